"""The frontier and the difference from the snapshots, for groups whose place is known by construction."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from pdiff_hf.evaluation import geometry, metrics
from pdiff_hf.evaluation.frontier import Bootstrap, FrontierGroup, FrontierRow, frontier_sentence

IMAGES = 2000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def group(name, wrong, value=None):
    return FrontierGroup(name, 100 - 100 * wrong.double().mean(1), wrong, name, value)


def frontier(generated, groups, wrong_snapshots, generator, num_resamples=200):
    return Bootstrap(wrong_snapshots, 1, generator, num_resamples).frontier(generated, groups)


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


def test_rows_hold_the_metrics_of_each_group(snapshots):
    groups = [
        group("p-diff", erring(7, 100, 30)),
        group("a", erring(3, 20, 200), 0.5),
        group("b", snapshots[:1], "all"),
    ]
    rows = frontier(groups[0], groups[1:], snapshots, seeded(), num_resamples=50)
    assert [(row.name, row.value, row.num_models) for row in rows] == [
        ("p-diff", None, 7),
        ("a", 0.5, 3),
        ("b", "all", 1),
    ]
    for row, expected in zip(rows, groups, strict=True):
        assert row.score == pytest.approx(100 - 100 * expected.wrong.double().mean().item())
        assert row.max_iou == pytest.approx(metrics.max_iou(expected.wrong, snapshots).mean().item())
        assert row.score_interval[0] < row.score < row.score_interval[1]
    assert (rows[0].worse, rows[0].better, rows[0].verdict) == (None, None, None)
    assert rows[2].max_iou_interval == (1, 1)  # it is an original


def test_verdicts(snapshots):
    generated = group("p-diff", erring(20, 100, 60))
    better = group("better", erring(20, 60, 40, seed=1))  # fewer errors, fewer of them shared
    worse = group("worse", erring(20, 140, 80, seed=2))  # more errors, more of them shared
    accurate_but_alike = group("alike", erring(20, 130, 0, seed=3))
    equal = group("equal", erring(20, 100, 60, seed=4))
    rows = frontier(generated, [better, worse, accurate_but_alike, equal], snapshots, seeded())
    assert {row.name: row.verdict for row in rows[1:]} == {
        "better": "worse",
        "worse": "better",
        "alike": "undecided",
        "equal": "undecided",
    }
    assert (rows[1].worse, rows[1].better) == (1, 0)
    assert (rows[2].worse, rows[2].better) == (0, 1)
    assert rows[4].worse + rows[4].better < 0.95


def test_equal_numbers_do_not_dominate(snapshots):
    """Nothing is strictly better where all is equal, and one strict inequality is enough where the other is a tie."""
    one = erring(1, 100, 60)
    fewer_errors = one.clone()
    fewer_errors[0, 1000:] &= torch.arange(1000) % 2 == 0
    (same,) = frontier(group("p-diff", one), [group("same", one.clone())], snapshots, seeded())[1:]
    assert (same.worse, same.better, same.verdict) == (0, 0, "undecided")
    nobody_errs = group("p-diff", torch.zeros(3, IMAGES, dtype=torch.bool))
    errs_alone = torch.zeros(2, IMAGES, dtype=torch.bool)
    errs_alone[:, 1900] = True  # less accurate, and as unlike the snapshots: IoU 0
    (alone,) = frontier(nobody_errs, [group("alone", errs_alone)], snapshots, seeded())[1:]
    # Image 1900 is absent from a resample with probability 1/e: there the two groups are equal.
    assert alone.worse == 0
    assert alone.better == pytest.approx(1 - math.exp(-1), abs=0.12)


def test_nobody_errs_at_all():
    right = torch.zeros(4, 50, dtype=torch.bool)
    rows = frontier(group("p-diff", right), [group("same", right)], right, seeded(), num_resamples=20)
    assert rows[0].score_interval == (100, 100) and rows[0].max_iou_interval == (1, 1)
    assert rows[1].verdict == "undecided"


def test_bootstrap_over_images_against_a_loop():
    wrong, original = torch.rand(2, 1, 60, generator=seeded(5)) < 0.5
    row = frontier(group("one", wrong), [], original, seeded(7), num_resamples=100)[0]
    generator = seeded(7)
    accuracy, iou = [], []
    for _ in range(100):
        images = torch.randint(60, (60,), generator=generator)
        accuracy.append(100 - 100 * wrong[0, images].double().mean().item())
        iou.append(jaccard_score(original[0, images], wrong[0, images]))
    np.testing.assert_allclose(row.score_interval, np.quantile(accuracy, [0.025, 0.975]))
    np.testing.assert_allclose(row.max_iou_interval, np.quantile(iou, [0.025, 0.975]))
    assert row.max_iou_interval[0] < row.max_iou < row.max_iou_interval[1]


def test_bootstrap_over_models():
    """Models that get everything right or everything wrong: images add no spread, so the interval is the binomial's."""
    wrong = torch.zeros(100, 40, dtype=torch.bool)
    wrong[:30] = True
    row = frontier(group("p-diff", wrong), [], wrong[:2], seeded(), num_resamples=2000)[0]
    deviation = 100 * math.sqrt(0.3 * 0.7 / 100)
    low, high = row.score_interval
    assert row.score == pytest.approx(70)
    assert (low + high) / 2 == pytest.approx(70, abs=1)
    assert (high - low) / (2 * 1.96) == pytest.approx(deviation, rel=0.1)


def test_groups_see_the_same_images():
    """Two models that differ on one image are told apart although each accuracy is uncertain by several percent."""
    base = torch.arange(100)[None] < 40
    worse = torch.arange(100)[None] < 60
    snapshots = torch.arange(100)[None] >= 60  # IoU 0 with both
    generated, other = frontier(group("p-diff", base), [group("worse", worse)], snapshots, seeded())
    assert other.score_interval[1] > generated.score_interval[0] - 3
    assert (other.verdict, other.better) == ("better", 1)


def test_frontier_is_reproducible(snapshots):
    arguments = group("p-diff", erring(5, 90, 30)), [group("a", erring(4, 20, 90))], snapshots
    assert frontier(*arguments, seeded()) == frontier(*arguments, seeded())
    assert frontier(*arguments, seeded()) != frontier(*arguments, seeded(1))


def test_frontier_in_small_chunks(snapshots, monkeypatch):
    arguments = group("p-diff", erring(5, 90, 30)), [group("a", erring(4, 20, 90))], snapshots
    at_once = frontier(*arguments, seeded(), num_resamples=20)
    monkeypatch.setattr(geometry, "CHUNK_BYTES", 2 * 16 * IMAGES)  # two models at a time
    assert frontier(*arguments, seeded(), num_resamples=20) == at_once


def test_scores_alone_decide_where_there_is_no_similarity():
    generated = FrontierGroup("generated", torch.tensor([3.0, 3.1, math.nan]))
    others = [FrontierGroup(name, torch.full((3,), value), None, name) for name, value in (("low", 1.0), ("high", 5.0))]
    equal = FrontierGroup("equal", torch.tensor([3.0, 3.1]), None, "equal")
    for sign, verdicts in ((1, ["better", "worse", "undecided"]), (-1, ["worse", "better", "undecided"])):
        bootstrap = Bootstrap(None, sign, seeded())
        rows = bootstrap.frontier(generated, [*others, equal])
        assert [row.verdict for row in rows[1:]] == verdicts
        assert rows[0].score == pytest.approx(3.05) and rows[0].max_iou is None
        low, high = (bootstrap.difference(generated, other) for other in others)
        assert [low.verdict, high.verdict] == verdicts[:2]
        assert low.difference == pytest.approx(2.05) and low.interval[0] > 0 > high.interval[1]
        assert bootstrap.difference(generated, equal).verdict == "undecided"


def test_the_difference_from_the_snapshots_is_taken_over_the_same_images(snapshots):
    """The accuracies are uncertain by several percent, their difference is not."""
    fewer = snapshots.clone()
    fewer[:, :20] = False  # 20 errors fewer, on the same images, for every network
    difference = Bootstrap(snapshots, 1, seeded()).difference(group("generated", fewer), group("snapshots", snapshots))
    assert difference.difference == pytest.approx(1) and difference.verdict == "better"
    assert 0.4 < difference.interval[0] < 1 < difference.interval[1] < 1.6
    back = Bootstrap(snapshots, 1, seeded()).difference(group("generated", snapshots), group("snapshots", fewer))
    assert back.verdict == "worse"


def test_frontier_sentence():
    row = FrontierRow("p-diff", "p-diff", None, False, 200, 91.333, (91, 92), 0.8984, (0.89, 0.91))

    def baseline(family, value, verdict):
        return replace(row, family=family, value=value, better=0.5, worse=0.5, verdict=verdict)

    rows = [
        row,
        baseline("noise", 0.001, "undecided"),
        baseline("noise", 0.05, "better"),
        baseline("noise", 0.15, "better"),
        baseline("soup", "all", "undecided"),
        baseline("VAE", None, "better"),
    ]
    assert frontier_sentence(rows) == (
        "p-diff (score 91.33, max IoU 0.898) is better than 3: noise (0.05, 0.15), VAE; worse than 0; undecided "
        "against 2: noise (0.001), soup (all); of 5 baseline settings, at 95% of a bootstrap over networks and test "
        "examples."
    )
