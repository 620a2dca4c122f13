"""Figures of a report, each one PNG.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart, and a marker or line style says the same
again. Every figure can be read at 600 pixels of width. Only `Figure` objects: no display, no global state.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.decomposition import PCA
from torch import Tensor

from ..utils.reports import FIELD_FIGURE, TEST
from .groups import Kind
from .report_data import GroupRow, ReportData

SNAPSHOTS, GENERATED = "#000000", "#D55E00"
OTHERS = ("#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7")  # their yellow is too pale for thin marks on white
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
DPI, WIDTH = 150, 6.4
JITTER = 0.01  # of the axis, so that points which coincide can be seen
MIN_IOU_RANGE = 0.02


@dataclass(frozen=True)
class ScatterGroup:
    """A group of N networks on the plane of similarity and accuracy.

    Args:
        family (`str`): groups of one family share colour, marker and an entry in the legend.
        accuracy (`torch.Tensor`): (N,) percent.
        max_iou (`torch.Tensor`): (N,) maximum IoU to the snapshots.
    """

    family: str
    accuracy: Tensor
    max_iou: Tensor


def sampling_error(accuracy: float, num_examples: int) -> float:
    """Half the width of the 95% interval of an accuracy in percent that was measured on so many examples."""
    share = min(max(accuracy / 100, 1 / num_examples), 1 - 1 / num_examples) if num_examples > 1 else 0.5
    return 196 * math.sqrt(share * (1 - share) / num_examples)


def plot_accuracy_vs_similarity(
    path: str | Path,
    panels: Mapping[str, tuple[ScatterGroup, ScatterGroup, Sequence[ScatterGroup]]],
    num_examples: int,
) -> Path:
    """Accuracy against maximum IoU to the snapshots, one panel a setting (paper, figures 3, 4 and 5a), in the region of
    most snapshots and generated networks; how much lies outside is written below. Small dots are those networks, moved
    by up to a hundredth of the axis; the large marks of a family are the means of its settings, joined in the order
    given. The band is the sampling error of the snapshots' accuracy. Up and left is better.

    Args:
        path (`str` or `Path`): of the PNG.
        panels (`Mapping`): title of the panel to snapshots, generated networks and other groups.
        num_examples (`int`): of the test data.
    """
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, 0.4 + 4.4 * lines if columns == 1 else 1.5 + 2.9 * lines), layout="constrained")
    handles: dict = {}
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (title, groups) in zip(grid, panels.items(), strict=False):
        labels = _draw_scatter(axes, *groups, num_examples)
        axes.set_title(title, fontsize="medium")
        if len(panels) == 1:
            _label_beside(axes, labels)
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for i in range(len(panels)):
        if i + columns >= len(panels):
            grid[i].set_xlabel("similarity to the nearest snapshot\n(max IoU of errors; left: newer)")
        if i % columns == 0:
            grid[i].set_ylabel("test accuracy (%)")
    if len(panels) > 1:
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=3, fontsize="small", frameon=False
        )
    return _save(figure, path)


# Where a label belongs, what it says, and its colour.
Label = tuple[float, float, str, str]


def _label_beside(axes: Axes, labels: Sequence[Label]) -> None:
    """Names at the right of the axes, each joined by a thin line to its point, and apart from each other."""
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    shown = sorted((label for label in labels if math.isfinite(label[1])), key=lambda label: label[1])
    gap, heights = 0.055, [min(max((y - low) / (high - low), 0.0), 1.0) for _, y, _, _ in shown]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    overflow = max(0.0, heights[-1] - 1) if heights else 0.0
    heights = [height - overflow for height in heights]
    for i in reversed(range(len(heights) - 1)):
        heights[i] = min(heights[i], heights[i + 1] - gap)
    for (x, y, text, colour), height in zip(shown, heights, strict=True):
        axes.annotate(
            text,
            (min(max(x, left), right), min(max(y, low), high)),
            xytext=(1.03, height),
            textcoords="axes fraction",
            fontsize="small",
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.5},
        )


def _draw_scatter(
    axes: Axes,
    snapshots: ScatterGroup,
    generated: ScatterGroup,
    others: Sequence[ScatterGroup],
    num_examples: int,
) -> list[Label]:
    families: dict[str, list[ScatterGroup]] = {}
    for group in (*others, snapshots, generated):
        families.setdefault(group.family, []).append(group)
    mean = _mean(snapshots.accuracy)
    error = sampling_error(mean, num_examples)
    low, high = mean - error, mean + error
    means = [torch.tensor([_mean(values)]) for values in (generated.max_iou, generated.accuracy)]
    limits = (
        _limits(MIN_IOU_RANGE, snapshots.max_iou, generated.max_iou, means[0], ends=(0, 1)),
        _limits(2 * error, snapshots.accuracy, generated.accuracy, means[1], torch.tensor([low, high]), ends=(0, 100)),
    )
    labels: list[Label] = []
    axes.axhspan(low, high, color=SNAPSHOTS, alpha=0.07, linewidth=0, label="sampling error (95%)")
    # Each colour returns with another marker and another line, four times.
    lines = [line for line in ("-", "--", "-.", ":") for _ in OTHERS]
    styles = cycle(zip(OTHERS * 4, (*MARKERS, *MARKERS[1:], MARKERS[0]), lines, strict=True))
    fixed = {snapshots.family: (SNAPSHOTS, "o", ""), generated.family: (GENERATED, "*", "")}
    jitter = np.random.default_rng(0)
    outside = 0
    for family, groups in families.items():
        colour, marker, line = fixed[family] if family in fixed else next(styles)
        size, on_top = (16, 5) if family == generated.family else (9, 4) if family in fixed else (6, 3)
        places = [(_mean(group.max_iou), _mean(group.accuracy)) for group in groups]
        drawn = places if family not in fixed else [*zip(groups[0].max_iou, groups[0].accuracy, strict=True)]
        outside += sum(not all(lo <= m <= hi for m, (lo, hi) in zip(point, limits, strict=True)) for point in drawn)
        if family in fixed:
            x, y = [
                values.numpy() + JITTER * (hi - lo) * jitter.uniform(-1, 1, len(values))
                for values, (lo, hi) in zip((groups[0].max_iou, groups[0].accuracy), limits, strict=True)
            ]
            axes.scatter(x, y, s=8, color=colour, alpha=0.35, linewidths=0)
        axes.plot(
            *zip(*places, strict=True),
            color=colour,
            marker=marker,
            markersize=size,
            markeredgecolor="white",
            linestyle=line,
            linewidth=1.2,
            zorder=on_top,
            label=family,
        )
        inside = [place for place in places if limits[1][0] <= place[1] <= limits[1][1]] or places
        labels.append((*inside[-1], family, colour))
    axes.set_xlim(*limits[0])
    axes.set_ylim(*limits[1])
    _note_outside(axes, outside)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(alpha=0.3)
    return labels


def plot_reverse_process(
    path: str | Path,
    steps: Sequence[int],
    accuracies: Tensor,
    reference_accuracy: float,
    num_examples: int,
    reference: str = "snapshots",
) -> Path:
    """Accuracy of the decoded intermediate latents along the reverse process (paper, figure 5b).

    Args:
        path (`str` or `Path`): of the PNG.
        steps (`Sequence[int]`): S denoising steps taken when the accuracy was measured, ascending.
        accuracies (`torch.Tensor`): (samples, S) percent.
        reference_accuracy (`float`): of what they are compared with, percent: the mean of the snapshots.
        num_examples (`int`): of the test data; the band is the sampling error of that accuracy.
        reference (`str`, *optional*, defaults to `"snapshots"`): what they are compared with.
    """
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    axes = figure.subplots()
    for i, line in enumerate(accuracies.numpy()):
        label = "samples" if i == 0 else None
        axes.plot(
            steps,
            line,
            color=GENERATED,
            alpha=min(0.5, 5 / len(accuracies)),
            linewidth=1,
            marker=".",
            markersize=4,
            label=label,
        )
    axes.plot(steps, accuracies.mean(0).numpy(), color=GENERATED, linewidth=2.5, marker="*", label="their mean")
    error = sampling_error(reference_accuracy, num_examples)
    low, high = reference_accuracy - error, reference_accuracy + error
    axes.axhspan(low, high, color=SNAPSHOTS, alpha=0.1, linewidth=0, label="sampling error (95%)")
    axes.axhline(reference_accuracy, color=SNAPSHOTS, linestyle="--", label=f"{reference} ({reference_accuracy:.2f} %)")
    ends = torch.stack([accuracies.min(), accuracies.max()])  # all of it, outliers too
    axes.set_ylim(*_limits(2 * error, ends, torch.tensor([low, high]), margin=0.05, ends=(0, 100)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("denoising steps taken")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    return _save(figure, path)


def plot_distribution(
    path: str | Path,
    groups: Mapping[str, Tensor],
    quantity: str,
    colours: Sequence[str] | None = None,
    min_range: float = 0.0,
    ends: tuple[float, float] = (-math.inf, math.inf),
) -> Path:
    """Distribution of a quantity over the networks of each group, as violins with their medians (of maximum similarity:
    paper, figure 5c).

    Args:
        path (`str` or `Path`): of the PNG.
        groups (`Mapping[str, torch.Tensor]`): name to (N,) values, nan where there is none; top to bottom.
        quantity (`str`): what the values are, with their unit.
        colours (`Sequence[str]`, *optional*): one a group; by default the first is drawn as the snapshots and the
            second as the generated networks.
        min_range (`float`, *optional*): the least that the axis spans.
        ends (`tuple[float, float]`, *optional*): where the measure ends, and with it the axis.
    """
    figure = Figure(figsize=(WIDTH, 1.2 + 0.38 * len(groups)), layout="constrained")
    axes = figure.subplots()
    colours = colours or [SNAPSHOTS, GENERATED] + [OTHERS[0]] * len(groups)
    jitter = np.random.default_rng(0)
    labels = []
    for row, ((name, values), colour) in enumerate(zip(groups.items(), colours, strict=False)):
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
    low, high = _limits(min_range, *groups.values(), ends=ends)
    axes.set_xlim(low, high)
    _note_outside(axes, sum(int(((values < low) | (values > high)).sum()) for values in groups.values()))
    axes.set_yticks(range(len(groups)), labels, fontsize="small")
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(f"{quantity}\n(bar: median)")
    axes.grid(axis="x", alpha=0.3)
    return _save(figure, path)


def plot_parameter_heatmap(path: str | Path, snapshots: Tensor, generated: Tensor, tensor_sizes: Sequence[int]) -> Path:
    """Parameters of the snapshots above those of the generated models; dashed lines are the borders of tensors,
    but for those too close to the one before to be told apart.

    Left are the parameters as they are. Right is how far each lies from the snapshots' mean, in standard deviations of
    the snapshots: paler below than above is a contraction, equal rows are copies. Up to 50 rows of each group and
    1024 of the parameters are drawn, evenly spaced.

    Args:
        path (`str` or `Path`): of the PNG.
        snapshots (`torch.Tensor`): (K, D).
        generated (`torch.Tensor`): (N, D).
        tensor_sizes (`Sequence[int]`): how many of the D parameters each tensor has, in order.
    """
    columns = _evenly(snapshots.shape[1], 1024)
    # Rows and columns in one step: whole rows may be more than fits into memory.
    shown = [group[_evenly(len(group), 50)[:, None], columns].double() for group in (snapshots, generated)]
    std, mean = torch.std_mean(snapshots[:, columns].double(), dim=0, correction=0)
    deviations = [(group - mean) / std.clamp(min=1e-12) for group in shown]
    # Of the snapshots alone: a generated network that has diverged must not set the scale.
    low, high = shown[0].flatten().quantile(torch.tensor([0.01, 0.99]).double()).tolist()
    borders = [-0.5]
    for border in np.searchsorted(columns, np.cumsum(tensor_sizes)[:-1]) - 0.5:
        if border - borders[-1] >= 0.02 * len(columns):
            borders.append(border)

    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    scales = (
        (shown, "viridis", low, high, "parameter"),
        (deviations, "PuOr", -3, 3, "deviation from the mean (std)"),
    )
    for column, (groups, colours, low, high, label) in enumerate(scales):
        for axes, group, name in zip(grid[:, column], groups, ("snapshots", "generated"), strict=True):
            image = axes.imshow(
                group.numpy(), cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest"
            )
            for border in borders[1:]:
                axes.axvline(border, color="white" if column == 0 else "black", linewidth=0.7, linestyle="--")
            if column == 0:
                count = len(snapshots) if name == "snapshots" else len(generated)
                axes.set_ylabel(f"{name}\n({len(group)} of {count})")
            axes.set_yticks([])
        ticks = np.linspace(0, len(columns) - 1, min(3, len(columns)), dtype=int)
        axes.set_xticks(ticks, [str(columns[tick]) for tick in ticks])
        axes.set_xlabel("index of the parameter")
        figure.colorbar(image, ax=grid[:, column], label=label, extend="both", location="top", aspect=25, shrink=0.9)
    return _save(figure, path)


def plot_latent_pca(path: str | Path, snapshots: Tensor, generated: Tensor) -> Path:
    """Latents on the first two principal components of the snapshots' latents.

    Args:
        path (`str` or `Path`): of the PNG.
        snapshots (`torch.Tensor`): (K, L), K and L at least 2.
        generated (`torch.Tensor`): (N, L).
    """
    if min(snapshots.shape) < 2:
        raise ValueError(f"two components need at least 2 snapshots and 2 coordinates, got {tuple(snapshots.shape)}")
    pca = PCA(2).fit(snapshots.double().numpy())
    figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
    axes = figure.subplots()
    for name, latents, colour, marker, size in (
        ("snapshots", snapshots, SNAPSHOTS, "o", 18),
        ("generated", generated, GENERATED, "*", 36),
    ):
        x, y = pca.transform(latents.double().numpy()).T
        axes.scatter(x, y, s=size, marker=marker, color=colour, alpha=0.6, linewidths=0, label=name)
    first, second = pca.explained_variance_ratio_
    axes.set_xlabel(f"first component ({first:.0%} of the snapshots' variance)")
    axes.set_ylabel(f"second component ({second:.0%})")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return _save(figure, path)


def plot_loss_curves(
    path: str | Path, panels: Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float]]]]
) -> Path:
    """Losses against training steps, one panel a network, on a logarithmic scale where all losses are positive.

    Curves of more than 100 points are drawn pale, with the mean over a fiftieth of their length around each
    step on top.

    Args:
        path (`str` or `Path`): of the PNG.
        panels (`Mapping`): title of the panel to name of the curve to (steps, losses).
    """
    figure = Figure(figsize=(WIDTH, 0.4 + 2.6 * len(panels)), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for (name, curve), colour, style in zip(
            curves.items(), cycle((OTHERS[0], GENERATED, *OTHERS[1:])), cycle(("-", "--", "-.", ":")), strict=False
        ):
            steps, losses = np.asarray(curve[0]), np.asarray(curve[1], dtype=float)
            window = len(losses) // 50
            if len(losses) > 100:
                axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
                steps = steps[window // 2 :][: len(losses) - window + 1]
                losses = np.convolve(losses, np.full(window, 1 / window), mode="valid")
            axes.plot(steps, losses, color=colour, linestyle=style, linewidth=1.8, label=name)
        _log_scale_if_positive(axes)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("training step")
        axes.set_ylabel("loss")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    return _save(figure, path)


def _log_scale_if_positive(axes: Axes) -> None:
    if all((np.asarray(line.get_ydata()) > 0).all() for line in axes.lines):
        axes.set_yscale("log")


def _limits(
    least: float, *groups: Tensor, margin: float = 0.4, ends: tuple[float, float] = (-math.inf, math.inf)
) -> tuple[float, float]:
    """Limits around the middle 80% of each group's finite values, with a margin on both sides as a share of their
    range, which is at least `least`, and within `ends`, where the measure ends; (0, 1) if there are none."""
    finite = [values[values.isfinite()].double() for values in groups]
    found = [values.quantile(share).item() for values in finite if len(values) for share in (0.1, 0.9)]
    if not found:
        return 0.0, 1.0
    low, high = min(found), max(found)
    width = max(high - low, least, 1e-6 * abs(high), 1e-12)
    middle, half = (low + high) / 2, (0.5 + margin) * width
    over = 0.02 * width  # so that marks at an end are whole
    return max(middle - half, ends[0] - over), min(middle + half, ends[1] + over)


def _note_outside(axes: Axes, count: int) -> None:
    if count:
        axes.text(0.01, 0.01, f"outside: {count}", transform=axes.transAxes, va="bottom", fontsize="small")


def _mean(values: Tensor) -> float:
    return values.nanmean().item()


def _evenly(count: int, limit: int) -> np.ndarray:
    """At most `limit` indices below `count`, evenly spaced."""
    return np.linspace(0, count - 1, min(count, limit)).round().astype(int)


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    figure.savefig(path, dpi=DPI, format="png")
    return path


# ------------------------------------------------------------------------------------------------ figures of a report

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
    losses: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
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
        losses (`Mapping[str, Mapping[str, Sequence[float]]]`, *optional*): The loss at every step, by panel and curve.
    """
    folder = Path(folder)
    title = f"{report.metric.name} ({report.metric.unit})" if report.metric.unit else report.metric.name
    if report.fields:
        plot_field(report, folder / FIELD_FIGURE)
        shown = sorted(report.groups, key=lambda row: -report.metric.sign * (row.mean() or 0.0))
        values = {row.name: as_tensor(row.scores()) for row in shown}
        colours = [GENERATED if row.kind == "generated" else OTHERS[0] for row in shown]
        plot_distribution(folder / "scores.png", values, f"{title} on unseen tasks", colours, ends=(0, 100))
    elif "nearness" in report.generated.measures:
        plot_frontier(report, folder / "frontier.png")
    else:
        _draw_task(report, folder, title)
    if report.reverse_process is not None:
        _draw_process(report, folder / "reverse_process.png")
    if snapshots is not None and generated is not None:
        plot_parameter_heatmap(folder / "parameters.png", snapshots, generated, tensor_sizes)
    if latents is not None and latents["snapshots"].shape[1] > 1:
        plot_latent_pca(folder / "latents.png", latents["snapshots"], latents["generated"])
    if losses:
        panels = {
            panel: {name: (range(1, len(values) + 1), values) for name, values in curves.items()}
            for panel, curves in losses.items()
        }
        plot_loss_curves(folder / "losses.png", panels)


def plot_frontier(report: ReportData, path: Path) -> Path:
    """Sets of data: the Fréchet distance against nearness to the training data. Low and right is better."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    styles = {"generated": (GENERATED, "o"), "variant": (GENERATED, "*"), "snapshots": (SNAPSHOTS, "X")}
    styles |= {"control": (SNAPSHOTS, "x"), "opponent": (OTHERS[2], "P")}
    spaces = {"weights": (OTHERS[0], "s"), "latents": (OTHERS[1], "^"), "data": (OTHERS[4], "D")}
    for row in report.groups:
        space = row.name.rpartition(", ")[2]
        colour, marker = styles.get(row.kind.value) or spaces[space]
        label = row.kind.value if row.kind.value in styles else f"trivial, in {space}"
        near, distance = row.measures.get("nearness"), row.mean()
        if near is not None and distance is not None:
            axes.scatter(near, max(distance, 0.05), color=colour, marker=marker, label=label)
    axes.axvline(1, color="0.7", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xlabel("nearness to the training data (held-out data: 1)")
    axes.set_ylabel("Fréchet distance (% of the variance)")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(list(handles.values()), list(handles), fontsize="small", frameon=False)
    return _save(figure, path)


def _draw_task(report: ReportData, folder: Path, title: str) -> None:
    best: dict[str, GroupRow] = {}
    for row in report.groups:
        if row.kind in ("baseline", "opponent"):
            kept = report.best([row, *([best[row.sweep or row.name]] if (row.sweep or row.name) in best else [])])
            assert kept is not None
            best[row.sweep or row.name] = kept
    shown = [row for row in report.groups if row.kind in ("snapshots", "generated")] + list(best.values())
    if "max_iou" not in report.generated.measures:
        values = {row.name: as_tensor(row.scores()) for row in shown}
        plot_distribution(folder / "scores.png", values, f"{title} on test examples")
        return
    first = [scatter_group(report, row.name, row.name) for row in shown[:2]]
    others = [
        scatter_group(report, row.name, row.sweep or row.name)
        for row in report.groups
        if row.kind in ("baseline", "opponent")
    ]
    snapshots, generated = sorted(first, key=lambda group: group.family == report.generated.name)
    panels = {"": (snapshots, generated, others)}
    plot_accuracy_vs_similarity(folder / "accuracy_vs_similarity.png", panels, report.splits["test"])
    similarities = {row.name: scatter_group(report, row.name, row.name).max_iou for row in shown}
    colours = [{"snapshots": SNAPSHOTS, "generated": GENERATED}.get(row.kind.value, OTHERS[0]) for row in shown]
    plot_distribution(
        folder / "max_similarity.png",
        similarities,
        "similarity to the nearest snapshot, lower is newer",
        colours,
        min_range=MIN_IOU_RANGE,
        ends=(0, 1),
    )


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


def plot_field(report: ReportData, path: str | os.PathLike) -> str | None:
    """
    Draws the accuracy of some groups against the values of a field, where the report has tasks along one; returns the
    name of that field.
    """
    along = next((name for name in report.conditions if name in report.fields), None)
    if along is None:
        return None
    values = [condition[along] for condition in report.conditions[along]]
    order = np.argsort(values)
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    colours = {"generated": GENERATED} | dict(zip(ALONG[1:], (SNAPSHOTS, *OTHERS), strict=False))
    labels, x = [], np.asarray(values)[order]
    for row in report.groups:
        if row.name in ALONG:
            y, colour = np.asarray(row.scores(along))[order], colours[row.name]
            axes.plot(x, y, color=colour, linewidth=2 if row.kind == "generated" else 1.2, marker=".", markersize=4)
            labels.append((float(x[-1]), float(y[-1]), row.name, colour))
    axes.set_xlabel(along)
    axes.set_ylabel("accuracy on the task (%)")
    axes.set_ylim(top=min(axes.get_ylim()[1], 100.5))
    axes.grid(alpha=0.3)
    _label_beside(axes, labels)
    _save(figure, Path(path))
    return along


def scatter_group(report: ReportData, name: str, family: str) -> ScatterGroup:
    """The networks of a group of a report on the plane of similarity and accuracy."""
    row = report.group(name)
    iou = [] if row.memorisation is None else row.memorisation["iou"]
    return ScatterGroup(family, as_tensor(row.sets[TEST]["scores"][0]), as_tensor(iou))


def as_tensor(values: Sequence[float | None]) -> Tensor:
    """Numbers of a report, nan where there is none."""
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
