"""What the page draws of networks that are sampled: the reverse process, and the parameters."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pdiff_hf.evaluation.plots import GENERATED, plot_reverse_process
from pdiff_hf.models.products import expanded
from pdiff_hf.tasks.task import evenly

if TYPE_CHECKING:
    from pdiff_hf.scripts.explore import Source
    from pdiff_hf.scripts.on_demand import Choice

WATCHED = 5  # networks whose way through the reverse process is drawn
WATCHED_EXAMPLES = 500  # test examples for the accuracy along the way
HEAT_MAP_ROWS, HEAT_MAP_COLUMNS = 50, 512
# For the figures of a report, so that a phone shows legible letters, and legends still fit.
LETTERS = {"font.size": 14, "legend.handlelength": 1.2, "legend.handletextpad": 0.5, "legend.columnspacing": 1.0}
_DRAWING = threading.Lock()


@contextlib.contextmanager
def drawing(**settings: object) -> Iterator[None]:
    """The settings of matplotlib are those of the whole process, and readers may come together: one draws at a time."""
    with _DRAWING, rc_context(settings):
        yield


@drawing()
def draw_heat_map(source: "Source", parameters: torch.Tensor, path: Path) -> None:
    """
    Draws how far the parameters of networks, shape `(N, D)`, lie from the mean of the snapshots, in units of each
    tensor's standard deviation; below those of the snapshots where they are available.
    """
    autoencoder = source.pipe.autoencoder
    groups = {"sampled": parameters} | ({} if source.snapshots is None else {"snapshots": source.snapshots})
    columns = evenly(autoencoder.vector_layout.num_parameters, HEAT_MAP_COLUMNS)
    figure = Figure(figsize=(5.4, 1.8 * len(groups) + 0.8), layout="constrained")
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, group) in zip(panels, groups.items(), strict=True):
        rows = group[evenly(len(group), HEAT_MAP_ROWS)].to(autoencoder.device)
        values = autoencoder.normalize(expanded(rows, autoencoder.products))[:, columns.to(autoencoder.device)].cpu()
        image = axes.imshow(values, cmap="PuOr", vmin=-3, vmax=3, aspect="auto", interpolation="nearest")
        axes.set_yticks([])
        axes.set_ylabel(f"{name}\n({len(rows)} of {len(group)})")
    ticks = torch.linspace(0, len(columns) - 1, min(5, len(columns))).long()
    axes.set_xticks(ticks.tolist(), [str(int(columns[tick])) for tick in ticks])
    axes.set_xlabel("index of the parameter")
    figure.colorbar(image, ax=panels, label="deviation (std)", extend="both", aspect=30)
    figure.savefig(path, dpi=200)


class Watcher:
    """
    What is drawn of the reverse process: of a few networks at every step the distance to the mean of the snapshots, in
    standard deviations (1 is where snapshots lie), and the accuracy on some test examples of the task if there is one.
    Before there are two steps nothing is drawn.
    """

    def __init__(self, source: "Source", choice: "Choice"):
        self.source, self.choice, self.reference = source, choice, ("", 0.0)
        self.steps: list[int] = []
        self.distances: list[torch.Tensor] = []
        self.accuracies: list[torch.Tensor] = []
        if source.at_work is not None:
            self.reference = next(iter(source.at_work.others(choice).items()))

    @torch.no_grad()
    def add(self, step: int, latents: torch.Tensor) -> None:
        """Latents of shape `(n, L)` after `step` steps."""
        autoencoder, at_work = self.source.pipe.autoencoder, self.source.at_work
        parameters = autoencoder.decode(latents).sample
        self.steps.append(step)
        self.distances.append(
            autoencoder.normalize(expanded(parameters, autoencoder.products)).square().mean(1).sqrt().cpu()
        )
        if at_work is not None:
            scores = at_work.score(self.choice, parameters, WATCHED_EXAMPLES)
            self.accuracies.append(scores.values)
            self.num_examples = len(scores.labels)

    @drawing(**LETTERS)
    def draw_distances(self, path: Path) -> None:
        if len(self.steps) < 2:
            return
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")  # as the figure of the accuracies beside it
        axes = figure.subplots()
        axes.plot(self.steps, torch.stack(self.distances), color=GENERATED, alpha=0.6, marker=".")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("denoising steps taken")
        axes.set_ylabel("distance to the snapshots' mean (std)")
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=150)

    @drawing(**LETTERS)
    def draw_accuracies(self, path: Path) -> None:
        if len(self.steps) < 2:
            return
        name, accuracy = self.reference
        plot_reverse_process(path, self.steps, torch.stack(self.accuracies, 1), accuracy, self.num_examples, name)
