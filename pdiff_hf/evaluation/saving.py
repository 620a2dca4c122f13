"""What all reports end with: how the generator was sampled, figures and files."""

import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..pipelines import PDiffPipeline
from .report import Report

logger = logging.getLogger(__name__)


def sampling_of(pipeline: PDiffPipeline) -> dict[str, Any]:
    """How a pipeline samples, for a report."""
    names = ("num_inference_steps", "temperature", "guidance_scale")
    return {name: pipeline.config[name] for name in names} | {"scheduler": type(pipeline.scheduler).__name__}


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
