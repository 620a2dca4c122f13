"""Which tensors of a network are generated, and the exact way from a state dict to a vector and back."""

import difflib
import fnmatch
import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

# No vector is longer, as torch counts in signed integers of 64 bits.
MAX_PARAMETERS = 2**63 - 1
# Similar names are looked for among so many, up to this long: the time grows with the square of the length.
MAX_COMPARED, MAX_COMPARED_LENGTH = 10_000, 300
# Every value of these types is a float32 as well, so that a round trip through the vector changes no bit.
EXACT_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.bool,
    )
}


class LayoutError(ValueError):
    """A state dict, vector or network does not fit a `ParameterLayout`, or a selection names nothing."""


@dataclass(frozen=True)
class ParameterLayout:
    """
    The tensors that make up a parameter vector, in order.

    Args:
        names (`tuple[str, ...]`): State-dict keys.
        shapes (`tuple[tuple[int, ...], ...]`): Shape of each tensor.
        dtypes (`tuple[str, ...]`): Type of each tensor, one of `EXACT_DTYPES`, which `unflatten` restores.

    Raises:
        LayoutError: for no tensors, repeated names, a type that float32 cannot hold exactly, and for names, shapes and
            types that are none.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    def __post_init__(self):
        # Lists arrive here when a layout was read from JSON.
        try:
            object.__setattr__(self, "names", tuple(self.names))
            object.__setattr__(self, "shapes", tuple(tuple(operator.index(n) for n in shape) for shape in self.shapes))
            object.__setattr__(self, "dtypes", tuple(self.dtypes))
        except TypeError as error:
            raise LayoutError(
                f"names, dtypes and shapes must be lists, and shapes hold whole numbers: {error}"
            ) from error
        for value in (*self.names, *self.dtypes):
            if not isinstance(value, str):
                raise LayoutError(f"names and dtypes of a layout must be strings, got {value!r:.200}")
        if not len(self.names) == len(self.shapes) == len(self.dtypes):
            raise LayoutError(
                f"a layout needs one shape and one dtype a name, got {len(self.names)} names, "
                f"{len(self.shapes)} shapes and {len(self.dtypes)} dtypes"
            )
        if not self.names:
            raise LayoutError("a layout needs at least one tensor, got none")
        if len(set(self.names)) < len(self.names):
            repeated = [name for name, count in Counter(self.names).items() if count > 1]
            raise LayoutError(f"the names of a layout must differ, got {_some(repeated)} more than once")
        for name, shape, dtype in zip(self.names, self.shapes, self.dtypes, strict=True):
            if dtype not in EXACT_DTYPES:
                raise LayoutError(
                    f"tensor '{name}' is {dtype}, which float32 cannot hold exactly; convert it to one of "
                    f"{', '.join(EXACT_DTYPES)} or leave it out of the selection"
                )
            if any(n < 0 for n in shape):
                raise LayoutError(f"tensor '{name}' has the impossible shape {shape}")
        if self.num_parameters > MAX_PARAMETERS:
            raise LayoutError(f"the shapes of a layout have more than {MAX_PARAMETERS} values together")

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, torch.Tensor], names: Iterable[str] | None = None
    ) -> "ParameterLayout":
        """Layout of the tensors `names` (all by default) of `state_dict`, in the order of `names`."""
        names = list(state_dict) if names is None else list(names)
        missing = [name for name in names if name not in state_dict]
        if missing:
            raise LayoutError(f"the state dict has no tensor {_some(missing)}; {_closest(missing[0], state_dict)}")
        tensors = [state_dict[name] for name in names]
        return cls(
            tuple(names),
            tuple(tuple(tensor.shape) for tensor in tensors),
            tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors),
        )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of values in each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor starts in the vector."""
        return (0, *itertools.accumulate(self.sizes[:-1]))

    @cached_property
    def num_parameters(self) -> int:
        """D, the length of the vector."""
        return sum(self.sizes)

    def flatten(self, state_dict: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """
        State dict to vector.

        Args:
            state_dict (`Mapping[str, torch.Tensor]`): Holds at least the layout's tensors, each of its shape, or of
                shape `(N, *shape)` for a batch of N models (all of them).

        Returns:
            `torch.Tensor`: float32 of shape `(D,)`, or `(N, D)` for a batch.

        Raises:
            LayoutError: names the first tensor that is missing, or has another shape or type.
        """
        batch = None
        for index, (name, shape, dtype) in enumerate(zip(self.names, self.shapes, self.dtypes, strict=True)):
            if name not in state_dict:
                raise LayoutError(f"the state dict has no tensor '{name}'; {_closest(name, state_dict)}")
            tensor = state_dict[name]
            lead = tuple(tensor.shape[: tensor.ndim - len(shape)])
            if tuple(tensor.shape[len(lead) :]) != shape or len(lead) > 1 or (index > 0 and lead != batch):
                raise LayoutError(
                    f"tensor '{name}' has shape {tuple(tensor.shape)}, but the layout says {shape}"
                    + (f" for a batch of {batch[0]} models" if index > 0 and batch else "")
                )
            if tensor.dtype != EXACT_DTYPES[dtype]:
                raise LayoutError(f"tensor '{name}' is {tensor.dtype}, but the layout says {dtype}")
            batch = lead
        return torch.cat(
            [state_dict[name].detach().to(torch.float32).reshape(*batch, -1) for name in self.names], dim=-1
        )

    def unflatten(self, parameters: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Vector to state dict; the exact inverse of `flatten`.

        Args:
            parameters (`torch.Tensor`): Shape `(D,)`, or `(N, D)` for N models.

        Returns:
            `dict[str, torch.Tensor]`: Tensors of the layout's shapes and types, with a leading N for a batch. float32
            tensors are views of `parameters`.
        """
        if parameters.ndim not in (1, 2) or parameters.shape[-1] != self.num_parameters:
            raise LayoutError(
                f"the layout has {self.num_parameters} parameters, so a vector must have shape "
                f"({self.num_parameters},) or (N, {self.num_parameters}), got {tuple(parameters.shape)}"
            )
        batch = parameters.shape[:-1]
        state_dict = {}
        pieces = parameters.split(self.sizes, dim=-1)
        for name, shape, dtype, piece in zip(self.names, self.shapes, self.dtypes, pieces, strict=True):
            state_dict[name] = _cast(piece.reshape((*batch, *shape)), EXACT_DTYPES[dtype])
        return state_dict

    def check_fits(self, state_dict: Mapping[str, torch.Tensor], what: str = "the base model") -> None:
        """Raises a `LayoutError` unless every tensor of the layout is in `state_dict` with its shape."""
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in state_dict:
                raise LayoutError(
                    f"the layout does not fit {what}: it has no tensor '{name}'; {_closest(name, state_dict)}"
                )
            if tuple(state_dict[name].shape) != shape:
                raise LayoutError(
                    f"the layout does not fit {what}: tensor '{name}' has shape {tuple(state_dict[name].shape)} there "
                    f"and {shape} in the layout"
                )

    def locate(self, index: int) -> str:
        """Name of the tensor that holds coordinate `index` of the vector."""
        if not 0 <= index < self.num_parameters:
            raise LayoutError(f"coordinate {index} is outside a vector of {self.num_parameters}")
        # Empty tensors share their offset with the next one, which is why the last match is the one that holds it.
        return self.names[max(i for i, offset in enumerate(self.offsets) if offset <= index and self.sizes[i])]

    def to_dict(self) -> dict:
        """Plain lists, as they are written to JSON."""
        return {"names": list(self.names), "shapes": [list(s) for s in self.shapes], "dtypes": list(self.dtypes)}

    @classmethod
    def from_dict(cls, values: Mapping) -> "ParameterLayout":
        """Inverse of `to_dict`."""
        if not isinstance(values, Mapping) or set(values) != {"names", "shapes", "dtypes"}:
            raise LayoutError(f"a layout needs the keys names, shapes and dtypes, got {values!r:.200}")
        return cls(**values)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return tensor.to(dtype)
    if dtype == torch.bool:
        return tensor > 0.5
    # A generated value is rarely a whole number, and a plain cast would cut it off and wrap it round.
    info = torch.iinfo(dtype)
    return tensor.round().clamp(info.min, info.max).to(dtype)


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(f"'{name}'" for name in names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )


def _closest(name: str, names: Iterable[str]) -> str:
    names = [name for name in names if len(name) <= MAX_COMPARED_LENGTH][:MAX_COMPARED]
    name = name[:MAX_COMPARED_LENGTH]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:3]
    return f"similar names there are {_some(close)}" if close else "it has none with a similar name"


def is_normalization(module: nn.Module) -> bool:
    """Whether `module` is a normalization layer that has parameters of its own, of any library."""
    return "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))


def is_attention(module: nn.Module) -> bool:
    """Whether `module` is an attention layer, of any library."""
    return any(word in type(module).__name__.lower() for word in ("attention", "attn"))


MODULE_KINDS = {
    "norm": is_normalization,
    "conv": lambda module: isinstance(module, nn.modules.conv._ConvNd),
    "linear": lambda module: isinstance(module, nn.Linear),
}
KINDS = ("all", "bias", *MODULE_KINDS, "attention", "blocks", "head")
_KIND = re.compile(rf"({'|'.join(KINDS)})(?:\[(-?\d{{0,18}})(:?)(-?\d{{0,18}})\])?")


def select_layout(model: nn.Module, select: str | Sequence[str], exclude: str | Sequence[str] = ()) -> ParameterLayout:
    """The layout of what [`select_parameters`] selects."""
    return ParameterLayout.from_state_dict(model.state_dict(), select_parameters(model, select, exclude))


def select_parameters(
    model: nn.Module, select: str | Sequence[str], exclude: str | Sequence[str] = ()
) -> tuple[str, ...]:
    """
    Names of the parameters of `model` that `select` asks for, in the model's own order. Buffers, such as the running
    statistics of batch norm, are never selected.

    Args:
        model (`nn.Module`): The network. Where it has a `base_model_prefix` (as transformers' wrapper of timm models
            has), patterns may leave that prefix out.
        select (`str` or `Sequence[str]`): One or several of

            - a kind: `all`, `bias`, `norm`, `conv`, `linear`, `attention`, `blocks`, `head`;
            - the modules of a kind, sliced as a Python list: `norm[-2:]` is the last two normalization layers that have
              parameters, `conv[0]` the first convolution, `blocks[:3]` the first three blocks;
            - a glob over parameter names: `layer4.1.bn*`, or `*.lora_*` for the adapters of a PEFT model;
            - a regular expression that matches a whole name, after `re:`.
        exclude (`str` or `Sequence[str]`, *optional*): What to leave out of that, in the same terms.

    `attention` takes in all that is inside an attention layer, which is known by the name of its class. `head` is the
    last layer with a weight matrix. `blocks` are the members of the `ModuleList`s, `Sequential`s and `ModuleDict`s that
    hold modules of one composite type, such as `BasicBlock` or `ViTLayer`. Where a network has several such types (the
    stages around the blocks, the layers inside them), the blocks are those of the most numerous type that has at least
    two weight matrices.

    Raises:
        LayoutError: names the entry that selects nothing, and parameters with similar names.
    """
    parameters = [name for name, _ in model.named_parameters()]
    chosen = _match(model, parameters, select) - (_match(model, parameters, exclude) if exclude else set())
    if not chosen:
        raise LayoutError(f"nothing is left to generate: {exclude!r} excludes all that {select!r} selects")
    return tuple(name for name in parameters if name in chosen)


def _match(model: nn.Module, parameters: list[str], patterns: str | Sequence[str]) -> set[str]:
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise LayoutError("no tensors were selected: give at least one kind or pattern, such as 'norm[-2:]'")
    prefix = getattr(model, "base_model_prefix", "")
    short = {name: name.removeprefix(f"{prefix}.") if prefix else name for name in parameters}
    chosen: set[str] = set()
    for pattern in patterns:
        if kind := _KIND.fullmatch(pattern):
            found = _match_kind(model, parameters, *kind.groups())
        elif pattern.startswith("re:"):
            try:
                expression = re.compile(pattern[3:])
            except re.error as error:
                raise LayoutError(f"'{pattern}' is not a regular expression: {error}") from error
            found = {n for n in parameters if expression.fullmatch(n) or expression.fullmatch(short[n])}
        else:
            found = {n for n in parameters if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(short[n], pattern)}
        if not found:
            raise LayoutError(
                f"'{pattern}' selects no parameter of {type(model).__name__}; {_closest(pattern, short.values())}"
            )
        chosen |= found
    return chosen


def _match_kind(model: nn.Module, parameters: list[str], kind: str, start: str, colon: str, stop: str) -> set[str]:
    named = dict(model.named_modules())
    if kind in MODULE_KINDS:
        names = [name for name, module in named.items() if MODULE_KINDS[kind](module)]
        groups = [[_join(name, p) for p, _ in named[name].named_parameters(recurse=False)] for name in names]
    elif kind in ("all", "bias"):
        groups = [[name] for name in parameters if kind == "all" or name.rpartition(".")[2] == "bias"]
    else:
        if kind == "blocks":
            names = _find_blocks(model)
        elif kind == "attention":
            names = [name for name, module in named.items() if name and is_attention(module)]
            names = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
        else:
            names = [n for n, m in named.items() if MODULE_KINDS["conv"](m) or MODULE_KINDS["linear"](m)][-1:]
        groups = [[_join(name, p) for p, _ in named[name].named_parameters()] for name in names]
    if "-" in (start, stop):
        raise LayoutError(f"'{kind}[{start}{colon}{stop}]' is not a slice: a number is missing after the minus sign")
    if colon:
        groups = groups[int(start) if start else None : int(stop) if stop else None]
    elif start:
        index = int(start)
        groups = groups[index : index + 1 or None]
    # Tied parameters are listed once by `named_parameters`, under the first of their names.
    return set(itertools.chain.from_iterable(groups)) & set(parameters)


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def _find_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks of `model`, in its own order; the rule is that of [`select_parameters`]."""
    found: dict[type, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            children = [(n, c) for n, c in module.named_children() if any(True for _ in c.parameters())]
            types = {type(child) for _, child in children}
            if len(types) == 1 and any(True for _ in children[0][1].children()):
                found.setdefault(types.pop(), []).extend(_join(name, child) for child, _ in children)
    if not found:
        return []

    def rank(names: list[str]) -> tuple[bool, int]:
        matrices = sum(parameter.ndim > 1 for parameter in model.get_submodule(names[0]).parameters())
        return matrices > 1, len(names)

    return max(found.values(), key=rank)
