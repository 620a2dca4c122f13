"""Tuning for one task: the values of the objective, what each of its terms does, and that starts are kept."""

import pytest
import torch
from accelerate import Accelerator
from support.families import make_family, make_generated, make_networks

from pdiff_hf.training.ensembles import (
    EnsembleObjective,
    TunedEnsembles,
    ensemble_loss,
    error_overlap,
    validation_batch,
    validation_loss,
)
from pdiff_hf.training.loop import Loop
from pdiff_hf.training.tune import TuneArguments, single_task, tune

CPU = torch.device("cpu")
ARGS = TuneArguments(num_steps=60, learning_rate=0.01, num_tasks=8, num_examples=32, ema_decay=0.9, validate_every=30)


def make_logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, 3, generator=generator), torch.tensor([0, 2, 1, 1, 0])


def test_the_loss_is_that_of_mean_probabilities():
    logits, labels = make_logits()
    probabilities = logits.softmax(-1)
    for size in (1, 2, 3, 6):
        means = torch.stack([part.mean(0) for part in probabilities.split(size)])  # (6 / size, 5, 3)
        expected = -torch.stack([means[:, i, label] for i, label in enumerate(labels)]).log().mean()
        torch.testing.assert_close(ensemble_loss(logits, labels, size), expected)


def test_the_overlap_of_sure_errors_is_the_iou():
    labels = torch.zeros(6, dtype=torch.long)
    wrong = torch.tensor([[1, 1, 0, 0, 0, 1], [1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0]]).bool()
    logits = torch.stack([torch.where(wrong, -40.0, 40.0), torch.where(wrong, 40.0, -40.0)], dim=-1)
    torch.testing.assert_close(error_overlap(logits, labels, 2), torch.tensor((2 / 4 + 1 / 2) / 2))
    pairs = [2 / 4, 0, 0, 0, 0, 1 / 2]
    torch.testing.assert_close(error_overlap(logits, labels, 4), torch.tensor(sum(pairs) / 6))
    never = torch.stack([torch.full((2, 6), 40.0), torch.full((2, 6), -40.0)], dim=-1).requires_grad_()
    error_overlap(never, labels, 2).backward()
    assert error_overlap(never, labels, 2) == 0 and never.grad.isfinite().all()


def test_networks_that_are_too_sure_lose_nothing_in_validation():
    logits, labels = make_logits()
    assert validation_loss(3 * logits, labels) < ensemble_loss(3 * logits, labels, 6)
    assert validation_loss(3 * logits, labels) <= ensemble_loss(logits, labels, 6) + 1e-6
    right = 9 * torch.nn.functional.one_hot(labels, 3).float().expand(2, -1, -1)
    torch.testing.assert_close(validation_loss(right, labels), ensemble_loss(right, labels, 2))


def make_ensembles(objective: EnsembleObjective, family, networks, tuned_map: bool = False) -> TunedEnsembles:
    generated = make_generated(family, networks, False, tuned_map=tuned_map)
    return TunedEnsembles(generated, objective, ARGS.num_tasks)


def tuned(objective: EnsembleObjective, folder, tuned_map: bool = False) -> dict[str, float]:
    """What tuning does to the latents and logits of one noise."""
    family = make_family()
    networks = make_networks(family)
    model = make_ensembles(objective, family, networks, tuned_map)
    task = family.task({"angle": 0.0, "occlude": "none", "blur": 0.0, "invert": "no"})
    noise = model.sample_noise(torch.Generator().manual_seed(1))
    batch = validation_batch(task, CPU)

    @torch.no_grad()
    def measure() -> tuple[torch.Tensor, torch.Tensor]:
        latents = model.generated.denoise(noise)
        return latents, model.logits(latents, batch)

    before, logits = measure()
    first = ensemble_loss(logits, batch["labels"], 4).item()
    tune(Loop(Accelerator(cpu=True), 0), model, single_task(task, ARGS, CPU), 8, ARGS)
    after, logits = measure()
    return {
        "first": first,
        "loss": ensemble_loss(logits, batch["labels"], 4).item(),
        "overlap": error_overlap(logits, batch["labels"], 4).item(),
        "distance": (after - before).square().mean().item(),
    }


def test_each_term_does_what_it_is_for(tmp_path):
    plain = tuned(EnsembleObjective(4), tmp_path)
    assert plain["loss"] < plain["first"] - 0.05
    apart = tuned(EnsembleObjective(4, diversity=30.0), tmp_path)
    assert apart["overlap"] < plain["overlap"] - 0.01
    near = tuned(EnsembleObjective(4, penalty=10.0), tmp_path)
    assert near["distance"] < 0.3 * plain["distance"] and near["loss"] < near["first"]


def test_a_tuned_map_is_trained_along(tmp_path):
    assert tuned(EnsembleObjective(2), tmp_path, tuned_map=True)["loss"] < tuned(EnsembleObjective(2), tmp_path)["loss"]


def test_the_first_loss_has_no_penalty():
    family = make_family()
    networks = make_networks(family)
    task = family.task({"angle": 0.0, "occlude": "none", "blur": 0.0, "invert": "no"})
    batch = validation_batch(task, CPU)
    values = [
        make_ensembles(EnsembleObjective(2, penalty=penalty), family, networks)(
            None, batch, torch.Generator().manual_seed(0)
        )
        for penalty in (0.0, 100.0)
    ]
    assert values[1].item() == pytest.approx(values[0].item())
