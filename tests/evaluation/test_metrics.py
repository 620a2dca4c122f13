"""Every metric against scikit-learn, torchmetrics or a loop that spells the definition out."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.metrics import accuracy_score, jaccard_score, log_loss
from sklearn.metrics import r2_score as sklearn_r2_score
from sklearn.neighbors import NearestNeighbors
from torchmetrics.functional.classification import multiclass_calibration_error

from pdiff_hf.evaluation import metrics

seeds = st.integers(0, 2**32 - 1)
# The one fixture below holds for all examples of a test: it need not be set up anew for each.
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=[metrics.CHUNK_BYTES, 96], ids=["one chunk", "many chunks"])
def chunked(request, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK_BYTES", request.param)


def random_wrong(generator, num_models, num_images):
    """Rows from error-free to all wrong."""
    rates = torch.rand(num_models, 1, generator=generator).mul(1.4).sub(0.2)
    return torch.rand(num_models, num_images, generator=generator) < rates


def random_log_probs(generator, num_models, num_images, num_classes, dtype=torch.float32):
    logits = 3 * torch.randn(num_models, num_images, num_classes, generator=generator)
    return logits.log_softmax(2).to(dtype), torch.randint(num_classes, (num_images,), generator=generator)


def test_chunks_cover_everything_once(chunked):
    for length, size in ((0, 8), (1, 8), (25, 8), (24, 8), (7, 10**9)):
        parts = list(metrics.chunks(length, size))
        assert [index for part in parts for index in range(length)[part]] == list(range(length))
        assert all((part.stop - part.start) * size <= max(size, metrics.CHUNK_BYTES) for part in parts)


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


@pytest.mark.parametrize(
    ("a", "b", "received"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), "float32"),
        (torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool), r"\(2, 4\)"),
        (torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool), r"\(3,\)"),
    ],
)
def test_iou_says_what_it_got(a, b, received):
    with pytest.raises(ValueError, match=received):
        metrics.wrong_prediction_iou(a, b)


def test_excluding_itself_needs_the_same_group():
    wrong = torch.zeros(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="compares a group with itself"):
        metrics.max_iou(wrong[:2], wrong, exclude_self=True)
    with pytest.raises(ValueError, match="compares a group with itself"):
        metrics.distances(torch.zeros(2, 4), torch.zeros(3, 4), exclude_self=True)


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
        expected = multiclass_calibration_error(probs[model], labels, num_classes, n_bins=15, norm="l1")
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
        expected = multiclass_calibration_error(model.exp(), labels, 2, n_bins=num_bins).item()
        assert metrics.expected_calibration_error(model[None], labels, num_bins).item() == pytest.approx(expected)


def test_calibration_error_where_certain_and_sure_meet_in_a_bin():
    """torchmetrics keeps confidences of exactly 1 apart from those just below: their gaps do not cancel."""
    probs = torch.tensor([[1.0, 0.0], [0.95, 0.05], [0.95, 0.05], [1.0, 0.0]])
    labels = torch.tensor([1, 0, 0, 0])
    expected = multiclass_calibration_error(probs, labels, 2, n_bins=15).item()
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
    assert whole["ece"] == pytest.approx(multiclass_calibration_error(probs.float(), labels, 4).item(), abs=1e-6)


def test_ensemble_metrics_average_over_disjoint_ensembles():
    log_probs, labels = random_log_probs(torch.Generator().manual_seed(1), 8, 300, 4)
    single, pairs, whole = metrics.ensemble_metrics(log_probs, labels, sizes=(1, 2, 20, None, 8))
    assert [(r["size"], r["num_ensembles"]) for r in (single, pairs, whole)] == [(1, 8), (2, 4), (8, 1)]
    assert single["accuracy"] == pytest.approx(metrics.accuracy(log_probs.argmax(2), labels).mean().item())
    assert single["nll"] == pytest.approx(metrics.negative_log_likelihood(log_probs, labels).mean().item(), rel=1e-5)
    assert single["ece"] == pytest.approx(metrics.expected_calibration_error(log_probs, labels).mean().item(), abs=1e-5)
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


def test_probabilities_and_labels_must_fit():
    with pytest.raises(ValueError, match=r"\(2, 5, 3\).*\(4,\)"):
        metrics.negative_log_likelihood(torch.zeros(2, 5, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(4,\)"):
        metrics.accuracy(torch.zeros(2, 5), torch.zeros(4))


# Parameters


@few
@given(seed=seeds, count=st.integers(1, 6), size=st.integers(1, 30), offset=st.sampled_from([0.0, 1000.0]))
def test_distances(chunked, seed, count, size, offset):
    generator = torch.Generator().manual_seed(seed)
    snapshots = offset + torch.randn(6, size, generator=generator)
    parameters = offset + torch.randn(count, size, generator=generator)
    result = metrics.distances(parameters, snapshots)

    rows, columns = parameters.double().numpy(), snapshots.double().numpy()
    expected, index = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(columns).kneighbors(rows)
    direct = np.linalg.norm(rows - columns[index[:, 0]], axis=1)
    own = [min(np.linalg.norm(columns[i] - columns[j]) for j in range(6) if j != i) for i in range(6)]
    to_mean = np.linalg.norm(rows - columns.mean(0), axis=1)
    spread = math.sqrt(np.mean(np.sum((columns - columns.mean(0)) ** 2, axis=1)))
    np.testing.assert_allclose(result["nearest"], direct, rtol=1e-9)
    np.testing.assert_array_equal(result["nearest_index"], index[:, 0])
    np.testing.assert_allclose(result["snapshots_nearest"], own, rtol=1e-9)
    np.testing.assert_allclose(result["nearest_relative"], direct / np.median(own), rtol=1e-9)
    np.testing.assert_allclose(result["to_mean"], to_mean, rtol=1e-9)
    np.testing.assert_allclose(result["to_mean_relative"], to_mean / spread, rtol=1e-9)

    own_result = metrics.distances(snapshots, snapshots, exclude_self=True)
    np.testing.assert_allclose(own_result["nearest"], own, rtol=1e-9)
    assert (own_result["nearest_index"] != torch.arange(6)).all()


def test_distances_of_large_and_nearly_equal_parameters():
    """A few units in the last place of one number apart: |a|² + |b|² - 2ab would be noise, even in float64."""
    step = torch.nextafter(torch.tensor(1000.0), torch.tensor(math.inf)) - 1000
    # Enough rows for cdist to multiply out, and numbers whose squares do not add up without rounding.
    snapshots = (1000 + 100 * torch.rand(1000, generator=torch.Generator().manual_seed(0))).repeat(40, 1)
    snapshots[:, 0] = 1000 + 4 * step * torch.arange(40)
    parameters = snapshots.clone()
    parameters[:, 0] += step
    result = metrics.distances(parameters, snapshots)
    assert result["nearest"].tolist() == [step.item()] * 40
    assert result["nearest_index"].tolist() == list(range(40))
    assert result["snapshots_nearest"].tolist() == [4 * step.item()] * 40


def test_distance_of_an_exact_copy_is_zero():
    snapshots = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    result = metrics.distances(snapshots.flip(0), snapshots)
    assert result["nearest"].tolist() == [0] * 40
    assert result["nearest_index"].tolist() == list(range(39, -1, -1))


def test_one_snapshot_has_no_spread():
    result = metrics.distances(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
    assert result["nearest"].item() == result["to_mean"].item() == 5
    assert result["nearest_relative"].isnan().all()
    assert result["snapshots_nearest"].isnan().all()
    assert result["to_mean_relative"].isinf().all()


@few
@given(seed=seeds, num_real=st.integers(2, 9), num_fake=st.integers(1, 9), k=st.integers(1, 12), shift=st.floats(0, 3))
def test_precision_recall_density_coverage(chunked, seed, num_real, num_fake, k, shift):
    generator = torch.Generator().manual_seed(seed)
    real, fake = torch.randn(num_real, 3, generator=generator), torch.randn(num_fake, 3, generator=generator) + shift
    result = metrics.precision_recall_density_coverage(real, fake, k)

    def radii(points):
        neighbours = min(k, len(points) - 1)
        return NearestNeighbors(n_neighbors=neighbours).fit(points).kneighbors()[0][:, -1]

    real, fake = real.double().numpy(), fake.double().numpy()
    inside_real = [[np.linalg.norm(y - x) <= radius for x, radius in zip(real, radii(real), strict=True)] for y in fake]
    assert result["precision"] == pytest.approx(np.mean([any(row) for row in inside_real]))
    assert result["density"] == pytest.approx(np.sum(inside_real) / (min(k, num_real - 1) * num_fake))
    assert result["coverage"] == pytest.approx(np.mean([any(column) for column in zip(*inside_real, strict=True)]))
    if num_fake == 1:
        assert math.isnan(result["recall"])
    else:
        inside_fake = [
            any(np.linalg.norm(y - x) <= radius for x, radius in zip(fake, radii(fake), strict=True)) for y in real
        ]
        assert result["recall"] == pytest.approx(np.mean(inside_fake))


def test_coverage_of_copies_and_of_strangers():
    originals = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    copies = metrics.precision_recall_density_coverage(originals, originals)
    assert (copies["precision"], copies["recall"], copies["coverage"]) == (1, 1, 1)
    # Every point lies in its own ball and in those that it is a neighbour of: k + 1 a ball.
    assert copies["density"] == pytest.approx(6 / 5)
    strangers = metrics.precision_recall_density_coverage(originals, originals + 100)
    assert strangers == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


@pytest.mark.parametrize(("count", "k", "received"), [(1, 5, "k=5 and 1 originals"), (4, 0, "k=0")])
def test_precision_says_what_it_got(count, k, received):
    with pytest.raises(ValueError, match=received):
        metrics.precision_recall_density_coverage(torch.zeros(count, 2), torch.zeros(3, 2), k)


@few
@given(seed=seeds, count=st.integers(2, 6), size=st.integers(1, 20))
def test_r2_score(chunked, seed, count, size):
    generator = torch.Generator().manual_seed(seed)
    parameters = 5 + torch.randn(count, size, generator=generator)
    reconstructions = parameters + 0.3 * torch.randn(count, size, generator=generator)
    mean = parameters.double().mean(0)
    # The mean of the rows themselves is what scikit-learn measures around.
    expected = sklearn_r2_score(parameters.double(), reconstructions.double(), multioutput="variance_weighted")
    assert metrics.r2_score(parameters, reconstructions, mean) == pytest.approx(expected, rel=1e-9)
    around_zero = 1 - (reconstructions.double() - parameters).square().sum() / parameters.double().square().sum()
    assert metrics.r2_score(parameters, reconstructions, torch.zeros(size)) == pytest.approx(around_zero.item())


@pytest.mark.parametrize("num_components", [1, 3, 30])
def test_variance_along_principal_components(num_components, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK_BYTES", 16 * 25 * 7)
    generator = torch.Generator().manual_seed(0)
    train, other = (torch.randn(n, 60, generator=generator) * torch.logspace(0, -2, 60) + 4 for n in (20, 5))
    pca = PCA(min(num_components, 19)).fit(train.double().numpy())
    for parameters in (train, other):
        reconstructions = torch.from_numpy(pca.inverse_transform(pca.transform(parameters.double().numpy())))
        expected = metrics.r2_score(parameters.double(), reconstructions, train.double().mean(0))
        assert metrics.pca_r2_score(train, parameters, num_components) == pytest.approx(expected, abs=1e-9)
    assert math.isnan(metrics.pca_r2_score(train[:1].expand(3, -1), train[:1], 1))


def test_r2_score_edges():
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    mean = rows.double().mean(0)
    assert metrics.r2_score(rows, rows, mean) == 1
    assert metrics.r2_score(rows, mean.expand(4, 3), mean) == 0
    assert math.isnan(metrics.r2_score(rows[:1], rows[:1], rows[0]))
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(4, 2\)"):
        metrics.r2_score(rows, rows[:, :2], mean)
