"""Draws the figures of a report from what the report and the networks hold."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .plots import (
    ScatterGroup,
    plot_accuracy_vs_similarity,
    plot_distribution,
    plot_latent_pca,
    plot_loss_curves,
    plot_max_similarity_distribution,
    plot_parameter_heatmap,
    plot_reverse_process,
)


def draw_figures(
    report: dict,
    folder: str | os.PathLike,
    *,
    originals: torch.Tensor,
    generated: torch.Tensor,
    tensor_sizes: Sequence[int],
    latents: Mapping[str, torch.Tensor] | None = None,
    losses: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> None:
    """
    Draws the figures of `report.FIGURES` that there are numbers for.

    Args:
        report (`dict`): As `evaluate` returns it, with `reverse_process` if there is one.
        folder (`str` or `os.PathLike`): Of the PNGs.
        originals (`torch.Tensor`): Parameters, shape `(K, D)`.
        generated (`torch.Tensor`): Parameters, shape `(N, D)`.
        tensor_sizes (`Sequence[int]`): How many of the D numbers each tensor has.
        latents (`Mapping[str, torch.Tensor]`, *optional*): `original` `(K, L)`, `reconstructed` `(K, L)` and
            `generated` `(N, L)`.
        losses (`Mapping[str, Mapping[str, Sequence[float]]]`, *optional*): The loss at every step, by panel and curve.
    """
    folder = Path(folder)
    if "metric" in report:
        _draw_scores(report, folder / "scores.png")
    else:
        _draw_classifiers(report, folder)
    plot_parameter_heatmap(folder / "parameters.png", originals, generated, tensor_sizes)
    if latents is not None and latents["original"].shape[1] > 1:
        plot_latent_pca(folder / "latents.png", latents["original"], latents["generated"], latents.get("reconstructed"))
    if losses:
        plot_loss_curves(
            folder / "losses.png",
            {
                title: {name: (range(1, len(values) + 1), values) for name, values in curves.items()}
                for title, curves in losses.items()
            },
        )


def _draw_classifiers(report: dict, folder: Path) -> None:
    rows = {row["name"]: row for row in report["groups"]}
    max_iou = {row["name"]: torch.tensor(row["iou"], dtype=torch.float64) for row in report["audit"]["rows"]}

    def scatter(name: str, family: str) -> ScatterGroup:
        return ScatterGroup(family, torch.tensor(rows[name]["accuracies"], dtype=torch.float64), max_iou[name])

    baselines = [row for row in report["groups"] if row["family"] is not None]
    plot_accuracy_vs_similarity(
        folder / "accuracy_vs_similarity.png",
        scatter("original", "originals"),
        scatter("generated", "generated"),
        [scatter(row["name"], row["family"]) for row in baselines],
    )
    shown = _shown(baselines)
    plot_max_similarity_distribution(folder / "max_similarity.png", {name: max_iou[name] for name in shown})
    if "reverse_process" in report:
        plot_reverse_process(
            folder / "reverse_process.png",
            report["reverse_process"]["steps"],
            torch.tensor(report["reverse_process"]["accuracy"]),
            rows["original"]["accuracy_mean"],
        )


def _draw_scores(report: dict, path: Path) -> None:
    """For tasks without similarities of predictions."""
    scores = {
        row["name"]: torch.tensor([math.nan if score is None else score for score in row["scores"]])
        for row in report["groups"]
    }
    shown = _shown([row for row in report["groups"] if row["family"] is not None])
    plot_distribution(path, {name: scores[name] for name in shown}, f"{report['metric']['name']} on test examples")


def _shown(baselines: Sequence[dict]) -> list[str]:
    """Originals, generated networks, and of every family of baselines the setting in the middle of its sweep."""
    families: dict[str, list[str]] = {}
    for row in baselines:
        families.setdefault(row["family"], []).append(row["name"])
    return ["original", "generated", *(names[len(names) // 2] for names in families.values())]
