"""How like held-out data a set of data is, and how new: Fréchet distance, nearness to training data, and the rest."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from ..tasks.data_task import DataTask
from ..tasks.task import Split, evenly
from ..training import Loop, LoopArguments
from .compare import Comparison, interval, judged
from .geometry import Yardstick, exact_distances, pairwise_distances
from .groups import named_generator

# Features that sets are compared by; of more, so many principal components of so many training data.
MOST_FEATURES, MOST_ROWS = 64, 1000
# The nearness of held-out data is 1. From here on a set counts as natural: to be farther from the training data than
# data are is no virtue.
NATURAL = 0.9
LIKE = 0.05  # in nearness: sets that differ by less are as new as each other
SPLITS: tuple[Split, ...] = ("train", "test")
COPY_QUANTILE = 0.01  # of held-out data's distances: what is nearer is a copy
NEIGHBOURS, RESAMPLES = 5, 200
# The classifiers of the data set, whose features sets are compared by.
CLASSIFIER, CLASSIFIERS = LoopArguments(500, 64, 2e-3, weight_decay=0.01), 3
WIDTH = 48
AT_ONCE = 100  # data that it sees at once


class Features(nn.Module):
    """
    Small classifiers of data, `(N, C, H, W)` or `(N, F)`; what their last layers get are features. There are several,
    because the distance between two sets depends on the classifier.
    """

    def __init__(self, shape: Sequence[int], num_classes: int):
        super().__init__()
        self.bodies = nn.ModuleList(self._body(shape) for _ in range(CLASSIFIERS))
        heads = (nn.Sequential(nn.Dropout(0.2), nn.Linear(WIDTH, num_classes)) for _ in range(CLASSIFIERS))
        self.heads = nn.ModuleList(heads)
        self.scale = torch.ones(CLASSIFIERS * WIDTH)

    @staticmethod
    def _body(shape: Sequence[int]) -> nn.Module:
        if len(shape) == 3:
            body, channels = [], shape[0]
            for width in (WIDTH // 2, WIDTH):
                body += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                body.append(nn.MaxPool2d(2, ceil_mode=True))
                channels = width
            body += [nn.Flatten(), nn.Linear(WIDTH * -(-shape[1] // 4) * -(-shape[2] // 4), WIDTH)]
        else:
            body = [nn.Linear(shape[0], 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH)]
        return nn.Sequential(*body, nn.ReLU())

    def features(self, data: Tensor) -> Tensor:
        """Those of all classifiers, `(N, CLASSIFIERS WIDTH)`."""
        return torch.cat([body(data) for body in self.bodies], 1) / self.scale

    def forward(self, data: Tensor) -> Tensor:
        """Logits of each classifier, `(N, CLASSIFIERS, classes)`."""
        pairs = zip(self.bodies, self.heads, strict=True)
        return torch.stack([head(body(data)) for body, head in pairs], 1)


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
            some = features[evenly(len(features), MOST_ROWS)]
            # The covariance of 12,288 values would be 1.2 GB; rows are few.
            self.basis = torch.linalg.svd(some - some.mean(0), full_matrices=False).Vh[:MOST_FEATURES].T
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
            targets = labels[rows].repeat_interleave(CLASSIFIERS).to(loop.device)
            return F.cross_entropy(model(inputs[rows].to(loop.device)).flatten(0, 1), targets)

        loop.train(self.classifier, loss, len(inputs), CLASSIFIER, description="classifier for features")
        self.classifier.cpu().eval()
        # Each counts the same, however large its features are.
        with torch.no_grad():
            found = self._in_parts(self.classifier.features, signals).unflatten(1, (CLASSIFIERS, -1))
        self.classifier.scale = found.var(0).sum(1).sqrt().repeat_interleave(WIDTH)

    @torch.no_grad()
    def classify(self, outputs: Tensor) -> Tensor:
        """Numbers of classes, `(N,)`."""
        assert self.classifier is not None
        return self._in_parts(self.classifier, outputs).softmax(-1).mean(1).argmax(1)

    def _in_parts(self, network: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
        return torch.cat([network(self._inputs(part)) for part in outputs.split(AT_ONCE)])

    @torch.no_grad()
    def _raw_features(self, outputs: Tensor) -> Tensor:
        found = self.task.features(outputs)
        if found is None:
            found = self.flat(outputs) if self.classifier is None else self._in_parts(self.classifier.features, outputs)
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
