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
    "parameters.png": "Parameters of snapshots and generated networks, as deviations from the snapshots' mean",
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
        text = Path(path).read_text(encoding="utf-8")
        version = json.loads(text).get("version", 1)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"'{path}' is not a report: {error}") from error
    if version == REPORT_VERSION:
        return json.loads(text)
    if version != 2:
        raise ValueError(
            f"'{path}' is a report of format {version}, as {'pdiff_hf 0.1' if version == 1 else 'another version'} "
            f"writes it; this version reads formats 2 and {REPORT_VERSION}. Evaluate again, with the stage evaluate or "
            "scripts/evaluate.py"
        )
    old = json.loads(text.replace('"undecided"', f'"{CLOSE}"'))
    changed = _from_members(old) if old.get("kind") == "conditional" else _from_task(old)
    empty: dict[str, Any] = {"reconstruction": None, "tuning": None, "reverse_process": None, "more_steps": None}
    empty |= {"sampling": {}, "num_generated": None}
    kept = {key: old[key] for key in ("metric", "num_parameters", "warnings", *empty) if key in old}
    said = {"version": REPORT_VERSION, "verdict": [old["verdict"]], "summary": {}}
    return empty | kept | said | changed


def find_group(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The group of that name."""
    return next(group for group in report["groups"] if group["name"] == name)


def generated_group(report: Mapping[str, Any]) -> dict[str, Any]:
    """The group of generated networks."""
    return next(group for group in report["groups"] if group["kind"] == "generated")


def _group(known: dict[str, Any]) -> dict[str, Any]:
    """With what groups of 0.2 do not have."""
    group: dict[str, Any] = {"sweep": None, "value": None, "n": 1, "num_undefined": 0, "cost": None, "size": None}
    return group | {"note": "", "tried": {}, "measures": {}, "ensembles": [], "memorisation": None} | known


_SINGLE = {"generated": "generated", "snapshots": "snapshots", "reconstructed": "control", "mean": "baseline"}


def _from_task(old: Mapping[str, Any]) -> dict[str, Any]:
    """What a report of 0.2 on one task says otherwise."""
    audits = {row["name"]: row for row in old["audit"]["rows"]}
    frontier = {row["name"]: row for row in old["frontier"]["rows"]}
    groups = []
    keys = ("name", "family", "value", "n", "num_undefined", "feedback", "scores", "ensembles")
    for row in old["groups"]:
        name, comparisons = row["name"], {}
        kind = _SINGLE.get(name, "opponent" if row.get("feedback") else "baseline")
        if row["family"] == "generated at other temperatures":
            kind = "variant"
        if name == "snapshots":
            comparisons[TEST] = old["difference"] | {"better": None, "worse": None}
        elif kind in ("baseline", "opponent") and name in frontier:
            ends = frontier[name]["score"], frontier["generated"]["score"]
            found = {"difference": None if None in ends else ends[1] - ends[0], "interval": None}
            comparisons[TEST] = found | {key: frontier[name][key] for key in ("verdict", "better", "worse")}
        group = {key: row[key] for key in ("name", "value", "n", "num_undefined", "ensembles") if key in row}
        group |= {"kind": kind, "sweep": row["family"], "cost": row.get("feedback"), "comparisons": comparisons}
        group["sets"] = {TEST: {"scores": [row["scores"]]}}
        group["measures"] = {key: value for key, value in row.items() if key not in keys}
        group["memorisation"] = {key: value for key, value in audits[name].items() if key != "name"}
        groups.append(_group(group))
    changed = {"groups": groups, "fields": {}, "conditions": {TEST: [{}]}, "settings": {}}
    return changed | {key: old.get(key) for key in ("splits", "num_generated", "tuning")}


_KINDS = {"generator": "variant", "closed form": "baseline", "trained": "opponent"}
_NAMED = {"generator": "generated", "nearest seen task": "snapshots", "base model": "baseline"}


def _from_members(old: Mapping[str, Any]) -> dict[str, Any]:
    """What a report of 0.2 on members of a family, which counted a pass forward and backward as one, says otherwise."""
    groups = []
    for name, row in old["rows"].items():
        group: dict[str, Any] = {"name": name, "kind": _NAMED.get(name, _KINDS.get(row["kind"], row["kind"]))}
        group |= {"note": row["note"], "cost": {"once": 3 * row["once"], "each": 3 * row["each"]}}
        group["sets"] = {
            set_name: {"scores": [[v] for v in scores["accuracy"]], "losses": [[v] for v in scores["loss"]]}
            for set_name, scores in row["sets"].items()
        }
        group["comparisons"] = {
            set_name: {"interval": [rows[name]["low"], rows[name]["high"]], "better": None, "worse": None}
            | {key: rows[name][key] for key in ("difference", "verdict")}
            for set_name, rows in old["comparisons"].items()
            if name in rows
        }
        scores = row["sets"][TEST]["accuracy"]
        groups.append(_group(group | {"measures": {"score_mean": sum(scores) / len(scores)}}))
    settings = old["settings"] if isinstance(old["settings"], dict) else {}
    sampling = {key: settings[key] for key in ("num_inference_steps", "temperature") if key in settings}
    changed = {"groups": groups, "splits": {}, "settings": settings, "sampling": sampling}
    return changed | {key: old[key] for key in ("fields", "conditions")}
