"""Which units of a network's hidden layers may be reordered, and what has to be reordered with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from ..layout import ParameterLayout
from ..tasks import ClassificationTask, Task
from ..tasks.task import load_batch

# So large a part of the largest output, reordered units may change outputs by, as the order of a sum changes rounding.
TOLERANCE = 1e-3


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

    def reordered(self, tensors: Mapping[str, torch.Tensor], order: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of a network with these units in another order, `(size,)`."""
        new = dict(tensors)
        for axis in self.axes:
            index = (order[:, None] * axis.block + torch.arange(axis.block)).flatten()
            new[axis.name] = new[axis.name].index_select(axis.dim, index.to(new[axis.name].device))
        return new


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
        changes = [(outputs(HiddenUnits(0, axes).reordered(tensors, order)) - expected).abs().amax() for axes in tries]
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
