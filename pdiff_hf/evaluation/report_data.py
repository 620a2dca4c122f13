"""What a report holds: groups of networks, and how they came out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..utils.files import without_nan
from ..utils.reports import REPORT_VERSION, TEST
from .compare import Comparison
from .groups import Cost, Kind
from .score import Metric

if TYPE_CHECKING:
    from typing_extensions import Self


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
        measures (`dict`): Of the group on test data; see `metrics.METRICS`.
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
        num_generated (`int`, *optional*): Networks that were generated, of which a sample may have been scored.
        reconstruction, tuning, temperatures, more_steps: Of a single task; see the schema.
        reverse_process (`dict`, *optional*): Scores after so many denoising steps, a row a sample or a test member.
        warnings (`list[str]`): What a reader has to know before believing the numbers.
        verdict (`list[str]`): Against snapshots, free alternatives, and equal feedback.
        summary (`dict`): `header`, `rows` and `about` of the small table.
    """

    metric: Metric
    num_parameters: int
    groups: list[GroupRow]
    splits: dict[str, int] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    conditions: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {TEST: [{}]})
    sampling: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    num_generated: int | None = None
    reconstruction: dict[str, Any] | None = None
    tuning: dict[str, Any] | None = None
    temperatures: list[dict[str, Any]] = field(default_factory=list)
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

    def best(self, groups: Sequence[GroupRow]) -> GroupRow | None:
        """The best of some groups: by validation data where there are scores of those, else by the mean on test."""

        def rank(group: GroupRow) -> float:
            value = group.measures.get("validation_score_mean", group.mean())
            return float("-inf") if value is None else self.metric.sign * value

        return max(groups, key=rank, default=None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: what is not finite is None."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("groups", "metric")}
        groups = [asdict(group) | {"kind": group.kind.value} for group in self.groups]
        return without_nan({"version": REPORT_VERSION, "metric": asdict(self.metric), "groups": groups, **values})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Self":
        """The inverse of `to_dict`."""
        rest = {key: value for key, value in values.items() if key not in ("version", "metric", "groups")}
        return cls(Metric(**values["metric"]), groups=[GroupRow(**row) for row in values["groups"]], **rest)
