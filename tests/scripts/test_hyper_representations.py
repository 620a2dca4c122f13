"""The generators of the paper's Table 7: whom they learn from, what they draw and keep, and their place in a report."""

import pytest
import torch
from reproduce.hyper_representations import (
    NAMES,
    best_snapshots,
    s_kde30,
    sample_hyper_representations,
    sane_kde30,
    sane_sub,
)
from support.evaluation import digits, digits_pipeline, digits_snapshots, report_on

from pdiff_hf import ParameterAutoencoder
from pdiff_hf.layout import ParameterLayout

LAYOUT = ParameterLayout(("a", "b"), ((10,), (2, 3)), ("float32", "float32"))
ARCHITECTURES = {
    "tokens": {"block_out_channels": (8,), "norm_num_groups": None, "token_size": 4, "token_dim": 4},
    "whole vector": {"block_out_channels": (4, 4)},
    "linear": {"block_out_channels": ()},
}


def first_numbers(parameters: torch.Tensor) -> torch.Tensor:
    """A score that likes networks whose first number is large."""
    return parameters[:, 0]


SAMPLERS = {
    "S_KDE30": s_kde30,
    "SANE_KDE30": sane_kde30,
    "SANE_SUB": lambda *arguments: sane_sub(*arguments, score=first_numbers),
}


@pytest.fixture(scope="module")
def snapshots() -> torch.Tensor:
    return torch.randn(20, 16, generator=torch.Generator().manual_seed(0)) + 3


@pytest.fixture(scope="module")
def accuracies() -> torch.Tensor:
    return torch.randperm(20, generator=torch.Generator().manual_seed(1)).double()


def fitted(snapshots: torch.Tensor, architecture: dict) -> ParameterAutoencoder:
    torch.manual_seed(0)
    autoencoder = ParameterAutoencoder(LAYOUT.to_dict(), latent_dim=12, **architecture).eval()
    autoencoder.fit_parameter_statistics(snapshots)
    autoencoder.fit_latent_statistics(autoencoder.tokenize(snapshots))
    return autoencoder


@pytest.fixture(scope="module")
def autoencoder(snapshots) -> ParameterAutoencoder:
    return fitted(snapshots, ARCHITECTURES["tokens"])


def distances(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")  # which cancels


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_networks_follow_from_the_generator_and_from_the_best_snapshots_alone(
    name, architecture, snapshots, accuracies
):
    sample, autoencoder = SAMPLERS[name], fitted(snapshots, architecture)
    networks = sample(snapshots, accuracies, autoencoder, 7, seeded())
    assert networks.shape == (7, 16) and networks.dtype == torch.float32 and networks.isfinite().all()
    assert len(networks.unique(dim=0)) == 7 and not networks.requires_grad
    assert torch.equal(sample(snapshots, accuracies, autoencoder, 7, seeded()), networks)
    assert not torch.equal(sample(snapshots, accuracies, autoencoder, 7, seeded(1)), networks)

    changed = torch.where((accuracies < 14).unsqueeze(1), 100.0, snapshots)  # all but the best 6 of 20
    assert torch.equal(sample(changed, accuracies, autoencoder, 7, seeded()), networks)
    changed = torch.where((accuracies == accuracies.max()).unsqueeze(1), 100.0, snapshots)
    assert not torch.equal(sample(changed, accuracies, autoencoder, 7, seeded()), networks)


def test_the_best_snapshots(snapshots, accuracies):
    assert best_snapshots(snapshots, accuracies).tolist() == (accuracies >= 14).nonzero().flatten().tolist()
    assert len(best_snapshots(snapshots, torch.full((20,), 90.0))) == 20  # none is better than another
    assert best_snapshots(snapshots[:3], torch.tensor([1.0, 3.0, 2.0])).tolist() == [1, 2]  # 30% would be one
    without = torch.where(accuracies < 19, -torch.inf, accuracies)  # only one has a score at all
    assert (accuracies == 19).nonzero() in best_snapshots(snapshots, without)


def test_without_bandwidth_every_token_is_one_of_a_snapshot(snapshots, accuracies, autoencoder):
    best = snapshots[best_snapshots(snapshots, accuracies)]
    networks = sane_kde30(snapshots, accuracies, autoencoder, 50, seeded(), bandwidth=0.0)
    chosen = []
    for start, stop in ((0, 4), (4, 8), (8, 10), (10, 14), (14, 16)):  # tokens of at most 4, cut at the tensors' end
        distance = distances(networks[:, start:stop], best[:, start:stop])
        assert distance.min(1).values.max() < 1e-4
        chosen.append(distance.argmin(1))
    chosen = torch.stack(chosen, dim=1)
    assert all(set(column.tolist()) == set(range(6)) for column in chosen.T)  # of all the best
    assert len(chosen.unique(dim=0)) > 40  # independently of each other


def test_without_bandwidth_every_latent_coordinate_is_one_of_a_snapshot(snapshots, accuracies):
    autoencoder = fitted(snapshots, ARCHITECTURES["linear"])  # whose decoder can be undone
    networks = s_kde30(snapshots, accuracies, autoencoder, 50, seeded(), bandwidth=0.0)
    latents, best = (
        autoencoder.encode(rows).latents for rows in (networks, snapshots[best_snapshots(snapshots, accuracies)])
    )
    distance = (latents.unsqueeze(1) - best).abs()  # (50, 6, L)
    assert distance.min(1).values.max() < 1e-3
    assert len(distance.argmin(1).unique(dim=0)) > 40


def test_a_bandwidth_is_a_part_of_the_spread(snapshots, accuracies, autoencoder):
    """The variance of a kernel density is that of its points, and the kernel's."""
    best = snapshots[best_snapshots(snapshots, accuracies)]
    expected = best.var(0, correction=0) + 0.5**2 * best.var(0)
    networks = sane_kde30(snapshots, accuracies, autoencoder, 20_000, seeded(), bandwidth=0.5)
    # Coordinates are principal components: their variances add up to that of the token.
    for rows in (slice(0, 4), slice(4, 8), slice(10, 14)):
        torch.testing.assert_close(networks.var(0)[rows].sum(), expected[rows].sum(), rtol=0.03, atol=0)
    torch.testing.assert_close(networks.mean(0), best.mean(0), rtol=0, atol=0.05)


def test_subsampling_keeps_what_scores_best(snapshots, accuracies, autoencoder):
    seen = []

    def score(parameters):
        seen.append(parameters)
        return parameters[:, 0]

    networks = sane_sub(snapshots, accuracies, autoencoder, 6, seeded(), score, num_candidates=4)
    candidates = torch.cat(seen)
    assert [len(part) for part in seen] == [6, 6, 6, 6]  # no more at once than are kept
    assert torch.equal(networks, candidates[candidates[:, 0].argsort(descending=True)[:6]])
    opposite = sane_sub(snapshots, accuracies, autoencoder, 6, seeded(), lambda p: -p[:, 0], num_candidates=4)
    assert torch.equal(opposite, candidates[candidates[:, 0].argsort()[:6]])

    # The prompts are the best two: every token is one of theirs.
    prompts = snapshots[accuracies.argsort(descending=True)[:2]]
    networks = sane_sub(snapshots, accuracies, autoencoder, 6, seeded(), score, num_prompts=2, bandwidth=0.0)
    assert distances(networks[:, :4], prompts[:, :4]).min(1).values.max() < 1e-4


def test_errors(snapshots, accuracies, autoencoder):
    for sample in SAMPLERS.values():
        with pytest.raises(ValueError, match=r"a score for each, got shapes \(20, 16\) and \(19,\)"):
            sample(snapshots, accuracies[1:], autoencoder, 3, seeded())
        with pytest.raises(ValueError, match=r"at least 2 snapshots .* got shapes \(1, 16\) and \(1,\)"):
            sample(snapshots[:1], accuracies[:1], autoencoder, 3, seeded())
    for wrong in ({"num_prompts": 1}, {"num_candidates": 0}):
        with pytest.raises(ValueError, match="`num_prompts` must be at least 2 and `num_candidates` at least 1"):
            sane_sub(snapshots, accuracies, autoencoder, 3, seeded(), first_numbers, **wrong)


def test_groups_of_a_report_learn_from_validation_data(tmp_path):
    scorer, snapshots = digits(), digits_snapshots()
    pipeline = digits_pipeline(scorer, snapshots)
    heldout = torch.arange(len(snapshots)) % 4 == 0
    settings = {"num_models": 4, "baseline_models": 0}
    seen = snapshots[~heldout]
    settings["extra_groups"] = sample_hyper_representations(scorer, seen, pipeline.autoencoder, 4, seed=0)
    report = report_on(scorer, snapshots, pipeline, tmp_path, heldout=heldout, **settings)
    groups = {row.name: row for row in report.groups if row.name in NAMES}
    assert list(groups) == list(NAMES)
    assert all(row.n == 4 and row.sweep == "hyper-representations" for row in groups.values())
    assert all(row.verdict is not None for row in groups.values())
    for group in sample_hyper_representations(scorer, seen, pipeline.autoencoder, 4, seed=0):
        assert scorer.score("test", group.networks).values.tolist() == groups[group.name].scores()
    with pytest.raises(ValueError, match=r"SANE_KDE30 need [\d,]+ bytes.*--num_models \d+ at most"):
        sample_hyper_representations(scorer, seen, pipeline.autoencoder, 10**12, 0)
