"""Frontier and audit on groups whose place is known by construction."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from pdiff_hf.evaluation import baselines, metrics
from pdiff_hf.evaluation.audit import audit_group, audit_verdict
from pdiff_hf.evaluation.frontier import FrontierGroup, FrontierRow, _dominates, frontier, frontier_sentence

IMAGES = 2000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def group(name, wrong, value=None):
    return FrontierGroup(name, name, value, wrong)


@pytest.fixture
def originals():
    """(10, 2000): each errs on 200 images, 150 of them common to all."""
    wrong = torch.zeros(10, IMAGES, dtype=torch.bool)
    wrong[:, :150] = True
    for row, model in enumerate(wrong):
        model[200 + 50 * row : 250 + 50 * row] = True
    return wrong


def erring(num_models, num_common, num_own, seed=0):
    """Models that err on `num_common` of the originals' common errors and on `num_own` images that no original gets
    wrong; few of them are other models' too."""
    generator = seeded(seed)
    wrong = torch.zeros(num_models, IMAGES, dtype=torch.bool)
    for model in wrong:
        model[torch.randperm(150, generator=generator)[:num_common]] = True
        model[1000 + torch.randperm(1000, generator=generator)[:num_own]] = True
    return wrong


def test_rows_hold_the_metrics_of_each_group(originals):
    groups = [
        group("p-diff", erring(7, 100, 30)),
        group("a", erring(3, 20, 200), 0.5),
        group("b", originals[:1], "all"),
    ]
    rows = frontier(groups[0], groups[1:], originals, seeded(), num_resamples=50)
    assert [(row.name, row.value, row.num_models) for row in rows] == [
        ("p-diff", None, 7),
        ("a", 0.5, 3),
        ("b", "all", 1),
    ]
    for row, expected in zip(rows, groups, strict=True):
        assert row.accuracy == pytest.approx(100 - 100 * expected.wrong.double().mean().item())
        assert row.max_iou == pytest.approx(metrics.max_iou(expected.wrong, originals).mean().item())
        assert row.accuracy_interval[0] < row.accuracy < row.accuracy_interval[1]
    assert (rows[0].dominated, rows[0].dominates, rows[0].verdict) == (None, None, None)
    assert rows[2].max_iou_interval == (1, 1)  # it is an original


def test_verdicts(originals):
    generated = group("p-diff", erring(20, 100, 60))
    better = group("better", erring(20, 60, 40, seed=1))  # fewer errors, fewer of them shared
    worse = group("worse", erring(20, 140, 80, seed=2))  # more errors, more of them shared
    accurate_but_alike = group("alike", erring(20, 130, 0, seed=3))
    equal = group("equal", erring(20, 100, 60, seed=4))
    rows = frontier(generated, [better, worse, accurate_but_alike, equal], originals, seeded())
    assert {row.name: row.verdict for row in rows[1:]} == {
        "better": "dominated",
        "worse": "dominates",
        "alike": "neither",
        "equal": "neither",
    }
    assert (rows[1].dominated, rows[1].dominates) == (1, 0)
    assert (rows[2].dominated, rows[2].dominates) == (0, 1)
    assert rows[4].dominated + rows[4].dominates < 0.95


def test_equal_numbers_do_not_dominate(originals):
    """Nothing is strictly better where all is equal, and one strict inequality is enough where the other is a tie."""
    one = erring(1, 100, 60)
    fewer_errors = one.clone()
    fewer_errors[0, 1000:] &= torch.arange(1000) % 2 == 0
    (same,) = frontier(group("p-diff", one), [group("same", one.clone())], originals, seeded())[1:]
    assert (same.dominated, same.dominates, same.verdict) == (0, 0, "neither")
    nobody_errs = group("p-diff", torch.zeros(3, IMAGES, dtype=torch.bool))
    errs_alone = torch.zeros(2, IMAGES, dtype=torch.bool)
    errs_alone[:, 1900] = True  # less accurate, and as unlike the originals: IoU 0
    (alone,) = frontier(nobody_errs, [group("alone", errs_alone)], originals, seeded())[1:]
    # Image 1900 is absent from a resample with probability 1/e: there the two groups are equal.
    assert alone.dominated == 0
    assert alone.dominates == pytest.approx(1 - math.exp(-1), abs=0.12)


@pytest.mark.parametrize("accuracy", [89.0, 90.0, 91.0])
@pytest.mark.parametrize("iou", [0.25, 0.5, 0.75])
def test_domination_point_by_point(accuracy, iou):
    expected = (accuracy >= 90 and iou <= 0.5) and (accuracy, iou) != (90, 0.5)
    assert (
        _dominates(torch.tensor([accuracy]), torch.tensor([iou]), torch.tensor([90.0]), torch.tensor([0.5])) == expected
    )


def test_nobody_errs_at_all():
    right = torch.zeros(4, 50, dtype=torch.bool)
    rows = frontier(group("p-diff", right), [group("same", right)], right, seeded(), num_resamples=20)
    assert rows[0].accuracy_interval == (100, 100) and rows[0].max_iou_interval == (1, 1)
    assert rows[1].verdict == "neither"


def test_bootstrap_over_images_against_a_loop():
    wrong, original = torch.rand(2, 1, 60, generator=seeded(5)) < 0.5
    row = frontier(group("one", wrong), [], original, seeded(7), num_resamples=100)[0]
    generator = seeded(7)
    accuracy, iou = [], []
    for _ in range(100):
        images = torch.randint(60, (60,), generator=generator)
        accuracy.append(100 - 100 * wrong[0, images].double().mean().item())
        iou.append(jaccard_score(original[0, images], wrong[0, images]))
    np.testing.assert_allclose(row.accuracy_interval, np.quantile(accuracy, [0.025, 0.975]))
    np.testing.assert_allclose(row.max_iou_interval, np.quantile(iou, [0.025, 0.975]))
    assert row.max_iou_interval[0] < row.max_iou < row.max_iou_interval[1]


def test_bootstrap_over_models():
    """Models that get everything right or everything wrong: images add no spread, so the interval is the binomial's."""
    wrong = torch.zeros(100, 40, dtype=torch.bool)
    wrong[:30] = True
    row = frontier(group("p-diff", wrong), [], wrong[:2], seeded(), num_resamples=2000)[0]
    deviation = 100 * math.sqrt(0.3 * 0.7 / 100)
    low, high = row.accuracy_interval
    assert row.accuracy == pytest.approx(70)
    assert (low + high) / 2 == pytest.approx(70, abs=1)
    assert (high - low) / (2 * 1.96) == pytest.approx(deviation, rel=0.1)


def test_groups_see_the_same_images():
    """Two models that differ on one image are told apart although each accuracy is uncertain by several percent."""
    base = torch.arange(100)[None] < 40
    worse = torch.arange(100)[None] < 60
    originals = torch.arange(100)[None] >= 60  # IoU 0 with both
    generated, other = frontier(group("p-diff", base), [group("worse", worse)], originals, seeded())
    assert other.accuracy_interval[1] > generated.accuracy_interval[0] - 3
    assert (other.verdict, other.dominates) == ("dominates", 1)


def test_frontier_is_reproducible(originals):
    arguments = group("p-diff", erring(5, 90, 30)), [group("a", erring(4, 20, 90))], originals
    assert frontier(*arguments, seeded()) == frontier(*arguments, seeded())
    assert frontier(*arguments, seeded()) != frontier(*arguments, seeded(1))


def test_frontier_in_small_chunks(originals, monkeypatch):
    arguments = group("p-diff", erring(5, 90, 30)), [group("a", erring(4, 20, 90))], originals
    at_once = frontier(*arguments, seeded(), num_resamples=20)
    monkeypatch.setattr(metrics, "CHUNK_BYTES", 2 * 16 * IMAGES)  # two models at a time
    assert frontier(*arguments, seeded(), num_resamples=20) == at_once


def test_frontier_sentence():
    row = FrontierRow("p-diff", "p-diff", None, 200, 91.333, (91, 92), 0.8984, (0.89, 0.91))

    def baseline(family, value, verdict):
        return replace(row, family=family, value=value, dominated=0.5, dominates=0.5, verdict=verdict)

    rows = [
        row,
        baseline("noise", 0.001, "neither"),
        baseline("noise", 0.05, "dominates"),
        baseline("noise", 0.15, "dominates"),
        baseline("soup", "all", "neither"),
        baseline("VAE", None, "dominates"),
    ]
    assert frontier_sentence(rows) == (
        "p-diff (accuracy 91.33 %, max IoU 0.898) is dominated by 0; dominates 3: noise (0.05, 0.15), VAE; does "
        "neither with 2: noise (0.001), soup (all); of 5 baseline settings, at 95% of a joint bootstrap over models "
        "and test images."
    )
    rows.append(baseline("low-rank Gaussian", 0.75, "dominated"))
    assert "is dominated by 1: low-rank Gaussian (0.75); dominates 3" in frontier_sentence(rows)


# Audit


@pytest.fixture
def snapshots():
    return torch.randn(60, 200, generator=seeded(11))


def audit(name, parameters, snapshots, exclude_self=False):
    """Predictions stand for parameters by a threshold, so that near in weights is near in predictions."""
    distances = metrics.distances(parameters, snapshots, exclude_self)
    return audit_group(name, distances, parameters > 0.5, snapshots > 0.5, exclude_self)


def test_exact_copies_are_found(snapshots):
    row = audit("copies", snapshots[[3, 50, 7]], snapshots)
    assert row.nearest_in_weights == row.nearest_in_predictions == [3, 50, 7]
    assert row.distance == [0, 0, 0] and row.iou == [1, 1, 1]
    assert (row.num_near_identical, row.num_too_near) == (3, 3)
    assert row.fraction_below_minimum == row.fraction_below_percentile == row.fraction_below_median == 1
    assert row.fraction_nearer_than_mean == row.fraction_alike == 1
    assert row.copies
    assert audit_verdict(row).startswith("Copies: of 3 models of copies, 3 lie nearer")


def test_one_copy_among_many_is_enough(snapshots):
    fresh = torch.randn(200, 200, generator=seeded(12))
    assert not audit("fresh", fresh, snapshots).copies
    fresh[17] = snapshots[5] + 0.01
    row = audit("one", fresh, snapshots)
    assert row.num_near_identical == 1 and row.nearest_in_weights[17] == 5
    assert row.copies


def test_a_model_at_the_mean_is_no_copy_of_a_snapshot_that_lies_there():
    snapshots = torch.tensor([[-1.0], [1.0], [0.1]])  # mean 0.033, smallest distance 0.9
    row = audit("mean", torch.tensor([[0.05]]), snapshots)
    assert row.distance == pytest.approx([0.05])
    assert row.num_near_identical == row.num_too_near == 0
    assert audit("copy", torch.tensor([[0.09]]), snapshots).num_near_identical == 1


def test_too_many_that_are_too_near_are_copies():
    """No single model is within half of the smallest distance, but all are nearer than snapshots are to each other."""
    snapshots = torch.randn(60, 200, generator=seeded(13))
    own = metrics.distances(snapshots, snapshots, exclude_self=True)["nearest"]
    direction = torch.randn(60, 200, generator=seeded(14))
    near = snapshots + 0.6 * own.min() * direction / direction.norm(dim=1, keepdim=True)
    row = audit("near", near.float(), snapshots)
    assert (row.num_near_identical, row.num_too_near) == (0, 60)
    assert row.copies


def test_fresh_draws_from_the_same_distribution_are_no_copies():
    snapshots = torch.randn(300, 3, generator=seeded(15))  # so few dimensions that all are near to some snapshot
    row = audit("fresh", torch.randn(200, 3, generator=seeded(16)), snapshots)
    assert not row.copies
    assert 0 < row.num_too_near <= row.num_allowed
    assert row.num_allowed == 18  # the 99 % quantile of Binomial(200, 0.05)
    assert row.fraction_below_percentile == pytest.approx(0.05, abs=0.05)
    assert row.fraction_below_median == pytest.approx(0.5, abs=0.12)
    assert row.to_mean_relative == pytest.approx(1, abs=0.05)
    assert "contraction" not in audit_verdict(row)


def test_contraction_is_neither_copying_nor_novelty(snapshots):
    """Near the mean of unrelated snapshots a model is nearer to each than they are to each other, and copies none."""
    contracted = baselines.diagonal_gaussian(snapshots, 30, 0.3, seeded())
    row = audit("p-diff", contracted, snapshots)
    assert row.fraction_below_minimum == 1 and row.fraction_nearer_than_mean == 0
    assert not row.copies
    assert row.to_mean_relative == pytest.approx(0.3, abs=0.004)
    verdict = audit_verdict(row)
    assert verdict.startswith("No copying: of 30 models of p-diff, 0 lie nearer")
    assert "that to their mean 0.30 times, a contraction towards the mean, so the distance to the snapshots" in verdict


def test_far_from_a_trajectory_but_near_its_mean_is_not_called_novel():
    """Snapshots one step apart on a path: their mean lies many steps from each, which is distance and not novelty."""
    path = torch.randn(100, 50, generator=seeded(17)).cumsum(0)
    row = audit("p-diff", path.mean(0, keepdim=True), path)
    assert row.distance_relative > 1.5
    assert "contraction towards the mean" in audit_verdict(row)


def test_verdict_names_the_baselines_that_copy(snapshots):
    rows = [
        audit("noise 0.001", baselines.gaussian_noise(snapshots, [200], 10, 0.001, seeded()), snapshots),
        audit("soup all", baselines.soup(snapshots, 1, None, seeded()), snapshots),
        audit("low-rank Gaussian 1.0", baselines.low_rank_gaussian(snapshots, 10, 1.0, seeded()), snapshots),
    ]
    assert audit_verdict(rows[2], rows[:2]).endswith("by the same rule 1 of 2 baselines copy (noise 0.001).")
    assert audit_verdict(rows[2], rows[1:2]).endswith("by the same rule 0 of 1 baselines copy.")
    assert "baselines" not in audit_verdict(rows[2])


def test_audit_against_a_loop(snapshots):
    parameters = torch.randn(9, 200, generator=seeded(18))
    row = audit("fresh", parameters, snapshots)
    for model in range(9):
        distances = [torch.dist(parameters[model].double(), snapshot.double()).item() for snapshot in snapshots]
        assert row.distance[model] == pytest.approx(min(distances))
        assert row.nearest_in_weights[model] == int(np.argmin(distances))
        ious = [jaccard_score(snapshot > 0.5, parameters[model] > 0.5) for snapshot in snapshots]
        assert row.iou[model] == pytest.approx(max(ious))
        assert row.nearest_in_predictions[model] == int(np.argmax(ious))
    assert row.num_models == 9


def test_originals_are_compared_with_each_other(snapshots):
    row = audit("originals", snapshots, snapshots, exclude_self=True)
    assert row.nearest_in_weights != list(range(60)) and min(row.distance) > 0
    assert row.distance_relative == pytest.approx(1)
    assert row.to_mean_relative == pytest.approx(1, abs=0.02)
    assert row.fraction_below_percentile == pytest.approx(0.05)
    assert row.fraction_below_minimum == 0
    assert row.fraction_alike == pytest.approx(0.05, abs=0.02)
    assert not row.copies


def test_audit_rows_are_plain_data(snapshots):
    fields = asdict(audit("one", snapshots[:1] + 1, snapshots))
    assert all(isinstance(value, str | int | float | list) for value in fields.values())
    assert len(fields["distance"]) == 1


def test_audit_says_what_it_got(snapshots):
    distances = metrics.distances(snapshots[:1], snapshots[:1])
    with pytest.raises(ValueError, match="at least 2 snapshots.* 1 snapshots"):
        audit_group("p-diff", distances, snapshots[:1] > 0, snapshots[:1] > 0)
    distances = metrics.distances(snapshots[:3], snapshots)
    with pytest.raises(ValueError, match="3 models to 60 snapshots, predictions of 2 models"):
        audit_group("p-diff", distances, snapshots[:2] > 0, snapshots > 0)
