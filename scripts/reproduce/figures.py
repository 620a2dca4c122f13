"""The paper's figures: `FIGURES[name](path, rows, reports)` draws rows with the report of each."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from pdiff_hf.evaluation import plots, scatter
from pdiff_hf.evaluation.report import Report
from pdiff_hf.utils.reports import find_group

from .tables import Row


def _draw_against_noise(path: Path, rows: Sequence[Row], reports: Sequence[dict]) -> None:
    """Figures 3 and 4: one panel a run."""
    panels = {}
    for row, report in zip(rows, reports, strict=True):
        if row.group == "generated":
            noise = [scatter_group(report, r.group, "noise") for r in rows if r.run == row.run and "noise" in r.group]
            shown = [scatter_group(report, name, name) for name in ("snapshots", "generated")]
            panels[row.label.partition(":")[0]] = (*shown, noise)
    plots.plot_accuracy_vs_similarity(path, panels, reports[0]["splits"]["test"])


def _draw_augmentation(path: Path, rows: Sequence[Row], reports: Sequence[dict]) -> None:
    """Figure 5a: the generated networks of all runs in one panel. Their snapshots are the same."""
    generated = [scatter_group(report, "generated", row.label) for row, report in zip(rows, reports, strict=True)]
    snapshots = scatter_group(reports[-1], "snapshots", "snapshots")
    panels = {"noise augmentation": (snapshots, generated[-1], generated[:-1])}
    plots.plot_accuracy_vs_similarity(path, panels, reports[0]["splits"]["test"])


def _draw_trajectories(path: Path, rows: Sequence[Row], reports: Sequence[dict]) -> None:
    """Figure 5b."""
    process, snapshots = reports[0]["reverse_process"], find_group(reports[0], "snapshots")
    scores, num_examples = torch.tensor(process["scores"]), reports[0]["splits"]["test"]
    plots.plot_reverse_process(path, process["steps"], scores, snapshots["measures"]["score_mean"], num_examples)


def _draw_similarities(path: Path, rows: Sequence[Row], reports: Sequence[dict]) -> None:
    """Figure 5c."""
    shown = {
        row.label: scatter_group(report, row.group, row.label).max_iou
        for row, report in zip(rows, reports, strict=True)
    }
    colours = [plots.SNAPSHOTS if row.group == "snapshots" else plots.GENERATED for row in rows]
    plots.plot_distribution(path, shown, "maximum IoU with a snapshot", colours, min_range=plots.MIN_IOU_RANGE)


def _draw_memory(path: Path, rows: Sequence[Row], reports: Sequence[dict]) -> None:
    """Table 13: what was measured, and what the paper prints."""
    curves = {}
    for network, column in (("autoencoder", 0), ("denoiser", 2)):
        measured = [report["memory"][network] for report in reports]
        here = [m.memory / 1e6 if m.fits else math.nan for m in measured]
        curves[network] = (here, [float(row.paper[column]) for row in rows])
    sizes = [row.varies["num_parameters"] for row in rows]
    figure = Figure(figsize=(plots.WIDTH, 4.8), layout="constrained")
    axes = figure.subplots()
    for (name, values), style, marker in zip(curves.items(), cycle(("-", "--")), cycle(scatter.MARKERS)):
        for whose, megabytes, colour in zip(("here", "paper"), values, (plots.GENERATED, plots.SNAPSHOTS), strict=True):
            axes.plot(sizes, megabytes, color=colour, linestyle=style, marker=marker, label=f"{name}, {whose}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("generated parameters")
    axes.set_ylabel("peak memory of training (MB)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=plots.DPI)


def scatter_group(report: dict, name: str, family: str) -> scatter.ScatterGroup:
    """A group of a report on the plane of similarity and accuracy."""
    return scatter.scatter_group(Report.from_dict(report), name, family)


FIGURES: Mapping[str, Callable[[Path, Sequence[Row], Sequence[dict]], Any]] = {
    "against_noise": _draw_against_noise,
    "augmentation": _draw_augmentation,
    "trajectories": _draw_trajectories,
    "similarities": _draw_similarities,
    "memory": _draw_memory,
}
