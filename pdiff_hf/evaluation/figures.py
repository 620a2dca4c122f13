"""Draws the figures of a report from what the report and the networks hold."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from . import plots
from .plots import ScatterGroup
from .render import best_of_families, metric_title


def draw_figures(
    report: dict,
    folder: str | os.PathLike,
    *,
    snapshots: torch.Tensor,
    generated: torch.Tensor,
    tensor_sizes: Sequence[int],
    latents: Mapping[str, torch.Tensor] | None = None,
    losses: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> None:
    """
    Draws the figures of `render.FIGURES` that there are numbers for.

    Args:
        report (`dict`): As `compare_generator` returns it.
        folder (`str` or `os.PathLike`): Of the PNGs.
        snapshots (`torch.Tensor`): Parameters, shape `(K, D)`.
        generated (`torch.Tensor`): Parameters, shape `(N, D)`.
        tensor_sizes (`Sequence[int]`): How many of the D parameters each tensor has.
        latents (`Mapping[str, torch.Tensor]`, *optional*): `snapshots` `(K, L)` and `generated` `(N, L)`.
        losses (`Mapping[str, Mapping[str, Sequence[float]]]`, *optional*): The loss at every step, by panel and curve.
    """
    folder = Path(folder)
    title = metric_title(report["metric"])
    shown = ["snapshots", "generated", *(row["name"] for row in best_of_families(report))]
    if report["frontier"]["rows"][0]["max_iou"] is None:
        scores = {row["name"]: numbers(row["scores"]) for row in report["groups"]}
        plots.plot_distribution(
            folder / "scores.png", {name: scores[name] for name in shown}, f"{title} on test examples"
        )
    else:
        baselines = [row for row in report["groups"] if row["family"] is not None]
        plots.plot_accuracy_vs_similarity(
            folder / "accuracy_vs_similarity.png",
            {
                "": (
                    scatter_group(report, "snapshots", "snapshots"),
                    scatter_group(report, "generated", "generated"),
                    [scatter_group(report, row["name"], row["family"]) for row in baselines],
                )
            },
            report["splits"]["test"],
        )
        plots.plot_distribution(
            folder / "max_similarity.png",
            {name: scatter_group(report, name, name).max_iou for name in shown},
            "maximum IoU with a snapshot",
            min_range=plots.MIN_IOU_RANGE,
        )
    if "reverse_process" in report:
        plots.plot_reverse_process(
            folder / "reverse_process.png",
            report["reverse_process"]["steps"],
            torch.tensor(report["reverse_process"]["scores"]),
            report["groups"][0]["score_mean"],
            report["splits"]["test"],
        )
    plots.plot_parameter_heatmap(folder / "parameters.png", snapshots, generated, tensor_sizes)
    if latents is not None and latents["snapshots"].shape[1] > 1:
        plots.plot_latent_pca(folder / "latents.png", latents["snapshots"], latents["generated"])
    if losses:
        panels = {
            panel: {name: (range(1, len(values) + 1), values) for name, values in curves.items()}
            for panel, curves in losses.items()
        }
        plots.plot_loss_curves(folder / "losses.png", panels)


def scatter_group(report: dict, name: str, family: str) -> ScatterGroup:
    """The networks of a group of a report on the plane of similarity and accuracy."""
    scores = next(row["scores"] for row in report["groups"] if row["name"] == name)
    iou = next(row["iou"] for row in report["audit"]["rows"] if row["name"] == name)
    return ScatterGroup(family, numbers(scores), numbers(iou))


def numbers(values: Sequence[float | None]) -> torch.Tensor:
    """Numbers of a report, nan where there is none."""
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
