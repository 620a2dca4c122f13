"""Random numbers that belong to an example of a task, so that all who look at it see the same ones."""

import math

import torch

# Constants of splitmix64, as int64 has them.
_STEP, _MULTIPLY = -0x61C8864680B583EB, (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


def _mix(state: torch.Tensor) -> torch.Tensor:
    """The finalizer of splitmix64 on int64, whose products wrap around; neighbouring states give unrelated numbers."""
    state = (state ^ _shift(state, 30)) * _MULTIPLY[0]
    state = (state ^ _shift(state, 27)) * _MULTIPLY[1]
    return state ^ _shift(state, 31)


def _shift(state: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, with zeros from the left."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


class ExampleGenerator:
    """
    Random numbers for B examples of each of T tasks. They follow from the condition of the task, the example and the
    number of the draw, and from nothing else: not from the other tasks or examples of a batch, nor from what was drawn
    for it before. An example with noise is the same one for every method and in every evaluation.

    Args:
        table (`torch.Tensor`): The conditions of the tasks, shape `(T, width)`.
        examples (`torch.Tensor`): Indices of the examples: shape `(B,)`, for all tasks the same, or `(T, B)`.
        stream (`int`): Another one gives other numbers, for the examples of another split.
    """

    def __init__(self, table: torch.Tensor, examples: torch.Tensor, stream: int = 0):
        tasks = torch.full((len(table),), stream, dtype=torch.int64, device=table.device)
        for column in (table.float() + 0.0).unbind(1):  # 0.0 makes one zero of two
            tasks = _mix(tasks + column.contiguous().view(torch.int32).long() + _STEP)
        self._states = _mix(tasks.unsqueeze(1) + (examples.to(table.device) + 1) * _STEP)  # (T, B)

    def _bits(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Whole numbers of 24 bits, shape `(T, B, *shape)`."""
        self._states = _mix(self._states + _STEP)
        places = torch.arange(1, math.prod(shape) + 1, device=self._states.device) * _STEP
        numbers = _mix(self._states.unsqueeze(-1) + places)
        return _shift(numbers, 40).view(*self._states.shape, *shape)

    def rand(self, *shape: int) -> torch.Tensor:
        """Uniform in [0, 1), float32 of shape `(T, B, *shape)`."""
        return self._bits(shape) / 2**24

    def randn(self, *shape: int) -> torch.Tensor:
        """Normal numbers, float32 of shape `(T, B, *shape)`."""
        radius = (-2 * torch.log1p(-self.rand(*shape))).sqrt()
        return radius * torch.cos(2 * math.pi * self.rand(*shape))

    def randint(self, high: int, *shape: int) -> torch.Tensor:
        """Whole numbers from 0 to `high - 1`, int64 of shape `(T, B, *shape)`."""
        return (self.rand(*shape) * high).long()

    def rand_like(self, values: torch.Tensor) -> torch.Tensor:
        """`rand` for images or labels of these examples, of their shape `(T, B, ...)`."""
        return self.rand(*values.shape[2:])

    def randn_like(self, values: torch.Tensor) -> torch.Tensor:
        """`randn` for images or labels of these examples, of their shape `(T, B, ...)`."""
        return self.randn(*values.shape[2:])
