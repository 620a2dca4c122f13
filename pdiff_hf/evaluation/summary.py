"""The few rows of a report that a reader wants first."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ..utils.reports import TEST
from . import metrics
from .compare import BETTER
from .report_data import GroupRow, Kind, Metric, ReportData
from .verdict import SPACES, number, space_of

MAX_ROWS = 9
# Of measures beside the mean, their titles and how they are written.
MEASURES = {
    "score_best": ("best", ".2f"),
    "score_best_on_test": ("best on test", ".2f"),
    "validation_score_mean": ("validation", ".2f"),
    "iou_within": ("IoU within", ".3f"),
    "max_iou": ("similarity", ".3f"),
    "nll": ("NLL", ".3f"),
    "ece": ("ECE", ".3f"),
    "distance_nearest": ("to nearest", ".2f"),
    "distance_to_mean": ("to mean", ".2f"),
}
COVERAGE = {name: (name, ".2f") for name in metrics.COVERAGE}
# Those of sets of data.
SET_MEASURES = {"nearness": ("nearness", ".2f"), "copies": ("copies (%)", ".1f"), "two_sample": ("1-NN", ".2f")}
SET_MEASURES |= COVERAGE | {"class_accuracy": ("class (%)", ".1f"), "decibels": ("dB", ".1f")}
ABOUT_SETS = (
    "Sets of data are compared with held-out data. The Fréchet distance is that of features (of classifiers of the "
    "data set, unless others were given), in percent of their variance; lower is better. Nearness is the median "
    "distance to the nearest training datum over that of held-out data: 1 is natural, less is closer to copies. Copies "
    "are data nearer than the nearest 1% of held-out data. The last column says how generated networks compare with "
    "the row: better is a lower Fréchet distance of data that are as new (nearness up to 0.9, within 0.05), in 95% of "
    "the resamples."
)
# What each column says of a row, by title; and a header with lines of texts.
Columns = dict[str, Callable[[Any], str]]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def table_of(rows: Sequence[Any], columns: Columns) -> Table:
    """A header and lines of texts, from what each column says of a row."""
    return list(columns), [[cell(row) for cell in columns.values()] for row in rows]


def metric_title(metric: Metric) -> str:
    """The metric with its unit, such as `accuracy (%)`."""
    return f"{metric.name} ({metric.unit})" if metric.unit else metric.name


def best_of_sweeps(report: ReportData, *kinds: Kind) -> list[GroupRow]:
    """Of every sweep of some kinds the best setting, on validation data where there is any; the best sweep first."""
    sweeps: dict[str, list[GroupRow]] = {}
    for row in report.of_kind(*kinds):
        sweeps.setdefault(row.sweep or row.name, []).append(row)
    return sorted((max(rows, key=report.rank) for rows in sweeps.values()), key=report.rank, reverse=True)


def summarise(report: ReportData) -> dict[str, Any]:
    """
    The few rows that a reader wants first.

    Returns:
        `dict`: `header` and `rows`, texts, and `about`, which explains the columns.
    """
    of_kind = _of_sets if report.is_of_sets else _of_members if report.fields else _of_task
    rows, columns, about = of_kind(report)
    header, cells = table_of(rows, columns)
    return {"header": header, "rows": cells, "about": " ".join(filter(None, [*about, sampling_sentence(report)]))}


def _of_task(report: ReportData) -> tuple[list[GroupRow], Columns, list[str]]:
    metric = report.metric
    has_similarity = "max_iou" in report.generated.measures
    columns: Columns = {"group": lambda row: row.name, metric_title(metric): spread_of}
    if has_similarity:
        columns["similarity"] = lambda row: number(row.measures.get("max_iou"))
        about = "similarity is that of wrong predictions to the nearest snapshot's (lower is newer)"
    else:
        columns["distance to mean"] = lambda row: number(row.measures.get("distance_to_mean"), ".2f")
        about = "distance to mean is that to the snapshots' mean, in units of their own"
    columns["generated vs. this row"] = verdict_of
    first = [*report.of_kind(Kind.GENERATED), *report.of_kind(Kind.SNAPSHOTS)]
    first += [row for row in report.of_kind(Kind.VARIANT) if row.sweep is None]
    plain, tuned = best_of_sweeps(report, Kind.BASELINE), best_of_sweeps(report, Kind.OPPONENT, Kind.ORACLE)
    first += [row for row in plain if row.sweep == "mean"]
    plain = [row for row in plain if row not in first]
    room = MAX_ROWS - len(first)
    rows = [*first, *plain[: max(room - len(tuned), (room + 1) // 2)]]
    rows += tuned[: MAX_ROWS - len(rows)]
    left = len(first) + len(plain) + len(tuned) - len(rows)
    sentences = [
        f"{report.num_parameters:,} generated parameters. {metric.name.capitalize()} is the mean ± standard deviation "
        f"over the networks of a group on {report.splits['test']:,} test examples"
        f"{'' if metric.higher_is_better else ', lower is better'}; {about}; the last column says how generated "
        "networks compare with the row. Of each sweep of settings the one that is best on validation.",
        f"{left} more kinds are in the tables of the report." if left else "",
    ]
    return rows, columns, sentences


def _of_members(report: ReportData) -> tuple[list[GroupRow], Columns, list[str]]:
    columns: Columns = {"networks": lambda row: row.name}
    for name, members in report.conditions.items():
        columns[f"{name} ({len(members)} tasks)"] = partial(lambda name, row: number(row.mean(name), ".1f"), name)
    columns |= {
        "generated vs. this row": difference_of,
        "passes before": lambda row: "–" if row.cost is None else short(row.cost.once),
        "passes a task": lambda row: "–" if row.cost is None else short(row.cost.each),
        "size": lambda row: "–" if row.size is None else short(row.size),
    }
    about = (
        f"{report.num_parameters:,} generated parameters a network. {metric_title(report.metric).capitalize()} is the "
        "mean over tasks; differences are the generated networks' less the row's, paired over tasks, and a verdict "
        "needs a 95% interval without 0. Passes are of one example through one network: forward counts 1, backward 2; "
        "before the first unseen task, with all that validation tried, and for each. Size is the parameters that a "
        "prediction goes through."
    )
    return sorted(report.groups, key=lambda row: -report.metric.sign * (row.mean() or 0.0)), columns, [about]


def _of_sets(report: ReportData) -> tuple[list[GroupRow], Columns, list[str]]:
    rows = report.of_kind(Kind.GENERATED, Kind.SNAPSHOTS)
    for space in SPACES:  # the best that are as new as data are, by the Fréchet distance
        known = [row for row in report.of_kind(Kind.BASELINE) if space_of(row) == space]
        known = [row for row in known if row.verdict != BETTER] or known
        rows += sorted(known, key=lambda row: row.mean() or math.inf)[:2]
    columns: Columns = {"data of": lambda row: row.name, "Fréchet (%)": lambda row: number(row.mean(), ".2f")}
    columns |= columns_of({key: SET_MEASURES[key] for key in ("nearness", "copies")}, rows)
    columns["generated vs. this row"] = verdict_of
    rows += report.of_kind(Kind.OPPONENT)
    return rows, columns, [f"{report.num_parameters:,} generated parameters a network. {ABOUT_SETS}"]


def columns_of(shown: Mapping[str, tuple[str, str]], rows: Sequence[GroupRow]) -> Columns:
    """The columns of those measures that some of the rows have."""
    return {
        title: partial(lambda key, style, row: number(row.measures.get(key), style), key, style)
        for key, (title, style) in shown.items()
        if any(key in row.measures for row in rows)
    }


def verdict_of(row: GroupRow) -> str:
    return row.verdict or "–"


def difference_of(row: GroupRow, with_interval: bool = True) -> str:
    """What the generated networks have more than a row, over members."""
    if TEST not in row.comparisons:
        return "–"
    comparison = row.comparisons[TEST]
    ends = with_interval and comparison.interval and " to ".join(number(end, "+.1f") for end in comparison.interval)
    return f"{number(comparison.difference, '+.1f')} {f'({ends}), ' if ends else ''}{row.verdict}"


def sampling_sentence(report: ReportData) -> str:
    """How the generator was sampled."""
    s = report.sampling
    if not s:
        return ""
    steps = s.get("num_inference_steps")
    parts = ["" if steps is None else "1 step" if steps == 1 else f"{steps} steps"]
    parts += [f"of {s['scheduler']}" if "scheduler" in s else ""]
    parts += [f"at temperature {s['temperature']:g}" if "temperature" in s else ""]
    parts += [f"with guidance {s['guidance_scale']:g}" if s.get("guidance_scale", 1) != 1 else ""]
    return f"Sampled in {' '.join(filter(None, parts))}."


def short(count: int) -> str:
    """A large number in few characters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def count_of(row: GroupRow) -> str:
    """The size of a group, and how many of its networks have no score or no finite predictions."""
    return f"{row.n:,}" + (f" ({row.num_undefined} not finite)" if row.num_undefined else "")


def spread_of(row: GroupRow) -> str:
    """The mean ± the standard deviation of a group."""
    mean, std = number(row.measures.get("score_mean"), ".2f"), number(row.measures.get("score_std"), ".2f")
    return mean if row.measures.get("score_mean") is None or row.n == 1 else f"{mean} ± {std}"
