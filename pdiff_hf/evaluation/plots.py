"""Figures of a report, each one PNG.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart, and a marker or line style says the same
again. Only `Figure` objects: no display, no global state.
"""

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

SNAPSHOTS, GENERATED = "#000000", "#D55E00"
OTHERS = ("#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7")  # their yellow is too pale for thin marks on white
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
DPI = 150


@dataclass(frozen=True)
class ScatterGroup:
    """A group of N models on the plane of similarity and accuracy.

    Args:
        family (`str`): groups of one family share colour, marker and an entry in the legend.
        accuracy (`torch.Tensor`): (N,) percent.
        max_iou (`torch.Tensor`): (N,) maximum IoU to the snapshots.
    """

    family: str
    accuracy: Tensor
    max_iou: Tensor


def plot_accuracy_vs_similarity(
    path: str | Path, snapshots: ScatterGroup, generated: ScatterGroup, baselines: Sequence[ScatterGroup] = ()
) -> Path:
    """Accuracy against maximum IoU to the snapshots (paper, figure 4): all models left, the region of the snapshots and
    the generated ones right. Small dots are models; the large marks of a family are the means of its settings, joined
    in the order given. Up and left is better."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    everything, detail = figure.subplots(1, 2)
    for axes in (everything, detail):
        _draw_scatter(axes, snapshots, generated, baselines)
    everything.set_title("all models")
    detail.set_title("region of the snapshots and the generated models")
    _zoom(detail.set_xlim, torch.cat([snapshots.max_iou, generated.max_iou]))
    _zoom(detail.set_ylim, torch.cat([snapshots.accuracy, generated.accuracy]))
    figure.legend(*everything.get_legend_handles_labels(), loc="outside right center", title="large: mean of a group")
    return _save(figure, path)


def plot_accuracy_vs_similarity_panels(
    path: str | Path, panels: Mapping[str, tuple[ScatterGroup, ScatterGroup, Sequence[ScatterGroup]]]
) -> Path:
    """Accuracy against maximum IoU to the snapshots, one panel a setting (paper, figures 3 and 5a), each drawn as in
    `plot_accuracy_vs_similarity`.

    Args:
        path (`str` or `Path`): of the PNG.
        panels (`Mapping`): title of the panel to snapshots, generated models and other groups.
    """
    figure = Figure(figsize=(4.5 * len(panels) + 2.5, 4.5), layout="constrained")
    handles = {}
    for axes, (title, groups) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _draw_scatter(axes, *groups)
        axes.set_title(title)
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", title="large: mean of a group")
    return _save(figure, path)


def _draw_scatter(
    axes: Axes, snapshots: ScatterGroup, generated: ScatterGroup, others: Sequence[ScatterGroup] = ()
) -> None:
    families: dict[str, list[ScatterGroup]] = {}
    for group in (snapshots, generated, *others):
        families.setdefault(group.family, []).append(group)
    # Each colour returns with another marker and another line.
    styles = cycle(zip(OTHERS * 2, MARKERS, ("-",) * len(OTHERS) + ("--",) * len(OTHERS), strict=True))
    fixed = {snapshots.family: (SNAPSHOTS, "o", ""), generated.family: (GENERATED, "*", "")}
    for family, groups in families.items():
        colour, marker, line = fixed[family] if family in fixed else next(styles)
        size, on_top = (18, 5) if family == generated.family else (10, 4) if family in fixed else (8, 3)
        means = [(group.max_iou.nanmean().item(), group.accuracy.mean().item()) for group in groups]
        for group in groups:
            axes.scatter(group.max_iou.numpy(), group.accuracy.numpy(), s=9, color=colour, alpha=0.25, linewidths=0)
        axes.plot(
            *zip(*means, strict=True),
            color=colour,
            marker=marker,
            markersize=size,
            markeredgecolor="white",
            linestyle=line,
            linewidth=1.2,
            zorder=on_top,
            label=family,
        )
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("maximum IoU of wrong predictions to the snapshots\n(lower: less similar)")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)


def plot_reverse_process(
    path: str | Path, steps: Sequence[int], accuracies: Tensor, snapshot_accuracy: float, num_examples: int
) -> Path:
    """Accuracy of the decoded intermediate latents along the reverse process (paper, figure 5b).

    Args:
        path (`str` or `Path`): of the PNG.
        steps (`Sequence[int]`): S denoising steps taken when the accuracy was measured, ascending.
        accuracies (`torch.Tensor`): (seeds, S) percent.
        snapshot_accuracy (`float`): mean of the snapshots, percent.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    styles = cycle(zip((GENERATED, *OTHERS[:4]), ("o", *MARKERS[:4]), strict=True))
    for seed, (line, (colour, marker)) in enumerate(zip(accuracies.numpy(), styles, strict=False)):
        axes.plot(
            steps,
            line,
            color=colour,
            marker=marker,
            markevery=max(1, len(steps) // 20),
            markersize=5,
            label=f"sample {seed + 1}",
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axhline(
        snapshot_accuracy, color=SNAPSHOTS, linestyle="--", label=f"mean snapshot\n({snapshot_accuracy:.2f} %)"
    )
    axes.set_xlabel("denoising steps taken")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    return _save(figure, path)


def plot_max_similarity_distribution(
    path: str | Path, groups: Mapping[str, Tensor], colours: Sequence[str] | None = None
) -> Path:
    """Distribution of the maximum IoU to the snapshots in each group (paper, figure 5c); see `plot_distribution`."""
    return plot_distribution(path, groups, "maximum IoU of wrong predictions to the snapshots", colours)


def plot_distribution(
    path: str | Path, groups: Mapping[str, Tensor], quantity: str, colours: Sequence[str] | None = None
) -> Path:
    """Distribution of a number over the models of each group, as violins with their medians.

    Args:
        path (`str` or `Path`): of the PNG.
        groups (`Mapping[str, torch.Tensor]`): name to (N,) parameters, nan where there is none; top to bottom.
        quantity (`str`): what the number is, with its unit.
        colours (`Sequence[str]`, *optional*): one a group; by default the first is drawn as the snapshots and the
            second as the generated models.
    """
    figure = Figure(figsize=(9, 1.6 + 0.5 * len(groups)), layout="constrained")
    axes = figure.subplots()
    colours = colours or [SNAPSHOTS, GENERATED] + [OTHERS[0]] * len(groups)
    labels = []
    for row, ((name, values), colour) in enumerate(zip(groups.items(), colours, strict=False)):
        values = values[~values.isnan()].double().numpy()
        labels.append(f"{name} (n={len(values)})")
        if len(values) == 0:
            continue
        violin = axes.violinplot([values], [row], orientation="horizontal", widths=0.8, showextrema=False)
        violin["bodies"][0].set(facecolor=colour, edgecolor=colour, alpha=0.35)
        axes.scatter(values, np.full(len(values), row), s=8, color=colour, alpha=0.4, linewidths=0)
        axes.scatter(np.median(values), row, s=60, marker="|", color=colour, linewidths=3)
    axes.set_yticks(range(len(groups)), labels)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlabel(f"{quantity} (bar: median)")
    axes.grid(axis="x", alpha=0.3)
    return _save(figure, path)


def plot_parameter_heatmap(path: str | Path, snapshots: Tensor, generated: Tensor, tensor_sizes: Sequence[int]) -> Path:
    """Parameters of the snapshots above those of the generated models; dashed lines are the borders of tensors,
    but for those too close to the one before to be told apart.

    Left are the parameters as they are. Right is how far each lies from the snapshots' mean, in standard deviations of the
    snapshots: paler below than above is a contraction, equal rows are copies. Up to 50 rows of each group and
    1024 of the parameters are drawn, evenly spaced.

    Args:
        path (`str` or `Path`): of the PNG.
        snapshots (`torch.Tensor`): (K, D).
        generated (`torch.Tensor`): (N, D).
        tensor_sizes (`Sequence[int]`): how many of the D parameters each tensor has, in order.
    """
    columns = _evenly(snapshots.shape[1], 1024)
    shown = [group[_evenly(len(group), 50)][:, columns].double() for group in (snapshots, generated)]
    std, mean = torch.std_mean(snapshots[:, columns].double(), dim=0, correction=0)
    deviations = [(group - mean) / std.clamp(min=1e-12) for group in shown]
    low, high = torch.cat(shown).flatten().quantile(torch.tensor([0.01, 0.99]).double()).tolist()
    borders = [-0.5]
    for border in np.searchsorted(columns, np.cumsum(tensor_sizes)[:-1]) - 0.5:
        if border - borders[-1] >= 0.02 * len(columns):
            borders.append(border)

    figure = Figure(figsize=(14, 6), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    scales = (
        (shown, "viridis", low, high, "parameter"),
        (deviations, "PuOr", -3, 3, "deviation from the snapshots' mean (std)"),
    )
    for column, (groups, colours, low, high, label) in enumerate(scales):
        for axes, group, name in zip(grid[:, column], groups, ("snapshots", "generated"), strict=True):
            image = axes.imshow(
                group.numpy(), cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest"
            )
            for border in borders[1:]:
                axes.axvline(border, color="white" if column == 0 else "black", linewidth=0.7, linestyle="--")
            axes.set_ylabel(
                f"{name}\n({len(group)} of {len(snapshots) if name == 'snapshots' else len(generated)} models)"
            )
            axes.set_yticks([])
        ticks = np.linspace(0, len(columns) - 1, min(5, len(columns)), dtype=int)
        axes.set_xticks(ticks, [str(columns[tick]) for tick in ticks])
        axes.set_xlabel("index of the number in the layout")
        figure.colorbar(image, ax=grid[:, column], label=label, extend="both", location="top", aspect=40, shrink=0.8)
    return _save(figure, path)


def plot_latent_pca(
    path: str | Path, snapshots: Tensor, generated: Tensor, reconstructions: Tensor | None = None
) -> Path:
    """Latents on the first two principal components of the snapshots' latents.

    Args:
        path (`str` or `Path`): of the PNG.
        snapshots (`torch.Tensor`): (K, L), K and L at least 2.
        generated (`torch.Tensor`): (N, L).
        reconstructions (`torch.Tensor`, *optional*): (K, L), the snapshots decoded and encoded again.
    """
    if min(snapshots.shape) < 2:
        raise ValueError(f"two components need at least 2 snapshots and 2 parameters, got {tuple(snapshots.shape)}")
    pca = PCA(2).fit(snapshots.double().numpy())
    figure = Figure(figsize=(8.5, 6), layout="constrained")
    axes = figure.subplots()
    place = {"snapshots": (snapshots, SNAPSHOTS, "o", 18), "generated": (generated, GENERATED, "*", 36)}
    if reconstructions is not None:
        place["snapshots,\nreconstructed"] = (reconstructions, OTHERS[0], "x", 18)
    for name, (latents, colour, marker, size) in place.items():
        x, y = pca.transform(latents.double().numpy()).T
        axes.scatter(
            x, y, s=size, marker=marker, color=colour, alpha=0.6, linewidths=1 if marker == "x" else 0, label=name
        )
    first, second = pca.explained_variance_ratio_
    axes.set_xlabel(f"first component ({first:.0%} of the snapshots' variance)")
    axes.set_ylabel(f"second component ({second:.0%})")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
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
    figure = Figure(figsize=(6.5 * len(panels), 4.5), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for (name, (steps, losses)), colour, style in zip(
            curves.items(), cycle((OTHERS[0], GENERATED, *OTHERS[1:])), cycle(("-", "--", "-.", ":")), strict=False
        ):
            steps, losses = np.asarray(steps), np.asarray(losses, dtype=float)
            window = len(losses) // 50
            if len(losses) > 100:
                axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
                steps = steps[window // 2 :][: len(losses) - window + 1]
                losses = np.convolve(losses, np.full(window, 1 / window), mode="valid")
            axes.plot(steps, losses, color=colour, linestyle=style, linewidth=1.8, label=name)
        _log_scale_if_positive(axes)
        axes.set_title(title)
        axes.set_xlabel("training step")
        axes.set_ylabel("loss")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    return _save(figure, path)


def plot_memory(path: str | Path, sizes: Sequence[int], curves: Mapping[str, tuple[Sequence, Sequence]]) -> Path:
    """Memory of training against the number of generated parameters (paper, table 13), both on a logarithmic scale.

    Args:
        path (`str` or `Path`): of the PNG.
        sizes (`Sequence[int]`): D.
        curves (`Mapping[str, tuple]`): name of a network to its megabytes here and in the paper, one for each size; NaN
            where there is none.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for (name, values), style, marker in zip(curves.items(), cycle(("-", "--")), cycle(MARKERS)):
        for whose, megabytes, colour in zip(("here", "paper"), values, (GENERATED, SNAPSHOTS), strict=True):
            axes.plot(sizes, megabytes, color=colour, linestyle=style, marker=marker, label=f"{name}, {whose}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("generated parameters")
    axes.set_ylabel("peak memory of training (MB)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return _save(figure, path)


def _log_scale_if_positive(axes: Axes) -> None:
    if all((line.get_ydata() > 0).all() for line in axes.lines):
        axes.set_yscale("log")


def _zoom(set_limits, values: Tensor) -> None:
    """Limits around the finite values, with a margin."""
    values = values[values.isfinite()]
    if len(values):
        low, high = values.min().item(), values.max().item()
        margin = 0.15 * (high - low) or 0.01 * abs(high) or 0.01
        set_limits(low - margin, high + margin)


def _evenly(count: int, limit: int) -> np.ndarray:
    """At most `limit` indices below `count`, evenly spaced."""
    return np.linspace(0, count - 1, min(count, limit)).round().astype(int)


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    figure.savefig(path, dpi=DPI, format="png")
    return path
