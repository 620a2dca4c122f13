"""The fields of a condition: numbers, angles, words and vectors, and how each is read, drawn, shown and stored."""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    import datasets

# The value of each field; a field that is left out, or None, is unknown.
Condition = Mapping[str, Any]

# A message shows so many characters of what a caller has given.
SHOWN = 100


class ConditionError(ValueError):
    """A condition, or the description of its fields, cannot be used; the message lists what there is."""


def shown(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 2]} …"


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean 'x'?)` if one of `names` is near to `name`, else an empty text."""
    spelled = {" ".join(other.casefold().replace("_", " ").split()): other for other in names}
    found = difflib.get_close_matches(" ".join(name.casefold().replace("_", " ").split()), spelled, n=1)
    return f" (did you mean {spelled[found[0]]!r}?)" if found else ""


def plain(value: Any) -> Any:
    """A value as plain Python has it: of a NumPy scalar, or an array or tensor of one element, that element."""
    if isinstance(value, np.generic | np.ndarray | torch.Tensor) and np.prod(value.shape, dtype=int) == 1:
        return value.item()
    return value


class Field:
    """
    One field of a condition. In a *table* of conditions it takes `width` columns, in their *features* `num_features`.

    Attributes:
        bounds (`tuple[float, float]`, *optional*): The lowest and the highest value of a number.
        step (`float`, *optional*): A small step from one number to the next.
        choices (`tuple[str, ...]`, *optional*): The words of a category.
    """

    type: ClassVar[str]
    bounds: tuple[float, float] | None = None
    step: float | None = None
    choices: tuple[str, ...] | None = None

    @property
    def width(self) -> int:
        return 1

    @property
    def num_features(self) -> int:
        return 1

    def parse(self, value: Any) -> list[float]:
        """A value as the `width` numbers of a table. Raises a `ValueError` or `TypeError` for what cannot be one."""
        number = float(plain(value))
        if not math.isfinite(number):
            raise ValueError("it is not finite")
        return [number]

    def parse_all(self, value: Any) -> list[list[float]]:
        """As `parse`, for each of several values that say the same."""
        return [self.parse(value)]

    def format(self, columns: list[float]) -> Any:
        """The inverse of `parse`."""
        return columns[0]

    def store(self, value: Any) -> Any:
        """A value as the column of a data set has it, see `feature`; `parse_all` reads it again."""
        return self.format(self.parse(value))

    def read(self, text: str) -> Any:
        """A value from what somebody has typed."""
        return text

    def features(self, columns: torch.Tensor) -> torch.Tensor:
        """`(N, width)` to `(N, num_features)`, of about unit size."""
        raise NotImplementedError

    def perturb(self, columns: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Values near those of `(N, width)`, moved by `noise` of that shape, in units of the field's spread."""
        return columns + noise

    def sample(self, generator: torch.Generator) -> Any:
        """A random value, as `parse` takes it. Raises a `ConditionError` if values have no range to draw from."""
        raise ConditionError(f"{self} cannot be drawn at random; a family with such a field needs `draw`")

    def line(self, num: int) -> list[float]:
        """So many values from the lowest to the highest; none if they have no order."""
        return []

    def example(self) -> Any:
        """A value, as `parse` takes it."""
        raise NotImplementedError

    def feature(self) -> "datasets.Value | datasets.List":
        """The type of a column that holds the field in a data set."""
        import datasets  # takes a second, which only data sets need

        return datasets.Value("float32")


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

    @property
    def bounds(self) -> tuple[float, float]:  # type: ignore[override]
        return self.low, self.high

    @property
    def step(self) -> float:  # type: ignore[override]
        return (self.high - self.low) / 100

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

    def sample(self, generator: torch.Generator) -> float:
        return self.low + torch.rand((), generator=generator).item() * (self.high - self.low)

    def line(self, num: int) -> list[float]:
        return torch.linspace(self.low, self.high, num).tolist()

    def example(self) -> float:
        return self.low + (self.high - self.low) / 4


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
    def bounds(self) -> tuple[float, float]:  # type: ignore[override]
        return 0.0, self.period

    @property
    def step(self) -> float:  # type: ignore[override]
        return self.period / 360

    @property
    def num_features(self) -> int:
        return 2

    def perturb(self, columns: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return columns + noise * self.period / math.sqrt(12)

    def features(self, columns: torch.Tensor) -> torch.Tensor:
        radians = columns * (2 * math.pi / self.period)
        return math.sqrt(2) * torch.cat([radians.sin(), radians.cos()], dim=1)

    def sample(self, generator: torch.Generator) -> float:
        return torch.rand((), generator=generator).item() * self.period

    def line(self, num: int) -> list[float]:
        return [self.period * i / num for i in range(num)]

    def example(self) -> float:
        return self.period / 10


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
        text = ", ".join(self.values)
        if len(text) <= SHOWN:
            return f"one of {text}"
        return f"one of {text[:SHOWN].rpartition(', ')[0] or text[:SHOWN]}, … ({len(self.values)} words)"

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.values

    @property
    def num_features(self) -> int:
        return len(self.values)

    def parse(self, value: Any) -> list[float]:
        value = plain(value)
        if not isinstance(value, str):  # words can be "1", "2" or "true", "false"
            texts = [str(value), str(value).lower(), *([f"{value:.15g}"] if isinstance(value, float) else [])]
            value = next((text for text in texts if text in self.values), value)
        if value not in self.values:
            raise ValueError(f"there is no such word{nearest(str(value), self.values)}")
        return [float(self.values.index(value))]

    def format(self, columns: list[float]) -> str:
        return self.values[int(columns[0])]

    def perturb(self, columns: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return columns  # there is nothing near to a word

    def features(self, columns: torch.Tensor) -> torch.Tensor:
        return math.sqrt(len(self.values)) * F.one_hot(columns[:, 0].long(), len(self.values)).to(columns.dtype)

    def sample(self, generator: torch.Generator) -> str:
        return self.values[int(torch.rand((), generator=generator).item() * len(self.values))]

    def example(self) -> str:
        return self.values[0]

    def feature(self) -> "datasets.Value":
        import datasets

        return datasets.Value("string")


@dataclass(frozen=True)
class VectorField(Field):
    """`length` numbers, such as bits or an embedding."""

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
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
        numbers = np.asarray(value, dtype=np.float64)
        if numbers.shape != (self.length,):
            raise ValueError(f"it has shape {numbers.shape}")
        if not np.isfinite(numbers).all():
            raise ValueError("it is not finite")
        return numbers.tolist()

    def format(self, columns: list[float]) -> list[float]:
        return columns

    def read(self, text: str) -> Any:
        return [float(number) for number in text.replace(",", " ").split()]

    def features(self, columns: torch.Tensor) -> torch.Tensor:
        return columns

    def example(self) -> Any:
        return [1.0] + [0.0] * (self.length - 1)

    def feature(self) -> "datasets.List":
        import datasets

        return datasets.List(datasets.Value("float32"), length=self.length)


FIELD_TYPES: dict[str, type[Field]] = {
    kind.type: kind for kind in (ScalarField, AngleField, CategoryField, VectorField)
}
