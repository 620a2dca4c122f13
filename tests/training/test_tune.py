"""Tuning on the task loss: it lowers that loss, keeps the best weights, ends early, and needs no condition."""

import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler
from support.families import make_family, make_generated, make_networks

from pdiff_hf import ParameterAutoencoder
from pdiff_hf.models import ConditionEncoder
from pdiff_hf.training import make_training_scheduler
from pdiff_hf.training.denoiser import LatentGenerator, denoising_loss, train_denoiser
from pdiff_hf.training.loop import Loop, LoopArguments
from pdiff_hf.training.tune import TuneArguments, fresh_tasks, has_jumped, seen_tasks, tune

CPU = torch.device("cpu")
ARGS = TuneArguments(num_steps=120, learning_rate=0.01, num_tasks=8, num_examples=8, ema_decay=0.9, validate_every=10)


@pytest.mark.parametrize("kind", ["fresh", "seen", "deterministic"])
def test_tuning_lowers_the_loss_of_the_networks(tmp_path, kind):
    family = make_family(ranges={"angle": None, "occlude": None})
    networks = make_networks(family)
    generated = make_generated(family, networks, True, kind == "deterministic")
    table = family.fields.table(family.conditions(6, seed=0))
    frozen = [networks.base_parameters().clone(), generated.autoencoder.token_basis.clone()]
    if kind == "seen":
        batches = seen_tasks(family, ARGS, table, CPU, condition_noise=0.1)
    else:
        batches = fresh_tasks(family, ARGS, (), CPU)
    history = tune(Loop(Accelerator(cpu=True), 0), generated, batches, 6, ARGS)
    losses = history["losses"]
    assert len(losses) == ARGS.num_steps
    first, last = (torch.tensor(part).mean() for part in (losses[:5], losses[-5:]))
    assert last < first - 0.05
    assert torch.equal(networks.base_parameters(), frozen[0])
    assert torch.equal(generated.autoencoder.token_basis, frozen[1])


def test_a_tuned_map_leaves_the_span_of_the_snapshots_and_is_saved(tmp_path):
    family = make_family(ranges={"angle": None, "occlude": None})
    networks = make_networks(family)
    plain, mapped = (make_generated(family, networks, True, tuned_map=tuned_map) for tuned_map in (False, True))
    latents = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mapped.autoencoder.decode(latents).sample, plain.autoencoder.decode(latents).sample)
    args = TuneArguments(**{**vars(ARGS), "num_steps": 50})
    losses = {}
    for name, generated in (("plain", plain), ("mapped", mapped)):
        batches = fresh_tasks(family, args, (), CPU)
        history = tune(Loop(Accelerator(cpu=True), 0), generated, batches, 6, args)
        losses[name] = sum(history["losses"][-10:]) / 10
    assert losses["mapped"] < losses["plain"] - 0.1  # eight random directions are little to learn with
    mapped.autoencoder.save_pretrained(tmp_path / "autoencoder")
    loaded = ParameterAutoencoder.from_pretrained(tmp_path / "autoencoder")
    torch.testing.assert_close(loaded.decode(latents).sample, mapped.autoencoder.decode(latents).sample)
    assert not torch.allclose(loaded.decode(latents).sample, plain.autoencoder.decode(latents).sample, atol=0.01)


def test_another_loss_counts_too(tmp_path):
    """Such as the denoiser's own on the latents of seen networks, which keeps tuning on few tasks near to them."""
    family = make_family()
    networks = make_networks(family)
    table = family.fields.table(family.conditions(6, seed=0))
    latents = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    scheduler = make_training_scheduler(prediction_type="v_prediction")
    args, own = TuneArguments(**{**vars(ARGS), "num_steps": 50}), {}
    for weight in (0.0, 100.0):
        generated = make_generated(family, networks, True)

        def denoising(generator: torch.Generator, weight=weight, model=generated.generator) -> torch.Tensor:
            return weight * denoising_loss(model, scheduler, latents, generator, table)

        seen = seen_tasks(family, args, table, CPU)
        tune(Loop(Accelerator(cpu=True), 0), generated, seen, 6, args, extra_loss=denoising)
        with torch.no_grad():
            noise = torch.Generator().manual_seed(1)
            own[weight] = sum(denoising(noise, 1.0, generated.generator).item() for _ in range(20)) / 20
    assert own[100.0] < 0.8 * own[0.0]


def test_the_best_weights_are_kept_and_training_ends_when_validation_gets_worse(tmp_path):
    family = make_family()
    generated = make_generated(family, make_networks(family), True)
    kept, results = [], iter([4.0, 3.0, 1.0, 1.5, 1.25])

    def validate() -> float:
        kept.append(generated.generator.denoiser.layer_out.weight.detach().clone())
        return next(results)

    args = TuneArguments(**{**vars(ARGS), "num_steps": 100, "validate_every": 3, "patience": 2})
    history = tune(
        Loop(Accelerator(cpu=True), 0),
        generated,
        fresh_tasks(family, args, (), CPU),
        4,
        args,
        validate=validate,
    )
    assert history["steps"] == [0, 3, 6, 9, 12] and len(history["losses"]) == 12 and history["restarts"] == []
    assert history["validation_losses"] == [4.0, 3.0, 1.0, 1.5, 1.25]
    assert torch.equal(generated.generator.denoiser.layer_out.weight, kept[2])
    assert not torch.equal(kept[1], kept[2])


def validated(folder, *, resume: bool = False, stop_at: int | None = None, **kwargs) -> tuple[dict, float, float]:
    """Tunes with validation on other tasks; the history, and the validation losses before and after."""
    family = make_family(ranges={"angle": None, "occlude": None})
    generated = make_generated(family, make_networks(family), True)
    args = TuneArguments(**{**vars(ARGS), "num_steps": 60} | kwargs)
    draw = fresh_tasks(family, args, (), CPU)
    table, batch = draw(torch.arange(6), torch.Generator().manual_seed(123))
    generated.generator.encoder.remember(table)

    @torch.no_grad()
    def validate() -> float:
        logits = generated(table, batch, torch.Generator().manual_seed(0))
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item()

    count = 0

    def batches(*arguments):
        nonlocal count
        count += 1
        if stop_at is not None and count > stop_at:
            raise KeyboardInterrupt
        return draw(*arguments)

    before = validate()
    loop = Loop(Accelerator(cpu=True), 0, folder, checkpointing_steps=7, resume=resume)
    return tune(loop, generated, batches, 6, args, validate=validate), before, validate()


@pytest.mark.parametrize("learning_rate", [0.01, 1.0, 1e3, 1e10])
def test_tuning_does_no_harm_whatever_the_learning_rate(tmp_path, learning_rate, caplog):
    history, before, after = validated(tmp_path, learning_rate=learning_rate)
    assert history["steps"][0] == 0 and history["validation_losses"][0] == pytest.approx(before, rel=1e-6)
    assert after == pytest.approx(min(loss for loss in history["validation_losses"] if loss), rel=1e-6)
    assert after <= before * (1 + 1e-6) and all(loss is None or loss < math.inf for loss in history["losses"])
    assert bool(history["restarts"]) == (learning_rate >= 1.0)
    assert ("at a learning rate of" in caplog.text) == (learning_rate >= 1.0)
    assert ("brought nothing" in caplog.text) == (after == before)
    if learning_rate == 0.01:
        assert after < before - 0.05


@pytest.mark.parametrize("learning_rate", [0.01, 1e3])
def test_a_resumed_tuning_has_the_history_of_an_uninterrupted_one(tmp_path, learning_rate):
    whole = validated(tmp_path / "whole", learning_rate=learning_rate)
    with pytest.raises(KeyboardInterrupt):
        validated(tmp_path / "parts", learning_rate=learning_rate, stop_at=34)
    assert validated(tmp_path / "parts", learning_rate=learning_rate, resume=True) == whole


def test_what_a_jump_is():
    falling = torch.linspace(2.0, 1.0, 60) + 0.1 * torch.randn(60, generator=torch.Generator().manual_seed(0))
    assert not any(has_jumped(falling[:n]) for n in range(1, 61))
    assert has_jumped(torch.cat([falling, falling[-1:] + torch.linspace(0.2, 2.0, 10)]))
    assert has_jumped(torch.linspace(2.2, 4.0, 10))
    assert has_jumped(torch.tensor([1.0, 0.9, math.nan])) and not has_jumped(torch.tensor([0.3]))
    noise = 0.02 + 0.01 * torch.randn(2000, generator=torch.Generator().manual_seed(1))
    assert not any(has_jumped(noise[:n]) for n in range(10, 2001, 10))


def test_fresh_tasks_leave_out_what_is_tested():
    family = make_family("grouped")
    conditions = family.split({"train": 500, "test": 11}, seed=0)
    tested = {family.key(condition) for condition in conditions["test"]}
    draw = fresh_tasks(family, ARGS, tested, CPU)
    for seed in range(20):
        table, batch = draw(torch.arange(8), torch.Generator().manual_seed(seed))
        assert batch["labels"].shape == (8, ARGS.num_examples)
        assert not tested & {family.key(condition) for condition in family.fields.conditions(table)}


def test_only_the_last_step_of_the_sampler_has_gradients():
    family = make_family()
    generated = make_generated(family, make_networks(family), True)
    table = family.fields.table(family.conditions(2, seed=0))
    calls = []
    hook = lambda module, inputs, output: calls.append(output.sample.requires_grad)  # noqa: E731
    generated.generator.denoiser.register_forward_hook(hook)
    latents = generated.sample_latents(table, torch.Generator().manual_seed(0), 2)
    assert calls == [False, False, True] and latents.requires_grad


def test_a_denoiser_learns_what_follows_from_a_condition(tmp_path):
    """Latents that are the condition: those of a condition that was not seen come out right."""
    encoder = ConditionEncoder({"x": {"type": "scalar", "low": -2.0, "high": 2.0}}, embedding_dim=16)
    values = torch.linspace(-1.5, 1.5, 64).view(-1, 1)
    encoder.remember(values)
    scheduler = make_training_scheduler(prediction_type="v_prediction")
    denoiser, _ = train_denoiser(
        Loop(Accelerator(cpu=True), 0),
        torch.cat([values, -values], dim=1),
        LoopArguments(300, 32, 5e-3),
        scheduler=scheduler,
        block_out_channels=(),
        bottleneck_dim=32,
        encoder=encoder,
        table=values,
        condition_dropout=0.1,
    )
    sampler = DPMSolverMultistepScheduler.from_config(scheduler.config, final_sigmas_type="zero")
    sampler.set_timesteps(10)
    latents = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    generator, asked = LatentGenerator(denoiser, encoder), torch.tensor([[-1.03], [0.04], [1.27]])
    with torch.no_grad():
        for timestep in sampler.timesteps:
            latents = sampler.step(generator(latents, timestep, asked), timestep, latents).prev_sample
    torch.testing.assert_close(latents, torch.cat([asked, -asked], dim=1), atol=0.25, rtol=0)
