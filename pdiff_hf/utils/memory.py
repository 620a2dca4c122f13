"""What does not fit into memory at once is computed in smaller parts."""

import logging
from collections.abc import Callable

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

# What oneDNN, which computes convolutions on a CPU, says where it gets no memory for its program or its scratchpad.
ONEDNN_MESSAGE = "could not create a primitive"

logger = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or on the CPU, so that less of the same could fit."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or should_reduce_batch_size(error):
        return True
    return isinstance(error, RuntimeError) and str(error) == ONEDNN_MESSAGE


def halve(size: int, what: str) -> int:
    """
    Half of `size`, for the next attempt; says so. Call it after the `except` block: inside, the exception holds on to
    what the failed attempt had allocated.
    """
    clear_device_cache(garbage_collection=True)
    half = (size + 1) // 2
    logger.warning("out of memory with %d %s at once: going on with %d", size, what, half)
    return half


class InParts:
    """
    Applies functions to the rows of tensors: all at once until memory runs out, and fewer at once from then on.

    Args:
        what (`str`): What the rows are, for the warning.
    """

    def __init__(self, what: str):
        self.what = what
        self.limit: int | None = None

    def __call__(self, function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """`function(rows)`, shape `(N, *)`, for a function that treats every row of `(N, *)` alike."""
        while True:
            size = min(len(rows), self.limit or len(rows))
            try:
                return torch.cat([function(part) for part in rows.split(size)])
            except Exception as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            self.limit = halve(size, self.what)
