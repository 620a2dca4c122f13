"""
Networks that were trained from different initialisations, with their hidden units brought into one common order.

The order of the hidden units of a layer means nothing to the network, but everything to a generator that sees a vector.
Weight matching (arXiv 2209.04836, algorithm 1) chooses, layer by layer, the order in which the weights of one network
are most like those of another. No network's function changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from ..layout import ParameterLayout
from ..tasks import ClassificationTask, Task
from ..tasks.task import load_batch

# So large a part of the largest output, reordered units may change outputs by, as the order of a sum changes rounding.
TOLERANCE = 1e-3
# So many parameters are matched at a time.
CHUNK_SIZE = 2**24
MAX_SWEEPS = 100
MAX_ROUNDS = 100
# A new order must gain more than this share of what is there: less is rounding, and might go back and forth for ever.
MIN_GAIN = 1e-6


class AlignmentError(ValueError):
    """The hidden units of a network cannot be reordered; the message names the module or the tensor."""


@dataclass(frozen=True)
class Axis:
    """
    A dimension of a tensor that belongs to the hidden units of a layer.

    Args:
        name (`str`): Of the tensor.
        dim (`int`): Of its dimensions.
        block (`int`): So many entries in a row belong to one unit: after a `Flatten`, one for each position.
    """

    name: str
    dim: int
    block: int


@dataclass(frozen=True, eq=False)
class HiddenUnits:
    """
    The units of a hidden layer (its channels, if it is a convolution), which may be reordered.

    Args:
        size (`int`): How many there are.
        axes (`list[Axis]`): Everything that has to be reordered with them.
    """

    size: int
    axes: list[Axis]

    def reorder(self, tensors: Mapping[str, torch.Tensor], order: torch.Tensor) -> None:
        """Brings these units of K networks, of tensors `(K, *shape)`, into an order `(K, size)`, in place."""
        for axis in self.axes:
            tensor, dim = tensors[axis.name], axis.dim + 1
            blocks = tensor.unflatten(dim, (self.size, axis.block))
            index = order.to(tensor.device).view(
                len(order), *[1] * (dim - 1), self.size, *[1] * (blocks.ndim - dim - 1)
            )
            tensor.copy_(blocks.take_along_dim(index, dim).flatten(dim, dim + 1))


@torch.no_grad()
def find_hidden_units(task: Task, model: nn.Module, layout: ParameterLayout) -> list[HiddenUnits]:
    """
    The hidden units of a network that may be reordered, layer by layer: of each linear layer and convolution that it
    calls, but for the last one, those that the next one takes in, with what layers between them have for each unit.
    Whether that is all that depends on their order, the network itself says: with other weights than its own, and the
    units in some other order, it must compute the same.

    Args:
        task (`Task`): Says what goes into the network.
        model (`nn.Module`): The network; it is put in eval mode.
        layout (`ParameterLayout`): The tensors that can be reordered.

    Raises:
        AlignmentError: names the layers whose units cannot be reordered alone, or a tensor that the layout lacks.
        LayoutError: if the layout does not fit the model.
    """
    layout.check_fits(model.state_dict())
    batch = load_batch(task, "validation", [0, 1], next(model.eval().parameters()).device)
    run = task.predict if isinstance(task, ClassificationTask) else task.loss
    generator = torch.Generator().manual_seed(0)

    def outputs(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """All that the network gives, `(n,)`."""
        found: list[torch.Tensor] = []

        def call(*args: Any, **kwargs: Any) -> Any:
            output = functional_call(model, dict(tensors), args, kwargs)
            found.extend(leaf.flatten().float() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
            return output

        run(call, batch)
        if not found:
            raise AlignmentError(f"{type(task).__name__} does not call the network")
        return torch.cat(found)

    def other(name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Of about the same size, and different for all units."""
        draws = torch.randn(2, *tensor.shape, generator=generator).to(tensor)
        values = tensor * (1 + draws[0] / 2) + draws[1] / 10
        return values.abs() + 0.1 if name.endswith("running_var") else values

    own = (*model.named_parameters(), *model.named_buffers())
    tensors = {name: other(name, tensor) for name, tensor in own if tensor.is_floating_point()}
    called: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
        if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    ]
    try:
        expected = outputs(tensors)
    finally:
        for hook in hooks:
            hook.remove()
    eps = max(torch.finfo(tensor.dtype).eps for tensor in tensors.values())
    most = max(TOLERANCE, 8 * eps) * expected.abs().amax()
    if repeated := next((name for name in called if called.count(name) > 1), None):
        raise AlignmentError(f"module '{repeated}' is used more than once, so that its units cannot be reordered")
    layers = [i for i, name in enumerate(called) if isinstance(model.get_submodule(name), nn.Linear | _ConvNd)]
    units = [_units(model, called[i : j + 1]) for i, j in zip(layers, layers[1:], strict=False)]
    if not units:
        raise AlignmentError(f"{type(model).__name__} has no hidden layer whose units could be reordered")
    for group, i, j in zip(units, layers, layers[1:], strict=False):
        cycle = torch.randperm(group.size, generator=generator)
        order = torch.empty_like(cycle).scatter(0, cycle, cycle.roll(1))  # no unit stays where it is
        # Without the layer that takes them in, their order must matter: else the outputs could not tell.
        tries = [group.axes, group.axes[:-1]] if all(axis.block and axis.name in tensors for axis in group.axes) else []
        changes = []
        for axes in tries:
            moved = {axis.name: tensors[axis.name][None].clone() for axis in axes}
            HiddenUnits(group.size, axes).reorder(moved, order[None])
            changes.append((outputs(tensors | {n: new[0] for n, new in moved.items()}) - expected).abs().amax())
        if not changes or not changes[0] <= most < changes[1] and group.size > 1:
            raise AlignmentError(
                f"the hidden units between the modules '{called[i]}' and '{called[j]}' cannot be reordered: something "
                "else depends on their order, as after a residual connection, in attention, in groups of channels, or "
                "where weights are computed from others. Networks of linear and convolutional layers in a row, with "
                "activations, pooling and normalization, can be aligned"
            )
    buffers = {name for name, _ in model.named_buffers()}
    absent = [axis.name for group in units for axis in group.axes if axis.name not in layout.names]
    if statistics := [name for name in absent if name in buffers]:
        raise AlignmentError(
            f"'{statistics[0]}' is a statistic of one network, which has to be reordered with the units of its layer, "
            "but is not generated: all networks would get the base model's. Networks with batch normalization cannot "
            "be aligned"
        )
    if absent:
        raise AlignmentError(
            f"the snapshots do not hold '{absent[0]}', which has to be reordered with the units of its layer, but "
            "would stay in the order of the base model; select all tensors (--select all)"
        )
    return units


def _units(model: nn.Module, names: list[str]) -> HiddenUnits:
    """Those of the first of some modules that are called one after the other, with what the others have for them."""
    first, *between, last = (model.get_submodule(name) for name in names)
    size = len(first.weight)  # type: ignore[arg-type]  # of a linear layer or a convolution
    axes = [Axis(f"{names[0]}.{name}", 0, 1) for name in ("weight", "bias") if getattr(first, name) is not None]
    for prefix, module in zip(names[1:-1], between, strict=True):
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.ndim and len(tensor) % size == 0:
                axes.append(Axis(f"{prefix}.{name}", 0, len(tensor) // size))
    block, rest = divmod(last.weight.shape[1], size)  # type: ignore[union-attr,operator,index]
    return HiddenUnits(size, [*axes, Axis(f"{names[-1]}.weight", 1, 0 if rest else block)])


@torch.no_grad()
def align_snapshots(task: Task, model: nn.Module, layout: ParameterLayout, parameters: torch.Tensor) -> torch.Tensor:
    """
    Reorders the hidden units of networks so that their parameters become as alike as weight matching can make them:
    first all like the first network, then all like their mean, again and again until nothing changes. Each network
    computes what it computed before.

    Args:
        task (`Task`): What the networks are for; it says what goes into them.
        model (`nn.Module`): The base model: layers in a row of the kinds `Linear`, `Conv1d` and `Conv2d`, element-wise
            activations, pooling, `Flatten`, and layer and batch normalization.
        layout (`ParameterLayout`): Of the parameters. It must hold every tensor that is reordered.
        parameters (`torch.Tensor`): Shape `(K, D)`; left as it is.

    Returns:
        `torch.Tensor`: Shape `(K, D)`, the same values in another order.

    Raises:
        AlignmentError: for a network with anything else in it, such as a residual connection or attention, or a layout
            that lacks a tensor.
    """
    units = find_hidden_units(task, model, layout)
    aligned = parameters.clone()
    chunks = aligned.split(max(1, CHUNK_SIZE // layout.num_parameters))  # views
    first = aligned[0].clone()
    for chunk in chunks:
        match_weights(chunk, first, layout, units)
    for _ in range(MAX_ROUNDS):
        mean = aligned.mean(0)
        changed = [match_weights(chunk, mean, layout, units) for chunk in chunks]
        if not any(changed):
            break
    return aligned


def match_weights(
    parameters: torch.Tensor, reference: torch.Tensor, layout: ParameterLayout, units: Sequence[HiddenUnits]
) -> bool:
    """
    Reorders the units of networks in place, to be as near as possible to those of a reference: one layer after the
    other, each by a linear assignment, until no layer can be improved. All networks are matched at once.

    Args:
        parameters (`torch.Tensor`): Shape `(K, D)`.
        reference (`torch.Tensor`): Shape `(D,)`.

    Returns:
        `bool`: Whether anything has changed.
    """
    tensors = _views(parameters, layout)
    targets = _views(reference[None], layout)
    rng = np.random.default_rng(0)
    any_change = False
    for _ in range(MAX_SWEEPS):
        changed = False
        for i in rng.permutation(len(units)):
            size = units[i].size
            similarity = torch.zeros(len(parameters), size, size, device=parameters.device)  # (K, n, n)
            for axis in units[i].axes:
                target = _units_first(targets[axis.name], axis, size)  # (1, n, m)
                similarity += target @ _units_first(tensors[axis.name], axis, size).mT  # (K, m, n)
            order = _best_orders(similarity.double())
            if order is not None:
                changed = any_change = True
                units[i].reorder(tensors, order)
        if not changed:
            break
    return any_change


def _views(parameters: torch.Tensor, layout: ParameterLayout) -> dict[str, torch.Tensor]:
    """`(K, D)` to the tensors by name, `(K, *shape)`, which share its memory."""
    pieces = parameters.split(layout.sizes, dim=1)
    return {
        name: piece.view(-1, *shape) for name, shape, piece in zip(layout.names, layout.shapes, pieces, strict=True)
    }


def _units_first(tensor: torch.Tensor, axis: Axis, size: int) -> torch.Tensor:
    """`(K, *shape)` to `(K, n, m)`: all that a tensor holds for each of n units."""
    return tensor.unflatten(axis.dim + 1, (size, axis.block)).movedim(axis.dim + 1, 1).flatten(2)


def _best_orders(similarity: torch.Tensor) -> torch.Tensor | None:
    """
    For `(K, n, n)` similarities of units of the reference (rows) and of K networks (columns): the unit of each network
    that belongs in each place, shape `(K, n)`, or `None` if all are where they belong.
    """
    identity = torch.arange(similarity.shape[1])
    orders = torch.stack(
        [torch.from_numpy(linear_sum_assignment(matrix, maximize=True)[1]) for matrix in similarity.cpu().numpy()]
    ).to(similarity.device)
    before = similarity.diagonal(dim1=1, dim2=2)  # (K, n)
    after = similarity.gather(2, orders[:, :, None]).squeeze(2)  # (K, n)
    better = (after - before).sum(1) > MIN_GAIN * before.abs().sum(1)  # (K,)
    return torch.where(better[:, None], orders, identity.to(orders.device)) if better.any() else None
