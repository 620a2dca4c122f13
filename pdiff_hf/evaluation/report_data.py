"""What a report holds: groups of networks, how they came out, and how generated networks compare with them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..utils.files import without_nan
from ..utils.reports import REPORT_VERSION, TEST
from .compare import Bootstrap, Comparison

if TYPE_CHECKING:
    from typing_extensions import Self


class Kind(str, Enum):  # noqa: UP042  # StrEnum needs Python 3.11
    """What a group of networks is to the generator whose report it stands in."""

    GENERATED = "generated"  # what the generator gives
    SNAPSHOTS = "snapshots"  # what it was made from; for an unseen task, the nearest of them
    BASELINE = "baseline"  # free: needs the snapshots or the base model, and no feedback
    OPPONENT = "opponent"  # trained on feedback from tasks, as the generator was
    ORACLE = "oracle"  # trained on the unseen task itself
    VARIANT = "variant"  # the generator otherwise: before tuning, at another temperature
    CONTROL = "control"  # shows where something is lost: reconstructions, shuffled conditions


@dataclass(frozen=True)
class Cost:
    """
    Passes of one example through one network: forward counts 1 and backward 2, so that a training step on one example
    costs 3.

    Args:
        once (`int`): Before the first network or unseen task, with what validation took to choose among settings.
        each (`int`): For each network, or each unseen task.
    """

    once: int = 0
    each: int = 0


@dataclass(frozen=True)
class Metric:
    """
    What networks are judged by.

    Args:
        name (`str`): Such as `accuracy`.
        unit (`str`): Such as `%`; empty if it has none.
        higher_is_better (`bool`): Whether the best network is the one with the largest value.
    """

    name: str
    unit: str = ""
    higher_is_better: bool = True

    @property
    def sign(self) -> int:
        """What values are multiplied with, so that larger is better."""
        return 1 if self.higher_is_better else -1


@dataclass
class GroupRow:
    """
    A group of networks in a report. Numbers that are not defined are None.

    Args:
        name (`str`): Unique.
        kind (`Kind`): What it is to the generator.
        sweep (`str`, *optional*), value (`float | str`, *optional*): Of a setting in a sweep.
        n (`int`): Networks; of a family, for each member.
        num_undefined (`int`): Networks without a score, or with predictions that are not finite.
        cost (`Cost`, *optional*): Of feedback from tasks.
        size (`int`, *optional*): Parameters that one prediction goes through.
        note (`str`): What validation chose.
        tried (`dict`): Validation losses of what was tried, by setting.
        sets (`dict`): For each set of members `scores`, a row a member and a column a network, and for members of a
            family `losses`.
        comparisons (`dict`): For each set, the generated networks against this group.
        measures (`dict`): Of the group on test data; see `metrics.measures`.
        ensembles (`list`), memorisation (`dict`, *optional*): Of a group for a single task.
    """

    name: str
    kind: Kind
    sweep: str | None = None
    value: float | str | None = None
    n: int = 1
    num_undefined: int = 0
    cost: Cost | None = None
    size: int | None = None
    note: str = ""
    tried: dict[str, Any] = field(default_factory=dict)
    sets: dict[str, dict[str, list]] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    measures: dict[str, Any] = field(default_factory=dict)
    ensembles: list[dict[str, Any]] = field(default_factory=list)
    memorisation: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.kind = Kind(self.kind)
        if isinstance(self.cost, Mapping):
            self.cost = Cost(**self.cost)
        self.comparisons = {
            name: Comparison(**one) if isinstance(one, Mapping) else one for name, one in self.comparisons.items()
        }

    def scores(self, set_name: str = TEST) -> list[float]:
        """The mean over networks for each member of a set, or of a single member those of its networks; no None."""
        rows = self.sets[set_name]["scores"]
        if len(rows) == 1:
            return [value for value in rows[0] if value is not None]
        return [fmean(row) for row in rows]

    def mean(self, set_name: str = TEST) -> float | None:
        """The mean score on a set."""
        scores = self.scores(set_name)
        return fmean(scores) if scores else None

    @property
    def verdict(self) -> str | None:
        """On the test members, seen from the generated networks."""
        return self.comparisons[TEST].verdict if TEST in self.comparisons else None

    def to_dict(self) -> dict[str, Any]:
        """The arguments, as JSON has them."""
        return without_nan(asdict(self) | {"kind": self.kind.value})


@dataclass
class ReportData:
    """
    How generated networks compare, for a single task or for unseen members of a family.

    Args:
        metric (`Metric`): What scores are.
        num_parameters (`int`): That are generated for a network.
        groups (`list[GroupRow]`): One of them of the kind `generated`.
        splits (`dict`): Examples of `validation` and `test`.
        fields (`dict`): Of conditions; empty for a single task.
        conditions (`dict`): The members of each set; the verdict is about `test`.
        sampling (`dict`): How the generator was sampled: steps, temperature, guidance, scheduler.
        settings (`dict`): What else the report was made with.
        num_generated (`int`, *optional*): Networks that were generated for a single task.
        reconstruction, tuning, more_steps: Of a single task; see the schema.
        reverse_process (`dict`, *optional*): Scores after so many denoising steps, a row a sample or a test member.
        warnings (`list[str]`): What a reader has to know before believing the numbers.
        verdict (`list[str]`): Against snapshots, free alternatives, and equal feedback.
        summary (`dict`): `header`, `rows` and `about` of the small table.
    """

    metric: Metric
    num_parameters: int
    groups: list[GroupRow] = field(default_factory=list)
    splits: dict[str, int] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    conditions: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {TEST: [{}]})
    sampling: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    num_generated: int | None = None
    reconstruction: dict[str, Any] | None = None
    tuning: dict[str, Any] | None = None
    reverse_process: dict[str, Any] | None = None
    more_steps: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    verdict: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    def group(self, name: str) -> GroupRow:
        """The group of that name; a `KeyError` if there is none."""
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"the report has no group {name!r}; it has {', '.join(group.name for group in self.groups)}")

    def of_kind(self, *kinds: Kind) -> list[GroupRow]:
        """The groups of some kinds, in their order."""
        return [group for group in self.groups if group.kind in kinds]

    @property
    def generated(self) -> GroupRow:
        return self.of_kind(Kind.GENERATED)[0]

    @property
    def is_of_sets(self) -> bool:
        """Whether networks are data, compared as sets."""
        return "nearness" in self.generated.measures

    def rank(self, group: GroupRow) -> float:
        """The larger the better: by validation data where there are scores of those, else by the mean on test."""
        value = group.measures.get("validation_score_mean", group.mean())
        return -math.inf if value is None else self.metric.sign * value

    def best(self, groups: Sequence[GroupRow]) -> GroupRow | None:
        """The best of some groups."""
        return max(groups, key=self.rank, default=None)

    def compare(self, wrong: Mapping[str, Tensor] | None = None, seed: int = 0) -> None:
        """
        Fills in how the generated networks compare with every other group on each set: paired over its members, or for
        a single member over the networks of both, and over test examples where it is known on which they err.

        Args:
            wrong (`Mapping[str, torch.Tensor]`, *optional*): For a single task where networks err, bool of shape
                `(N, U)`, by group.
            seed (`int`, *optional*, defaults to 0): Of the bootstrap.
        """
        wrong = wrong or {}
        snapshots = next((wrong[row.name] for row in self.of_kind(Kind.SNAPSHOTS) if row.name in wrong), None)
        for name, members in self.conditions.items():
            num_units = len(members) if len(members) > 1 else 0 if snapshots is None else snapshots.shape[1]
            noise = torch.Generator().manual_seed(seed)
            bootstrap = Bootstrap(num_units, self.metric.sign, noise, snapshots)
            places = {row.name: bootstrap.place(*_sample(row, name, wrong.get(row.name))) for row in self.groups}
            own = places[self.generated.name]
            for row in self.groups:
                if row is not self.generated:
                    with_similarity = row.kind != Kind.SNAPSHOTS
                    row.comparisons[name] = bootstrap.compare(own, places[row.name], with_similarity)
            if name == TEST:
                for row in self.groups:
                    ends = {key: places[row.name][key] for key in ("score_interval", "max_iou_interval")}
                    row.measures |= {key: interval for key, interval in ends.items() if interval is not None}

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: what is not finite is None."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("groups", "metric")}
        groups = [group.to_dict() for group in self.groups]
        return without_nan({"version": REPORT_VERSION, "metric": asdict(self.metric), "groups": groups, **values})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Self":
        """The inverse of `to_dict`; what else there is, as in reports of earlier versions, is left out."""
        rest = {one.name: values[one.name] for one in fields(cls) if one.name not in ("groups", "metric")}
        return cls(Metric(**values["metric"]), groups=[GroupRow(**row) for row in values["groups"]], **rest)


def _sample(row: GroupRow, set_name: str, wrong: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What the bootstrap resamples of a group: means of members, or its networks where there is one member."""
    rows = row.sets[set_name]["scores"]
    if len(rows) == 1:
        return as_tensor(rows[0]), wrong
    means = as_tensor(row.scores(set_name))
    return means, means[None]


def as_tensor(values: Sequence[float | None]) -> Tensor:
    """Numbers of a report, float64, nan where there is none."""
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
