"""What a training loop tells of itself while it runs."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn


@dataclass
class LoopState:
    """
    What hooks see of a training, and how they change its course. All processes must ask for the same.

    Attributes:
        description (`str`): What is trained.
        num_steps (`int`): Of the whole training.
        step (`int`): The step that has just been taken, counted from 1.
        losses (`torch.Tensor`): Of all steps up to this one, shape `(step,)`, on the training's device.
        learning_rate (`float`): Of the next step.
        is_checked (`bool`): Whether losses are looked at after this step: to look at others stalls a GPU.
        should_stop (`bool`): Set it to end the training after this step.
    """

    description: str
    num_steps: int
    parameters: list[nn.Parameter] = field(repr=False)
    optimizer: Any = field(repr=False)
    lr_scheduler: Any = field(repr=False)
    ema: EMAModel | None = field(repr=False)
    losses: torch.Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    step: int = 0
    trusted_from: int = 0
    is_checked: bool = False
    should_stop: bool = False

    @property
    def learning_rate(self) -> float:
        return self.lr_scheduler.get_last_lr()[0]

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within the block the model has its averaged weights, if an average is kept."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def restart(self) -> None:
        """
        Goes on from the weights that the model has now, such as earlier ones, at half the learning rate: what
        optimizer, average and losses were before this step counts no more.
        """
        for group in self.optimizer.param_groups:
            group["lr"] /= 2
        schedule = self.lr_scheduler.scheduler
        schedule.base_lrs = [rate / 2 for rate in schedule.base_lrs]  # part of a checkpoint
        schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.optimizer.state.clear()
        if self.ema is not None:
            self.ema.shadow_params = [parameter.detach().clone() for parameter in self.parameters]
        self.trusted_from = self.step


class Average(EMAModel):
    """diffusers' moving average, in one pass over memory a step: several times faster on a CPU."""

    @torch.no_grad()
    def step(self, parameters: Sequence[nn.Parameter]) -> None:
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)


class LoopCallback:
    """What a training says while it runs, on every process; the methods of a subclass need not do anything."""

    def on_step_end(self, state: LoopState) -> None:
        """After every step."""

    def on_log(self, state: LoopState, logs: dict[str, float]) -> None:
        """With `loss` and `learning_rate`, every `CHECK_EVERY` steps and after the last one."""

    def on_save(self, state: LoopState, checkpoint: Path) -> None:
        """After a checkpoint was written."""
