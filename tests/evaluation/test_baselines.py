"""Each generator against the moments that it should have, with fixed seeds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde
from sklearn.decomposition import PCA
from support.evaluation import seeded

from pdiff_hf.evaluation import baselines, geometry
from pdiff_hf.evaluation.baselines import BaselineContext, standard_baselines

MANY = 40_000
CLOSE = {"rtol": 0.05, "atol": 0.05}  # five standard errors of a variance of 1 from MANY samples are 0.035


@pytest.fixture
def snapshots():
    """(12, 6): correlated, away from zero, with different scales."""
    mixing = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.3, 0.8]).diag() + 0.3
    return torch.randn(12, 6, generator=seeded(1)) @ mixing + torch.arange(6.0)


def covariance(rows):
    return np.cov(rows.double().numpy(), rowvar=False)


def test_noise_is_in_units_of_each_tensor():
    snapshots = torch.arange(4.0)[:, None] * 1000 + torch.tensor([3.0, -3.0, 1.0, -1.0, 5.0, 7.0, 7.0])
    sizes = (2, 2, 1, 2)  # standard deviations 3, 1, none (one number), 0 (constant)
    samples = baselines.gaussian_noise(BaselineContext(snapshots, sizes), MANY, 0.5, seeded())
    which = (samples[:, 4] / 1000).round().long()  # told by the number without noise
    noise = samples - snapshots[which]
    np.testing.assert_allclose(noise.std(0), [1.5, 1.5, 0.5, 0.5, 0, 0, 0], rtol=0.03)
    np.testing.assert_allclose(noise.mean(0), np.zeros(7), atol=0.04)
    np.testing.assert_allclose(which.bincount() / MANY, [0.25] * 4, atol=0.015)


def test_noise_uses_each_snapshot_once_while_there_are_enough(snapshots):
    five, twelve, thirty = (
        baselines.gaussian_noise(BaselineContext(snapshots, [6]), count, 0.0, seeded()) for count in (5, 12, 30)
    )
    assert sorted(twelve.tolist()) == sorted(snapshots.tolist()) and twelve.tolist() != snapshots.tolist()
    assert len(five.unique(dim=0)) == 5 and len(thirty) == 30


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_soup_moments(snapshots, k):
    samples = baselines.soup(BaselineContext(snapshots), MANY, k, seeded())
    np.testing.assert_allclose(samples.mean(0), snapshots.mean(0), atol=0.05)
    # A mean of k of K without replacement: the population's covariance / k * (K - k) / (K - 1).
    expected = covariance(snapshots) * (11 / 12) / k * (12 - k) / 11
    np.testing.assert_allclose(covariance(samples), expected, **CLOSE)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_diagonal_gaussian_moments(snapshots, temperature):
    samples = baselines.diagonal_gaussian(BaselineContext(snapshots), MANY, temperature, seeded())
    np.testing.assert_allclose(samples.mean(0), snapshots.mean(0), atol=0.08)
    expected = temperature**2 * np.diag(np.diag(covariance(snapshots)))
    np.testing.assert_allclose(covariance(samples), expected, rtol=0.05, atol=0.05 + 0.1 * temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_low_rank_gaussian_moments(snapshots, temperature):
    samples = baselines.low_rank_gaussian(BaselineContext(snapshots), MANY, temperature, seeded())
    np.testing.assert_allclose(samples.mean(0), snapshots.mean(0), atol=0.08)
    np.testing.assert_allclose(covariance(samples), temperature**2 * covariance(snapshots), rtol=0.05, atol=0.1)


def test_low_rank_gaussian_with_diagonal_is_half_and_half(snapshots):
    samples = baselines.low_rank_gaussian(BaselineContext(snapshots), MANY, 1.0, seeded(), with_diagonal=True)
    full = covariance(snapshots)
    np.testing.assert_allclose(covariance(samples), (full + np.diag(np.diag(full))) / 2, **CLOSE)


@pytest.mark.parametrize("sample", ["low_rank_gaussian", "pca_gaussian"])
def test_few_snapshots_span_few_directions(sample):
    snapshots = torch.randn(4, 50, generator=seeded(2))
    setting = 3 if sample == "pca_gaussian" else 1.0
    samples = getattr(baselines, sample)(BaselineContext(snapshots), 20, setting, seeded())
    ranks = [torch.linalg.matrix_rank(rows - snapshots.mean(0), rtol=1e-4).item() for rows in (snapshots, samples)]
    assert ranks == [3, 3]
    both = torch.cat([snapshots, samples]) - snapshots.mean(0)
    assert torch.linalg.matrix_rank(both, rtol=1e-4) == 3


@pytest.mark.parametrize("num_components", [1, 3, 6])
@pytest.mark.parametrize("chunk_bytes", [geometry.CHUNK_BYTES, 2 * 8 * 12], ids=["one chunk", "three chunks"])
def test_pca_gaussian_moments(snapshots, num_components, chunk_bytes, monkeypatch):
    monkeypatch.setattr(geometry, "CHUNK_BYTES", chunk_bytes)
    samples = baselines.pca_gaussian(BaselineContext(snapshots), MANY, num_components, seeded())
    pca = PCA(num_components).fit(snapshots.double().numpy())
    expected = pca.components_.T @ np.diag(pca.explained_variance_) @ pca.components_
    np.testing.assert_allclose(samples.mean(0), snapshots.mean(0), atol=0.08)
    np.testing.assert_allclose(covariance(samples), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("weight_range", [(0.0, 1.0), (1.5, 2.0), (0.25, 0.25)])
def test_interpolation_weights(weight_range):
    low, high = weight_range
    ends = torch.tensor([[0.0, 10.0], [1.0, 20.0]])
    samples = baselines.interpolation(BaselineContext(ends), MANY, f"{low} to {high}", seeded())
    torch.testing.assert_close(samples[:, 1], 10 + 10 * samples[:, 0])  # on the line
    # Half of the pairs run from the second to the first snapshot.
    position = torch.where((samples[:, 0] - 0.5).sign() > 0, samples[:, 0], 1 - samples[:, 0])
    furthest = max(high, 1 - low)
    assert position.min() >= max(0.5, 1 - high, low) - 1e-5 and position.max() <= furthest + 1e-5
    mean, square = (low + high) / 2, (low**2 + low * high + high**2) / 3
    second_moment = (square + (1 - 2 * mean + square)) / 2
    np.testing.assert_allclose(samples[:, 0].square().mean(), second_moment, rtol=0.03)
    np.testing.assert_allclose(samples[:, 0].mean(), 0.5, atol=0.03)


def test_interpolation_pairs_are_distinct(snapshots):
    samples = baselines.interpolation(BaselineContext(snapshots), 500, "0.5 to 0.5", seeded())
    distance = torch.cdist(samples.double(), snapshots.double())
    assert distance.min() > 1e-3  # a snapshot paired with itself would be that snapshot


@pytest.mark.parametrize("bandwidth", [0.0, 0.5, None])
def test_latent_kde_moments(snapshots, bandwidth):
    samples = baselines.latent_kde(snapshots, MANY, bandwidth, seeded())
    factor = gaussian_kde(snapshots.numpy().T).scotts_factor() if bandwidth is None else bandwidth
    full = covariance(snapshots)
    np.testing.assert_allclose(samples.mean(0), snapshots.mean(0), atol=0.08)
    np.testing.assert_allclose(covariance(samples), full * 11 / 12 + factor**2 * np.diag(np.diag(full)), **CLOSE)


# What a report runs


@pytest.fixture
def context():
    snapshots = torch.randn(70, 30, generator=seeded(3))
    decoder = torch.randn(5, 30, generator=seeded(4))
    return BaselineContext(snapshots, (10, 20), snapshots[:, :5].contiguous(), lambda latents: latents @ decoder)


def test_standard_baselines_all_run_and_are_reproducible(context):
    every = standard_baselines()
    for baseline in every:
        assert baseline.supports(context)
        samples = baseline.sample(context, 3, seeded())
        assert samples.shape == (3, 30)
        assert samples.dtype == torch.float32
        assert samples.isfinite().all()
        assert torch.equal(samples, baseline.sample(context, 3, seeded()))
        assert not torch.equal(samples, baseline.sample(context, 3, seeded(1))), baseline.name
    distinct = {tuple(baseline.sample(context, 3, seeded()).flatten().tolist()) for baseline in every}
    assert len(distinct) == len(every) == len({baseline.name for baseline in every})  # no setting is lost on the way


@pytest.mark.parametrize("chunk_bytes", [geometry.CHUNK_BYTES, 8 * 80 * 7], ids=["one chunk", "five chunks"])
def test_snapshots_that_are_held_out_need_not_be_copied_away(context, chunk_bytes, monkeypatch):
    monkeypatch.setattr(geometry, "CHUNK_BYTES", chunk_bytes)
    seen = torch.arange(70) % 9 != 0
    copied, chosen = (
        replace(context, snapshots=rows, latents=context.latents[seen])
        for rows in (context.snapshots[seen], geometry.Rows(context.snapshots, seen))
    )
    for baseline in standard_baselines():
        if baseline.supports(copied):
            assert torch.equal(baseline.sample(chosen, 3, seeded()), baseline.sample(copied, 3, seeded())), (
                baseline.name
            )


def test_baselines_say_what_they_need(context):
    without_latents = BaselineContext(context.snapshots, context.tensor_sizes)
    lost = {b.sweep for b in standard_baselines() if not b.supports(without_latents)}
    assert lost == {"latent KDE"}
    few = BaselineContext(context.snapshots[:5], context.tensor_sizes, context.latents[:5], context.decode)
    lost = [b for b in standard_baselines() if not b.supports(few)]
    assert [b.name for b in lost] == ["soup 16", "PCA Gaussian 16", "PCA Gaussian 64"]
    assert [b.name for b in standard_baselines("few")] == [f"{name} {s[2]}" for name, s in baselines.SWEEPS.items()]
    for baseline in standard_baselines():
        if baseline.supports(few):
            assert baseline.sample(few, 2, seeded()).isfinite().all()
