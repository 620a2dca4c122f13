"""Reading of reports, for everything that shows one."""

import json
import os
from pathlib import Path

REPORT_VERSION = 2
FIELD_FIGURE = "accuracy_along_field.png"
# The figures beside a report, and what they show; the first one that there is comes first everywhere.
FIGURES = {
    FIELD_FIGURE: "Accuracy along a field of the conditions",
    "accuracy_vs_similarity.png": "Accuracy against the similarity to the snapshots (paper, figure 4)",
    "scores.png": "Distribution of the metric in each group",
    "max_similarity.png": "Maximum similarity to the snapshots (paper, figure 5c)",
    "reverse_process.png": "Accuracy along the reverse process (paper, figure 5b)",
    "parameters.png": "Parameters of snapshots and generated networks",
    "latents.png": "Latents on the snapshots' first two principal components",
    "losses.png": "Losses in training",
}


def load_report(path: str | os.PathLike) -> dict:
    """
    What a `report.json` holds, as `evaluation/report_schema.json` describes it.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no report, or one of another version of this library.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        version = report.get("version", 1)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"'{path}' is not a report: {error}") from error
    if version != REPORT_VERSION:
        raise ValueError(
            f"'{path}' is a report of format {version}, as {'pdiff_hf 0.1' if version == 1 else 'another version'} "
            f"writes it; this version reads format {REPORT_VERSION}. Evaluate again, with the stage evaluate or "
            "scripts/evaluate.py"
        )
    return report
