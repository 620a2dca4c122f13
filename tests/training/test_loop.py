"""The training loop: what it trains, that a resumed run repeats an uninterrupted one bit for bit, and how it fails."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback

from pdiff_hf.training import Loop, LoopArguments, warn_of_rise
from pdiff_hf.training.loop import epoch_indices
from pdiff_hf.training.state import latest_checkpoint
from pdiff_hf.utils.seeds import derive_seed

TARGET = torch.randn(23, 5, generator=torch.Generator().manual_seed(7))


class Interrupted(Exception):
    pass


def run(
    folder, *, accumulation=1, stop_at=None, resume=False, scale=1.0, noise=0.1, dropout=0.2, callbacks=(), **kwargs
):
    """Trains a network with dropout on noisy data for 30 steps; the weights and the losses."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(dropout), nn.Linear(8, 5))
    calls = []

    def loss_function(model, indices, generator):
        calls.append(indices)
        if stop_at is not None and len(calls) > stop_at * accumulation:
            raise Interrupted
        target = TARGET[indices]
        return scale * F.mse_loss(model(target + noise * torch.randn(target.shape, generator=generator)), target)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, step_scheduler_with_optimizer=False)
    every = kwargs.pop("checkpointing_steps", None)
    args = LoopArguments(**{"num_steps": 30, "batch_size": 8, "learning_rate": 1e-2} | kwargs)
    loop = Loop(accelerator, 0, folder, every, resume, callbacks)
    losses = loop.train(model, loss_function, len(TARGET), args, description="test")
    return torch.cat([p.detach().flatten() for p in model.parameters()]), losses, calls


def test_it_trains(tmp_path):
    _, losses, calls = run(tmp_path, num_steps=200)
    assert losses.isfinite().all() and losses[-20:].mean() < 0.5 * losses[:10].mean()
    assert len(calls) == 200 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path, ema_decay, accumulation):
    options = {"ema_decay": ema_decay, "accumulation": accumulation, "checkpointing_steps": 7, "lr_warmup_steps": 5}
    weights, losses, _ = run(tmp_path / "whole", **options)
    for stop_at in (8, 22):
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", stop_at=stop_at - (7 if stop_at == 22 else 0), resume=True, **options)
    assert latest_checkpoint(tmp_path / "parts").name == "checkpoint-21"
    torch.manual_seed(99)  # the state of the global generator comes from the checkpoint
    resumed_weights, resumed_losses, calls = run(tmp_path / "parts", resume=True, **options)
    assert len(calls) == 9 * accumulation
    assert torch.equal(resumed_weights, weights) and torch.equal(resumed_losses, losses)


def test_accumulation_gives_the_gradients_and_the_schedule_of_the_whole_batch(tmp_path):
    options = {"noise": 0.0, "dropout": 0.0, "lr_warmup_steps": 5, "optimizer": "sgd", "max_grad_norm": 0.5}
    weights, losses, _ = run(tmp_path, **options)
    parts, part_losses, _ = run(tmp_path, accumulation=4, **options)
    torch.testing.assert_close(parts, weights, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(part_losses, losses, atol=1e-6, rtol=1e-5)


class Events(TrainerCallback):
    def __init__(self, stop_at: int | None = None):
        self.steps, self.logs, self.saved, self.stop_at = [], [], [], stop_at

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)
        control.should_training_stop = state.global_step == self.stop_at

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append((state.global_step, logs["loss"], logs["learning_rate"]))

    def on_save(self, args, state, control, checkpoint, **kwargs):
        self.saved.append((state.global_step, checkpoint.name))


def test_callbacks_are_told_and_may_end_the_training(tmp_path):
    events = Events()
    _, losses, _ = run(tmp_path, callbacks=[events], checkpointing_steps=12)
    assert events.steps == list(range(1, 31))
    assert [step for step, *_ in events.logs] == [10, 12, 20, 24, 30]
    assert events.logs[0][1] == losses[9] and 0 < events.logs[2][2] < events.logs[0][2] < 1e-2
    assert events.saved == [(12, "checkpoint-12"), (24, "checkpoint-24")]
    events = Events(stop_at=13)
    _, few, _ = run(tmp_path, callbacks=[events], checkpointing_steps=13)
    assert torch.equal(few, losses[:13]) and events.saved == [] and events.logs[-1][0] == 13


def test_without_resume_it_starts_again(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, stop_at=10, checkpointing_steps=5)
    assert len(run(tmp_path, checkpointing_steps=5)[2]) == 30


def test_checkpoints_are_limited_and_half_written_ones_ignored(tmp_path):
    run(tmp_path, checkpointing_steps=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-24", "checkpoint-28"]
    (tmp_path / "part-40").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert latest_checkpoint(tmp_path).name == "checkpoint-28"


def test_ema_is_what_is_kept(tmp_path):
    plain, losses, _ = run(tmp_path)
    averaged, ema_losses, _ = run(tmp_path, ema_decay=0.9)
    assert torch.equal(losses, ema_losses) and not torch.allclose(plain, averaged)


def test_gradient_clipping_and_optimizers_change_the_result(tmp_path):
    plain = run(tmp_path)[0]
    assert not torch.equal(plain, run(tmp_path, max_grad_norm=1e-3, optimizer="sgd")[0])
    assert not torch.equal(run(tmp_path, optimizer="sgd")[0], run(tmp_path, max_grad_norm=1e-3, optimizer="sgd")[0])


def test_a_batch_must_come_in_equal_parts(tmp_path):
    with pytest.raises(ValueError, match="a batch of 8 cannot be cut into 3 equal parts"):
        run(tmp_path, accumulation=3)


@pytest.mark.parametrize(("num_examples", "batch_size"), [(10, 3), (3, 10), (1, 4), (5, 5)])
def test_indices_take_every_example_once_an_epoch(num_examples, batch_size):
    def first(count, first_step=0):
        batches = epoch_indices(num_examples, batch_size, seed=1, first_step=first_step)
        return torch.cat([next(batches) for _ in range(count)])

    stream = first(num_examples)
    for epoch in stream.view(batch_size, num_examples):
        assert sorted(epoch.tolist()) == list(range(num_examples))
    if num_examples > 4:
        assert stream[:num_examples].tolist() != stream[num_examples : 2 * num_examples].tolist()
    for step in range(num_examples):
        assert torch.equal(first(1, step), stream[step * batch_size : (step + 1) * batch_size])


def test_derived_seeds_differ():
    seeds = {derive_seed(a, b) for a in range(40) for b in range(40)}
    assert len(seeds) == 1600 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0) != derive_seed(0, 0)


def test_a_training_that_ends_above_its_start_is_told(caplog):
    for quiet in (torch.linspace(3, 1, 40), torch.linspace(1, 1.05, 40), torch.tensor([1.0, 5.0])):
        warn_of_rise("autoencoder", quiet, 0.02)
    assert not caplog.records
    warn_of_rise("autoencoder", torch.linspace(1, 3, 40), 0.02)
    assert "autoencoder: the loss has risen from 1.1 to 2.9, so that" in caplog.text
    assert "the learning rate of 0.02 is too high; try a third" in caplog.text
