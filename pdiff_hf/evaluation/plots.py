"""Figures of a report, each one PNG.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart, and a marker or line style says the same
again. Every figure can be read at 600 pixels of width. Only `Figure` objects: no display, no global state.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw
from sklearn.decomposition import PCA
from torch import Tensor

from ..utils.reports import CONTACT_SHEET, FIELD_FIGURE, TEST
from .report_data import Kind, ReportData, as_tensor
from .scatter import (
    DPI,
    GENERATED,
    MIN_IOU_RANGE,
    OTHERS,
    SNAPSHOTS,
    WIDTH,
    axis_limits,
    label_beside,
    note_outside,
    plot_accuracy_vs_similarity,
    sampling_error,
    scatter_group,
)
from .summary import best_of_sweeps, metric_title

SHEET_HEIGHT, SHEET_GAP, SHEET_LABEL = 40, 4, 190  # pixels
COLOURS = {Kind.SNAPSHOTS: SNAPSHOTS, Kind.GENERATED: GENERATED}
# Rows of the figure of accuracy along a field, where they are there.
ALONG = ("generated", "trained on the task", "kernel ridge", "nearest snapshot", "base model", "nearest seen task")


def draw_figures(
    report: ReportData,
    folder: str | os.PathLike,
    *,
    snapshots: Tensor | None = None,
    generated: Tensor | None = None,
    tensor_sizes: Sequence[int] = (),
    latents: Mapping[str, Tensor] | None = None,
    losses: Mapping[str, Sequence[float]] | None = None,
    sheet: Mapping[str, Tensor] | None = None,
) -> None:
    """
    Draws the figures of `utils.reports.FIGURES` that there are numbers for.

    Args:
        report (`ReportData`): What was compared.
        folder (`str` or `os.PathLike`): Of the PNGs.
        snapshots (`torch.Tensor`, *optional*), generated (`torch.Tensor`, *optional*): Parameters, shape `(K, D)` and
            `(N, D)`.
        tensor_sizes (`Sequence[int]`): How many of the D parameters each tensor has.
        latents (`Mapping[str, torch.Tensor]`, *optional*): `snapshots` `(K, L)` and `generated` `(N, L)`.
        losses (`Mapping[str, Sequence[float]]`, *optional*): The loss at every step, by network.
        sheet (`Mapping[str, torch.Tensor]`, *optional*): Images `(N, C, H, W)` from 0 to 1 of some sets of data.
    """
    folder, title = Path(folder), metric_title(report.metric)
    compared = report.of_kind(Kind.BASELINE, Kind.OPPONENT)
    first = report.of_kind(Kind.GENERATED, Kind.SNAPSHOTS)
    shown = [*first, *best_of_sweeps(report, Kind.BASELINE, Kind.OPPONENT)]
    if report.fields:
        plot_field(report, folder / FIELD_FIGURE)
        shown = sorted(report.groups, key=lambda row: -report.metric.sign * (row.mean() or 0.0))
        title += " on unseen tasks"
    colours = [COLOURS.get(row.kind, OTHERS[0]) for row in shown]
    if "max_iou" in report.generated.measures:
        own, *others = (scatter_group(report, row.name, row.sweep or row.name) for row in (report.generated, *compared))
        panels = {"": (scatter_group(report, "snapshots", "snapshots"), own, others)}
        plot_accuracy_vs_similarity(folder / "accuracy_vs_similarity.png", panels, report.splits["test"])
        similarities = {row.name: scatter_group(report, row.name, row.name).max_iou for row in shown}
        quantity = "similarity to the nearest snapshot, lower is newer"
        plot_distribution(
            folder / "max_similarity.png", similarities, quantity, colours, min_range=MIN_IOU_RANGE, ends=(0, 1)
        )
    elif report.is_of_sets:
        plot_frontier(report, folder / "frontier.png")
    else:
        values = {row.name: as_tensor(row.scores()) for row in shown}
        ends = (0, 100) if report.fields else (-math.inf, math.inf)
        plot_distribution(folder / "scores.png", values, title, colours, ends=ends)
    if report.reverse_process is not None:
        _draw_process(report, folder / "reverse_process.png")
    if snapshots is not None and generated is not None:
        plot_parameter_heatmap(folder / "parameters.png", snapshots, generated, tensor_sizes)
    if latents and latents["snapshots"].shape[1] > 1:
        plot_latent_pca(folder / "latents.png", latents["snapshots"], latents["generated"])
    if losses:
        plot_loss_curves(folder / "losses.png", losses)
    if sheet:
        plot_sheet(folder / CONTACT_SHEET, sheet)


@contextlib.contextmanager
def _figure(path: str | os.PathLike, height: float) -> Iterator[Axes]:
    """Axes to draw on, which are saved when the block ends."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    yield axes
    figure.savefig(path, dpi=DPI, format="png")


def plot_reverse_process(
    path: str | os.PathLike,
    steps: Sequence[int],
    accuracies: Tensor,
    reference_accuracy: float,
    num_examples: int,
    reference: str = "snapshots",
) -> None:
    """
    Accuracy of the decoded intermediate latents along the reverse process (paper, figure 5b).

    Args:
        path (`str` or `os.PathLike`): Of the PNG.
        steps (`Sequence[int]`): S denoising steps taken when the accuracy was measured, ascending.
        accuracies (`torch.Tensor`): Shape `(samples, S)`, percent.
        reference_accuracy (`float`): Of what they are compared with, percent: the mean of the snapshots.
        num_examples (`int`): Of the test data; the band is the sampling error of that accuracy.
        reference (`str`, *optional*, defaults to `"snapshots"`): What they are compared with.
    """
    error = sampling_error(reference_accuracy, num_examples)
    low, high = reference_accuracy - error, reference_accuracy + error
    alpha = min(0.5, 5 / len(accuracies))
    with _figure(path, 4.4) as axes:
        for i, line in enumerate(accuracies.numpy()):
            label = "samples" if i == 0 else None
            axes.plot(steps, line, color=GENERATED, alpha=alpha, linewidth=1, marker=".", markersize=4, label=label)
        axes.plot(steps, accuracies.mean(0).numpy(), color=GENERATED, linewidth=2.5, marker="*", label="their mean")
        axes.axhspan(low, high, color=SNAPSHOTS, alpha=0.1, linewidth=0, label="sampling error (95%)")
        label = f"{reference} ({reference_accuracy:.2f} %)"
        axes.axhline(reference_accuracy, color=SNAPSHOTS, linestyle="--", label=label)
        all_of_it = (accuracies.min()[None], accuracies.max()[None], torch.tensor([low]), torch.tensor([high]))
        axes.set_ylim(*axis_limits(2 * error, *all_of_it, margin=0.05, ends=(0, 100)))  # outliers too
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("denoising steps taken")
        axes.set_ylabel("test accuracy (%)")
        axes.figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)


def _draw_process(report: ReportData, path: Path) -> None:
    """Beside the snapshots, or for a family beside the best that there is without a generator on the same tasks."""
    assert report.reverse_process is not None
    scores = torch.tensor(report.reverse_process["scores"])
    beside = report.best(report.of_kind(Kind.ORACLE) or report.of_kind(Kind.SNAPSHOTS))
    if beside is None:
        return
    own, name, num_examples = beside.mean() or 0.0, beside.name, report.splits[TEST]
    if report.fields:
        num_examples *= len(scores)
        if len(scores) < len(report.conditions[TEST]):  # of large networks
            own, name = float(np.mean(beside.scores()[: len(scores)])), f"{name}, on this task"
    plot_reverse_process(path, report.reverse_process["steps"], scores, own, num_examples, name)


def plot_frontier(report: ReportData, path: Path) -> None:
    """Sets of data: the Fréchet distance against nearness to the training data. Low and right is better."""
    styles = {
        "generated": ("generated", GENERATED, "o"),
        "variant": ("generated, other guidance", GENERATED, "*"),
        "snapshots": ("training networks", SNAPSHOTS, "X"),
        "control": ("real data, held-out networks", SNAPSHOTS, "x"),
        "opponent": ("same generator, of the data", OTHERS[2], "P"),
    }
    spaces = {"weights": (OTHERS[0], "s"), "latents": (OTHERS[1], "^"), "data": (OTHERS[4], "D")}
    with _figure(path, 4.2) as axes:
        for row in report.groups:
            space = row.name.rpartition(", ")[2]
            label, colour, marker = styles.get(row.kind.value) or (f"trivial, in {space}", *spaces[space])
            near, distance = row.measures.get("nearness"), row.mean()
            if near is not None and distance is not None:
                axes.scatter(near, max(distance, 0.05), color=colour, marker=marker, label=label)
        axes.axvline(1, color="0.7", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_xlabel("nearness to the training data (held-out data: 1)")
        axes.set_ylabel("Fréchet distance (% of the variance)")
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(list(handles.values()), list(handles), fontsize="small", frameon=False)


def plot_distribution(
    path: str | os.PathLike,
    groups: Mapping[str, Tensor],
    quantity: str,
    colours: Sequence[str],
    min_range: float = 0.0,
    ends: tuple[float, float] = (-math.inf, math.inf),
) -> None:
    """
    Distribution of a quantity over the networks of each group, as violins with their medians (of maximum similarity:
    paper, figure 5c).

    Args:
        path (`str` or `os.PathLike`): Of the PNG.
        groups (`Mapping[str, torch.Tensor]`): Name to `(N,)` values, nan where there is none; top to bottom.
        quantity (`str`): What the values are, with their unit.
        colours (`Sequence[str]`): One a group.
        min_range (`float`, *optional*): The least that the axis spans.
        ends (`tuple[float, float]`, *optional*): Where the measure ends, and with it the axis.
    """
    jitter, labels = np.random.default_rng(0), []
    low, high = axis_limits(min_range, *groups.values(), ends=ends)
    with _figure(path, 1.2 + 0.38 * len(groups)) as axes:
        for row, ((name, values), colour) in enumerate(zip(groups.items(), colours, strict=True)):
            shown = values[values.isfinite()].double().numpy()
            labels.append(f"{name} (n={len(shown)})")
            if len(shown) == 0:
                continue
            if np.ptp(shown) > 0:
                violin = axes.violinplot([shown], [row], orientation="horizontal", widths=0.8, showextrema=False)
                for body in violin["bodies"]:  # type: ignore[attr-defined]  # its type is too wide
                    body.set(facecolor=colour, edgecolor=colour, alpha=0.3)
            axes.scatter(shown, row + jitter.uniform(-0.2, 0.2, len(shown)), s=6, color=colour, alpha=0.4, linewidths=0)
            axes.scatter(np.median(shown), row, s=110, marker="|", color=colour, linewidths=2.5)
        axes.set_xlim(low, high)
        note_outside(axes, sum(int(((values < low) | (values > high)).sum()) for values in groups.values()))
        axes.set_yticks(range(len(groups)), labels, fontsize="small")
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"{quantity}\n(bar: median)")
        axes.grid(visible=False, axis="y")


def plot_parameter_heatmap(
    path: str | os.PathLike, snapshots: Tensor, generated: Tensor, tensor_sizes: Sequence[int]
) -> None:
    """
    How far parameters lie from the snapshots' mean, in standard deviations of the snapshots: those of the snapshots
    above, those of the generated models below. Paler below than above is a contraction, equal rows are copies. Dashed
    lines are the borders of tensors, but for those too close to the one before to be told apart. Up to 50 rows of each
    group and 1024 of the parameters are drawn, evenly spaced.

    Args:
        path (`str` or `os.PathLike`): Of the PNG.
        snapshots (`torch.Tensor`): Shape `(K, D)`.
        generated (`torch.Tensor`): Shape `(N, D)`.
        tensor_sizes (`Sequence[int]`): How many of the D parameters each tensor has, in order.
    """
    columns = _evenly(snapshots.shape[1], 1024)
    # Rows and columns in one step: whole rows may be more than fits into memory.
    shown = [group[_evenly(len(group), 50)[:, None], columns].double() for group in (snapshots, generated)]
    std, mean = torch.std_mean(snapshots[:, columns].double(), dim=0, correction=0)
    deviations = [(group - mean) / std.clamp(min=1e-12) for group in shown]
    borders = [-0.5]
    for border in np.searchsorted(columns, np.cumsum(tensor_sizes)[:-1]) - 0.5:
        if border - borders[-1] >= 0.02 * len(columns):
            borders.append(border)

    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    grid = figure.subplots(2, 1, sharex=True)
    counts = {"snapshots": len(snapshots), "generated": len(generated)}
    for axes, group, (name, count) in zip(grid, deviations, counts.items(), strict=True):
        image = axes.imshow(group.numpy(), cmap="PuOr", vmin=-3, vmax=3, aspect="auto", interpolation="nearest")
        for border in borders[1:]:
            axes.axvline(border, color="black", linewidth=0.7, linestyle="--")
        axes.set_ylabel(f"{name}\n({len(group)} of {count})")
        axes.set_yticks([])
    ticks = np.linspace(0, len(columns) - 1, min(5, len(columns)), dtype=int)
    axes.set_xticks(ticks, [str(columns[tick]) for tick in ticks])
    axes.set_xlabel("index of the parameter")
    figure.colorbar(image, ax=grid, label="deviation from the mean (std)", extend="both", aspect=40)
    figure.savefig(path, dpi=DPI, format="png")


def plot_latent_pca(path: str | os.PathLike, snapshots: Tensor, generated: Tensor) -> None:
    """
    Latents on the first two principal components of the snapshots' latents.

    Args:
        path (`str` or `os.PathLike`): Of the PNG.
        snapshots (`torch.Tensor`): Shape `(K, L)`, K and L at least 2.
        generated (`torch.Tensor`): Shape `(N, L)`.
    """
    pca = PCA(2).fit(snapshots.double().numpy())
    first, second = pca.explained_variance_ratio_
    with _figure(path, 4.8) as axes:
        marks = (("snapshots", snapshots, SNAPSHOTS, "o", 18), ("generated", generated, GENERATED, "*", 36))
        for name, latents, colour, marker, size in marks:
            x, y = pca.transform(latents.double().numpy()).T
            axes.scatter(x, y, s=size, marker=marker, color=colour, alpha=0.6, linewidths=0, label=name)
        axes.set_xlabel(f"first component ({first:.0%} of the snapshots' variance)")
        axes.set_ylabel(f"second component ({second:.0%})")
        axes.figure.legend(loc="outside lower center", ncols=2, frameon=False)


def plot_loss_curves(path: str | os.PathLike, panels: Mapping[str, Sequence[float]]) -> None:
    """
    The loss at every training step, one panel a network, on a logarithmic scale where all losses are positive. Curves
    of more than 100 points are drawn pale, with the mean over a fiftieth of their length around each step on top.

    Args:
        path (`str` or `os.PathLike`): Of the PNG.
        panels (`Mapping`): Title of the panel to the losses.
    """
    figure = Figure(figsize=(WIDTH, 0.4 + 2.6 * len(panels)), layout="constrained")
    for axes, (title, curve) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        losses = np.asarray(curve, dtype=float)
        if (losses > 0).all():
            axes.set_yscale("log")
        steps, window = np.arange(1, len(losses) + 1), len(losses) // 50
        if len(losses) > 100:
            axes.plot(steps, losses, color=OTHERS[0], alpha=0.25, linewidth=0.8)
            steps = steps[window // 2 :][: len(losses) - window + 1]
            losses = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        axes.plot(steps, losses, color=OTHERS[0], linewidth=1.8)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("training step")
        axes.set_ylabel("loss")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=DPI, format="png")


def plot_field(report: ReportData, path: str | os.PathLike) -> None:
    """Draws the accuracy of some groups against the values of a field, where the report has tasks along one."""
    along = next((name for name in report.conditions if name in report.fields), None)
    if along is None:
        return
    values = [condition[along] for condition in report.conditions[along]]
    order = np.argsort(values)
    colours = dict(zip(ALONG, (GENERATED, SNAPSHOTS, *OTHERS), strict=False))
    labels, x = [], np.asarray(values)[order]
    with _figure(path, 4.2) as axes:
        for row in report.groups:
            if row.name in ALONG:
                y, colour = np.asarray(row.scores(along))[order], colours[row.name]
                width = 2 if row.kind == Kind.GENERATED else 1.2
                axes.plot(x, y, color=colour, linewidth=width, marker=".", markersize=4)
                labels.append((float(x[-1]), float(y[-1]), row.name, colour))
        axes.set_xlabel(along)
        axes.set_ylabel("accuracy on the task (%)")
        axes.set_ylim(top=min(axes.get_ylim()[1], 100.5))
        label_beside(axes, labels)


def plot_sheet(path: str | os.PathLike, sheet: Mapping[str, Tensor]) -> None:
    """A row of images, `(N, C, H, W)` from 0 to 1, for each of some sets."""
    height, width = next(iter(sheet.values())).shape[-2:]
    scale, most = max(1, SHEET_HEIGHT // height), max(map(len, sheet.values()))
    size = (scale * width + SHEET_GAP, scale * height + SHEET_GAP)
    picture = Image.new("RGB", (SHEET_LABEL + most * size[0], len(sheet) * size[1]), "white")
    for i, (name, images) in enumerate(sheet.items()):
        ImageDraw.Draw(picture).text((4, i * size[1] + size[1] // 2 - 6), name, fill="black")
        for j, image in enumerate(images):
            pixels = (255 * image.nan_to_num()).round().byte().permute(1, 2, 0).squeeze(-1).numpy()
            one = Image.fromarray(pixels).resize((scale * width, scale * height), Image.Resampling.NEAREST)
            picture.paste(one.convert("RGB"), (SHEET_LABEL + j * size[0], i * size[1]))
    picture.save(path)


def _evenly(count: int, limit: int) -> np.ndarray:
    """At most `limit` indices below `count`, evenly spaced."""
    return np.linspace(0, count - 1, min(count, limit)).round().astype(int)
