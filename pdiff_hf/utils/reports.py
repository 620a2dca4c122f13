"""Reading of reports, for everything that shows one; those of version 0.2 are brought into today's form."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPORT_VERSION = 3
FIELD_FIGURE = "accuracy_along_field.png"
CONTACT_SHEET = "contact_sheet.png"
# The figures beside a report, and what they show; the first one that there is comes first everywhere.
FIGURES = {
    CONTACT_SHEET: "Generated data, the nearest training data, and those of other generators",
    FIELD_FIGURE: "Accuracy along a field of the conditions",
    "accuracy_vs_similarity.png": "Accuracy against the similarity to the snapshots (paper, figure 4)",
    "frontier.png": "Fidelity against novelty: Fréchet distance and nearness to the training data",
    "scores.png": "Distribution of the metric in each group",
    "max_similarity.png": "Similarity to the nearest snapshot, lower is newer (paper, figure 5c)",
    "reverse_process.png": "Accuracy along the reverse process (paper, figure 5b)",
    "parameters.png": "Parameters of snapshots and generated networks",
    "latents.png": "Latents on the snapshots' first two principal components",
    "losses.png": "Losses in training",
}
TEST = "test"
CLOSE = "too close to call"


def load_report(path: str | os.PathLike) -> dict[str, Any]:
    """
    What a `report.json` holds, as `evaluation/report_schema.json` describes it.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not a report, or one of a version that this one does not read.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        version = report.get("version", 1)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"'{path}' is not a report: {error}") from error
    if version == 2:
        return _from_members(report) if report.get("kind") == "conditional" else _from_task(report)
    if version != REPORT_VERSION:
        raise ValueError(
            f"'{path}' is a report of format {version}, as {'pdiff_hf 0.1' if version == 1 else 'another version'} "
            f"writes it; this version reads formats 2 and {REPORT_VERSION}. Evaluate again, with the stage evaluate or "
            "scripts/evaluate.py"
        )
    return report


def find_group(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The group of that name."""
    return next(group for group in report["groups"] if group["name"] == name)


def generated_group(report: Mapping[str, Any]) -> dict[str, Any]:
    """The group of generated networks."""
    return next(group for group in report["groups"] if group["kind"] == "generated")


def _verdict(word: str) -> str:
    return CLOSE if word == "undecided" else word


def _new_report(old: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {"reconstruction": None, "tuning": None, "temperatures": []}
    empty |= {"reverse_process": None, "more_steps": None}
    kept = {key: old[key] for key in ("metric", "num_parameters", "warnings", *empty) if key in old}
    return {
        "version": REPORT_VERSION,
        **empty,
        **kept,
        "sampling": {},
        "summary": {},
        "verdict": [old["verdict"]],
        "num_generated": None,
        **changes,
    }


def _new_group(name: str, kind: str, sets: dict, comparisons: dict, **changes: Any) -> dict[str, Any]:
    group: dict[str, Any] = {"name": name, "kind": kind, "sweep": None, "value": None, "n": 1, "num_undefined": 0}
    group |= {"cost": None, "size": None, "note": "", "tried": {}, "sets": sets, "comparisons": comparisons}
    return group | {"measures": {}, "ensembles": [], "memorisation": None} | changes


_SINGLE = {"generated": "generated", "snapshots": "snapshots", "reconstructed": "control", "mean": "baseline"}


def _from_task(old: Mapping[str, Any]) -> dict[str, Any]:
    """A report of 0.2 on one task."""
    audits = {row["name"]: row for row in old["audit"]["rows"]}
    frontier = {row["name"]: row for row in old["frontier"]["rows"]}
    groups = []
    keys = ("name", "family", "value", "n", "num_undefined", "feedback", "scores", "ensembles")
    for row in old["groups"]:
        feedback, comparison = row.get("feedback"), None
        kind = _SINGLE.get(row["name"], "opponent" if feedback else "baseline")
        if row["family"] == "generated at other temperatures":
            kind = "variant"
        if row["name"] == "snapshots":
            comparison = old["difference"] | {"better": None, "worse": None}
        elif kind in ("baseline", "opponent") and row["name"] in frontier:
            place = frontier[row["name"]]
            ends = place["score"], frontier["generated"]["score"]
            comparison = {"difference": None if None in ends else ends[1] - ends[0], "interval": None}
            comparison |= {key: place[key] for key in ("verdict", "better", "worse")}
        if comparison:
            comparison["verdict"] = _verdict(comparison["verdict"])
        groups.append(
            _new_group(
                row["name"],
                kind,
                {TEST: {"scores": [row["scores"]]}},
                {TEST: comparison} if comparison else {},
                sweep=row["family"],
                value=row["value"],
                n=row["n"],
                num_undefined=row["num_undefined"],
                cost=feedback,
                measures={key: value for key, value in row.items() if key not in keys},
                ensembles=row.get("ensembles", []),
                memorisation={key: value for key, value in audits[row["name"]].items() if key != "name"},
            )
        )
    curve = [
        {key: row[key] for key in ("value", "num_models", "score", "max_iou")}
        | {
            kind: {_verdict(word): count for word, count in row[kind].items()}
            for kind in ("plain", "tuned")
            if kind in row
        }
        for row in old.get("temperatures", [])
    ]
    tuning = old.get("tuning")
    if tuning is not None:
        entries = [entry | {"verdict": _verdict(entry["verdict"])} for entry in tuning["break_even"]]
        tuning = tuning | {"break_even": entries}
    return _new_report(
        old,
        groups=groups,
        tuning=tuning,
        fields={},
        conditions={TEST: [{}]},
        splits=old["splits"],
        settings={},
        num_generated=old["num_generated"],
        temperatures=curve,
    )


_KINDS = {"generator": "variant", "closed form": "baseline", "trained": "opponent"}
_NAMED = {"generator": "generated", "nearest seen task": "snapshots", "base model": "baseline"}


def _from_members(old: Mapping[str, Any]) -> dict[str, Any]:
    """A report of 0.2 on members of a family, which counted a pass forward and backward as one."""
    groups = []
    for name, row in old["rows"].items():
        comparisons = {
            set_name: {
                "difference": rows[name]["difference"],
                "interval": [rows[name]["low"], rows[name]["high"]],
                "verdict": _verdict(rows[name]["verdict"]),
                "better": None,
                "worse": None,
            }
            for set_name, rows in old["comparisons"].items()
            if name in rows
        }
        sets = {
            set_name: {"scores": [[v] for v in scores["accuracy"]], "losses": [[v] for v in scores["loss"]]}
            for set_name, scores in row["sets"].items()
        }
        kind = _NAMED.get(name, _KINDS.get(row["kind"], row["kind"]))
        cost = {"once": 3 * row["once"], "each": 3 * row["each"]}
        scores = row["sets"][TEST]["accuracy"]
        measures = {"score_mean": sum(scores) / len(scores)}
        groups.append(_new_group(name, kind, sets, comparisons, cost=cost, note=row["note"], measures=measures))
    settings = old["settings"] if isinstance(old["settings"], dict) else {}
    sampling = {key: settings[key] for key in ("num_inference_steps", "temperature") if key in settings}
    return _new_report(
        old,
        groups=groups,
        fields=old["fields"],
        conditions=old["conditions"],
        splits={},
        settings=settings,
        sampling=sampling,
        temperatures=[],
    )
