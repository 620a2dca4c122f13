"""Networks that are data, compared as sets: how like held-out data those of generated networks are, and how new."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..networks.runner import NetworkRunner
from ..pipelines import PDiffPipeline
from ..tasks.data_task import DataTask
from ..utils.reports import TEST
from .baselines import BaselineContext, diagonal_gaussian, low_rank_gaussian
from .decoded import sample
from .geometry import pairwise_distances
from .groups import Group, Pending, named_generator
from .placing import NEIGHBOURS, SPLITS, Judge, Placed, Resampled
from .report import GroupRow, Report
from .report_data import Kind, Metric

METRIC = Metric("Fréchet distance", "% of the variance", higher_is_better=False)
BANDWIDTHS = (0.2, 0.3, 0.4, 0.5, 0.6)
GUIDANCE = 1.5
# Of the contact sheet: how many data in a row, and which rows below the generated data and those nearest to them.
SHEET_COLUMNS = 12
SHEET_ROWS = ("Gaussian, weights", "KDE 0.3, weights", "KDE 0.4, latents", "denoiser on the data")


def trivial(
    rows: Tensor, classes: Tensor | None, count: int, seed: int, space: str
) -> Iterator[tuple[str, str, Tensor, Tensor | None]]:
    """
    What anybody can draw from `rows`, `(N, d)`, in a space such as `weights`: name, kind, rows `(count, d)` and the
    classes that they are of. Kernels have the covariance of the rows, times the square of the bandwidth.
    """

    def generator(name: str) -> torch.Generator:
        return named_generator(seed, f"{name} {space}")

    def deviations(of: Tensor, number: int, name: str) -> Tensor:
        return low_rank_gaussian(BaselineContext(of), number, 1.0, generator(name)) - of.mean(0)

    def pick(name: str, *size: int) -> Tensor:
        return torch.randint(len(rows), size or (count,), generator=generator(name))

    mean = rows.mean(0)
    yield "mean", "mean", mean.expand(count, -1), None
    independent = diagonal_gaussian(BaselineContext(rows), count, 1.0, generator("diagonal"))
    yield "diagonal Gaussian", "Gaussian", independent, None
    yield "Gaussian", "Gaussian", mean + deviations(rows, count, "Gaussian"), None
    if classes is not None and len(known := classes[~classes.isnan()]):
        drawn = known[torch.randint(len(known), (count,), generator=generator("classes"))]
        found = torch.empty(count, rows.shape[1])
        for label in drawn.unique():
            members, which = rows[classes == label], drawn == label
            found[which] = members.mean(0).expand(int(which.sum()), -1)
            if len(members) > 1:
                found[which] += deviations(members, int(which.sum()), f"class {label:g}")
        yield "Gaussian of each class", "Gaussian of each class", found, drawn
    for bandwidth in BANDWIDTHS:
        name = f"KDE {bandwidth}"
        chosen = pick(name)
        noise = deviations(rows, count, f"noise of {name}")
        yield name, "KDE", rows[chosen] + bandwidth * noise, None if classes is None else classes[chosen]
    first, second = pick("first"), pick("second")
    share = torch.rand(count, 1, generator=generator("share"))
    yield "interpolation", "interpolation", torch.lerp(rows[first], rows[second], share), None
    near = pairwise_distances(rows[first], rows).topk(NEIGHBOURS + 1, largest=False).indices[:, 1:]
    second = near.gather(1, pick("neighbour", count, 1) % NEIGHBOURS).squeeze(1)
    yield "interpolation of neighbours", "interpolation", torch.lerp(rows[first], rows[second], share), None


class Sets:
    """
    The data that generated networks make, as a set, beside held-out data, those of other networks, and what anybody can
    draw in the spaces of weights, latents and data.

    Args:
        task (`DataTask`): Says what networks render, and which data there are.
        networks (`NetworkRunner`): Runs them.
        generator, snapshots, seed: Those of [`evaluate`]. A pipeline is sampled for the conditions of training data.
        table (`torch.Tensor`, *optional*): Conditions of the snapshots, shape `(K, width)`.
        num_models (`int`, *optional*, defaults to 1000): Networks to sample, and of each trivial generator; as many as
            there are if they are given, because the Fréchet distance falls with the size of a set.
        heldout (`torch.Tensor`, *optional*): bool of shape `(K,)`: networks that no generator has seen.
        data (`torch.Tensor`, *optional*): Which of those of the splits train and test each snapshot is, `(K,)`.
        latents (`torch.Tensor`, *optional*): Of the snapshots, `(K, L)`, if they are known already.

    Raises:
        ValueError: if there are too few data, conditions are missing, or networks are not finite.
    """

    metric = METRIC

    def __init__(
        self,
        task: DataTask,
        networks: NetworkRunner,
        generator: PDiffPipeline | Tensor,
        snapshots: Tensor,
        table: Tensor | None,
        *,
        num_models: int = 1000,
        seed: int,
        heldout: Tensor | None = None,
        data: Tensor | None = None,
        latents: Tensor | None = None,
    ):
        heldout = torch.zeros(len(snapshots), dtype=torch.bool) if heldout is None else heldout
        self.signals = {split: task.signals(split) for split in SPLITS}
        if few := too_few(*map(len, self.signals.values()), int((~heldout).sum())):
            raise ValueError(few)
        if isinstance(generator, Tensor):
            num_models = len(generator)
            if num_models < 2 or not generator.isfinite().all():
                raise ValueError("a set of generated networks is needed: at least 2, with finite parameters")
        self.task, self.networks, self.generator = task, networks, generator
        self.snapshots, self.heldout, self.data, self.latents = snapshots, heldout, data, latents
        self.num_models, self.seed = num_models, seed
        self.judge = Judge(task, seed)
        self.resampled = Resampled(self.judge, seed)
        self.table = None if table is None or not table.shape[1] else table[~heldout]
        self.figures = dict[str, Any]()

    def facts(self) -> dict[str, Any]:
        """What a report says of the data, whatever comes out."""
        sizes = {"test": len(self.judge.heldout), "train": len(self.judge.train), "validation": 0}
        return {"splits": sizes, "num_generated": self.num_models}

    def groups(self) -> Iterator[Group]:
        """All groups, the generated networks first."""
        pipeline = self.generator if isinstance(self.generator, PDiffPipeline) else None
        seen, train = self.snapshots[~self.heldout], self.signals["train"]
        yield from self._generated()
        yield Group("training networks", self._some(seen), Kind.SNAPSHOTS)
        yield Group("training data", self._some(train), Kind.CONTROL)
        if self.heldout.any():
            own = self.snapshots[self.heldout]
            yield Group("held-out networks", own, Kind.CONTROL)
            if pipeline is not None:
                known = pipeline.encode(own) if self.latents is None else self.latents[self.heldout]
                yield Group("held-out networks, reconstructed", pipeline.decode_latents(known), Kind.CONTROL)
        yield from self._trivial("weights", seen.float(), self.classes(self.table), lambda found: found)
        if pipeline is not None:
            known = pipeline.encode(seen) if self.latents is None else self.latents[~self.heldout]
            yield from self._trivial("latents", known, self.classes(self.table), pipeline.decode_latents)
        points = train.flatten(1)
        yield from self._trivial("data", points, self.judge.classes, lambda found: found.unflatten(1, train.shape[1:]))

    def _generated(self) -> Iterator[Group]:
        """The generator as it is, and with guidance."""
        pipe = self.generator
        if isinstance(pipe, Tensor):
            yield Group("generated", pipe, Kind.GENERATED)
            return
        told, found = self.sample(pipe)
        yield Group("generated", found, Kind.GENERATED, classes=self.classes(told))
        if pipe.condition_encoder is None or not pipe.denoiser.knows_no_condition:
            return
        other = 1.0 if pipe.config.guidance_scale != 1 else GUIDANCE
        told, found = self.sample(pipe, guidance_scale=other)
        yield Group(f"guidance {other:g}", found, Kind.VARIANT, "guidance", classes=self.classes(told))

    def sample(self, pipe: PDiffPipeline, **how: Any) -> tuple[Tensor | None, Tensor]:
        """Conditions, drawn from those of training data, and what is generated for them, `(num_models, D)`."""
        if self.table is None or pipe.condition_encoder is None:  # it draws conditions itself, if it has some
            return None, sample(pipe, self.num_models, self.seed, None, "pt", **how)
        draws = named_generator(self.seed, "conditions")
        told = self.table[torch.randint(len(self.table), (self.num_models,), generator=draws)]
        return told, sample(pipe, 1, self.seed, pipe.condition_encoder.fields.conditions(told), "pt", **how)

    def _trivial(
        self, space: str, points: Tensor, classes: Tensor | None, networks: Callable[[Tensor], Tensor]
    ) -> Iterator[Group]:
        for name, sweep, found, told in trivial(points, classes, self.num_models, self.seed, space):
            yield Group(f"{name}, {space}", networks(found), Kind.BASELINE, f"{sweep}, {space}", classes=told)

    def classes(self, table: Tensor | None) -> Tensor | None:
        """Those that conditions ask for, `(N,)`, where data have classes."""
        return None if table is None or self.judge.classes is None else table[:, self.judge.column]

    def _some(self, rows: Tensor) -> Tensor:
        order = torch.randperm(len(rows), generator=named_generator(self.seed, "some"))
        return rows[order[: self.num_models]]

    def rows(self, groups: Iterable[Pending]) -> Iterator[GroupRow]:
        """Each group with its place among the data, and how the generated networks compare with it."""
        own: Placed | None = None
        sheet, wanted = self.figures.setdefault("sheet", {}), None
        if self.data is not None:
            wanted = self.task.data(torch.cat([*self.signals.values()])[self.data[self.heldout]])
        for name, make in groups:
            group = make()
            outputs = group.networks
            if outputs.ndim == 2:
                outputs = self.task.render_all(self.networks, outputs)
            placed = self.resampled.place(outputs, group.classes)
            if name.startswith("held-out networks") and wanted is not None:
                # The peak signal-to-noise ratio of data with values from 0 to 1, mean over data.
                errors = (self.task.data(outputs) - wanted).double().square().mean((1, 2))
                placed.measures["decibels"] = (-10 * errors.log10()).mean().item()
            row = group.row(len(outputs), measures=placed.measures)
            row.sets = {TEST: {"scores": [[placed.measures["score_mean"]]]}}
            own = own or placed
            if row.kind in (Kind.BASELINE, Kind.OPPONENT, Kind.SNAPSHOTS):
                row.comparisons = {TEST: self.resampled.compare(own, placed)}
            if name in ("generated", *SHEET_ROWS):
                sheet[name] = outputs[:SHEET_COLUMNS].clone()  # a view would keep all of them
            yield row

    def complete(self, report: Report) -> None:
        """Adds what features are worth, and pictures of the data."""
        report.settings["classifier_accuracy"] = self.judge.accuracy
        sheet, train = self.figures["sheet"], self.signals["train"]
        nearest = pairwise_distances(self.judge.flat(sheet["generated"]), self.judge.train).argmin(1)
        rows = {"generated": sheet.pop("generated"), "nearest training datum": train[nearest], **sheet}
        self.figures = {"sheet": {name: self.task.images(outputs) for name, outputs in rows.items()}}
        if self.task.images(train[:1]) is None:
            self.figures = {}


def too_few(*sizes: int) -> str | None:
    """What is wrong with the numbers of training data, held-out data and networks, if anything is."""
    if min(sizes) > NEIGHBOURS:
        return None
    return (
        f"a report on sets of data needs more than {NEIGHBOURS} training data, as many held-out ones and networks, and "
        f"there are {min(sizes)}; use more data, or leave the stage evaluate out"
    )
