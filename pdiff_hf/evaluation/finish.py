"""What all reports end with: words, figures and files."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..pipelines import PDiffPipeline
from .plots import draw_figures
from .report import Report


def save_report(
    report: Report,
    folder: str | os.PathLike,
    losses: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    **figures: Any,
) -> None:
    """Writes a report with its figures; see [`~pdiff_hf.evaluation.plots.draw_figures`]."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    draw_figures(report, folder, losses=losses, **figures)
    report.save(folder)


def sampling_of(pipeline: PDiffPipeline) -> dict[str, Any]:
    """How a pipeline samples, for a report."""
    config = pipeline.config
    names = ("num_inference_steps", "temperature", "guidance_scale")
    return {name: config[name] for name in names} | {"scheduler": type(pipeline.scheduler).__name__}


def finish(report: Report) -> None:
    """Everything in words, which follows from the numbers."""
    for row in report.groups:
        row.measures = {key: _finite(value) for key, value in row.measures.items()}
    report.describe()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
