"""Every figure is a PNG with the marks that it should have, for ordinary and for degenerate groups."""

import math

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from pdiff_hf.evaluation import plots
from pdiff_hf.evaluation.scatter import ScatterGroup


def picture(path):
    """(height, width, 3) in [0, 1], after the checks that hold for each figure."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)[..., :3]
    assert pixels.shape[0] > 200 and pixels.shape[1] == 960  # 10 points are 13 pixels where it is 600 wide
    assert pixels.std() > 0.05
    return pixels


def has(pixels, colour, share=1e-5):
    """Whether at least a share of the pixels is of this colour."""
    return (np.abs(pixels - to_rgb(colour)).max(-1) < 0.02).mean() > share


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "figure.png"


def draw(path, snapshots, generated, others=(), panels=1, num_examples=1000):
    plots.plot_accuracy_vs_similarity(
        path, {f"panel {i}": (snapshots, generated, others) for i in range(panels)}, num_examples
    )


@pytest.mark.parametrize("count", [1, 30])
def test_accuracy_vs_similarity(path, count):
    snapshots = ScatterGroup("snapshots", 91 + rows(count), 0.93 + 0.01 * rows(count, seed=1))
    generated = ScatterGroup("p-diff", 92 + rows(count), 0.89 + 0.01 * rows(count, seed=1))
    sweep = [
        ScatterGroup(f"family {family}", 91.5 + 0.1 * value + rows(count), 0.9 + 0.01 * value + 0.001 * rows(count))
        for family in range(11)
        for value in range(3)
    ]
    draw(str(path), snapshots, generated, sweep)
    full = picture(path)
    for colour in (plots.GENERATED, *plots.OTHERS):
        assert has(full, colour)
    draw(path, snapshots, generated, panels=3)
    alone = picture(path)
    assert has(alone, plots.GENERATED) and not any(has(alone, colour) for colour in plots.OTHERS)
    assert full.shape[1] == alone.shape[1]  # both are as wide as a page


def marks(path, colour=plots.GENERATED):
    """How many pixels of the upper two thirds, where the plot is, have a colour, and their places."""
    pixels = picture(path)
    found = np.abs(pixels[: int(0.65 * len(pixels))] - to_rgb(colour)).max(-1) < 0.02
    return found.sum(), np.nonzero(found)


def test_outliers_and_bad_baselines_do_not_squeeze_the_region_of_interest(path):
    accuracy, iou = 91 + 0.2 * rows(30), 0.9 + 0.01 * rows(30, seed=1)
    generated, snapshots = ScatterGroup("p-diff", accuracy, iou), ScatterGroup("snapshots", accuracy + 1, iou - 0.02)
    draw(path, snapshots, generated)
    count, (height, width) = marks(path)
    outlier = ScatterGroup("p-diff", torch.cat([accuracy, torch.tensor([80.0])]), torch.cat([iou, torch.tensor([0.5])]))
    draw(path, snapshots, outlier, [ScatterGroup("noise", torch.tensor([10.0]), torch.tensor([0.1]))])
    again, (new_height, new_width) = marks(path)
    assert again > 0.5 * count
    assert np.ptp(new_width) > 0.4 * np.ptp(width)


def test_points_that_coincide_can_be_told_apart_from_one(path):
    """And an axis on which all is equal spans the sampling error."""
    one, many = (ScatterGroup("p-diff", torch.full((n,), 99.0), torch.ones(n)) for n in (1, 200))
    snapshots = ScatterGroup("snapshots", torch.full((5,), 99.0), torch.full((5,), 0.99))
    counts = []
    for group in (one, many):
        draw(path, snapshots, group)
        pixels = picture(path)
        reddish = (pixels[..., 0] - pixels[..., 2] > 0.1).sum()
        counts.append(reddish)
    assert counts[1] > 1.1 * counts[0]
    assert plots.sampling_error(99.0, 1000) == pytest.approx(0.617, abs=0.001)
    assert plots.sampling_error(100.0, 1000) > 0.15


def test_accuracy_vs_similarity_without_similarity(path):
    """One snapshot has no other one to be similar to: its maximum IoU is nan, and the rest is drawn all the same."""
    snapshots = ScatterGroup("snapshots", torch.tensor([91.0]), torch.tensor([math.nan]))
    draw(path, snapshots, ScatterGroup("p-diff", torch.tensor([92.0]), torch.tensor([0.9])))
    assert has(picture(path), plots.GENERATED)
    draw(path, snapshots, ScatterGroup("p-diff", torch.tensor([92.0]), torch.tensor([math.nan])))
    picture(path)


@pytest.mark.parametrize(("seeds", "steps"), [(5, [0, 1, 5, 20]), (1, [0]), (7, list(range(1000)))])
def test_reverse_process(path, seeds, steps):
    accuracies = 90 + rows(seeds, len(steps))
    plots.plot_reverse_process(path, steps, accuracies, 91.0, 500)
    assert has(picture(path), plots.GENERATED)


def test_the_reverse_process_of_few_examples_does_not_look_like_progress(path):
    """Three of 500 examples are less than the sampling error, and less than half of the axis."""
    heights = []
    for change in (0.6, 6.0):
        plots.plot_reverse_process(path, [0, 1, 2], torch.tensor([[90.0, 90.0 + change, 90.0]]), 90.0, 500)
        heights.append(np.ptp(marks(path)[1][0]) / len(picture(path)))
    assert heights[0] < 0.2 < heights[1]


def test_the_reverse_process_shows_all_samples(path, monkeypatch):
    limits, set_ylim = [], Axes.set_ylim
    monkeypatch.setattr(Axes, "set_ylim", lambda axes, *ends, **kw: (limits.append(ends), set_ylim(axes, *ends, **kw)))
    accuracies = torch.tensor([[2.0, 94.0], [60.0, 80.0]])
    plots.plot_reverse_process(path, [0, 1], accuracies, 88.0, 500)
    (low, high) = limits[-1]
    assert low < 2 and 94 < high <= 102


def test_distribution(path):
    nothing, one, equal = torch.tensor([math.nan, math.nan]), torch.tensor([0.9]), torch.full((20,), 0.9)
    values = 0.9 + 0.01 * rows(40)
    groups = {"snapshots": values, "p-diff": values - 0.05, "soup all": one, "equal": equal, "none": nothing}
    colours = [plots.SNAPSHOTS, plots.GENERATED, *[plots.OTHERS[0]] * 3]
    plots.plot_distribution(path, groups, "maximum IoU", colours, min_range=0.02)
    pixels = picture(path)
    assert has(pixels, plots.GENERATED) and has(pixels, plots.OTHERS[0])
    plots.plot_distribution(path, {"snapshots": values}, "maximum IoU", colours[:1])
    one_row = picture(path)
    assert len(one_row) < len(pixels) and not has(one_row, plots.GENERATED)
    plots.plot_distribution(path, {"snapshots": torch.cat([values, nothing])}, "maximum IoU", colours[:1])
    np.testing.assert_array_equal(picture(path), one_row)


@pytest.mark.parametrize(
    ("num_snapshots", "num_generated", "sizes"),
    [(60, 55, (700, 700, 700)), (1, 1, (3, 2)), (4, 1, (1,)), (3, 3, (2,) * 40 + (500,))],
)
def test_parameter_heatmap(path, num_snapshots, num_generated, sizes):
    snapshots, generated = rows(num_snapshots, sum(sizes)), rows(num_generated, sum(sizes), seed=1)
    plots.plot_parameter_heatmap(path, snapshots, generated, sizes)
    assert len(np.unique(picture(path).reshape(-1, 3), axis=0)) > 50


def test_parameter_heatmap_shows_a_contraction(path):
    """The lower right panel (deviations of the generated) pales as they approach the mean."""
    snapshots = 5 + rows(50, 200)

    def colourfulness(generated):
        plots.plot_parameter_heatmap(path, snapshots, generated, (100, 100))
        pixels = picture(path)
        height, width = pixels.shape[:2]
        panel = pixels[int(0.6 * height) : int(0.85 * height), int(0.6 * width) : int(0.9 * width)]
        return np.ptp(panel, axis=-1).mean()

    spread, contracted = (colourfulness(5 + scale * rows(50, 200, seed=1)) for scale in (1, 0.2))
    assert contracted < 0.5 * spread


def test_latent_pca(path):
    snapshots = rows(20, 6)
    plots.plot_latent_pca(path, snapshots, rows(30, 6, seed=1))
    pixels = picture(path)
    assert (pixels[..., 0] - pixels[..., 2] > 0.3).mean() > 1e-3  # stars, half transparent


def test_loss_curves(path):
    losses = [1 / (1 + step / 50) for step in range(1000)]
    plots.plot_loss_curves(path, {"autoencoder": losses, "denoiser": [0.0]})
    both = picture(path)
    assert has(both, plots.OTHERS[0])
    plots.plot_loss_curves(path, {"denoiser": losses})
    assert len(picture(path)) < 0.7 * len(both)
