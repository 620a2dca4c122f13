"""The paper's figures: `FIGURES[name](path, rows, reports)` draws rows with the report of each."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pdiff_hf.evaluation.plots import (
    GENERATED,
    ORIGINAL,
    ScatterGroup,
    plot_accuracy_vs_similarity_panels,
    plot_max_similarity_distribution,
    plot_memory,
    plot_reverse_process,
)

from .cells import find_group, max_iou
from .tables import Row


def _max_iou(report: dict, group: str) -> torch.Tensor:
    values = [math.nan if value is None else value for value in max_iou(report, group)]
    return torch.tensor(values, dtype=torch.float64)


def _scatter(report: dict, group: str, family: str) -> ScatterGroup:
    accuracies = torch.tensor(find_group(report, group)["accuracies"], dtype=torch.float64)
    return ScatterGroup(family, accuracies, _max_iou(report, group))


def _draw_against_noise(path: Path, rows: Sequence[Row], reports: Sequence[dict]) -> None:
    """Figures 3 and 4: one panel a run."""
    panels = {}
    for row, report in zip(rows, reports, strict=True):
        if row.group == "generated":
            noise = [_scatter(report, r.group, "noise") for r in rows if r.run == row.run and "noise" in r.group]
            shown = (_scatter(report, "original", "originals"), _scatter(report, "generated", "generated"), noise)
            panels[row.label.partition(":")[0]] = shown
    plot_accuracy_vs_similarity_panels(path, panels)


def _draw_augmentation(path: Path, rows: Sequence[Row], reports: Sequence[dict]) -> None:
    """Figure 5a: the generated networks of all runs in one panel. Their originals are the same."""
    generated = [_scatter(report, "generated", row.label) for row, report in zip(rows, reports, strict=True)]
    originals = _scatter(reports[-1], "original", "originals")
    plot_accuracy_vs_similarity_panels(path, {"noise augmentation": (originals, generated[-1], generated[:-1])})


def _draw_trajectories(path: Path, rows: Sequence[Row], reports: Sequence[dict]) -> None:
    """Figure 5b."""
    process, originals = reports[0]["reverse_process"], find_group(reports[0], "original")
    plot_reverse_process(path, process["steps"], torch.tensor(process["accuracy"]), originals["accuracy_mean"])


def _draw_similarities(path: Path, rows: Sequence[Row], reports: Sequence[dict]) -> None:
    """Figure 5c."""
    shown = {row.label: _max_iou(report, row.group) for row, report in zip(rows, reports, strict=True)}
    colours = [ORIGINAL if row.group == "original" else GENERATED for row in rows]
    plot_max_similarity_distribution(path, shown, colours)


def _draw_memory(path: Path, rows: Sequence[Row], reports: Sequence[dict]) -> None:
    """Table 13: what was measured, and what the paper prints."""
    curves = {}
    for network, column in (("autoencoder", 0), ("denoiser", 2)):
        measured = [report["memory"][network] for report in reports]
        here = [m.memory / 1e6 if m.fits else math.nan for m in measured]
        curves[network] = (here, [float(row.paper[column]) for row in rows])
    plot_memory(path, [row.varies["num_parameters"] for row in rows], curves)


FIGURES: Mapping[str, Callable[[Path, Sequence[Row], Sequence[dict]], Any]] = {
    "against_noise": _draw_against_noise,
    "augmentation": _draw_augmentation,
    "trajectories": _draw_trajectories,
    "similarities": _draw_similarities,
    "memory": _draw_memory,
}
