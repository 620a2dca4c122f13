"""The paired bootstrap, for groups whose place is known by construction."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import jaccard_score
from support.evaluation import seeded

from pdiff_hf.evaluation import metrics
from pdiff_hf.evaluation.compare import BETTER, CLOSE, WORSE, Bootstrap, Comparison, paired_difference

IMAGES = 2000


def sample(wrong):
    return 100 - 100 * wrong.double().mean(1), wrong


def compare(generated, others, wrong_snapshots, seed=0, with_similarity=True) -> list[Comparison]:
    bootstrap = Bootstrap(generated.shape[1], 1, seeded(seed), wrong_snapshots)
    own = bootstrap.place(*sample(generated))
    return [bootstrap.compare(own, bootstrap.place(*sample(other)), with_similarity) for other in others]


@pytest.fixture
def snapshots():
    """(10, 2000): each errs on 200 images, 150 of them common to all."""
    wrong = torch.zeros(10, IMAGES, dtype=torch.bool)
    wrong[:, :150] = True
    for row, model in enumerate(wrong):
        model[200 + 50 * row : 250 + 50 * row] = True
    return wrong


def erring(num_models, num_common, num_own, seed=0):
    """Models that err on `num_common` of the snapshots' common errors and on `num_own` images that no original gets
    wrong; few of them are other models' too."""
    generator = seeded(seed)
    wrong = torch.zeros(num_models, IMAGES, dtype=torch.bool)
    for model in wrong:
        model[torch.randperm(150, generator=generator)[:num_common]] = True
        model[1000 + torch.randperm(1000, generator=generator)[:num_own]] = True
    return wrong


def test_verdicts_count_score_and_similarity(snapshots):
    generated = erring(20, 100, 60)
    better = erring(20, 60, 40, seed=1)  # fewer errors, fewer of them shared
    worse = erring(20, 140, 80, seed=2)  # more errors, more of them shared
    accurate_but_alike = erring(20, 130, 0, seed=3)
    equal = erring(20, 100, 60, seed=4)
    found = compare(generated, [better, worse, accurate_but_alike, equal], snapshots)
    assert [one.verdict for one in found] == [WORSE, BETTER, CLOSE, CLOSE]
    assert (found[0].worse, found[0].better) == (1, 0) and (found[1].worse, found[1].better) == (0, 1)
    alone = compare(generated, [accurate_but_alike], snapshots, with_similarity=False)[0]
    assert alone.verdict == WORSE and alone.better is None and alone.interval[1] < 0
    place = Bootstrap(IMAGES, 1, seeded(), snapshots).place(*sample(generated))
    assert place["max_iou"] == pytest.approx(metrics.max_iou(generated, snapshots).mean().item())
    assert place["score_interval"][0] < place["score"] < place["score_interval"][1]


def test_equal_numbers_do_not_dominate(snapshots):
    """Nothing is strictly better where all is equal, and one strict inequality is enough where the other is a tie."""
    one = erring(1, 100, 60)
    (same,) = compare(one, [one.clone()], snapshots)
    assert (same.worse, same.better, same.verdict) == (0, 0, CLOSE)
    errs_alone = torch.zeros(2, IMAGES, dtype=torch.bool)
    errs_alone[:, 1900] = True  # less accurate, and as unlike the snapshots: IoU 0
    (alone,) = compare(torch.zeros(3, IMAGES, dtype=torch.bool), [errs_alone], snapshots)
    # Image 1900 is absent from a resample with probability 1/e: there the two groups are equal.
    assert alone.worse == 0 and alone.better == pytest.approx(1 - math.exp(-1), abs=0.06)
    right = torch.zeros(4, 50, dtype=torch.bool)
    assert compare(right, [right], right)[0].verdict == CLOSE


def test_resamples_against_a_loop():
    wrong, original = torch.rand(2, 1, 60, generator=seeded(5)) < 0.5
    bootstrap = Bootstrap(60, 1, seeded(7), original)
    draws = torch.randint(60, (bootstrap.num_resamples, 60), generator=seeded(7))[:500]
    place = bootstrap.place(*sample(wrong))
    accuracy = [100 - 100 * wrong[0, images].double().mean().item() for images in draws]
    iou = [jaccard_score(original[0, images], wrong[0, images]) for images in draws]
    np.testing.assert_allclose(place["scores"][:500], accuracy, rtol=1e-5)
    np.testing.assert_allclose(place["similarities"][:500], iou)


def test_networks_are_resampled_too():
    """Models that get everything right or everything wrong: images add no spread, so the interval is the binomial's."""
    wrong = torch.zeros(100, 40, dtype=torch.bool)
    wrong[:30] = True
    low, high = Bootstrap(40, 1, seeded()).place(*sample(wrong))["score_interval"]
    assert (low + high) / 2 == pytest.approx(70, abs=1)
    assert (high - low) / (2 * 1.96) == pytest.approx(100 * math.sqrt(0.3 * 0.7 / 100), rel=0.1)


def test_groups_see_the_same_images(snapshots):
    """Accuracies are uncertain by several percent, their difference is not."""
    base, worse = torch.arange(100)[None] < 40, torch.arange(100)[None] < 60
    assert compare(base, [worse], torch.arange(100)[None] >= 60)[0].better == 1
    fewer = snapshots.clone()
    fewer[:, :20] = False  # 20 errors fewer, on the same images, for every network
    (difference,) = compare(fewer, [snapshots], snapshots, with_similarity=False)
    assert difference.difference == pytest.approx(1) and difference.verdict == BETTER
    assert 0.4 < difference.interval[0] < 1 < difference.interval[1] < 1.6
    assert compare(snapshots, [fewer], snapshots, with_similarity=False)[0].verdict == WORSE


@pytest.mark.parametrize(("sign", "verdicts"), [(1, [BETTER, WORSE, CLOSE]), (-1, [WORSE, BETTER, CLOSE])])
def test_scores_alone_decide_where_there_are_no_predictions(sign, verdicts):
    bootstrap = Bootstrap(0, sign, seeded())
    own = bootstrap.place(torch.tensor([3.0, 3.1, math.nan]).double())
    others = [torch.full((3,), 1.0), torch.full((3,), 5.0), torch.tensor([3.0, 3.1])]
    found = [bootstrap.compare(own, bootstrap.place(values.double()), True) for values in others]
    assert [one.verdict for one in found] == verdicts and found[0].difference == pytest.approx(2.05)
    assert own["max_iou"] is None


def test_members_are_paired_as_scipy_does_it():
    noise = np.random.default_rng(0)
    first = noise.normal(80, 10, 48)
    second = first + noise.normal(-1, 2, 48)  # the spread of members is in both
    found = paired_difference(first, second)
    expected = scipy.stats.bootstrap(
        (first, second),
        lambda a, b, axis: (a - b).mean(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    np.testing.assert_allclose(found.interval, expected, atol=0.06)
    assert found.difference == pytest.approx((first - second).mean(), rel=1e-5) and found.verdict == BETTER
    assert paired_difference(second, first).verdict == WORSE
    assert paired_difference([0.0, 5.0] * 5, [5.0, 0.0] * 5).verdict == CLOSE
