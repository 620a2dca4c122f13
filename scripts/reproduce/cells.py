"""From reports to the cells of a table: statistics of a group over networks and seeds, and how two groups compare."""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from pdiff_hf.evaluation.render import table
from pdiff_hf.utils.reports import find_group

from .tables import Column, Experiment, Row

CONFIDENCE = 0.95
# What stands in the table, and the values behind it by name; the first has the name "".
Cell = tuple[str, dict[str, Any]]


def _max_iou(report: dict, group: str) -> list[float]:
    """Maximum IoU with a snapshot, of each network for which it is defined."""
    return [value for value in find_group(report, group)["memorisation"]["iou"] if value is not None]


def _best(report: dict, group: str) -> dict[str, float]:
    measures = find_group(report, group)["measures"]
    return {"": measures["score_best"], "selected on test": measures["score_best_on_test"]}


def _best_on_all(report: dict, group: str) -> dict[str, float]:
    """As `best`, on all test images, where the report has only some of them."""
    selected = report.get("selected")
    return {"": selected[group]} if selected else {"": _best(report, group)[""]}


def _average(report: dict, group: str) -> dict[str, float]:
    row = find_group(report, group)
    measures = row["measures"]
    return {"": measures["score_mean"], "std over networks": measures["score_std"], "networks": row["n"]}


def _similarity(report: dict, group: str) -> dict[str, float]:
    values = _max_iou(report, group)
    return {
        "": statistics.mean(values) if values else math.nan,
        "std over networks": statistics.stdev(values) if len(values) > 1 else 0.0 if values else math.nan,
        "networks": len(values),
    }


def _range(report: dict, group: str) -> dict[str, float]:
    values = _max_iou(report, group) or [math.nan]
    return {"": min(values), "highest": max(values)}


def _memory(report: dict, group: str) -> dict[str, float]:
    measured = report["memory"][group]
    return {"" if measured.fits else "does not fit into": round(measured.memory / 1e6)}


# From a report and a group to values, of which the first is the one that the paper prints.
STATISTICS = {
    "best": _best,
    "best_on_all": _best_on_all,
    "average": _average,
    "similarity": _similarity,
    "range": _range,
    "memory": _memory,
}
DIGITS = {"similarity": 3, "memory": 0}


def make_cell(column: Column, row: Row, reports: Sequence[dict]) -> Cell | None:
    """The cell of a column and a row, over the reports of several seeds; None if there is nothing to show."""
    if column.statistic is None or not reports:
        return None
    group = column.group or row.group
    if column.against is not None:
        return compare(column.statistic, reports, group, column.against)
    return statistic_of(column.statistic, reports, group)


def statistic_of(statistic: str, reports: Sequence[dict], group: str) -> Cell:
    """A statistic of a group: its mean over the reports of several seeds, ± over networks and over seeds."""
    digits = DIGITS.get(statistic, 2)
    values = [STATISTICS[statistic](report, group) for report in reports]
    if statistic == "range":
        numbers = {"": min(v[""] for v in values), "highest": max(v["highest"] for v in values)}
        return f"{numbers['']:.{digits}f}~{numbers['highest']:.{digits}f}", numbers
    if statistic == "memory" and "" not in values[0]:
        return f"more than {values[0]['does not fit into']}", values[0]
    numbers = {key: statistics.mean(value[key] for value in values) for key in values[0]}
    text = f"{numbers['']:.{digits}f}"
    if "networks" in numbers:
        numbers["networks"] = int(numbers["networks"])
        text += f" ± {numbers['std over networks']:.{digits}f} (n={numbers['networks']})"
    if len(values) > 1:
        numbers["std over seeds"] = statistics.stdev(value[""] for value in values)
        text += f"; ± {numbers['std over seeds']:.{digits}f} over {len(values)} seeds"
    return text, numbers


def compare(statistic: str, reports: Sequence[dict], group: str, against: str) -> Cell:
    """
    Whether a group is better than another one, worse, or equal within the noise of the seeds: by a paired t-test, at
    95% confidence, of the differences within each seed.
    """
    function, digits = STATISTICS[statistic], DIGITS.get(statistic, 2)
    differences = [function(report, group)[""] - function(report, against)[""] for report in reports]
    mean = statistics.mean(differences)
    if len(reports) == 1:
        return f"{mean:+.{digits}f}, one seed", {"": "one seed", "difference": mean}
    std = statistics.stdev(differences)
    margin = student.ppf((1 + CONFIDENCE) / 2, len(reports) - 1) * std / math.sqrt(len(reports))
    gain = mean if reports[0]["metric"]["higher_is_better"] else -mean
    verdict = "better" if gain > margin else "worse" if gain < -margin else "equal within noise"
    text = f"{verdict} ({mean:+.{digits}f} ± {std:.{digits}f} over {len(reports)} seeds)"
    return text, {"": verdict, "difference": mean, "std over seeds": std}


def write_table(
    experiment: Experiment,
    name: str,
    rows: Sequence[tuple[Row, Sequence[Cell | None], Mapping[str, Any]]],
    folder: Path,
    about: Sequence[str],
) -> None:
    """
    Writes `table.md` and `table.csv` into `folder`.

    Args:
        rows (`Sequence[tuple]`): Rows, each with a cell or None for each column, and with more values for `table.csv`.
        about (`Sequence[str]`): Paragraphs below the table.
    """
    header, lines = [experiment.varied], [[row.label] for row, _, _ in rows]
    records: list[dict[str, Any]] = [
        {"run": row.run, experiment.varied: row.label, "group": row.group} for row, _, _ in rows
    ]
    for i, column in enumerate(experiment.columns):
        printed = [row.paper[i] if len(row.paper) > i else "" for row, _, _ in rows]
        if any(printed):  # the paper has no numbers of some figures
            header.append(f"{column.title}, paper")
            for line, record, number in zip(lines, records, printed, strict=True):
                line.append(number or "–")
                record[f"{column.title} (paper)"] = number
        if column.statistic is not None:
            header.append(f"{column.title}, here")
            for line, record, (_, cells, _) in zip(lines, records, rows, strict=True):
                text, numbers = cells[i] or ("–", {})
                line.append(text)
                record |= {f"{column.title} {key}".strip(): number for key, number in numbers.items()}
    for record, (_, _, more) in zip(records, rows, strict=True):
        record |= more
    paragraphs = [f"## {name}: {experiment.title}", table(header, lines), *about]
    if experiment.note:
        paragraphs.append(experiment.note)
    (folder / "table.md").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for record in records for key in record)))
        writer.writeheader()
        writer.writerows(records)
