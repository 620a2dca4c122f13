"""Which units of a network's hidden layers may be reordered, and what has to be reordered with them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx import Node

from ..layout import ParameterLayout
from ..tasks import ClassificationTask, Task, take
from ..utils.devices import to_device
from ..utils.errors import first_line

aten = torch.ops.aten
# With the dimension in which these have their channels, in what goes in and what comes out.
WEIGHTED: dict[Any, int] = {aten.linear.default: -1} | {
    overload: 1 for conv in (aten.conv1d, aten.conv2d) for overload in (conv.default, conv.padding)
}
# With the number of dimensions that they need if the second is to be that of the channels.
POOLING: dict[Any, int] = {
    getattr(aten, f"{kind}_pool{dims}d").default: dims + 2 for kind in ("max", "avg", "adaptive_avg") for dims in (1, 2)
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


def _arguments(task: Task, model: nn.Module) -> tuple[tuple, dict[str, Any]]:
    """What the task calls its network with, for a batch of two examples."""
    batch = to_device(task.collate(take(task.load_split("validation"), [0, 1])), next(model.parameters()).device)
    calls: list[tuple[tuple, dict[str, Any]]] = []
    note = model.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad(), note:
        run = task.predict if isinstance(task, ClassificationTask) else task.loss
        run(model, batch)
    if not calls:
        raise AlignmentError(f"{type(task).__name__}.{run.__name__} does not call the network")
    return calls[0]


def find_hidden_units(task: Task, model: nn.Module, layout: ParameterLayout) -> list[HiddenUnits]:
    """
    The hidden units of a network that may be reordered, layer by layer, found by tracing it with `torch.export`.

    Args:
        task (`Task`): Says what goes into the network. Examples are stacked in the first dimension.
        model (`nn.Module`): The network; it is put in eval mode.
        layout (`ParameterLayout`): The tensors that can be reordered.

    Raises:
        AlignmentError: names the module whose part in this is not known, or the tensor that is used twice or that the
            layout lacks.
        LayoutError: if the layout does not fit the model.
    """
    layout.check_fits(model.state_dict())
    args, kwargs = _arguments(task, model.eval())
    try:
        program = torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:  # whatever a network's code may raise while it is traced
        raise AlignmentError(f"torch.export cannot trace {type(model).__name__}: {first_line(error)}") from error
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
        if node.target in WEIGHTED:
            self._weighted(node)
        elif source := next((source for source in node.all_input_nodes if source in self.carried), None):
            pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
            handler = HANDLERS.get(node.target, _Tracer._pointwise if pointwise else None)
            if handler is None:
                self._refuse(node, "it is not known how it treats the order of its inputs")
            units, dim = self.carried[source]
            self.carried[node] = units, handler(self, node, source, units, dim)

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

    def _norm(self, node: Node, source: Node, units: HiddenUnits, dim: int) -> int:
        arguments = _bind(node)
        first = len(_shape(source)) - len(arguments["normalized_shape"]) if "normalized_shape" in arguments else 1
        if node.target is aten.batch_norm.default and dim != 1:
            self._refuse(node, "it is not applied to the dimension of the hidden units")
        if dim >= first:  # otherwise each unit is normalised by itself, and all with the same weights
            for name in ("weight", "bias", "running_mean", "running_var"):
                self._add(node, units, arguments.get(name), dim - first, _shape(source)[dim] // units.size)
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


# What they do to the units of their first input. Of those that work on each number alone, these are not tagged as
# `pointwise` by all releases of torch.
HANDLERS: dict[Any, Callable] = (
    {aten.layer_norm.default: _Tracer._norm, aten.batch_norm.default: _Tracer._norm, aten.mean.dim: _Tracer._mean}
    | dict.fromkeys(POOLING, _Tracer._pool)
    | dict.fromkeys((aten.flatten.using_ints, aten.view.default, aten.reshape.default), _Tracer._reshape)
    | dict.fromkeys((aten.unflatten.int, aten.unsqueeze.default), _Tracer._reshape)
    | dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _Tracer._reshape)
    | dict.fromkeys((aten.leaky_relu.default, aten.dropout.default, aten.feature_dropout.default), _Tracer._pointwise)
    | dict.fromkeys((aten.clone.default, aten.contiguous.default, aten.to.device, aten.to.dtype), _Tracer._pointwise)
)


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _bind(node: Node) -> dict[str, Any]:
    """The arguments of the call of an operator by name, with its defaults."""
    operator: Any = node.target
    arguments = {a.name: a.default_value for a in operator._schema.arguments if a.has_default_value()}
    names = [a.name for a in operator._schema.arguments]
    return arguments | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
