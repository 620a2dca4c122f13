"""
Networks that were trained from different initialisations, with their hidden units brought into one common order.

The order of the hidden units of a layer means nothing to the network, but everything to a generator that sees a vector.
Weight matching (arXiv 2209.04836, algorithm 1) chooses, layer by layer, the order in which the weights of one network
are most like those of another. No network's function changes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.utils import send_to_device
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.fx import Node

from ..layout import ParameterLayout
from ..tasks import ClassificationTask, take

# So many numbers are matched at a time.
CHUNK_SIZE = 2**24
MAX_SWEEPS = 100
MAX_ROUNDS = 100
# A new order must gain more than this share of what is there: less is rounding, and might go back and forth for ever.
MIN_GAIN = 1e-6

aten = torch.ops.aten
# With the dimension in which these have their channels, in what goes in and what comes out.
WEIGHTED = {
    aten.linear.default: -1,
    aten.conv1d.default: 1,
    aten.conv1d.padding: 1,
    aten.conv2d.default: 1,
    aten.conv2d.padding: 1,
}
# With the number of dimensions that they need if the second is to be that of the channels.
POOLING = {
    aten.max_pool1d.default: 3,
    aten.avg_pool1d.default: 3,
    aten.adaptive_avg_pool1d.default: 3,
    aten.max_pool2d.default: 4,
    aten.avg_pool2d.default: 4,
    aten.adaptive_avg_pool2d.default: 4,
}
RESHAPING = {
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
}
# Work on each number alone, but are not tagged as `pointwise`.
POINTWISE = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.to.device,
    aten.to.dtype,
}


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


@dataclass(eq=False)
class HiddenUnits:
    """
    The units of a hidden layer (its channels, if it is a convolution), which may be reordered.

    Args:
        size (`int`): How many there are.
        axes (`list[Axis]`): Everything that has to be reordered with them.
    """

    size: int
    axes: list[Axis] = field(default_factory=list)


@torch.no_grad()
def align_snapshots(
    task: ClassificationTask, model: nn.Module, layout: ParameterLayout, parameters: torch.Tensor
) -> torch.Tensor:
    """
    Reorders the hidden units of networks so that their parameters become as alike as weight matching can make them:
    first all like the first network, then all like their mean, again and again until nothing changes. Each network
    computes what it computed before.

    Args:
        task (`ClassificationTask`): What the networks are for; it says what goes into them.
        model (`nn.Module`): The base model: layers in a row of the kinds `Linear`, `Conv1d` and `Conv2d`, element-wise
            activations, pooling, `Flatten`, and layer and batch normalization.
        layout (`ParameterLayout`): Of the parameters. It must hold every tensor that is reordered.
        parameters (`torch.Tensor`): Shape `(K, D)`; left as it is.

    Returns:
        `torch.Tensor`: Shape `(K, D)`, the same numbers in another order.

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
    parameters: torch.Tensor,
    reference: torch.Tensor,
    layout: ParameterLayout,
    units: Sequence[HiddenUnits],
    seed: int = 0,
) -> bool:
    """
    Reorders the units of networks in place, to be as near as possible to those of a reference: one layer after the
    other, each by a linear assignment, until no layer can be improved. All networks are matched at once.

    Args:
        parameters (`torch.Tensor`): Shape `(K, D)`.
        reference (`torch.Tensor`): Shape `(D,)`.
        seed (`int`, *optional*, defaults to 0): Of the order in which layers are matched.

    Returns:
        `bool`: Whether anything has changed.
    """
    tensors = _views(parameters, layout)
    targets = _views(reference[None], layout)
    rng = np.random.default_rng(seed)
    any_change = False
    for _ in range(MAX_SWEEPS):
        changed = False
        for i in rng.permutation(len(units)):
            similarity = sum(
                _units_first(targets[axis.name], axis, units[i].size)  # (1, n, m)
                @ _units_first(tensors[axis.name], axis, units[i].size).mT  # (K, m, n)
                for axis in units[i].axes
            )  # (K, n, n)
            order = _best_orders(similarity.double())
            if order is not None:
                changed = any_change = True
                for axis in units[i].axes:
                    _reorder(tensors[axis.name], axis, order)
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


def _reorder(tensor: torch.Tensor, axis: Axis, order: torch.Tensor) -> None:
    """Reorders the units of K networks in place: `tensor` has shape `(K, *shape)`, `order` `(K, n)`."""
    dim = axis.dim + 1
    blocks = tensor.unflatten(dim, (order.shape[1], axis.block))
    index = order.view(len(order), *[1] * (dim - 1), order.shape[1], *[1] * (blocks.ndim - dim - 1))
    tensor.copy_(blocks.take_along_dim(index, dim).flatten(dim, dim + 1))


# ------------------------------------------------------------------------------------------ which units a network has


class _Captured(Exception):
    """Carries the arguments of the first call of a network."""


def _arguments(task: ClassificationTask, device: torch.device) -> tuple[tuple, dict[str, Any]]:
    """What the task calls its network with, for a batch of two examples."""
    batch = send_to_device(task.collate(take(task.load_split("validation"), [0, 1])), device)

    def capture(*args, **kwargs) -> NoReturn:
        raise _Captured(args, kwargs)

    try:
        task.predict(capture, batch)
    except _Captured as captured:
        return captured.args
    raise AlignmentError(f"{type(task).__name__}.predict does not call the network")


def find_hidden_units(task: ClassificationTask, model: nn.Module, layout: ParameterLayout) -> list[HiddenUnits]:
    """
    The hidden units of a network that may be reordered, layer by layer, found by tracing it with `torch.export`.

    Args:
        task (`ClassificationTask`): Says what goes into the network. Examples are stacked in the first dimension.
        model (`nn.Module`): The network; it is put in eval mode.
        layout (`ParameterLayout`): The tensors that can be reordered.

    Raises:
        AlignmentError: names the module whose part in this is not known, or the tensor that is used twice or that the
            layout lacks.
        LayoutError: if the layout does not fit the model.
    """
    layout.check_fits(model.state_dict())
    args, kwargs = _arguments(task, next(model.parameters()).device)
    try:
        program = torch.export.export(model.eval(), args, kwargs)
    except Exception as error:  # whatever a network's code may raise while it is traced
        reason = str(error).strip().partition("\n")[0]
        raise AlignmentError(f"torch.export cannot trace {type(model).__name__}: {reason}") from error
    buffers = program.graph_signature.inputs_to_buffers
    tracer = _Tracer({**program.graph_signature.inputs_to_parameters, **buffers})
    for node in program.graph.nodes:
        if node.op == "call_function":
            tracer.call(node)
    # The order of the outputs is given.
    (output,) = program.graph.find_nodes(op="output")
    fixed = [tracer.carried[node][0] for node in output.all_input_nodes if node in tracer.carried]
    units = [group for group in tracer.units if group not in fixed]
    if not units:
        raise AlignmentError(f"{type(model).__name__} has no hidden layer whose units could be reordered")
    missing = [axis.name for group in units for axis in group.axes if axis.name not in layout.names]
    if statistics := [name for name in missing if name in buffers.values()]:
        raise AlignmentError(
            f"'{statistics[0]}' is a statistic of one network, which has to be reordered with the units of its layer, "
            "but is not generated: all networks would get the base model's. Networks with batch normalization cannot "
            "be aligned"
        )
    if missing:
        raise AlignmentError(
            f"the snapshots do not hold '{missing[0]}', which has to be reordered with the units of its layer, but "
            "would stay in the order of the base model; select all tensors (--select all)"
        )
    return units


class _Tracer:
    """
    Follows hidden units from the layer that makes them to those that use them.

    Args:
        names (`dict[str, str]`): The names of parameters and buffers, by the names of the graph's inputs.
    """

    def __init__(self, names: dict[str, str]):
        self.names = names
        self.units: list[HiddenUnits] = []
        # The units that a result holds, and in which of its dimensions. What is not here has a fixed order.
        self.carried: dict[Node, tuple[HiddenUnits, int]] = {}

    def call(self, node: Node) -> None:
        """Notes what the call of an operator does to units."""
        if not isinstance(node.meta.get("val"), torch.Tensor | tuple | list):
            return  # an assertion
        inputs = [source for source in node.all_input_nodes if source in self.carried]
        if node.target in WEIGHTED:
            self._weighted(node)
        elif not inputs:
            return
        elif handler := self._handler(node.target):
            units, dim = self.carried[inputs[0]]
            self.carried[node] = (units, handler(node, inputs[0], units, dim))
        else:
            self._refuse(node, "it is not known how it treats the order of its inputs")

    def _handler(self, target: Any) -> Callable | None:
        if target is aten.layer_norm.default:
            return self._layer_norm
        if target is aten.batch_norm.default:
            return self._batch_norm
        if target is aten.mean.dim:
            return self._mean
        if target in POOLING:
            return self._pool
        if target in RESHAPING:
            return self._reshape
        if target in POINTWISE or torch.Tag.pointwise in getattr(target, "tags", ()):
            return self._pointwise
        return None

    def _weighted(self, node: Node) -> None:
        arguments = _bind(node)
        source, weight = arguments["input"], arguments["weight"]
        if arguments.get("groups", 1) != 1:
            self._refuse(node, "its channels form groups")
        dim = WEIGHTED[node.target] % len(_shape(node))
        if source in self.carried:
            units, source_dim = self.carried[source]
            if source_dim != dim:
                self._refuse(node, "it is not applied to the dimension of the hidden units")
            self._add(node, units, weight, 1, _shape(source)[dim] // units.size)
        made = HiddenUnits(_shape(node)[dim])
        self._add(node, made, weight, 0, 1)
        self._add(node, made, arguments["bias"], 0, 1)
        self.units.append(made)
        self.carried[node] = (made, dim)

    def _layer_norm(self, node: Node, source: Node, units: HiddenUnits, dim: int) -> int:
        arguments = _bind(node)
        own_dim = dim - (len(_shape(source)) - len(arguments["normalized_shape"]))
        if own_dim >= 0:  # otherwise each unit is normalised by itself, and all with the same weights
            for name in ("weight", "bias"):
                self._add(node, units, arguments[name], own_dim, _shape(source)[dim] // units.size)
        return dim

    def _batch_norm(self, node: Node, source: Node, units: HiddenUnits, dim: int) -> int:
        if dim != 1:
            self._refuse(node, "it is not applied to the dimension of the hidden units")
        arguments = _bind(node)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self._add(node, units, arguments[name], 0, _shape(source)[1] // units.size)
        return dim

    def _mean(self, node: Node, source: Node, units: HiddenUnits, dim: int) -> int:
        arguments = _bind(node)
        ndim = len(_shape(source))
        reduced = set(range(ndim)) if arguments["dim"] is None else {d % ndim for d in arguments["dim"]}
        if dim in reduced:
            self._refuse(node, "it averages over the hidden units")
        return dim if arguments["keepdim"] else dim - sum(d < dim for d in reduced)

    def _pool(self, node: Node, source: Node, units: HiddenUnits, dim: int) -> int:
        if dim != 1 or len(_shape(source)) != POOLING[node.target]:
            self._refuse(node, "it pools over the hidden units")
        return dim

    def _reshape(self, node: Node, source: Node, units: HiddenUnits, dim: int) -> int:
        before, after = _shape(source), _shape(node)
        for new_dim, size in enumerate(after):
            # As many rows of units as before, and each of them is still one run of all units.
            if math.prod(after[:new_dim]) == math.prod(before[:dim]) and size % units.size == 0:
                return new_dim
        self._refuse(node, f"it breaks up the hidden units in the change of shape from {before} to {after}")

    def _pointwise(self, node: Node, source: Node, units: HiddenUnits, dim: int) -> int:
        for other in node.all_input_nodes:
            if self.carried.get(other) != (units, dim) or _shape(other) != _shape(source):
                self._refuse(node, "it combines several tensors, as a residual connection does")
        return dim

    def _add(self, node: Node, units: HiddenUnits, tensor: Node | None, dim: int, block: int) -> None:
        if tensor is None:
            return
        if tensor.name not in self.names:
            self._refuse(node, "its weights are computed from others")
        if len(tensor.users) > 1:
            self._refuse(node, f"its tensor '{self.names[tensor.name]}' is used more than once")
        units.axes.append(Axis(self.names[tensor.name], dim, block))

    def _refuse(self, node: Node, reason: str) -> NoReturn:
        stack = list((node.meta.get("nn_module_stack") or {"": ("", "the network")}).values())
        name, kind = stack[-1]
        module = f"module '{name}' ({kind.rpartition('.')[2]})" if name else kind.rpartition(".")[2]
        raise AlignmentError(
            f"the hidden units cannot be aligned because of {node.target} in {module}: {reason}. Networks of linear "
            "and convolutional layers in a row, with activations, pooling and normalization, can be aligned"
        )


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _bind(node: Node) -> dict[str, Any]:
    """The arguments of the call of an operator by name, with its defaults."""
    arguments = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}
    names = [a.name for a in node.target._schema.arguments]
    return arguments | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
