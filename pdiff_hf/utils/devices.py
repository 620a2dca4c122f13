"""Batches of data, and chance, on the device of a network."""

from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device


def to_device(batch: Any, device: torch.device) -> Any:
    """
    All tensors in a batch on `device`. What goes to a GPU is pinned in memory first, so that the program does not wait
    until the GPU, busy with the last batch, has taken it.
    """
    if device.type != "cuda":
        return send_to_device(batch, device)
    return send_to_device(recursively_apply(_pinned, batch), device, non_blocking=True)


def seed_global(seed: int, device: torch.device) -> None:
    """
    `torch.manual_seed` for what is drawn on `device`. For a CPU it leaves out GPUs that nothing has used, for each of
    which torch would write down the whole stack: most of a millisecond, at every step of a training.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor  # what is there already cannot be
