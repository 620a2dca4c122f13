"""Groups of networks that a report compares."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..utils.seeds import named_seed
from .report_data import Cost, GroupRow, Kind


def training_cost(*numbers: int) -> int:
    """Of training: three passes for each of the product of `numbers`, such as steps, networks and examples."""
    return 3 * math.prod(numbers)


@dataclass(frozen=True)
class Group:
    """
    Networks that are reported together.

    Args:
        name (`str`): Unique.
        networks: For a single task, parameters of shape `(N, D)`; of networks that are data, these or what they make,
            `(N, P, C)`. For members of a family, a function `networks(name of the set, table)` to parameters of shape
            `(M, D)` or `(M, n, D)`, or an `nn.Module` that answers itself: `module(table, batch, generator)` gives
            logits of shape `(M, B, C)`.
        kind (`Kind`, *optional*): A baseline by default.
        sweep (`str`, *optional*): What settings of one sweep have in common, such as `noise`; by default the name.
        value (`float | str`, *optional*): The setting in its sweep.
        cost (`Cost`, *optional*): Of feedback from tasks.
        size (`int`, *optional*): Parameters that one prediction goes through; those of one network by default.
        note (`str`, *optional*): What was chosen on validation data.
        tried (`Mapping`, *optional*): Validation losses of what was tried, by setting.
        vote (`bool`, *optional*, defaults to `False`): Whether the networks of a member answer together, by the mean
            of their probabilities.
        classes (`torch.Tensor`, *optional*): Of networks that are data, the classes that were asked for, `(N,)`.
    """

    name: str
    networks: Any
    kind: Kind = Kind.BASELINE
    sweep: str | None = None
    value: float | str | None = None
    cost: Cost | None = None
    size: int | None = None
    note: str = ""
    tried: Mapping[str, float] | None = None
    vote: bool = False
    classes: torch.Tensor | None = None

    def row(self, n: int, **scores: Any) -> GroupRow:
        """What a report says of it, with `n` networks (for each member) and their scores."""
        about = {"cost": self.cost, "size": self.size, "note": self.note, "tried": dict(self.tried or {})}
        return GroupRow(self.name, self.kind, self.sweep, self.value, n, **about, **scores)  # type: ignore[arg-type]


# A group of that name, of which the work begins when it is asked for.
Pending = tuple[str, Callable[[], Group]]
ExtraGroups = Iterable[Group | Pending] | Callable[[Any], Iterable[Group | Pending]]


def pending(group: Group | Pending) -> Pending:
    return (group.name, lambda: group) if isinstance(group, Group) else group


def named_generator(seed: int, name: str) -> torch.Generator:
    """A source of randomness of its own for everything that has a name."""
    return torch.Generator().manual_seed(named_seed(seed, name))


def search(
    losses: Callable[[Sequence[float]], Sequence[float]], values: Sequence[float], factor: float = 2.0, most: int = 6
) -> tuple[float, dict[str, float]]:
    """
    Tries settings, at least four of them, and goes on beyond an edge until the loss rises again.

    Args:
        losses (`Callable`): The validation losses of some settings, which are tried together.
        values (`Sequence[float]`): In a row of rising ones.
        factor (`float`, *optional*, defaults to 2): From one to the next beyond an edge.
        most (`int`, *optional*, defaults to 6): So many are added at most.

    Returns:
        `tuple`: The best setting, and the loss of each that was tried.
    """
    tried = dict(zip(values, losses(values), strict=True))

    def rank(value: float) -> float:
        return tried[value] if math.isfinite(tried[value]) else math.inf

    for _ in range(most):
        best = min(tried, key=rank)
        if best == max(tried):
            new = best * factor
        elif best == min(tried):
            new = best / factor
        else:
            break
        tried[new] = losses([new])[0]
    return min(tried, key=rank), {f"{value:.3g}": tried[value] for value in sorted(tried)}
