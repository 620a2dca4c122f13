"""Which tensors make up a parameter vector, and the exact way from a state dict to it and back."""

import difflib
import itertools
import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

# No vector is longer, as torch counts in signed integers of 64 bits.
MAX_PARAMETERS = 2**63 - 1
# Limits of the search for similar names, whose time grows with the square of the length: how many, and how long.
MAX_COMPARED, MAX_COMPARED_LENGTH = 10_000, 300
# Every value of these types is a float32 as well, so that a round trip through the vector changes no bit.
EXACT_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "int8", "uint8", "int16", "bool")
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
        aliases (`tuple[tuple[str, ...], ...]`, *optional*): Other names of each tensor, where a network shares it
            between modules or files call it otherwise; see [`~pdiff_hf.selection.fit_layout`]. Two layouts that differ
            in nothing else are equal.
        adapters (`Mapping[str, dict]`, *optional*): The configuration, as JSON, of each adapter of PEFT that tensors
            belong to, by its name: how the factors of LoRA are scaled, and what is needed to write adapters.

    Raises:
        LayoutError: for no tensors, repeated names, a type that float32 cannot hold exactly, names or types that are
            not strings, and shapes that are not whole numbers of at least 0.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    aliases: tuple[tuple[str, ...], ...] = field(default=(), compare=False, repr=False)
    adapters: Mapping[str, dict] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        # Lists arrive here when a layout was read from JSON.
        try:
            shapes = tuple(tuple(operator.index(n) for n in shape) for shape in self.shapes)
            aliases = tuple(map(tuple, self.aliases)) or ((),) * len(self.names)
            vars(self).update(names=tuple(self.names), shapes=shapes, dtypes=tuple(self.dtypes), aliases=aliases)
        except TypeError as error:
            raise LayoutError(f"names, dtypes and shapes must be lists, of whole numbers in shapes: {error}") from error
        for value in (*self.names, *self.dtypes, *itertools.chain.from_iterable(self.aliases)):
            if not isinstance(value, str):
                raise LayoutError(f"names and dtypes of a layout must be strings, got {value!r:.200}")
        if not isinstance(self.adapters, Mapping) or not all(isinstance(c, Mapping) for c in self.adapters.values()):
            raise LayoutError(f"the adapters of a layout must be configurations by name, got {self.adapters!r:.200}")
        if not len(self.names) == len(self.shapes) == len(self.dtypes) == len(self.aliases):
            raise LayoutError(
                f"a layout needs one shape and one dtype per name, got {len(self.names)} names, "
                f"{len(self.shapes)} shapes and {len(self.dtypes)} dtypes"
            )
        if not self.names:
            raise LayoutError("a layout needs at least one tensor, got none")
        if repeated := [name for name, count in Counter(self.names).items() if count > 1]:
            raise LayoutError(f"the names of a layout must differ, got {some_names(repeated)} more than once")
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
        if missing := [name for name in names if name not in state_dict]:
            similar = closest_names(missing[0], state_dict)
            raise LayoutError(f"the state dict has no tensor {some_names(missing)}; {similar}")
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
        batch: tuple[int, ...] = ()
        for index, (name, shape, dtype) in enumerate(zip(self.names, self.shapes, self.dtypes, strict=True)):
            if name not in state_dict:
                raise LayoutError(f"the state dict has no tensor '{name}'; {closest_names(name, state_dict)}")
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
        tensors = (state_dict[name].detach().to(torch.float32) for name in self.names)
        return torch.cat([tensor.reshape(*batch, -1) for tensor in tensors], dim=-1)

    def unflatten(self, parameters: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Vector to state dict; the exact inverse of `flatten`.

        Args:
            parameters (`torch.Tensor`): Shape `(D,)`, or `(N, D)` for N models.

        Returns:
            `dict[str, torch.Tensor]`: Tensors of the layout's shapes and types, with a leading N for a batch. float32
            tensors are views of `parameters`. Values that no network can use are corrected: integers are rounded, and
            variances of batch norm (`running_var`) are at least 0.
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
            tensor = _cast(piece.reshape((*batch, *shape)), EXACT_DTYPES[dtype])
            state_dict[name] = tensor.clamp(min=0) if name.endswith("running_var") else tensor
        return state_dict

    def check_fits(self, state_dict: Mapping[str, torch.Tensor], what: str = "the base model") -> None:
        """Raises a `LayoutError` unless every tensor of the layout is in `state_dict` with its shape."""
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in state_dict:
                raise LayoutError(
                    f"the layout does not fit {what}: it has no tensor '{name}'; {closest_names(name, state_dict)}"
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
        values = {"names": list(self.names), "shapes": [list(s) for s in self.shapes], "dtypes": list(self.dtypes)}
        values |= {"aliases": [list(a) for a in self.aliases]} if any(self.aliases) else {}
        return values | ({"adapters": dict(self.adapters)} if self.adapters else {})

    @classmethod
    def from_dict(cls, values: Mapping) -> "ParameterLayout":
        """Inverse of `to_dict`."""
        if not isinstance(values, Mapping) or set(values) - {"aliases", "adapters"} != {"names", "shapes", "dtypes"}:
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


def some_names(names: Sequence[str], most: int = 3) -> str:
    """The first few names, in words."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more


def closest_names(name: str, names: Iterable[str]) -> str:
    """What to say of a name that is not among `names`: which of them are similar."""
    names = [name for name in names if len(name) <= MAX_COMPARED_LENGTH][:MAX_COMPARED]
    name = name[:MAX_COMPARED_LENGTH]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:3]
    return f"similar names: {some_names(close)}" if close else "no name is similar"
