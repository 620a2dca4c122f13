"""What does not fit into memory at once, in smaller parts; and rows in blocks of sizes that nobody chooses."""

import logging
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

# What oneDNN, which computes convolutions on a CPU, says where it gets no memory for its program or its scratchpad.
ONEDNN_MESSAGE = "could not create a primitive"
# The last bits of a matrix product depend on its shape. So rows are computed in blocks of fixed sizes, and the last one
# is filled up. On a CPU the first ones are small, which keeps one row cheap, and the others large: a matrix product of
# 100 rows does three quarters more in a second than one of 40, and 100 and 200 rows fill their blocks.
CPU_BLOCKS, CPU_BLOCK = (8, 32, 60), 100
DEVICE_BLOCK = 256
# Nor has a block more values than this, which bounds its memory: that of long rows has fewer of them.
MAX_BLOCK_VALUES = 2**22

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


def in_blocks(
    function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, length: int, in_parts: InParts
) -> Iterator[torch.Tensor]:
    """
    `function` of the rows `(N, *)`, block by block. The bits of a row depend on its index alone, but where memory runs
    out: a block is then computed in parts.

    Args:
        length (`int`): Values that the function has to do with for each row.
    """
    first, later = (CPU_BLOCKS, CPU_BLOCK) if rows.device.type == "cpu" else ((), DEVICE_BLOCK)
    most = max(1, MAX_BLOCK_VALUES // length)
    start, index = 0, 0
    while start < len(rows):
        size = min(most, first[index] if index < len(first) else later)
        inside = rows[start : start + size]
        filled = F.pad(inside, (0, 0) * (rows.ndim - 1) + (0, size - len(inside)))
        yield in_parts(function, filled)[: len(inside)]
        start, index = start + size, index + 1
