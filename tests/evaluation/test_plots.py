"""Every figure is a PNG with the marks that it should have, for ordinary and for degenerate groups."""

import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from pdiff_hf.evaluation import plots
from pdiff_hf.evaluation.plots import ScatterGroup


def picture(path):
    """(height, width, 3) in [0, 1], after the checks that hold for each figure."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 300
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


@pytest.mark.parametrize("count", [1, 30])
def test_accuracy_vs_similarity(path, count):
    originals = ScatterGroup("originals", 91 + rows(count), 0.93 + 0.01 * rows(count, seed=1))
    generated = ScatterGroup("p-diff", 92 + rows(count), 0.89 + 0.01 * rows(count, seed=1))
    families = [f"family {index}" for index in range(11)]
    sweep = [
        ScatterGroup(family, 90 - value + rows(count), 0.8 + 0.01 * value + 0.01 * rows(count, seed=2))
        for family in families
        for value in range(3)
    ]
    assert plots.plot_accuracy_vs_similarity(str(path), originals, generated, sweep) == path
    full = picture(path)
    for colour in (plots.GENERATED, *plots.OTHERS):
        assert has(full, colour)
    plots.plot_accuracy_vs_similarity(path, originals, generated)
    alone = picture(path)
    assert has(alone, plots.GENERATED) and not any(has(alone, colour) for colour in plots.OTHERS)


def test_accuracy_vs_similarity_shows_the_region_of_interest(path):
    """One bad group squeezes the left panel; in the right one the generated models stay in the middle."""
    generated = ScatterGroup("p-diff", 91 + rows(30), 0.9 + 0.01 * rows(30, seed=1))
    originals = ScatterGroup("originals", generated.accuracy, generated.max_iou)
    bad = ScatterGroup("noise", torch.tensor([10.0]), torch.tensor([0.1]))
    plots.plot_accuracy_vs_similarity(path, originals, generated, [bad])
    pixels = picture(path)
    height, width = pixels.shape[:2]
    marks = np.abs(pixels - to_rgb(plots.GENERATED)).max(-1) < 0.02
    left, right = marks[:, : int(0.4 * width)], marks[:, int(0.45 * width) : int(0.8 * width)]
    assert np.nonzero(left)[0].mean() / height < 0.2
    assert 0.3 < np.nonzero(right)[0].mean() / height < 0.6


def test_accuracy_vs_similarity_without_similarity(path):
    """One original has no other one to be similar to: its maximum IoU is nan, and the rest is drawn all the same."""
    originals = ScatterGroup("originals", torch.tensor([91.0]), torch.tensor([math.nan]))
    generated = ScatterGroup("p-diff", torch.tensor([92.0]), torch.tensor([0.9]))
    plots.plot_accuracy_vs_similarity(path, originals, generated)
    assert has(picture(path), plots.GENERATED)
    plots.plot_accuracy_vs_similarity(
        path, originals, ScatterGroup("p-diff", torch.tensor([92.0]), torch.tensor([math.nan]))
    )
    picture(path)


@pytest.mark.parametrize(("seeds", "steps"), [(5, [0, 1, 5, 20]), (1, [0]), (7, list(range(1000)))])
def test_reverse_process(path, seeds, steps):
    assert plots.plot_reverse_process(path, steps, 90 + rows(seeds, len(steps)), 91.0) == path
    pixels = picture(path)
    assert has(pixels, plots.GENERATED)
    assert has(pixels, plots.OTHERS[0]) == (seeds > 1)


def test_max_similarity_distribution(path):
    nothing, one, equal = torch.tensor([math.nan, math.nan]), torch.tensor([0.9]), torch.full((20,), 0.9)
    values = 0.9 + 0.01 * rows(40)
    groups = {"originals": values, "p-diff": values - 0.05, "soup all": one, "equal": equal, "none": nothing}
    assert plots.plot_max_similarity_distribution(path, groups) == path
    pixels = picture(path)
    assert has(pixels, plots.GENERATED) and has(pixels, plots.OTHERS[0])
    one_row = picture(plots.plot_max_similarity_distribution(path, {"originals": values}))
    assert len(one_row) < len(pixels) and not has(one_row, plots.GENERATED)
    plots.plot_max_similarity_distribution(path, {"originals": torch.cat([values, nothing])})
    np.testing.assert_array_equal(picture(path), one_row)


@pytest.mark.parametrize(
    ("num_originals", "num_generated", "sizes"),
    [(60, 55, (700, 700, 700)), (1, 1, (3, 2)), (4, 1, (1,)), (3, 3, (2,) * 40 + (500,))],
)
def test_parameter_heatmap(path, num_originals, num_generated, sizes):
    originals, generated = rows(num_originals, sum(sizes)), rows(num_generated, sum(sizes), seed=1)
    assert plots.plot_parameter_heatmap(path, originals, generated, sizes) == path
    assert len(np.unique(picture(path).reshape(-1, 3), axis=0)) > 50


def test_parameter_heatmap_shows_a_contraction(path):
    """The lower right panel (deviations of the generated) pales as they approach the mean."""
    originals = 5 + rows(50, 200)

    def colourfulness(generated):
        pixels = picture(plots.plot_parameter_heatmap(path, originals, generated, (100, 100)))
        height, width = pixels.shape[:2]
        panel = pixels[int(0.6 * height) : int(0.85 * height), int(0.6 * width) : int(0.9 * width)]
        return np.ptp(panel, axis=-1).mean()

    spread, contracted = (colourfulness(5 + scale * rows(50, 200, seed=1)) for scale in (1, 0.2))
    assert contracted < 0.5 * spread


def test_latent_pca(path):
    originals = rows(20, 6)
    assert plots.plot_latent_pca(path, originals, rows(1, 6, seed=1)) == path
    pixels = picture(path)
    assert not has(pixels, plots.OTHERS[0])
    plots.plot_latent_pca(path, originals, rows(30, 6, seed=1), originals + 0.5)
    assert (np.abs(picture(path) - pixels).max(-1) > 0.1).mean() > 1e-3
    with pytest.raises(ValueError, match=r"\(1, 6\)"):
        plots.plot_latent_pca(path, originals[:1], originals)


def test_loss_curves(path):
    steps = range(1000)
    losses = [1 / (1 + step / 50) for step in steps]
    panels = {
        "autoencoder": {"training": (steps, losses), "held-out snapshots": ([0, 500], [1.0, 0.3])},
        "denoiser": {"training": ([1], [0.0])},
    }
    assert plots.plot_loss_curves(path, panels) == path
    both = picture(path)
    assert has(both, plots.OTHERS[0]) and has(both, plots.GENERATED)
    one = picture(plots.plot_loss_curves(path, {"denoiser": {"training": (steps, losses)}}))
    assert one.shape[1] < 0.6 * both.shape[1]


def test_memory(path):
    """A size that did not fit has no mark, and the rest is drawn all the same."""
    curves = {"autoencoder": ([45.0, math.nan], [658.0, 44_882.0]), "denoiser": ([78.0, 360.0], [530.0, 12_942.0])}
    assert plots.plot_memory(str(path), [2_048, 300_288], curves) == path
    pixels = picture(path)
    assert has(pixels, plots.GENERATED) and has(pixels, plots.ORIGINAL)
    plots.plot_memory(path, [2_048, 300_288], {"autoencoder": ([math.nan, math.nan], [658.0, 44_882.0])})
    none = picture(path)
    plots.plot_memory(path, [2_048, 300_288], {"autoencoder": ([45.0, 629.0], [658.0, 44_882.0])})
    marks = [np.abs(figure - to_rgb(plots.GENERATED)).max(-1) < 0.02 for figure in (none, picture(path))]
    assert marks[1].sum() > 2 * marks[0].sum() > 0  # the legend says what is missing
