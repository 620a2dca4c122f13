"""Functions of many rows, computed in blocks whose sizes depend on nothing that a caller chooses."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from .memory import InParts

# The last bits of a matrix product depend on its shape. So rows are computed in blocks of fixed sizes, and the last one
# is filled up. On a CPU the first ones are small, which keeps one row cheap, and the others large: a matrix product of
# 100 rows does three quarters more in a second than one of 40, and 100 and 200 rows fill their blocks.
CPU_BLOCKS, CPU_BLOCK = (8, 32, 60), 100
DEVICE_BLOCK = 256
# Nor has a block more values than this, which bounds its memory: that of long rows has fewer of them.
MAX_BLOCK_VALUES = 2**22


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
