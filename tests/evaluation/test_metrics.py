"""Every metric against scikit-learn, torchmetrics or a loop that spells the definition out."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from sklearn.metrics import accuracy_score, jaccard_score, log_loss

from pdiff_hf.evaluation import geometry, metrics

seeds = st.integers(0, 2**32 - 1)
# The one fixture below holds for all examples of a test: it need not be set up anew for each.
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=[geometry.CHUNK_BYTES, 96], ids=["one chunk", "many chunks"])
def chunked(request, monkeypatch):
    monkeypatch.setattr(geometry, "CHUNK_BYTES", request.param)


def random_wrong(generator, num_models, num_images):
    """Rows from error-free to all wrong."""
    rates = torch.rand(num_models, 1, generator=generator).mul(1.4).sub(0.2)
    return torch.rand(num_models, num_images, generator=generator) < rates


def calibration_error(*arguments, **settings):
    """That of torchmetrics, which takes a second to import."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    return multiclass_calibration_error(*arguments, **settings)


def random_log_probs(generator, num_models, num_images, num_classes, dtype=torch.float32):
    logits = 3 * torch.randn(num_models, num_images, num_classes, generator=generator)
    return logits.log_softmax(2).to(dtype), torch.randint(num_classes, (num_images,), generator=generator)


def test_chunks_cover_everything_once(chunked):
    for length, size in ((0, 8), (1, 8), (25, 8), (24, 8), (7, 10**9)):
        parts = list(geometry.chunks(length, size))
        assert [index for part in parts for index in range(length)[part]] == list(range(length))
        assert all((part.stop - part.start) * size <= max(size, geometry.CHUNK_BYTES) for part in parts)


def test_accuracy():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (31,), generator=generator)
    predictions = torch.randint(4, (5, 31), generator=generator).to(torch.int16)
    predictions[0], predictions[1] = labels, labels + 1
    expected = [100 * accuracy_score(labels, row) for row in predictions]
    assert metrics.accuracy(predictions, labels).tolist() == pytest.approx(expected)
    assert expected[:2] == [100, 0]


# IoU


@few
@given(seed=seeds, num_a=st.integers(1, 4), num_b=st.integers(1, 4), num_images=st.integers(1, 40))
def test_iou_is_the_jaccard_score(chunked, seed, num_a, num_b, num_images):
    generator = torch.Generator().manual_seed(seed)
    a, b = random_wrong(generator, num_a, num_images), random_wrong(generator, num_b, num_images)
    expected = [[jaccard_score(x, y, zero_division=1) for y in b.numpy()] for x in a.numpy()]
    np.testing.assert_allclose(metrics.wrong_prediction_iou(a, b), expected, rtol=1e-12)
    np.testing.assert_allclose(metrics.max_iou(a, b), np.max(expected, axis=1), rtol=1e-12)


@few
@given(seed=seeds, num_models=st.integers(2, 6))
def test_iou_within_and_max_iou_without_self(chunked, seed, num_models):
    wrong = random_wrong(torch.Generator().manual_seed(seed), num_models, 30)
    table = {
        (i, j): jaccard_score(wrong[i], wrong[j], zero_division=1)
        for i, j in itertools.permutations(range(num_models), 2)
    }
    assert metrics.iou_within(wrong) == pytest.approx(np.mean(list(table.values())))
    expected = [max(table[i, j] for j in range(num_models) if j != i) for i in range(num_models)]
    largest, index = metrics.nearest_in_predictions(wrong, wrong, exclude_self=True)
    assert largest.tolist() == pytest.approx(expected)
    assert [table[i, j] for i, j in enumerate(index.tolist())] == pytest.approx(expected)
    assert metrics.max_iou(wrong, wrong).tolist() == [1] * num_models


def test_iou_where_nobody_errs_and_where_everybody_does():
    right, wrong = torch.zeros(2, 9, dtype=torch.bool), torch.ones(3, 9, dtype=torch.bool)
    assert metrics.wrong_prediction_iou(right, right).tolist() == [[1, 1], [1, 1]]
    assert metrics.wrong_prediction_iou(wrong, wrong).tolist() == [[1, 1, 1]] * 3
    assert metrics.wrong_prediction_iou(right, wrong).tolist() == [[0, 0, 0]] * 2
    assert metrics.max_iou(right, wrong).tolist() == [0, 0]


def test_one_model_has_nothing_to_be_compared_with():
    wrong = torch.tensor([[True, False]])
    assert math.isnan(metrics.iou_within(wrong))
    assert metrics.max_iou(wrong, wrong, exclude_self=True).isnan().all()
    assert metrics.max_iou(wrong, wrong).tolist() == [1]


def test_ties_go_to_the_first_original():
    wrong = torch.tensor([[True, True, False, False]])
    originals = torch.tensor([[False, False, True, True], [True, False, False, False], [False, True, False, False]])
    largest, index = metrics.nearest_in_predictions(wrong, originals)
    assert (largest.item(), index.item()) == (0.5, 1)


def test_iou_counts_exactly_beyond_float32():
    count = 2**24 + 1  # the first integer that float32 does not hold
    a = torch.ones(1, count, dtype=torch.bool)
    b = a.clone()
    b[0, 0] = False
    assert metrics.wrong_prediction_iou(a, a).item() == 1
    assert metrics.wrong_prediction_iou(a, b).item() == 2**24 / (2**24 + 1)


# Probabilities


@few
@given(seed=seeds, num_models=st.integers(1, 5), num_classes=st.integers(2, 6))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nll_and_calibration_error(chunked, dtype, seed, num_models, num_classes):
    log_probs, labels = random_log_probs(torch.Generator().manual_seed(seed), num_models, 50, num_classes, dtype)
    nll, ece = metrics.negative_log_likelihood(log_probs, labels), metrics.expected_calibration_error(log_probs, labels)
    probs = log_probs.float().exp()
    for model in range(num_models):
        rows = log_probs[model].double().exp()
        # scikit-learn normalises each row, float16 rows sum to 1 only within 0.1 %
        expected = log_loss(labels, rows / rows.sum(1, keepdim=True), labels=range(num_classes))
        expected -= rows.sum(1).log().mean().item()
        assert nll[model].item() == pytest.approx(expected, rel=1e-6)
        expected = calibration_error(probs[model], labels, num_classes, n_bins=15, norm="l1")
        assert ece[model].item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("num_bins", [1, 4, 15])
def test_calibration_error_of_certain_models(num_bins):
    labels = torch.tensor([0, 1, 1, 0])
    certain = torch.full((3, 4, 2), -math.inf)
    certain[0, range(4), labels] = 0  # all right
    certain[1, range(4), 1 - labels] = 0  # all wrong
    certain[2, :, 0] = 0  # right on half
    assert metrics.expected_calibration_error(certain, labels, num_bins).tolist() == [0, 1, 0.5]
    assert metrics.negative_log_likelihood(certain, labels).tolist() == [0, math.inf, math.inf]
    for model in certain:
        expected = calibration_error(model.exp(), labels, 2, n_bins=num_bins).item()
        assert metrics.expected_calibration_error(model[None], labels, num_bins).item() == pytest.approx(expected)


def test_calibration_error_where_certain_and_sure_meet_in_a_bin():
    """torchmetrics keeps confidences of exactly 1 apart from those just below: their gaps do not cancel."""
    probs = torch.tensor([[1.0, 0.0], [0.95, 0.05], [0.95, 0.05], [1.0, 0.0]])
    labels = torch.tensor([1, 0, 0, 0])
    expected = calibration_error(probs, labels, 2, n_bins=15).item()
    assert expected == pytest.approx((1 + 0.1) / 4)
    assert metrics.expected_calibration_error(probs.log()[None], labels).item() == pytest.approx(expected)


@few
@given(seed=seeds, num_models=st.integers(1, 6))
def test_ensemble_is_the_mean_probability(chunked, seed, num_models):
    log_probs, _ = random_log_probs(torch.Generator().manual_seed(seed), num_models, 9, 3, torch.float16)
    expected = np.log(np.mean(np.exp(log_probs.double().numpy()), axis=0))
    result = metrics.ensemble_log_probs(log_probs)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_ensemble_keeps_impossible_classes_impossible():
    log_probs = torch.tensor([[[0.0, -math.inf]], [[0.0, -math.inf]]])
    assert metrics.ensemble_log_probs(log_probs).tolist() == [[0, -math.inf]]


def test_ensemble_metrics_of_the_whole_group():
    log_probs, labels = random_log_probs(torch.Generator().manual_seed(0), 7, 200, 4)
    (whole,) = metrics.ensemble_metrics(log_probs, labels, sizes=(None,))
    probs = log_probs.double().log_softmax(2).exp().mean(0)
    assert (whole["size"], whole["num_ensembles"]) == (7, 1)
    assert whole["accuracy"] == pytest.approx(100 * accuracy_score(labels, probs.argmax(1)))
    assert whole["nll"] == pytest.approx(log_loss(labels, probs, labels=range(4)), rel=1e-6)
    assert whole["ece"] == pytest.approx(calibration_error(probs.float(), labels, 4).item(), abs=1e-6)


def test_ensemble_metrics_average_over_disjoint_ensembles():
    log_probs, labels = random_log_probs(torch.Generator().manual_seed(1), 8, 300, 4)
    single, pairs, whole = metrics.ensemble_metrics(log_probs, labels, sizes=(1, 2, 20, None, 8))
    assert [(r["size"], r["num_ensembles"]) for r in (single, pairs, whole)] == [(1, 8), (2, 4), (8, 1)]
    assert single["accuracy"] == pytest.approx(100 * (log_probs.argmax(2) == labels).double().mean().item())
    assert single["nll"] == pytest.approx(-log_probs[:, range(300), labels].mean().item(), rel=1e-5)
    expected = torch.stack([calibration_error(rows.exp(), labels, 4, n_bins=15) for rows in log_probs])
    assert single["ece"] == pytest.approx(expected.mean().item(), abs=1e-5)
    # One of the 105 ways to split 8 models into pairs: between the lowest and the highest mean over all of them.
    nll = {
        pair: metrics.negative_log_likelihood(metrics.ensemble_log_probs(log_probs[list(pair)])[None], labels).item()
        for pair in itertools.combinations(range(8), 2)
    }

    def splits(models):
        if not models:
            yield []
        for other in models[1:]:
            for rest in splits([model for model in models[1:] if model != other]):
                yield [nll[models[0], other], *rest]

    means = [np.mean(split) for split in splits(list(range(8)))]
    assert len(means) == 105
    assert min(abs(mean - pairs["nll"]) for mean in means) < 1e-6


def test_ensemble_metrics_use_at_most_ten_ensembles():
    log_probs, labels = random_log_probs(torch.Generator().manual_seed(2), 25, 20, 3, torch.float16)
    assert [r["num_ensembles"] for r in metrics.ensemble_metrics(log_probs, labels)] == [10, 5, 1, 1]


def test_probabilities_that_are_not_finite_are_errors_and_leave_other_networks_alone():
    log_probs, labels = random_log_probs(torch.Generator().manual_seed(3), 4, 50, 3)
    expected = metrics.expected_calibration_error(log_probs[1:], labels)
    log_probs[0, 7:] = math.nan
    for values in (
        metrics.negative_log_likelihood(log_probs, labels),
        metrics.expected_calibration_error(log_probs, labels),
    ):
        assert values.isnan().tolist() == [True, False, False, False]
    torch.testing.assert_close(metrics.expected_calibration_error(log_probs, labels)[1:], expected)
    (whole,) = metrics.ensemble_metrics(log_probs, labels, sizes=(None,))
    assert whole["accuracy"] <= 100 * 7 / 50 and math.isnan(whole["nll"]) and math.isnan(whole["ece"])
