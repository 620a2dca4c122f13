"""Conditions: what is known of a task, as named fields, and the network that turns it into an embedding."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .saved import FORMAT_VERSION, SavedModel, check_format_version

# The value of each field; a field that is left out, or None, is unknown.
Condition = Mapping[str, Any]


class ConditionError(ValueError):
    """A condition, or the description of its fields, cannot be used; the message lists what there is."""


class Field:
    """
    One field of a condition. In a *table* of conditions it takes `width` columns, in their *features* `num_features`.
    """

    type: ClassVar[str]

    @property
    def width(self) -> int:
        return 1

    @property
    def num_features(self) -> int:
        return 1

    def parse(self, value: Any) -> list[float]:
        """A value as the `width` numbers of a table. Raises a `ValueError` or `TypeError` for what cannot be one."""
        number = float(value)
        if not math.isfinite(number):
            raise ValueError("it is not finite")
        return [number]

    def format(self, columns: list[float]) -> Any:
        """The inverse of `parse`."""
        return columns[0]

    def features(self, columns: torch.Tensor) -> torch.Tensor:
        """`(N, width)` to `(N, num_features)`, of about unit size."""
        raise NotImplementedError

    def perturb(self, columns: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Values near those of `(N, width)`, moved by `noise` of that shape, in units of the field's spread."""
        return columns + noise


@dataclass(frozen=True)
class ScalarField(Field):
    """A number between `low` and `high`."""

    low: float
    high: float
    type: ClassVar[str] = "scalar"

    def __post_init__(self):
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")

    def __str__(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"

    def parse(self, value: Any) -> list[float]:
        (number,) = super().parse(value)
        if not np.float32(self.low) <= np.float32(number) <= np.float32(self.high):  # as tables and data sets have it
            raise ValueError("it is out of range")
        return [number]

    def perturb(self, columns: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return (columns + noise * (self.high - self.low) / math.sqrt(12)).clamp(self.low, self.high)

    def features(self, columns: torch.Tensor) -> torch.Tensor:
        # Standardised, if values are spread evenly over the range.
        return (columns - (self.low + self.high) / 2) * (math.sqrt(12) / (self.high - self.low))


@dataclass(frozen=True)
class AngleField(Field):
    """A number of which all multiples of `period` are the same."""

    period: float = 360.0
    type: ClassVar[str] = "angle"

    def __post_init__(self):
        if not 0 < self.period < math.inf:
            raise ValueError(f"period must be above 0, got {self.period}")

    def __str__(self) -> str:
        return f"an angle with period {self.period:g}"

    @property
    def num_features(self) -> int:
        return 2

    def perturb(self, columns: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return columns + noise * self.period / math.sqrt(12)

    def features(self, columns: torch.Tensor) -> torch.Tensor:
        radians = columns * (2 * math.pi / self.period)
        return math.sqrt(2) * torch.cat([radians.sin(), radians.cos()], dim=1)


@dataclass(frozen=True)
class CategoryField(Field):
    """One of several words."""

    values: tuple[str, ...]
    type: ClassVar[str] = "category"

    def __post_init__(self):
        object.__setattr__(self, "values", tuple(self.values))
        if len(set(self.values)) < max(1, len(self.values)) or not all(isinstance(value, str) for value in self.values):
            raise ValueError(f"values must be different words, got {list(self.values)}")

    def __str__(self) -> str:
        return f"one of {', '.join(self.values)}"

    @property
    def num_features(self) -> int:
        return len(self.values)

    def parse(self, value: Any) -> list[float]:
        return [float(self.values.index(value))]

    def format(self, columns: list[float]) -> str:
        return self.values[int(columns[0])]

    def perturb(self, columns: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return columns  # there is nothing near to a word

    def features(self, columns: torch.Tensor) -> torch.Tensor:
        return math.sqrt(len(self.values)) * F.one_hot(columns[:, 0].long(), len(self.values)).to(columns.dtype)


@dataclass(frozen=True)
class VectorField(Field):
    """`length` numbers, such as bits or the embedding of a text."""

    length: int
    type: ClassVar[str] = "vector"

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")

    def __str__(self) -> str:
        return f"{self.length} numbers"

    @property
    def width(self) -> int:
        return self.length

    @property
    def num_features(self) -> int:
        return self.length

    def parse(self, value: Any) -> list[float]:
        numbers = np.asarray(value, dtype=np.float64)
        if numbers.shape != (self.length,) or not np.isfinite(numbers).all():
            raise ValueError(f"it has shape {numbers.shape}" if numbers.shape != (self.length,) else "it is not finite")
        return numbers.tolist()

    def format(self, columns: list[float]) -> list[float]:
        return columns

    def features(self, columns: torch.Tensor) -> torch.Tensor:
        return columns


FIELD_TYPES = {kind.type: kind for kind in (ScalarField, AngleField, CategoryField, VectorField)}


class Fields(Mapping[str, Field]):
    """
    The fields of a condition by name, in alphabetical order: a saved config does not keep another one. There may be
    none: then there is one condition, `{}`, and tables have shape `(N, 0)`.

    Conditions travel as *tables*: float32 of shape `(N, width)`, the columns of one field after those of another, NaN
    where a field is unknown.

    Args:
        fields (`Mapping[str, Field | Mapping]`): A field, or what describes one in JSON: its `type` (`scalar`, `angle`,
            `category` or `vector`) and the arguments of its class.

    Raises:
        ConditionError: for a description that is of no field.
    """

    def __init__(self, fields: Mapping[str, Field | Mapping]):
        self._fields = {name: self._make(name, fields[name]) for name in sorted(fields)}
        self.width = sum(field.width for field in self.values())
        self.num_features = sum(field.num_features for field in self.values())
        starts = np.cumsum([0, *(field.width for field in self.values())]).tolist()
        self.columns = {name: slice(*ends) for name, *ends in zip(self, starts, starts[1:], strict=False)}

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
                f"{', '.join(FIELD_TYPES)}, with low and high, period, values, or length"
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
        """As JSON has it; `Fields` reads it again."""
        return {name: {"type": field.type} | vars(field) for name, field in self.items()}

    def table(self, conditions: Iterable[Condition]) -> torch.Tensor:
        """
        Conditions as a table of shape `(N, width)`.

        Raises:
            ConditionError: for a field that there is not, or a value that a field cannot have; it lists all fields.
        """
        rows = [self._row(condition) for condition in conditions]
        return torch.tensor(rows, dtype=torch.float32).view(len(rows), self.width)

    def _row(self, condition: Condition) -> list[float]:
        unknown = [name for name in condition if name not in self]
        if unknown:
            raise ConditionError(f"a condition has no field {unknown[0]!r}; there is {self}")
        row = []
        for name, field in self.items():
            value = condition.get(name)
            try:
                row += [math.nan] * field.width if value is None else field.parse(value)
            except (TypeError, ValueError) as error:
                raise ConditionError(
                    f"'{name}' must be {field}, got {value!r:.100} ({error}); there is {self}"
                ) from error
        return row

    def conditions(self, table: torch.Tensor) -> list[dict[str, Any]]:
        """The inverse of `table`; unknown fields are None."""
        known = self.known(table).tolist()
        return [
            {
                name: field.format(row[self.columns[name]]) if known[i][j] else None
                for j, (name, field) in enumerate(self.items())
            }
            for i, row in enumerate(table.tolist())
        ]

    def known(self, table: torch.Tensor) -> torch.Tensor:
        """Which fields of a table are known, bool of shape `(N, number of fields)`."""
        known = [~table[:, columns].isnan().any(1) for columns in self.columns.values()]
        return torch.stack(known, dim=1) if known else table.bool()

    def features(self, table: torch.Tensor) -> torch.Tensor:
        """What a regression can use, for a table without unknown fields: shape `(N, num_features)`."""
        features = [field.features(table[:, self.columns[name]]) for name, field in self.items()]
        return torch.cat([table[:, :0], *features], dim=1)

    def perturb(self, table: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Conditions near those of a table, moved by `noise` of its shape, in units of each field's spread."""
        parts = [self[name].perturb(table[:, part], noise[:, part]) for name, part in self.columns.items()]
        return torch.cat([table[:, :0], *parts], dim=1)

    def feature_fields(self) -> torch.Tensor:
        """The index of the field that each feature belongs to, shape `(num_features,)`."""
        counts = torch.tensor([field.num_features for field in self.values()])
        return torch.arange(len(self)).repeat_interleave(counts)


class ConditionEncoder(SavedModel, ConfigMixin):
    r"""
    Turns conditions into embeddings for a [`LatentDenoiser`], and knows which conditions were seen in training.

    Angles enter as sine and cosine, numbers standardised, categories through an embedding each, vectors through a
    linear map. There is no embedding for an unknown field: [`complete`] draws its value from the seen conditions.

    Args:
        fields (`dict`): See [`Fields`].
        embedding_dim (`int`, *optional*, defaults to 128): E, the length of an embedding.
        num_seen (`int`, *optional*, defaults to 0): Number of seen conditions, see [`remember`].
        format_version (`int`, *optional*): Of the saved files, which carry it so that an older release can refuse them.
    """

    _keep_in_fp32_modules = ["seen", "feature_mean", "feature_std"]

    @register_to_config
    def __init__(
        self,
        fields: dict,
        embedding_dim: int = 128,
        num_seen: int = 0,
        format_version: int = FORMAT_VERSION,
    ):
        super().__init__()
        check_format_version(format_version)
        self.fields = Fields(fields)
        if not self.fields:
            raise ConditionError("a condition encoder needs at least one field")
        # Of a one-hot vector, a linear map is an embedding.
        self.proj = nn.Linear(self.fields.num_features, embedding_dim)
        self.out = nn.Linear(embedding_dim, embedding_dim)
        self.register_buffer("seen", torch.zeros(num_seen, self.fields.width))
        self.register_buffer("seen_known", torch.zeros(num_seen, len(self.fields), dtype=torch.bool))
        self.register_buffer("feature_mean", torch.zeros(self.fields.num_features))
        self.register_buffer("feature_std", torch.ones(self.fields.num_features))

    def remember(self, table: torch.Tensor) -> None:
        """Keeps the seen conditions, a table of shape `(num_seen, width)`, and standardises features by them."""
        self.register_to_config(num_seen=len(table))
        self.seen_known = self.fields.known(table)
        self.seen = table.nan_to_num()
        complete = self.seen[self.seen_known.all(1)]
        if len(complete) > 1:
            std, mean = torch.std_mean(self.fields.features(complete), dim=0)
            self.feature_mean, self.feature_std = mean, torch.where(std > 0, std, 1.0)

    @apply_forward_hook  # that moves an offloaded model to its device
    def complete(self, table: torch.Tensor, draws: torch.Tensor, num_neighbors: int | None = None) -> torch.Tensor:
        """
        Draws the unknown fields from the seen conditions.

        Args:
            table (`torch.Tensor`): Shape `(N, width)`, NaN where a field is unknown.
            draws (`torch.Tensor`): Shape `(N,)`, uniform in [0, 1): which of the seen conditions each row takes all of
                its unknown fields from.
            num_neighbors (`int`, *optional*): Only from so many of the seen conditions, the nearest in the known
                fields; all by default, which is right for fields that do not depend on each other.

        Raises:
            ConditionError: if there are unknown fields, and no seen condition to draw them from.
        """
        known = self.fields.known(table)  # (N, K)
        if known.all():
            return table
        if not self.seen_known.all(1).any():
            raise ConditionError(
                f"unknown fields cannot be drawn, because no seen conditions are kept; give {self.fields}"
            )
        seen = self.seen[self.seen_known.all(1)]  # (S, width)
        features = (self.fields.features(torch.cat([seen, table.nan_to_num()])) - self.feature_mean) / self.feature_std
        of_seen, of_rows = features[: len(seen)], features[len(seen) :]
        weights = known[:, self.fields.feature_fields().to(known.device)].to(features.dtype)  # (N, F)
        distances = ((of_rows.unsqueeze(1) - of_seen).square() * weights.unsqueeze(1)).sum(-1)  # (N, S)
        # Where nothing is known, all are equally near.
        sizes = torch.where(known.any(1), min(num_neighbors or len(seen), len(seen)), len(seen))
        chosen = (draws * sizes).long().minimum(sizes - 1)  # (N,)
        chosen = distances.argsort(dim=1, stable=True).gather(1, chosen.unsqueeze(1)).squeeze(1)
        return torch.where(table.isnan(), seen[chosen], table)

    def forward(self, table: torch.Tensor) -> torch.Tensor:
        """A table without unknown fields, shape `(N, width)`, to embeddings, shape `(N, E)`."""
        features = (self.fields.features(table.float()) - self.feature_mean) / self.feature_std
        return self.out(F.silu(self.proj(features.to(self.dtype))))
