"""What all reports end with: words, figures and files."""

import importlib.util
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..pipelines import PDiffPipeline
from .report import Report

logger = logging.getLogger(__name__)


def save_report(
    report: Report,
    folder: str | os.PathLike,
    losses: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    **figures: Any,
) -> None:
    """Writes a report with its figures, if they can be drawn; see [`~pdiff_hf.evaluation.plots.draw_figures`]."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("matplotlib"):
        from .plots import draw_figures

        draw_figures(report, folder, losses=losses, **figures)
    else:
        logger.warning("the report has no figures, which need matplotlib: pip install 'pdiff_hf[report]'")
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
