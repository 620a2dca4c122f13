"""A network for each datum, side by side from one start, and the start that is learned for that."""

import dataclasses
import itertools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call, vmap

from ..layout import ParameterLayout
from ..models.condition import Condition
from ..networks.runner import NetworkRunner
from ..tasks.data_task import DataTask
from ..training import Loop, LoopArguments
from ..utils.files import replacing
from ..utils.seeds import derive_seed
from .dataset import SnapshotWriter
from .zoo import SideBySide

# Networks that are trained side by side, and the values that their parameters and outputs may have in all.
MOST_AT_ONCE, MOST_VALUES = 128, 2**23
# Of a start that is meta-learned: steps of gradient descent that it is learned for, and their first rate.
INNER_STEPS, INNER_RATE = 3, 1e-2
# Pairs of networks that are mixed, and how far off the mixtures of networks from one start are at most.
NUM_MIXED, MOST_MIXING = 64, 1.0

logger = logging.getLogger(__name__)


def fit_networks(
    loop: Loop, task: DataTask, networks: NetworkRunner, signals: torch.Tensor, args: LoopArguments
) -> torch.Tensor:
    """
    Trains one network for each datum, all from the base model's own parameters. They do not influence each other.

    Args:
        loop (`Loop`): Where the training runs. With `resume`, blocks that an earlier call has finished are kept.
        networks (`NetworkRunner`): Runs them.
        signals (`torch.Tensor`): Shape `(N, P, C)`.
        args (`LoopArguments`): A batch are `batch_size` coordinates, or all if there are fewer, the same for all.

    Returns:
        `torch.Tensor`: Parameters, shape `(N, D)`.
    """
    networks.model.to(loop.device)
    start, coordinates = networks.base_parameters(), task.coordinates().to(loop.device)
    args = dataclasses.replace(args, batch_size=min(args.batch_size, len(coordinates)))
    values = len(start) + args.batch_size * sum(t.shape[0] for t in networks.model.state_dict().values())
    found = []
    for number, rows in enumerate(torch.arange(len(signals)).split(max(1, min(MOST_AT_ONCE, MOST_VALUES // values)))):
        path = None if loop.checkpoint_dir is None else Path(loop.checkpoint_dir, f"block-{number}.safetensors")
        if loop.resume and path is not None and path.is_file():
            found.append(load_file(path)["values"])
            continue
        block, targets = SideBySide(start, len(rows)), signals[rows].to(loop.device)

        def loss_function(model, indices, generator, targets=targets):
            outputs = model(networks, task.predict, {"coordinates": coordinates[indices]}, shared=True)
            # The sum over networks: each gets the gradient of its own loss.
            return task.error(outputs, targets[:, indices]).sum()

        part = dataclasses.replace(
            loop, seed=derive_seed(loop.seed, number), checkpoint_dir=None, checkpointing_steps=None
        )
        part.train(
            block, loss_function, len(coordinates), args, description=f"networks {rows[0] + 1} to {rows[-1] + 1}"
        )
        found.append(block.values.detach().cpu())
        if path is not None and loop.accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                save_file({"values": found[-1]}, file)
    return torch.cat(found)


def write_networks_of_data(
    folder: str | os.PathLike,
    task: DataTask,
    layout: ParameterLayout,
    parts: Sequence[tuple[torch.Tensor, Sequence[Condition], torch.Tensor, bool]],
    step: int,
    seed: int,
) -> None:
    """
    Writes the parameter data set `folder`, with the columns `error`, the loss of each network, `heldout`, 1 for
    networks of data that no generator may see, and `datum`, the number of the datum. Of equal data, which have equal
    networks, the first one is kept.

    Args:
        parts (`Sequence`): Parameters `(N, D)`, conditions and losses `(N,)` of networks, and whether these are held
            out.
    """
    number, equal = itertools.count(), 0
    with SnapshotWriter(folder, layout, metrics=("error", "heldout", "datum"), fields=task.fields) as writer:
        for parameters, conditions, errors, heldout in parts:
            for row, condition, error in zip(parameters, conditions, errors.tolist(), strict=True):
                columns = {"error": error, "heldout": float(heldout), "datum": float(next(number))}
                if writer.find(row) is None:
                    writer.write(row, step=step, seed=seed, condition=condition, **columns)
                else:
                    equal += 1
    if equal:
        logger.warning("%d data are equal to others, whose networks stand for them", equal)


def check_starts(task: DataTask, networks: NetworkRunner, parameters: torch.Tensor) -> float:
    """
    How far networks halfway between two are from the mean of what both render, as a share of what they differ by: the
    median over some pairs of (outputs of the mean - mean of outputs)² / (half of their difference)². Well below 1 for
    networks from one start, which are alike; a warning from `MOST_MIXING` on.

    Args:
        parameters (`torch.Tensor`): Shape `(K, D)`.
    """
    order = torch.randperm(len(parameters), generator=torch.Generator().manual_seed(0))[: 2 * NUM_MIXED]
    first, second = parameters[order].tensor_split(2)
    second = second[: len(first)]
    first = first[: len(second)]
    ends = [task.render_all(networks, rows) for rows in (first, second)]
    between = task.render_all(networks, (first + second) / 2)
    error = (between - (ends[0] + ends[1]) / 2).square().mean((1, 2))
    mixing = (error / ((ends[0] - ends[1]) / 2).square().mean((1, 2))).median().item()
    if not mixing < MOST_MIXING:
        logger.warning(
            "networks halfway between two render something else than what lies between their data (%.2g of the "
            "difference, below %.2g for networks from one start): were they trained from different starts? Train all "
            "from one network, or align them (scripts/collect.py --import ... --align)",
            mixing,
            MOST_MIXING,
        )
    return mixing


class MetaLearned(nn.Module):
    """A network from whose tensors `names` a few steps of gradient descent are to reach any datum."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        super().__init__()
        self.model, self.names = model, list(names)
        self.log_rate = nn.Parameter(torch.tensor(INNER_RATE).log())

    def forward(self, task: DataTask, coordinates: torch.Tensor, signals: torch.Tensor) -> torch.Tensor:
        """The mean loss after the steps, through all of them (MAML), a scalar."""
        shared = dict(self.model.named_parameters())

        def render(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
            return task.render(lambda points: functional_call(self.model, shared | tensors, points), coordinates)

        tensors = {name: shared[name].expand(len(signals), *shared[name].shape) for name in self.names}
        for _ in range(INNER_STEPS):
            loss = task.error(vmap(render)(tensors), signals).sum()
            gradients = torch.autograd.grad(loss, list(tensors.values()), create_graph=True)
            rate = self.log_rate.exp()
            tensors = {name: tensors[name] - rate * g for name, g in zip(self.names, gradients, strict=True)}
        return task.error(vmap(render)(tensors), signals).mean()


def learn_start(
    loop: Loop, task: DataTask, model: nn.Module, layout: ParameterLayout, args: LoopArguments
) -> torch.Tensor:
    """
    Trains all parameters of `model` in place such that `INNER_STEPS` steps on the tensors of `layout` fit any datum.

    Returns:
        `torch.Tensor`: The loss at every step.
    """
    signals, coordinates = task.signals("train"), task.coordinates().to(loop.device)

    def loss_function(model, indices, generator):
        return model(task, coordinates, signals[indices].to(loop.device))

    meta = MetaLearned(model, layout.names)
    return loop.train(meta, loss_function, len(signals), args, description="meta-learned start")
