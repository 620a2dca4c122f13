"""Checkpoints of a training loop: written whole or not at all, and read without unpickling what is ours."""

import os
import re
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from ..utils.files import remove, sync
from .state import LoopState


def latest_checkpoint(checkpoint_dir: str | os.PathLike) -> Path | None:
    """The `checkpoint-N` folder with the highest N."""
    checkpoints = _checkpoints(Path(checkpoint_dir))
    return checkpoints[-1] if checkpoints else None


def _checkpoints(checkpoint_dir: Path) -> list[Path]:
    found = [path for path in checkpoint_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def save_checkpoint(
    accelerator: Accelerator, checkpoint_dir: str | os.PathLike, limit: int, state: LoopState, losses: torch.Tensor
) -> Path:
    """Under a temporary name first, so that a `checkpoint-N` folder is always whole."""
    folder = Path(checkpoint_dir)
    part, checkpoint = folder / f"part-{state.step}", folder / f"checkpoint-{state.step}"
    if accelerator.is_main_process:
        remove(part)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(part))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            # Not registered with Accelerate, which would pickle and unpickle it.
            tensors = {"losses": losses, "step": torch.tensor(state.step)}
            tensors["trusted_from"] = torch.tensor(state.trusted_from)
            for i, tensor in enumerate(state.ema.shadow_params if state.ema is not None else ()):
                tensors[f"ema.{i}"] = tensor.contiguous()
            save_file(tensors, part / "loop.safetensors")
            sync(part)
            remove(checkpoint)
            part.rename(checkpoint)
    except BaseException:
        if accelerator.is_main_process:
            remove(part)
        raise
    if accelerator.is_main_process:
        for old in _checkpoints(folder)[:-limit]:
            remove(old)
    accelerator.wait_for_everyone()
    return checkpoint


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, state: LoopState, losses: torch.Tensor) -> int:
    """Sets models, optimizers, `state` and `losses` to those of a checkpoint; the number of its step."""
    accelerator.load_state(str(checkpoint))
    tensors = load_file(checkpoint / "loop.safetensors")
    step, state.trusted_from = int(tensors["step"]), int(tensors["trusted_from"])
    losses[:step] = tensors["losses"][:step].to(losses.device)
    if state.ema is not None:
        shadow = [tensors[f"ema.{i}"].to(accelerator.device) for i in range(len(state.parameters))]
        state.ema.shadow_params, state.ema.optimization_step = shadow, step
    return step
