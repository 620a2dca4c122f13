"""The paper's tables and figures, read from `networks.yaml` and `tables.yaml`."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


class ExperimentError(ValueError):
    """An experiment cannot be run as asked; nothing was changed."""


@dataclass(frozen=True)
class Dataset:
    """
    Args:
        id (`str`): On the Hub.
        title (`str`): The paper's name.
        settings (`Mapping`, *optional*): Settings that runs on it need.
    """

    id: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """A network of the paper; the fields are described in `networks.yaml`."""

    label: str
    recipe: str
    minutes: int
    small: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)
    canvases: Mapping[str, int] | None = None
    features: str | None = None


@dataclass(frozen=True)
class Column:
    """
    A column of numbers.

    Args:
        title (`str`): The paper's.
        statistic (`str`, *optional*): One of `cells.STATISTICS`, or `memory`; None for what only the paper has.
        group (`str`, *optional*): Group of the report that it describes; by default the one of the row.
        against (`str`, *optional*): Instead of the number, whether it is better than that of this group.
    """

    title: str
    statistic: str | None = None
    group: str | None = None
    against: str | None = None


@dataclass(frozen=True)
class Row:
    """
    A row of a table, or a point of a figure: one group of networks of one run.

    Args:
        run (`str`): Name of the run; rows with the same name describe the same run.
        label (`str`): First cell of the row.
        varies (`Mapping`): Settings in which the runs of the experiment differ.
        paper (`Sequence[str]`): What the paper prints, as it prints it, for the first columns or none.
        group (`str`, *optional*, defaults to `"generated"`): Group of the report.
        architecture (`str`, *optional*, defaults to `"resnet18"`): One of `ARCHITECTURES`.
        dataset (`str`, *optional*, defaults to `"cifar100"`): One of `DATASETS`.
    """

    run: str
    label: str
    varies: Mapping[str, Any] = field(default_factory=dict)
    paper: Sequence[str] = ()
    group: str = "generated"
    architecture: str = "resnet18"
    dataset: str = "cifar100"


@dataclass(frozen=True)
class Experiment:
    """
    A table or figure of the paper.

    Args:
        title (`str`): What it shows.
        varied (`str`): What the rows differ in, the title of the first column.
        columns (`Sequence[Column]`): Columns of numbers.
        rows (`Sequence[Row]`): In the paper's order.
        figure (`str`, *optional*): One of `figures.FIGURES`.
        settings (`Mapping`, *optional*): Settings that all of its rows need.
        note (`str`, *optional*): What a reader has to know to compare the numbers.
        extra_groups (`str`, *optional*): One of `extra_groups.EXTRA_GROUPS`, whose groups its reports have too.
    """

    title: str
    varied: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    figure: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    extra_groups: str | None = None

    @property
    def measures_memory(self) -> bool:
        """Whether rows are trainings whose memory is measured, and not runs."""
        return any(column.statistic == "memory" for column in self.columns)


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def _read_experiment(
    columns: Sequence[dict],
    cells: Mapping[str, str] | None = None,
    rows: Sequence[dict] = (),
    groups: Sequence[str] = (),
    **rest,
) -> Experiment:
    expanded = [Row(**row | {"paper": row.get("paper", "").split()}) for row in rows]
    for run, paper in (cells or {}).items():
        architecture, dataset = run.split("/")
        label = f"{ARCHITECTURES[architecture].label}, {DATASETS[dataset].title}"
        expanded.append(Row(run, label, {}, paper.split(), architecture=architecture, dataset=dataset))
    if groups:
        expanded = [
            dataclasses.replace(row, label=f"{row.label}: {group}", group=group) for row in expanded for group in groups
        ]
    return Experiment(columns=[Column(**column) for column in columns], rows=expanded, **rest)


_NETWORKS = _read("networks.yaml")
DATASETS = {name: Dataset(**values) for name, values in _NETWORKS["datasets"].items()}
ARCHITECTURES = {name: Architecture(**values) for name, values in _NETWORKS["architectures"].items()}
SCALE_SETTINGS: dict[str, dict[str, Any]] = _NETWORKS["scales"]
EXPERIMENTS = {name: _read_experiment(**values) for name, values in _read("tables.yaml").items()}


def find_experiment(name: str) -> Experiment:
    """The experiment of that name; an `ExperimentError` if there is none."""
    if name not in EXPERIMENTS:
        raise ExperimentError(f"there is no experiment '{name}'; there are {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]
