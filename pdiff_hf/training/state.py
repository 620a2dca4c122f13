"""What a training loop tells of itself while it runs, and its checkpoints: always whole, nothing of ours pickled."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..utils.files import remove, sync


@dataclass
class LoopState:
    """
    What hooks see of a training, and how they change its course. All processes must ask for the same. Callbacks of
    transformers see a `TrainerState` of it, and may set `control.should_training_stop`.

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
    callbacks: Sequence[TrainerCallback] = field(default=(), repr=False)
    stage: str = ""
    told: TrainerState = field(default_factory=TrainerState, repr=False)
    control: TrainerControl = field(default_factory=TrainerControl, repr=False)

    @property
    def learning_rate(self) -> float:
        return self.lr_scheduler.get_last_lr()[0]

    def tell(self, event: str, **kwargs: Any) -> None:
        """Tells all callbacks of an event, such as `on_step_end`."""
        self.told.global_step, self.told.max_steps = self.step, self.num_steps
        if "logs" in kwargs:
            self.told.log_history.append({**kwargs["logs"], "step": self.step, "stage": self.stage})
        for callback in self.callbacks:
            getattr(callback, event)(None, self.told, self.control, stage=self.stage, **kwargs)
        self.should_stop = self.should_stop or self.control.should_training_stop

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

    def save(self, accelerator: Accelerator, folder: Path) -> Path:
        """
        Writes a checkpoint into `folder`, where the one before is kept too. It has a temporary name at first, so that a
        `checkpoint-N` folder is always whole.
        """
        part, checkpoint = folder / f"part-{self.step}", folder / f"checkpoint-{self.step}"
        if accelerator.is_main_process:
            remove(part)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(part))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                # Not registered with Accelerate, which would pickle and unpickle it.
                numbers = {"step": torch.tensor(self.step), "trusted_from": torch.tensor(self.trusted_from)}
                averages = self.ema.shadow_params if self.ema is not None else ()
                ema = {f"ema.{i}": tensor.contiguous() for i, tensor in enumerate(averages)}
                save_file({"losses": self.losses} | numbers | ema, part / "loop.safetensors")
                sync(part)
                remove(checkpoint)
                part.rename(checkpoint)
                for old in _checkpoints(folder)[:-2]:
                    remove(old)
        except BaseException:
            if accelerator.is_main_process:
                remove(part)
            raise
        accelerator.wait_for_everyone()
        return checkpoint

    def load(self, accelerator: Accelerator, checkpoint: Path) -> None:
        """Sets models, optimizers and this state to those of a checkpoint."""
        accelerator.load_state(str(checkpoint))
        device = accelerator.device
        # With several processes Accelerate says `cpu:0`, which safetensors does not know.
        tensors = load_file(checkpoint / "loop.safetensors", "cpu" if device.type == "cpu" else str(device))
        self.step, self.trusted_from = int(tensors["step"]), int(tensors["trusted_from"])
        self.losses = tensors["losses"][: self.step]
        if self.ema is not None:
            self.ema.shadow_params = [tensors[f"ema.{i}"] for i in range(len(self.parameters))]
            self.ema.optimization_step = self.step


def latest_checkpoint(folder: str | os.PathLike | None) -> Path | None:
    """The `checkpoint-N` folder with the highest N, if there is one."""
    checkpoints = [] if folder is None else _checkpoints(Path(folder))
    return checkpoints[-1] if checkpoints else None


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


class Average(EMAModel):
    """diffusers' moving average, in one pass over memory a step: several times faster on a CPU."""

    @torch.no_grad()
    def step(self, parameters: Sequence[nn.Parameter]) -> None:
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)
