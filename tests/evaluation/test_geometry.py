"""Where networks lie: distances, coverage and explained variance against scikit-learn or a loop."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from pdiff_hf.evaluation import geometry
from pdiff_hf.evaluation.geometry import Yardstick

seeds = st.integers(0, 2**32 - 1)
# The one fixture below holds for all examples of a test: it need not be set up anew for each.
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=[geometry.CHUNK_BYTES, 96], ids=["one chunk", "many chunks"])
def chunked(request, monkeypatch):
    monkeypatch.setattr(geometry, "CHUNK_BYTES", request.param)
    monkeypatch.setattr(geometry, "CACHE_BYTES", min(request.param, geometry.CACHE_BYTES))


@few
@given(seed=seeds, count=st.integers(1, 6), size=st.integers(1, 30), offset=st.sampled_from([0.0, 1000.0]))
def test_distances(chunked, seed, count, size, offset):
    generator = torch.Generator().manual_seed(seed)
    snapshots = offset + torch.randn(6, size, generator=generator)
    parameters = offset + torch.randn(count, size, generator=generator)
    result = Yardstick(snapshots).place(parameters)

    rows, columns = parameters.double().numpy(), snapshots.double().numpy()
    expected, index = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(columns).kneighbors(rows)
    direct = np.linalg.norm(rows - columns[index[:, 0]], axis=1)
    own = [min(np.linalg.norm(columns[i] - columns[j]) for j in range(6) if j != i) for i in range(6)]
    to_mean = np.linalg.norm(rows - columns.mean(0), axis=1)
    spread = math.sqrt(np.mean(np.sum((columns - columns.mean(0)) ** 2, axis=1)))
    np.testing.assert_allclose(result["nearest"], direct, rtol=1e-9)
    np.testing.assert_array_equal(result["nearest_index"], index[:, 0])
    np.testing.assert_allclose(Yardstick(snapshots).nearest, own, rtol=1e-9)
    np.testing.assert_allclose(result["nearest_relative"], direct / np.median(own), rtol=1e-9)
    np.testing.assert_allclose(result["to_mean"], to_mean, rtol=1e-9)
    np.testing.assert_allclose(result["to_mean_relative"], to_mean / spread, rtol=1e-9)

    own_result = Yardstick(snapshots).place()
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
    result = Yardstick(snapshots).place(parameters)
    assert result["nearest"].tolist() == [step.item()] * 40
    assert result["nearest_index"].tolist() == list(range(40))
    assert Yardstick(snapshots).nearest.tolist() == [4 * step.item()] * 40


def test_some_rows_are_as_good_as_a_copy_of_them(chunked):
    matrix = torch.randn(9, 30, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([0, 1, 1, 0, 1, 1, 1, 1, 1], dtype=torch.bool)
    rows, copy, other = geometry.Rows(matrix, chosen), matrix[chosen], matrix + 0.1
    assert rows.shape == copy.shape and len(rows) == 7 and torch.equal(torch.stack(list(rows)), copy)
    assert torch.equal(rows[torch.tensor([2, 0]), 3:5], copy[torch.tensor([2, 0]), 3:5])
    assert torch.equal(geometry.mean_of(rows), geometry.mean_of(copy))
    assert geometry.pca_r2_score(rows, rows, 3) == geometry.pca_r2_score(copy, copy, 3)
    (placed, expected) = (Yardstick(snapshots).place(other) for snapshots in (rows, copy))
    for key, value in expected.items():
        np.testing.assert_array_equal(placed[key], value)


@few
@given(seed=seeds, num_real=st.integers(2, 9), num_fake=st.integers(1, 9), k=st.integers(1, 12), shift=st.floats(0, 3))
def test_precision_recall_density_coverage(chunked, seed, num_real, num_fake, k, shift):
    generator = torch.Generator().manual_seed(seed)
    real, fake = torch.randn(num_real, 3, generator=generator), torch.randn(num_fake, 3, generator=generator) + shift
    result = Yardstick(real, k).place(fake)

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
    snapshots = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    copies = Yardstick(snapshots).place(snapshots)
    assert (copies["precision"], copies["recall"], copies["coverage"]) == (1, 1, 1)
    # Every point lies in its own ball and in those that it is a neighbour of: k + 1 a ball.
    assert copies["density"] == pytest.approx(6 / 5)
    strangers = Yardstick(snapshots).place(snapshots + 100)
    assert [strangers[name] for name in ("precision", "recall", "density", "coverage")] == [0, 0, 0, 0]


def test_one_snapshot_has_no_other_one():
    with pytest.raises(ValueError, match=r"at least 2 snapshots, got shape \(1, 2\)"):
        Yardstick(torch.zeros(1, 2))


@pytest.mark.parametrize("num_components", [1, 3, 30])
def test_variance_along_principal_components(num_components, monkeypatch):
    monkeypatch.setattr(geometry, "CHUNK_BYTES", 16 * 25 * 7)
    generator = torch.Generator().manual_seed(0)
    train, other = (torch.randn(n, 60, generator=generator) * torch.logspace(0, -2, 60) + 4 for n in (20, 5))
    pca = PCA(min(num_components, 19)).fit(train.double().numpy())
    for parameters in (train, other):
        reconstructions = torch.from_numpy(pca.inverse_transform(pca.transform(parameters.double().numpy())))
        error = (parameters.double() - reconstructions).square().sum()
        expected = 1 - error.item() / (parameters - train.double().mean(0)).square().sum().item()
        assert geometry.pca_r2_score(train, parameters, num_components) == pytest.approx(expected, abs=1e-9)
    assert math.isnan(geometry.pca_r2_score(train[:1].expand(3, -1), train[:1], 1))
