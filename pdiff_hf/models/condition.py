"""Conditions: what is known of a task, as named fields, and many of them as a table."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .embedded import FIELD_TYPES
from .fields import (
    AngleField,
    CategoryField,
    Condition,
    ConditionError,
    Field,
    ScalarField,
    VectorField,
    nearest,
    shown,
)

# The types of fields belong to what a condition is; people name them from here.
__all__ = [
    "AngleField",
    "CategoryField",
    "Condition",
    "ConditionError",
    "Conditions",
    "Field",
    "Fields",
    "ScalarField",
    "VectorField",
]


class Fields(Mapping[str, Field]):
    """
    The fields of a condition by name, in the order of their declaration.

    Conditions travel as *tables*: float32 of shape `(N, width)`, the columns of one field after those of another, NaN
    where a field is unknown. [`named`] has their columns by name.

    Args:
        fields (`Mapping[str, Field | Mapping]` or `Sequence[Mapping]`): A field, or what describes one in JSON: its
            `type` (`scalar`, `angle`, `category`, `vector`, `text` or `image`) and the arguments of its class; in a
            list also its `name`. There may be none: then all conditions are `{}`.

    Raises:
        ConditionError: for a description that does not describe a field.
    """

    def __init__(self, fields: "Mapping[str, Field | Mapping] | Sequence[Mapping]" = ()):
        # JSON with sorted keys loses the order of a mapping, so that configs have a list. Older ones have a mapping,
        # and its order there, that of the alphabet, is the one that their columns have.
        if not isinstance(fields, Mapping):
            unnamed = [field for field in fields if not isinstance(field, Mapping) or "name" not in field]
            if unnamed:
                raise ConditionError(f"a list of fields has mappings, each with a name, got {shown(unnamed[0])}")
            fields = {field["name"]: {key: field[key] for key in field if key != "name"} for field in fields}
        self._fields = {name: self._make(name, field) for name, field in fields.items()}
        self.width = sum(field.width for field in self.values())
        self.num_features = sum(field.num_features for field in self.values())
        ends = np.cumsum([field.width for field in self.values()]).tolist()
        self.columns = {n: slice(end - self[n].width, end) for n, end in zip(self, ends, strict=True)}

    @staticmethod
    def _make(name: str, field: Field | Mapping) -> Field:
        if isinstance(field, Field):
            return field
        try:
            arguments = dict(field)
            return FIELD_TYPES[arguments.pop("type")](**arguments)
        except (TypeError, ValueError, KeyError) as error:
            raise ConditionError(
                f"field '{name}' of a condition cannot be made from {field!r:.200} ({error}); it needs a type, one of "
                f"{', '.join(FIELD_TYPES)}, with low and high, period, values, length, or encoder"
            ) from error

    def __getitem__(self, name: str) -> Field:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __str__(self) -> str:
        return "; ".join(f"'{name}' ({field})" for name, field in self.items()) or "none"

    def to_dict(self) -> dict[str, dict]:
        """By name, as JSON has it; `Fields` reads it again. Equal for the same fields in another order."""
        return {name: {"type": field.type} | asdict(field) for name, field in self.items()}  # type: ignore[call-overload]

    def to_list(self) -> list[dict]:
        """In order, as JSON has it; `Fields` reads it again."""
        return [{"name": name} | field for name, field in self.to_dict().items()]

    def table(self, conditions: Iterable[Condition]) -> torch.Tensor:
        """
        Conditions as a table of shape `(N, width)`.

        Raises:
            ConditionError: for a field that there is not, or a value that a field cannot have; says what there is.
        """
        return self.alternatives(conditions)[:, 0].contiguous()

    def alternatives(self, conditions: Iterable[Condition]) -> torch.Tensor:
        """
        As [`table`], with all that is said of each condition: shape `(N, K, width)`, where K is the most values that a
        field has in one of them. Fewer values come several times.
        """
        rows = [self._parts(condition) for condition in conditions]
        most = max((len(parts) for row in rows for parts in row), default=1)
        table = [[[x for parts in row for x in parts[k % len(parts)]] for k in range(most)] for row in rows]
        return torch.tensor(table, dtype=torch.float32).view(len(rows), most, self.width)

    def stored(self, condition: Condition) -> dict[str, Any]:
        """A condition as the columns of a data set have it."""
        self._parts(condition)  # an error for what it cannot be
        values = {name: condition.get(name) for name in self}
        return {name: None if value is None else self[name].store(value) for name, value in values.items()}

    def _parts(self, condition: Condition) -> list[list[list[float]]]:
        """For each field, the columns of each of its values."""
        if not isinstance(condition, Mapping):
            raise ConditionError(f"a condition is a mapping of fields, got {shown(condition)}; there is {self}")
        unknown = [name for name in condition if name not in self]
        if unknown:
            raise ConditionError(
                f"a condition has no field {unknown[0]!r}{nearest(str(unknown[0]), self)}; there is {self}"
            )
        parts = []
        for name, field in self.items():
            value = condition.get(name)
            try:
                parts.append([[math.nan] * field.width] if value is None else field.parse_all(value))
            except (TypeError, ValueError, OverflowError) as error:
                raise ConditionError(f"'{name}' must be {field}, got {shown(value)} ({error})") from error
        return parts

    def named(self, table: torch.Tensor) -> "Conditions":
        """The columns of a table by name."""
        return Conditions(self, table)

    def conditions(self, table: torch.Tensor) -> list[dict[str, Any]]:
        """The inverse of `table`; unknown fields are None."""
        return [
            {
                n: f.format(row[self.columns[n]]) if known else None
                for (n, f), known in zip(self.items(), flags, strict=True)
            }
            for row, flags in zip(table.tolist(), self.known(table).tolist(), strict=True)
        ]

    def known(self, table: torch.Tensor) -> torch.Tensor:
        """Which fields of a table are known, bool of shape `(N, number of fields)`."""
        known = [~table[:, columns].isnan().any(1) for columns in self.columns.values()]
        return torch.stack(known, dim=1) if known else torch.ones(len(table), 0, dtype=torch.bool, device=table.device)

    def features(self, table: torch.Tensor) -> torch.Tensor:
        """What a regression can use, for a table without unknown fields: shape `(N, num_features)`."""
        parts = [field.features(table[:, self.columns[name]]) for name, field in self.items()]
        return torch.cat([table[:, :0], *parts], dim=1)

    def perturb(self, table: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Conditions near those of a table, moved by `noise` of its shape, in units of each field's spread."""
        parts = [self[name].perturb(table[:, part], noise[:, part]) for name, part in self.columns.items()]
        return torch.cat([table[:, :0], *parts], dim=1)

    def feature_fields(self) -> torch.Tensor:
        """The index of the field that each feature belongs to, shape `(num_features,)`."""
        counts = torch.tensor([field.num_features for field in self.values()], dtype=torch.long)
        return torch.arange(len(self)).repeat_interleave(counts)


class Words(torch.Tensor):
    """
    The column of a category: for each task the index of its word, int64. Comparing it with a word gives bools. All
    other operations give plain tensors.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    words: tuple[str, ...]

    def _compare(self, compare: Callable, word: Any) -> torch.Tensor:
        if isinstance(word, str):
            if word not in self.words:
                raise ConditionError(
                    f"a category has no word {word!r}{nearest(word, self.words)}; there is {', '.join(self.words)}"
                )
            word = self.words.index(word)
        return compare(self, word)

    def __eq__(self, other: Any) -> torch.Tensor:  # type: ignore[override]
        return self._compare(torch.eq, other)

    def __ne__(self, other: Any) -> torch.Tensor:  # type: ignore[override]
        return self._compare(torch.ne, other)

    __hash__ = torch.Tensor.__hash__


class Conditions(Mapping[str, torch.Tensor]):
    """
    The conditions of T tasks, a column for each field, by name: `conditions["angle"]`, or `conditions.angle` for a name
    that no method has.

    A number or an angle has a column of shape `(T,)`, a vector one of shape `(T, length)`. A category has the index of
    its word, int64 of shape `(T,)`, which can be compared with a word: `conditions["invert"] == "yes"`; for one column
    a word see [`one_hot`].

    Args:
        fields (`Fields`): Of the conditions.
        table (`torch.Tensor`): Shape `(T, width)`.
        ndim (`int`, *optional*): The number of dimensions of the columns that have one number for each task.
    """

    def __init__(self, fields: Fields, table: torch.Tensor, ndim: int = 1):
        self.fields, self.table, self._ndim = fields, table, ndim

    @property
    def num_tasks(self) -> int:
        return len(self.table)

    def __getitem__(self, name: str) -> torch.Tensor:
        if not isinstance(name, str):
            raise TypeError(
                f"conditions have columns by name, such as conditions[{next(iter(self.fields), 'x')!r}], and not by "
                f"{shown(name)}; there is {self.fields}"
            )
        if name not in self.fields:
            raise ConditionError(f"there is no field {name!r}{nearest(name, self.fields)}; there is {self.fields}")
        field, column = self.fields[name], self.table[:, self.fields.columns[name]]
        if field.length is not None:
            return column
        column = column.reshape(-1, *[1] * (self._ndim - 1))
        if field.choices is not None:
            column = column.long().as_subclass(Words)
            column.words = field.choices
        return column

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.fields:
            hint = "" if name.startswith("_") else f"{nearest(name, self.fields)}; there is {self.fields}"
            raise AttributeError(f"conditions have no field {name!r}{hint}")
        return self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __contains__(self, name: object) -> bool:
        return name in self.fields

    def __len__(self) -> int:
        return len(self.fields)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.fields]

    def __repr__(self) -> str:
        return f"Conditions of {self.num_tasks} tasks: {self.fields}"

    def over(self, values: torch.Tensor) -> "Conditions":
        """
        With columns that broadcast over `values`, whose first dimension is that of the tasks: over images of shape
        `(T, B, C, H, W)`, a number has shape `(T, 1, 1, 1, 1)`, so that `images ** conditions.over(images).gamma` is
        right. Vectors stay as they are.
        """
        return Conditions(self.fields, self.table, values.ndim)

    def one_hot(self, name: str) -> torch.Tensor:
        """A category as one column a word: float32 of shape `(T, number of words)`, in the order of its field."""
        words = self.fields[name].choices if name in self.fields else None
        if words is None:
            raise ConditionError(f"there is no category {name!r}; there is {self.fields}")
        return F.one_hot(self.table[:, self.fields.columns[name]][:, 0].long(), len(words)).to(self.table.dtype)
