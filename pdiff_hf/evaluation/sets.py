"""Networks that are data, compared as sets: how like held-out data those of generated networks are, and how new."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from ..networks.runner import NetworkRunner
from ..pipelines import PDiffPipeline
from ..tasks.data_task import DataTask
from ..tasks.task import Split
from ..training import Loop, LoopArguments
from ..utils.reports import TEST
from .baselines import BaselineContext, diagonal_gaussian, low_rank_gaussian
from .compare import Comparison, interval, judged
from .decoded import sample
from .geometry import Yardstick, exact_distances, pairwise_distances
from .groups import Group, Pending, named_generator
from .report import GroupRow, Report
from .report_data import Kind, Metric

METRIC = Metric("Fréchet distance", "% of the variance", higher_is_better=False)
# Features that sets are compared by; of more, so many principal components.
MOST_FEATURES = 64
# The nearness of held-out data is 1. From here on a set counts as natural: to be farther from the training data than
# data are is no virtue.
NATURAL = 0.9
LIKE = 0.05  # in nearness: sets that differ by less are as new as each other
SPLITS: tuple[Split, ...] = ("train", "test")
COPY_QUANTILE = 0.01  # of held-out data's distances: what is nearer is a copy
NEIGHBOURS, RESAMPLES = 5, 200
BANDWIDTHS = (0.2, 0.3, 0.4, 0.5, 0.6)
GUIDANCE = 1.5
# The classifier of the data set, whose features sets are compared by.
CLASSIFIER = LoopArguments(500, 64, 2e-3, weight_decay=0.01)
WIDTH = 48
# Of the contact sheet: how many data in a row, and which rows below the generated data and those nearest to them.
SHEET_COLUMNS = 12
SHEET_ROWS = ("Gaussian, weights", "KDE 0.3, weights", "KDE 0.4, latents", "denoiser on the data")


class Features(nn.Module):
    """A small classifier of data, `(N, C, H, W)` or `(N, F)`; what its last layer gets are features."""

    def __init__(self, shape: Sequence[int], num_classes: int):
        super().__init__()
        if len(shape) == 3:
            body, channels = [], shape[0]
            for width in (WIDTH // 2, WIDTH):
                body += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                body.append(nn.MaxPool2d(2, ceil_mode=True))
                channels = width
            body += [nn.Flatten(), nn.Linear(WIDTH * -(-shape[1] // 4) * -(-shape[2] // 4), WIDTH)]
        else:
            body = [nn.Linear(shape[0], 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH)]
        self.body, self.head = (
            nn.Sequential(*body, nn.ReLU()),
            nn.Sequential(nn.Dropout(0.2), nn.Linear(WIDTH, num_classes)),
        )

    def forward(self, data: Tensor) -> Tensor:
        return self.head(self.body(data))


class Judge:
    """
    What sets of data are compared by.

    Args:
        task (`DataTask`): Gives data, what they have in common, and perhaps features.
        seed (`int`): Of the classifier's training.

    Attributes:
        train, heldout (`torch.Tensor`): Data, `(N, P C)`, float64.
        classes (`torch.Tensor`, *optional*): Of training data, for the classifier, `(N,)`.
    """

    def __init__(self, task: DataTask, seed: int):
        self.task = task
        signals = {split: task.signals(split) for split in SPLITS}
        self.train, self.heldout = (self.flat(signals[split]) for split in SPLITS)
        self.classes: Tensor | None = None
        self.classifier: Features | None = None
        self.accuracy: float | None = None
        words = [name for name, field in task.fields.items() if field.choices]
        if words:
            column = task.fields.columns[words[0]].start
            seen, held = (task.fields.table(task.conditions(split))[:, column] for split in SPLITS)
            if not seen.isnan().all():
                self.column, self.classes = column, seen
                self._train_classifier(signals["train"], len(task.fields[words[0]].choices or ()), seed)
                known = ~held.isnan()
                said = self.classify(signals["test"])[known] == held[known]
                self.accuracy = 100 * said.double().mean().item() if len(said) else None
        self.basis: Tensor | None = None
        features = self._raw_features(signals["train"])
        if features.shape[1] > MOST_FEATURES:
            self.basis = torch.linalg.eigh(torch.cov(features.T)).eigenvectors[:, -MOST_FEATURES:]
        self.real = self.features(signals["test"])
        distances = pairwise_distances(self.heldout, self.train)
        self.heldout_nearest = exact_distances(self.heldout, self.train, distances.argmin(1))
        self.copy_distance = self.heldout_nearest.quantile(COPY_QUANTILE)
        self.covering = Yardstick(self.real, NEIGHBOURS)

    def flat(self, outputs: Tensor) -> Tensor:
        """Outputs or signals `(N, P, C)` as data `(N, P C)`."""
        return self.task.data(outputs).flatten(1).double()

    def _inputs(self, outputs: Tensor) -> Tensor:
        images = self.task.images(outputs)
        return self.flat(outputs).float() if images is None else images.float()

    def _train_classifier(self, signals: Tensor, num_classes: int, seed: int) -> None:
        assert self.classes is not None
        known = (~self.classes.isnan()).nonzero().flatten()
        inputs, labels = self._inputs(signals)[known], self.classes[known].long()
        torch.manual_seed(seed)
        self.classifier = Features(inputs.shape[1:], num_classes)
        loop = Loop(Accelerator(), seed)

        def loss(model: nn.Module, indices: Tensor, generator: torch.Generator) -> Tensor:
            rows = indices.cpu()
            return F.cross_entropy(model(inputs[rows].to(loop.device)), labels[rows].to(loop.device))

        loop.train(self.classifier, loss, len(inputs), CLASSIFIER, description="classifier for features")
        self.classifier.cpu().eval()

    @torch.no_grad()
    def classify(self, outputs: Tensor) -> Tensor:
        """Numbers of classes, `(N,)`."""
        assert self.classifier is not None
        return self.classifier(self._inputs(outputs)).argmax(1)

    @torch.no_grad()
    def _raw_features(self, outputs: Tensor) -> Tensor:
        found = self.task.features(outputs)
        if found is None:
            found = self.flat(outputs) if self.classifier is None else self.classifier.body(self._inputs(outputs))
        return found.double()

    def features(self, outputs: Tensor) -> Tensor:
        """Outputs or signals `(N, P, C)` to what sets are compared by, float64 of shape `(N, F)`."""
        found = self._raw_features(outputs)
        return found if self.basis is None else found @ self.basis


@dataclass
class Placed:
    """
    A set, placed among the data, with its resamples.

    Args:
        measures (`dict`): See [`place`].
        distances, novelties (`torch.Tensor`): Fréchet distance and novelty in each resample, `(R,)`.
    """

    measures: dict[str, Any]
    distances: Tensor
    novelties: Tensor


class Resampled:
    """Resamples of the held-out data, the same for all sets; those of each set are its own."""

    def __init__(self, judge: Judge, seed: int):
        self.judge, self.generator = judge, named_generator(seed, "resamples of sets")
        counts = self._counts(len(judge.real))
        self.real = with_root(*self._moments(judge.real, counts))
        self.exact = with_root(*self._moments(judge.real, torch.ones(1, len(judge.real)).double()))
        self.nearest = weighted_median(judge.heldout_nearest, counts)

    def _counts(self, number: int) -> Tensor:
        draws = torch.randint(number, (RESAMPLES, number), generator=self.generator)
        return torch.zeros(draws.shape).scatter_add_(1, draws, torch.ones(draws.shape)).double()

    def _moments(self, features: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Means `(R, F)` and covariances `(R, F, F)` of resamples."""
        total = counts.sum(1, keepdim=True)
        mean = counts @ features / total
        squares = (features.unsqueeze(2) * features.unsqueeze(1)).flatten(1)  # (n, F²)
        second = (counts @ squares / total).unflatten(1, (features.shape[1], -1))
        scale = (total / (total - 1)).unsqueeze(2)
        return mean, scale * (second - mean.unsqueeze(2) * mean.unsqueeze(1))

    def place(self, outputs: Tensor, classes: Tensor | None = None) -> Placed:
        """
        Where a set lies: `score_mean`, the Fréchet distance to the held-out data; `nearness`, the median distance to
        the nearest training datum over that of held-out data; `copies`, the share that is nearer than the nearest 1%
        of held-out data; `two_sample`, how often the nearest neighbour of a datum is of its own set (0.5 is ideal);
        `precision`, `recall`, `density`, `coverage` among the held-out data; `class_accuracy`.
        """
        judge = self.judge
        features, data = judge.features(outputs), judge.flat(outputs)
        if not (features.isfinite().all() and data.isfinite().all()):
            nothing = torch.full((RESAMPLES,), math.nan, dtype=torch.float64)
            return Placed({"score_mean": math.nan, "nearness": math.nan}, nothing, nothing)
        nearest = exact_distances(data, judge.train, pairwise_distances(data, judge.train).argmin(1))
        counts = self._counts(len(data))
        value = frechet(*self._moments(features, torch.ones(1, len(data)).double()), *self.exact).item()
        distances = frechet(*self._moments(features, counts), *self.real)
        # Resamples lie farther from each other than samples do, and wide sets more so than narrow ones.
        distances += value - distances.mean()
        covering = judge.covering.place(features) if len(data) > 1 else {}
        measures: dict[str, Any] = {
            "score_mean": value,
            "score_interval": interval(distances.clamp(min=0)),
            "nearness": (nearest.quantile(0.5) / judge.heldout_nearest.quantile(0.5)).item(),
            "copies": 100 * (nearest < judge.copy_distance).double().mean().item(),
            "two_sample": two_sample(features, judge.real),
            **{name: covering.get(name) for name in ("precision", "recall", "density", "coverage")},
        }
        if classes is not None and judge.classifier is not None:
            known = ~classes.isnan()
            said = judge.classify(outputs)[known] == classes[known]
            measures["class_accuracy"] = 100 * said.double().mean().item()
        return Placed(measures, distances, weighted_median(nearest, counts) / self.nearest)

    @staticmethod
    def compare(own: Placed, other: Placed) -> Comparison:
        """
        Fidelity against novelty: better is nearer to the held-out data, and as new or newer (in nearness up to
        `NATURAL`, within `LIKE`), in 95% of the resamples.
        """
        gain = other.distances - own.distances
        newer = own.novelties.clamp(max=NATURAL) - other.novelties.clamp(max=NATURAL)
        difference = own.measures["score_mean"] - other.measures["score_mean"]
        return judged(difference, interval(-gain), (gain > 0) & (newer >= -LIKE), (gain < 0) & (newer <= LIKE))


def with_root(mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means `(R, F)`, roots of covariances `(R, F, F)`, and their traces `(R,)`."""
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt().unsqueeze(1)) @ vectors.mT
    return mean, root, covariance.diagonal(dim1=1, dim2=2).sum(1)


def frechet(mean: Tensor, covariance: Tensor, real_mean: Tensor, root: Tensor, variance: Tensor) -> Tensor:
    """The Fréchet distance of R Gaussians to others, of [`with_root`], in percent of the variance of the others."""
    shared = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum(1)
    own = covariance.diagonal(dim1=1, dim2=2).sum(1)
    return 100 * ((mean - real_mean).square().sum(1) + own + variance - 2 * shared) / variance


def weighted_median(values: Tensor, counts: Tensor) -> Tensor:
    """The median in each resample, `(R,)`, of values `(N,)` that come `counts` times, `(R, N)`."""
    ordered = values.argsort()
    sums = counts[:, ordered].cumsum(1)
    return values[ordered][(sums >= sums[:, -1:] / 2).double().argmax(1)]


def two_sample(features: Tensor, real: Tensor) -> float:
    """How often the nearest neighbour is of the own set, of two sets of equal size (Lopez-Paz and Oquab 2017)."""
    size = min(len(features), len(real))
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))  # data are often sorted by class
    both = torch.cat([features[:size], real[order[:size]]])
    nearest = pairwise_distances(both, both).fill_diagonal_(math.inf).argmin(1)
    return ((nearest < size) == (torch.arange(2 * size) < size)).double().mean().item()


# ------------------------------------------------------------------------------------------------- trivial generators


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


# ----------------------------------------------------------------------------------------------------- what is compared


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
        elif generator.condition_encoder is not None and (table is None or not table.shape[1]):
            raise ValueError(
                "conditions of the snapshots are needed: the generator is sampled for those of training data"
            )
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
        """The generator as it is, with guidance, and without a condition."""
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
        nothing = pipe.denoiser.null_condition.detach().expand(self.num_models, -1)
        found = sample(pipe, 1, self.seed, nothing, "pt", guidance_scale=1.0)
        yield Group("without a condition", found, Kind.VARIANT)

    def sample(self, pipe: PDiffPipeline, **how: Any) -> tuple[Tensor | None, Tensor]:
        """Conditions, drawn from those of training data, and what is generated for them, `(num_models, D)`."""
        if pipe.condition_encoder is None:
            return None, sample(pipe, self.num_models, self.seed, None, "pt", **how)
        assert self.table is not None
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
            sheet[name] = outputs[:SHEET_COLUMNS]
            yield row

    def complete(self, report: Report) -> None:
        """Adds what features are worth, and pictures of the data."""
        report.settings["classifier_accuracy"] = self.judge.accuracy
        sheet, train = self.figures["sheet"], self.signals["train"]
        nearest = pairwise_distances(self.judge.flat(sheet["generated"]), self.judge.train).argmin(1)
        rows = {"generated": sheet["generated"], "nearest training datum": train[nearest]}
        rows |= {name: sheet[name] for name in SHEET_ROWS if name in sheet}
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
