"""Is a generator better than a trivial one, and as good as the snapshots? One bootstrap answers both.

A good group of networks has a good score and is unlike the snapshots. One group is better than another where its score
is at least as good and its networks at most as similar (mean of the maximum IoU of wrong predictions with a snapshot),
and one of the two is strictly better. Where there is no similarity of predictions, the score alone decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from .geometry import chunks
from .metrics import nearest_in_predictions
from .render import number

CONFIDENCE = 0.95
VERDICTS = ("better", "worse", "undecided")


@dataclass(frozen=True)
class FrontierGroup:
    """
    A group of networks on the test data.

    Args:
        name (`str`): Shown in the report.
        values (`torch.Tensor`): Shape `(N,)`, the metric; those that are nan are left out.
        wrong (`torch.Tensor`, *optional*): bool of shape `(N, M)`, where a classifier errs; its metric is its accuracy.
        family (`str`, *optional*): What the settings of one sweep have in common.
        value (`float | str`, *optional*): The setting, where the family has one.
        tuned (`bool`, *optional*, defaults to `False`): Whether it got feedback from the task.
    """

    name: str
    values: Tensor
    wrong: Tensor | None = None
    family: str | None = None
    value: float | str | None = None
    tuned: bool = False


@dataclass(frozen=True)
class FrontierRow:
    """
    A group's place on the plane, and the generated group's relation to it.

    Intervals are the central 95% of the bootstrap. The last three fields are seen from the generated group, and `None`
    in its own row: `better` is the share of resamples in which it is better than this group, `worse` that in which it
    is worse, and `verdict` which of the two reaches 95%, or `"undecided"`.
    """

    name: str
    family: str | None
    value: float | str | None
    tuned: bool
    num_models: int
    score: float
    score_interval: tuple[float, float]
    max_iou: float | None
    max_iou_interval: tuple[float, float] | None
    better: float | None = None
    worse: float | None = None
    verdict: str | None = None


@dataclass(frozen=True)
class Difference:
    """The mean score of the generated networks less that of the snapshots, in the metric's units, the central 95% of
    the bootstrap, and the verdict: `"undecided"` where that interval holds 0."""

    difference: float
    interval: tuple[float, float]
    verdict: str


class Bootstrap:
    """
    Resamples the networks of each group and, of classifiers, the test examples, which are the same for all groups.

    What stays fixed: the snapshots, because they define the reference, and which of them each network is nearest to.
    Choosing the nearest anew in each resample takes the maximum over noise once more: it shifts each group's similarity
    upwards by a different amount, and the intervals then miss the true difference far too often. The 95% hold for each
    comparison alone, not for all of them together. A group of one network has no spread over networks, only over
    examples.

    Args:
        wrong_snapshots (`torch.Tensor`, *optional*): bool of shape `(K, M)`, for classifiers.
        sign (`int`): What scores are multiplied with, so that larger is better.
        generator (`torch.Generator`): Source of randomness.
        num_resamples (`int`, *optional*, defaults to 200): R.
    """

    def __init__(self, wrong_snapshots: Tensor | None, sign: int, generator: Generator, num_resamples: int = 200):
        self.wrong_snapshots, self.sign, self.generator = wrong_snapshots, sign, generator
        self.num_resamples = num_resamples
        if wrong_snapshots is not None:
            count = wrong_snapshots.shape[1]
            draws = [torch.randint(count, (count,), generator=generator) for _ in range(num_resamples)]
            self.weights = torch.stack([draw.bincount(minlength=count) for draw in draws], dim=1).float()  # (M, R)

    def frontier(self, generated: FrontierGroup, baselines: Sequence[FrontierGroup]) -> list[FrontierRow]:
        """The generated group, then the baselines in their order."""
        reference, score, iou = self._place(generated)
        rows = [FrontierRow(**reference)]
        for group in baselines:
            place, other_score, other_iou = self._place(group)
            better = _is_better(score, iou, other_score, other_iou)
            worse = _is_better(other_score, other_iou, score, iou)
            rows.append(FrontierRow(**place, better=better, worse=worse, verdict=_verdict(better, worse)))
        return rows

    def difference(self, generated: FrontierGroup, snapshots: FrontierGroup) -> Difference:
        """Whether the generated networks are as good as the snapshots, whose networks are resampled as well."""
        resamples = self._scores(generated)[0] - self._scores(snapshots)[0]
        difference = _mean(generated.values) - _mean(snapshots.values)
        low, high = _interval(resamples)
        decided = "better" if low > 0 else "worse" if high < 0 else "undecided"
        if self.sign < 0:
            decided = {"better": "worse", "worse": "better"}.get(decided, decided)
        return Difference(difference, (low, high), decided)

    def _place(self, group: FrontierGroup) -> tuple[dict, Tensor, Tensor]:
        """The fields of a row, and in each resample the mean score, larger being better, and the mean maximum IoU."""
        scores, counts = self._scores(group)
        fields = {
            "name": group.name,
            "family": group.family,
            "value": group.value,
            "tuned": group.tuned,
            "num_models": len(group.values),
            "score": _mean(group.values),
            "score_interval": _interval(scores),
            "max_iou": None,
            "max_iou_interval": None,
        }
        similarity = torch.zeros(self.num_resamples, dtype=torch.float64)
        if group.wrong is not None:
            iou, resampled = self._similarity(group.wrong)
            similarity = (counts.T * resampled).mean(0)
            fields |= {"max_iou": iou.mean().item(), "max_iou_interval": _interval(similarity)}
        return fields, self.sign * scores, similarity

    def _scores(self, group: FrontierGroup) -> tuple[Tensor, Tensor]:
        """The group's mean score in each resample `(R,)`, and how often each network is in it `(R, N)`."""
        values = group.values[:, None].expand(-1, self.num_resamples).clone()
        if group.wrong is not None:
            num_examples = group.wrong.shape[1]
            for models in chunks(len(values), 8 * num_examples):
                values[models] = 100 - 100 * (group.wrong[models].float() @ self.weights).double() / num_examples
        draws = torch.randint(len(values), (self.num_resamples, len(values)), generator=self.generator)
        counts = torch.zeros(draws.shape, dtype=torch.float64).scatter_add_(1, draws, torch.ones(draws.shape).double())
        defined = ~values.isnan()
        total = (counts.T * values.nan_to_num()).sum(0)
        return total / (counts.T * defined).sum(0), counts

    def _similarity(self, wrong: Tensor) -> tuple[Tensor, Tensor]:
        """The maximum IoU of each network with a snapshot `(N,)`, and the same in each resample `(N, R)`."""
        assert self.wrong_snapshots is not None
        iou, nearest = nearest_in_predictions(wrong, self.wrong_snapshots)
        resampled = torch.empty(len(wrong), self.num_resamples, dtype=torch.float64)
        for models in chunks(len(wrong), 16 * wrong.shape[1]):
            snapshot = self.wrong_snapshots[nearest[models]]
            intersection = (wrong[models] & snapshot).float() @ self.weights  # (n, R), counts
            union = (wrong[models] | snapshot).float() @ self.weights
            resampled[models] = torch.where(union > 0, intersection.double() / union, 1.0)
        return iou, resampled


def frontier_sentence(rows: Sequence[FrontierRow]) -> str:
    """What the rows of a frontier say, in one sentence: for each verdict the families and their values."""
    reference, *baselines = rows
    listed = []
    for verdict in VERDICTS:
        families: dict[str, list[str]] = {}
        for row in baselines:
            if row.verdict == verdict:
                families.setdefault(str(row.family), []).extend([] if row.value is None else [str(row.value)])
        names = [f"{family} ({', '.join(values)})" if values else family for family, values in families.items()]
        count = sum(row.verdict == verdict for row in baselines)
        listed.append(f"{count}" + (f": {', '.join(names)}" if names else ""))
    better, worse, undecided = listed
    similarity = "" if reference.max_iou is None else f", max IoU {number(reference.max_iou)}"
    return (
        f"{reference.name} (score {number(reference.score, '.2f')}{similarity}) is better than {better}; worse than "
        f"{worse}; undecided against {undecided}; of {len(baselines)} baseline settings, at {CONFIDENCE:.0%} of a "
        f"bootstrap over networks{' and test examples' if similarity else ''}."
    )


def _mean(values: Tensor) -> float:
    return values.nanmean().item()


def _interval(resamples: Tensor) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    return resamples.nanquantile(tail).item(), resamples.nanquantile(1 - tail).item()


def _is_better(score: Tensor, iou: Tensor, other_score: Tensor, other_iou: Tensor) -> float:
    """Share of the resamples in which the first group is nowhere worse than the other and somewhere better."""
    nowhere_worse = (score >= other_score) & (iou <= other_iou)
    somewhere_better = (score > other_score) | (iou < other_iou)
    return (nowhere_worse & somewhere_better).double().mean().item()


def _verdict(better: float, worse: float) -> str:
    return "better" if better >= CONFIDENCE else "worse" if worse >= CONFIDENCE else "undecided"
