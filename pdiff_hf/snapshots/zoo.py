"""A zoo: the specialists of many tasks of a family, fine-tuned from one base model side by side."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..layout import ParameterLayout
from ..models.condition import Condition
from ..networks.runner import NetworkRunner
from ..tasks.family import Family
from ..training import Loop, LoopArguments, LoopState
from ..utils.devices import seed_global
from .dataset import SnapshotWriter


@dataclass(frozen=True)
class ZooArguments(LoopArguments):
    """
    Args:
        num_steps (`int`, *optional*, defaults to 400): Optimizer steps of each specialist.
        batch_size (`int`, *optional*, defaults to 32): Examples in a step of one specialist.
        learning_rate (`float`, *optional*, defaults to 3e-3).
        num_snapshots (`int`, *optional*, defaults to 2): Of each specialist, the last one after its last step.
        every_n_steps (`int`, *optional*, defaults to 50): Steps between two snapshots.
    """

    num_steps: int = 400
    batch_size: int = 32
    learning_rate: float = 3e-3
    num_snapshots: int = 2
    every_n_steps: int = 50

    @property
    def snapshot_steps(self) -> list[int]:
        return [self.num_steps - i * self.every_n_steps for i in reversed(range(self.num_snapshots))]


class SideBySide(nn.Module):
    """The parameters of N networks while they are trained, `(N, D)`, all from one start or each from its own."""

    def __init__(self, start: torch.Tensor, num_networks: int):
        super().__init__()
        self.values = nn.Parameter(start.expand(num_networks, -1).clone())

    def forward(self, networks: NetworkRunner, predict: Callable, batch: Any, shared: bool = False) -> torch.Tensor:
        return networks.stack(predict, self.values, batch, shared)


class Specialists(SideBySide):
    """With S snapshots of each network, `(S, N, D)`."""

    snapshots: torch.Tensor
    _ddp_params_and_buffers_to_ignore = ["snapshots"]  # long, and the same on every process

    def __init__(self, start: torch.Tensor, num_networks: int, num_snapshots: int):
        super().__init__(start, num_networks)
        self.register_buffer("snapshots", torch.zeros(num_snapshots, *self.values.shape))


def train_specialists(
    loop: Loop,
    family: Family,
    networks: NetworkRunner,
    table: torch.Tensor,
    args: ZooArguments,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Fine-tunes one network for each of T tasks, all from one start and with the same examples in the same order, in one
    batched pass forward and backward a step. They do not influence each other.

    Args:
        loop (`Loop`): Where the training runs.
        table (`torch.Tensor`): The conditions of the tasks, shape `(T, width)`.
        start (`torch.Tensor`, *optional*): Shape `(D,)`, or `(T, D)` for a start of their own; the base model's own
            parameters by default.

    Returns:
        `torch.Tensor`: Parameters after `args.snapshot_steps`, shape `(S, T, D)`.
    """
    networks.model.to(loop.device)
    start = networks.base_parameters() if start is None else start
    specialists = Specialists(start, len(table), args.num_snapshots)
    table = table.to(loop.device)

    def loss_function(model, indices, generator):
        seed_global(generator.initial_seed(), generator.device)  # of what a network draws by chance
        batch = family.training_batch(table, indices, generator)
        logits = model(networks, family.predict, batch)  # (T, B, C)
        # The sum over tasks of the mean over examples: each network gets the gradient of its own loss.
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()) * len(table)

    def after_step(state: LoopState) -> None:
        if state.step in args.snapshot_steps:
            specialists.snapshots[args.snapshot_steps.index(state.step)] = specialists.values.detach()

    num_examples, description = family.num_examples("train"), f"{len(table)} specialists"
    loop.train(specialists, loss_function, num_examples, args, description=description, after_step=after_step)
    return specialists.snapshots.cpu()


def write_zoo(
    folder: str | os.PathLike,
    family: Family,
    layout: ParameterLayout,
    conditions: Sequence[Condition],
    args: ZooArguments,
    snapshots: torch.Tensor,
    seed: int,
) -> None:
    """Writes the parameter data set `folder` from what [`train_specialists`] returns, shape `(S, T, D)`."""
    with SnapshotWriter(folder, layout, fields=family.fields) as writer:
        for step, parameters in zip(args.snapshot_steps, snapshots, strict=True):
            for row, condition in zip(parameters, conditions, strict=True):
                writer.write(row, step=step, seed=seed, condition=condition)
