"""Memorisation, on groups that copy or do not by construction."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from support.evaluation import seeded

from pdiff_hf.evaluation import baselines, geometry, metrics
from pdiff_hf.evaluation.memorisation import find_copies


@pytest.fixture
def snapshots():
    return torch.randn(60, 200, generator=seeded(11))


def audit(parameters, snapshots):
    """Predictions stand for parameters by a threshold, so that near in weights is near in predictions."""
    yardstick, own = geometry.Yardstick(snapshots), parameters is snapshots
    similarity = metrics.nearest_in_predictions(parameters > 0.5, snapshots > 0.5, own)
    snapshots_iou = metrics.max_iou(snapshots > 0.5, snapshots > 0.5, exclude_self=True)
    place = yardstick.place(None if own else parameters)
    found = SimpleNamespace(**find_copies(place, yardstick.nearest, similarity, snapshots_iou))
    found.distance_relative = place["nearest_relative"].quantile(0.5).item()
    found.to_mean_relative = place["to_mean_relative"].square().mean().sqrt().item()
    return found


def test_one_copy_among_many_is_enough(snapshots):
    fresh = torch.randn(200, 200, generator=seeded(12))
    assert not audit(fresh, snapshots).copies
    fresh[17] = snapshots[5] + 0.01
    row = audit(fresh, snapshots)
    assert row.num_near_identical == 1 and row.nearest_in_weights[17] == 5
    assert row.copies


def test_a_model_at_the_mean_is_no_copy_of_a_snapshot_that_lies_there():
    snapshots = torch.tensor([[-1.0], [1.0], [0.1]])  # mean 0.033, smallest distance 0.9
    row = audit(torch.tensor([[0.05]]), snapshots)
    assert row.distance == pytest.approx([0.05])
    assert row.num_near_identical == row.num_too_near == 0
    assert audit(torch.tensor([[0.09]]), snapshots).num_near_identical == 1


def test_too_many_that_are_too_near_are_copies():
    """No single model is within half of the smallest distance, but all are nearer than snapshots are to each other."""
    snapshots = torch.randn(60, 200, generator=seeded(13))
    own = geometry.Yardstick(snapshots).nearest
    direction = torch.randn(60, 200, generator=seeded(14))
    near = snapshots + 0.6 * own.min() * direction / direction.norm(dim=1, keepdim=True)
    row = audit(near.float(), snapshots)
    assert (row.num_near_identical, row.num_too_near) == (0, 60)
    assert row.copies


def test_fresh_draws_from_the_same_distribution_are_no_copies():
    snapshots = torch.randn(300, 3, generator=seeded(15))  # so few dimensions that all are near to some snapshot
    row = audit(torch.randn(200, 3, generator=seeded(16)), snapshots)
    assert not row.copies
    assert 0 < row.num_too_near <= row.num_allowed
    assert row.num_allowed == 18  # the 99 % quantile of Binomial(200, 0.05)
    assert row.to_mean_relative == pytest.approx(1, abs=0.05)


def test_contraction_is_neither_copying_nor_novelty(snapshots):
    """Near the mean of unrelated snapshots a model is nearer to each than they are to each other, and copies none."""
    contracted = baselines.diagonal_gaussian(baselines.BaselineContext(snapshots), 30, 0.3, seeded())
    row = audit(contracted, snapshots)
    assert row.fraction_nearer_than_mean == 0
    assert not row.copies
    assert row.to_mean_relative == pytest.approx(0.3, abs=0.004)


def test_audit_against_a_loop(snapshots):
    parameters = torch.randn(9, 200, generator=seeded(18))
    row = audit(parameters, snapshots)
    for model in range(9):
        distances = [torch.dist(parameters[model].double(), snapshot.double()).item() for snapshot in snapshots]
        assert row.distance[model] == pytest.approx(min(distances))
        assert row.nearest_in_weights[model] == int(np.argmin(distances))
        ious = [jaccard_score(snapshot > 0.5, parameters[model] > 0.5) for snapshot in snapshots]
        assert row.iou[model] == pytest.approx(max(ious))
        assert row.nearest_in_predictions[model] == int(np.argmax(ious))
    assert len(row.distance) == 9


def test_snapshots_are_compared_with_each_other(snapshots):
    row = audit(snapshots, snapshots)
    assert row.nearest_in_weights != list(range(60)) and min(row.distance) > 0
    assert row.distance_relative == pytest.approx(1)
    assert row.to_mean_relative == pytest.approx(1, abs=0.02)
    assert row.fraction_alike == pytest.approx(0.05, abs=0.02)
    assert not row.copies
