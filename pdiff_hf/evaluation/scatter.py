"""The plane of similarity and accuracy, on which networks that are good and new lie up and left."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..utils.reports import TEST
from .report_data import ReportData, as_tensor

SNAPSHOTS, GENERATED = "#000000", "#D55E00"
OTHERS = ("#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7")  # their yellow is too pale for thin marks on white
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p")  # no multiple of the colours
DPI, WIDTH = 150, 6.4
JITTER = 0.01  # of the axis, so that points which coincide can be seen
MIN_IOU_RANGE = 0.02


@dataclass(frozen=True)
class ScatterGroup:
    """
    A group of N networks on the plane of similarity and accuracy.

    Args:
        family (`str`): Groups of one family share colour, marker and an entry in the legend.
        accuracy (`torch.Tensor`): Shape `(N,)`, percent.
        max_iou (`torch.Tensor`): Shape `(N,)`, maximum IoU to the snapshots.
    """

    family: str
    accuracy: Tensor
    max_iou: Tensor


def scatter_group(report: ReportData, name: str, family: str) -> ScatterGroup:
    """The networks of a group of a report on the plane of similarity and accuracy."""
    row = report.group(name)
    iou = [] if row.memorisation is None else row.memorisation["iou"]
    return ScatterGroup(family, as_tensor(row.sets[TEST]["scores"][0]), as_tensor(iou))


def sampling_error(accuracy: float, num_examples: int) -> float:
    """Half the width of the 95% interval of an accuracy in percent that was measured on `num_examples` examples."""
    share = min(max(accuracy / 100, 1 / num_examples), 1 - 1 / num_examples) if num_examples > 1 else 0.5
    return 196 * math.sqrt(share * (1 - share) / num_examples)


def plot_accuracy_vs_similarity(
    path: str | os.PathLike,
    panels: Mapping[str, tuple[ScatterGroup, ScatterGroup, Sequence[ScatterGroup]]],
    num_examples: int,
) -> None:
    """
    Accuracy against maximum IoU to the snapshots, one panel a setting (paper, figures 3, 4 and 5a), in the region of
    most snapshots and generated networks; how much lies outside is written below. Small dots are those networks, moved
    by up to a hundredth of the axis; the large marks of a family are the means of its settings, joined in the order
    given. The band is the sampling error of the snapshots' accuracy. Up and left is better.

    Args:
        path (`str` or `os.PathLike`): Of the PNG.
        panels (`Mapping`): Title of the panel to snapshots, generated networks and other groups.
        num_examples (`int`): Of the test data.
    """
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, 0.4 + 4.4 * lines if columns == 1 else 1.5 + 2.9 * lines), layout="constrained")
    handles: dict = {}
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for i, (axes, (title, groups)) in enumerate(zip(grid, panels.items(), strict=False)):
        labels = _draw_scatter(axes, *groups, num_examples)
        axes.set_title(title, fontsize="medium")
        if len(panels) == 1:
            label_beside(axes, labels)
        if i + columns >= len(panels):
            axes.set_xlabel("similarity to the nearest snapshot\n(max IoU of errors; left: newer)")
        if i % columns == 0:
            axes.set_ylabel("test accuracy (%)")
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    if len(panels) > 1:
        where: dict[str, Any] = {"loc": "outside lower center", "ncols": 3, "fontsize": "small", "frameon": False}
        figure.legend(list(handles.values()), list(handles), **where)
    figure.savefig(path, dpi=DPI, format="png")


# Where a label belongs, what it says, and its colour.
Label = tuple[float, float, str, str]


def label_beside(axes: Axes, labels: Sequence[Label]) -> None:
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
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.5, "relpos": (0, 0.5)},
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
    band = torch.tensor([mean - error, mean + error])
    own = [torch.tensor([_mean(values)]) for values in (generated.max_iou, generated.accuracy)]
    limits = (
        axis_limits(MIN_IOU_RANGE, snapshots.max_iou, generated.max_iou, own[0], ends=(0, 1)),
        axis_limits(2 * error, snapshots.accuracy, generated.accuracy, own[1], band, ends=(0, 100)),
    )
    labels: list[Label] = []
    axes.axhspan(*band.tolist(), color=SNAPSHOTS, alpha=0.07, linewidth=0, label="sampling error (95%)")
    styles = zip(cycle(OTHERS), cycle(MARKERS), strict=False)  # a colour returns with another marker
    # The networks of these are drawn one by one too: colour, marker, its size, and how far in front.
    fixed = {snapshots.family: (SNAPSHOTS, "o", 9, 4), generated.family: (GENERATED, "*", 16, 5)}
    jitter, outside = np.random.default_rng(0), 0
    for family, groups in families.items():
        places = drawn = [(_mean(group.max_iou), _mean(group.accuracy)) for group in groups]
        if family in fixed:
            colour, marker, size, on_top = fixed[family]
            line, cloud = "", (groups[0].max_iou, groups[0].accuracy)
            drawn = [*zip(*cloud, strict=True)]
            x, y = (
                values.numpy() + JITTER * (hi - lo) * jitter.uniform(-1, 1, len(values))
                for values, (lo, hi) in zip(cloud, limits, strict=True)
            )
            axes.scatter(x, y, s=8, color=colour, alpha=0.35, linewidths=0)
        else:
            (colour, marker), line, size, on_top = next(styles), "-", 6, 3
        outside += sum(not all(lo <= m <= hi for m, (lo, hi) in zip(point, limits, strict=True)) for point in drawn)
        look: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "markersize": size,
            "markeredgecolor": "white",
            "linestyle": line,
        }
        axes.plot(*zip(*places, strict=True), **look, linewidth=1.2, zorder=on_top, label=family)
        inside = [place for place in places if limits[1][0] <= place[1] <= limits[1][1]] or places
        labels.append((*inside[-1], family, colour))
    axes.set_xlim(*limits[0])
    axes.set_ylim(*limits[1])
    note_outside(axes, outside)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(alpha=0.3)
    return labels


def axis_limits(
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


def note_outside(axes: Axes, count: int) -> None:
    if count:
        axes.text(0.01, 0.01, f"outside: {count}", transform=axes.transAxes, va="bottom", fontsize="small")


def _mean(values: Tensor) -> float:
    return values.nanmean().item()
