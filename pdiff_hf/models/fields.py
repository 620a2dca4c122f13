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
        length (`int`, *optional*): How many numbers a vector has.
        spread (`float`): The standard deviation of its numbers, as far as the field tells; there is nothing near to a
            word.
    """

    type: ClassVar[str]
    bounds: tuple[float, float] | None = None
    step: float | None = None
    choices: tuple[str, ...] | None = None
    length: int | None = None
    num_features: int = 1
    spread: float = 0.0

    @property
    def width(self) -> int:
        return self.length or 1

    def _span(self, low: float, high: float, num_steps: int) -> None:
        """The attributes of a number; of values that are spread evenly. The dataclasses are frozen."""
        step, spread = (high - low) / num_steps, (high - low) / math.sqrt(12)
        vars(self).update(bounds=(low, high), step=step, spread=spread)

    def parse(self, value: Any) -> list[float]:
        """A value as the `width` numbers of a table. Raises a `ValueError` or `TypeError` for what cannot be one."""
        try:
            number = float(plain(value))
        except (TypeError, ValueError):
            several = isinstance(value, Iterable) and not isinstance(value, str | bytes)
            hint = "; for several tasks give a list of conditions" if several else ""
            raise ValueError(f"it is not a number{hint}") from None
        if not math.isfinite(number):
            raise ValueError("it is not finite; leave it out, or give None, if it is unknown")
        return [number]

    def parse_all(self, value: Any) -> list[list[float]]:
        """As `parse`, for each of several values that say the same."""
        return [self.parse(value)]

    def format(self, columns: list[float]) -> Any:
        """The inverse of `parse`."""
        return columns[0] if self.length is None else columns

    def store(self, value: Any) -> Any:
        """A value as the column of a data set has it, see `feature`; `parse_all` reads it again."""
        return self.format(self.parse(value))

    def read(self, text: str) -> Any:
        """A value from what somebody has typed."""
        return text

    def features(self, columns: torch.Tensor) -> torch.Tensor:
        """`(N, width)` to `(N, num_features)`, of about unit size."""
        return columns

    def perturb(self, columns: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Values near those of `(N, width)`, moved by `noise` of that shape, in units of the field's spread."""
        return columns + self.spread * noise

    def sample(self, generator: torch.Generator) -> Any:
        """A random value, as `parse` takes it. Raises a `ConditionError` if values have no range to draw from."""
        if self.bounds is None and self.choices is None:
            raise ConditionError(f"{self} cannot be drawn at random; a family with such a field needs `draw`")
        share = torch.rand((), generator=generator).item()
        if self.choices is not None:
            return self.choices[int(share * len(self.choices))]
        low, high = self.bounds or (0.0, 0.0)
        return low + share * (high - low)

    def line(self, num: int) -> list[float]:
        """So many values from the lowest to the highest; none if they have no order."""
        return torch.linspace(*self.bounds, num).tolist() if self.bounds else []

    def example(self) -> Any:
        """A value, as `parse` takes it."""
        raise NotImplementedError

    def feature(self) -> "datasets.Value | datasets.List":
        """The type of a column that holds the field in a data set."""
        import datasets  # takes a second, which only data sets need

        value = datasets.Value("string" if self.choices else "float32")
        return value if self.length is None else datasets.List(value, length=self.length)


@dataclass(frozen=True)
class ScalarField(Field):
    """A number between `low` and `high`."""

    low: float
    high: float
    type: ClassVar[str] = "scalar"

    def __post_init__(self):
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        self._span(self.low, self.high, 100)

    def __str__(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"

    def parse(self, value: Any) -> list[float]:
        (number,) = super().parse(value)
        if not np.float32(self.low) <= np.float32(number) <= np.float32(self.high):  # as tables and data sets have it
            raise ValueError("it is out of range")
        return [number]

    def features(self, columns: torch.Tensor) -> torch.Tensor:
        return (columns - (self.low + self.high) / 2) * (math.sqrt(12) / (self.high - self.low))  # standardised

    def perturb(self, columns: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return super().perturb(columns, noise).clamp(self.low, self.high)

    def example(self) -> float:
        return self.low + (self.high - self.low) / 4


@dataclass(frozen=True)
class AngleField(Field):
    """A number of which all multiples of `period` are the same."""

    period: float = 360.0
    type: ClassVar[str] = "angle"
    num_features = 2

    def __post_init__(self):
        if not 0 < self.period < math.inf:
            raise ValueError(f"period must be above 0, got {self.period}")
        self._span(0.0, self.period, 360)

    def __str__(self) -> str:
        return f"an angle with period {self.period:g}"

    def parse(self, value: Any) -> list[float]:
        (number,) = super().parse(value)
        return [number if abs(number) <= self.period else number % self.period]  # many turns are not exact in float32

    def features(self, columns: torch.Tensor) -> torch.Tensor:
        radians = columns * (2 * math.pi / self.period)
        return math.sqrt(2) * torch.cat([radians.sin(), radians.cos()], dim=1)

    def line(self, num: int) -> list[float]:
        return super().line(num + 1)[:-1]

    def example(self) -> float:
        return self.period / 10


@dataclass(frozen=True)
class CategoryField(Field):
    """One of several words."""

    values: tuple[str, ...]
    type: ClassVar[str] = "category"

    def __post_init__(self):
        vars(self).update(values=tuple(self.values), choices=tuple(self.values), num_features=len(self.values))
        if len(set(self.values)) < max(1, len(self.values)) or not all(isinstance(value, str) for value in self.values):
            raise ValueError(f"values must be different words, got {list(self.values)}")

    def __str__(self) -> str:
        text = ", ".join(self.values)
        if len(text) <= SHOWN:
            return f"one of {text}"
        return f"one of {text[:SHOWN].rpartition(', ')[0] or text[:SHOWN]}, … ({len(self.values)} words)"

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

    def features(self, columns: torch.Tensor) -> torch.Tensor:
        return math.sqrt(len(self.values)) * F.one_hot(columns[:, 0].long(), len(self.values)).to(columns.dtype)

    def example(self) -> str:
        return self.values[0]


@dataclass(frozen=True)
class VectorField(Field):
    """`length` numbers, such as bits or an embedding."""

    length: int
    type: ClassVar[str] = "vector"
    spread = 1.0

    def __post_init__(self):
        if not self.length or self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")
        vars(self).update(num_features=self.length)

    def __str__(self) -> str:
        return f"{self.length} numbers"

    def parse(self, value: Any) -> list[float]:
        numbers = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value, dtype=np.float64)
        if numbers.shape != (self.length,):
            raise ValueError(f"it has shape {numbers.shape}")
        if not np.isfinite(numbers).all():
            raise ValueError("it is not finite")
        return numbers.tolist()

    def read(self, text: str) -> Any:
        return [float(number) for number in text.replace(",", " ").split()]

    def example(self) -> Any:
        return [1.0] + [0.0] * (self.length - 1)
