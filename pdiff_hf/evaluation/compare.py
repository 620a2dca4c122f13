"""Whether generated networks are better than others: one paired bootstrap, for a single task and for many members."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from ..utils.reports import CLOSE
from .geometry import chunks
from .metrics import nearest_in_predictions

CONFIDENCE = 0.95
BETTER, WORSE = "better", "worse"
MOST_RESAMPLES, LEAST_RESAMPLES, NUM_DRAWS = 10_000, 200, 2_000_000


@dataclass(frozen=True)
class Comparison:
    """
    Generated networks against a group, seen from the generated ones.

    Args:
        difference (`float`): Their mean score less the group's, in units of the metric.
        interval (`tuple[float, float]`): Central 95% of the bootstrap of that.
        verdict (`str`): `better` or `worse` where the interval leaves out 0, else `too close to call`. Against
            baselines of a single task similarity counts too: better is nowhere worse, in score and in similarity to
            the nearest snapshot, and somewhere better, in 95% of the resamples.
        better, worse (`float`, *optional*): Shares of the resamples where similarity counts.
    """

    difference: float
    interval: tuple[float, float]
    verdict: str
    better: float | None = None
    worse: float | None = None


class Bootstrap:
    """
    Resamples pairwise what all groups have in common, members of a family or test examples of a task, and the networks
    of each group for itself.

    What stays fixed: the snapshots, because they define the reference, and which of them each network is nearest to.
    Choosing the nearest anew in each resample takes the maximum over noise once more: it shifts each group's similarity
    upwards by a different amount, and the intervals then miss the true difference far too often. The 95% hold for each
    comparison alone, not for all of them together.

    Args:
        num_units (`int`): U; 0 where there is nothing in common.
        sign (`int`): What scores are multiplied with, so that larger is better.
        generator (`torch.Generator`): Source of randomness.
        wrong_snapshots (`torch.Tensor`, *optional*): bool of shape `(K, U)`, where snapshots err, for similarities.
    """

    def __init__(self, num_units: int, sign: int, generator: Generator, wrong_snapshots: Tensor | None = None):
        self.sign, self.generator, self.wrong_snapshots = sign, generator, wrong_snapshots
        self.num_resamples = min(MOST_RESAMPLES, max(LEAST_RESAMPLES, NUM_DRAWS // max(1, num_units)))
        draws = torch.randint(max(1, num_units), (self.num_resamples, max(1, num_units)), generator=generator)
        self.weights = torch.zeros(draws.shape).scatter_add_(1, draws, torch.ones(draws.shape)).T  # (U, R)

    def place(self, values: Tensor, units: Tensor | None = None) -> dict[str, Any]:
        """
        Mean score and similarity of a group with their intervals, under `score`, `score_interval`, `max_iou` and
        `max_iou_interval`, and the same in each resample, under `scores` and `similarities`, shape `(R,)`.

        Args:
            values (`torch.Tensor`): float64 of shape `(N,)`, the score of each network; nan is left out.
            units (`torch.Tensor`, *optional*): What is drawn alike for all groups: bool of shape `(N, U)`, where
                networks err on U test examples; or float64 of shape `(1, U)`, mean scores for U members of a family.
        """
        scores, counts = self._scores(values, units)
        row: dict[str, Any] = {
            "score": values.nanmean().item(),
            "score_interval": interval(scores),
            "scores": scores,
        }
        row |= {"max_iou": None, "max_iou_interval": None, "similarities": None}
        if self.wrong_snapshots is not None and units is not None:
            iou, resampled = self._similarity(units)
            similarities = (counts.T * resampled).mean(0)
            row |= {"max_iou": iou.mean().item(), "max_iou_interval": interval(similarities)}
            row["similarities"] = similarities
        return row

    def compare(self, generated: dict[str, Any], other: dict[str, Any], with_similarity: bool = False) -> Comparison:
        """Two groups, as [`place`] gives them; with their similarity to the snapshots where there is one."""
        resampled = generated["scores"] - other["scores"]
        low, high = interval(resampled)
        difference = generated["score"] - other["score"]
        if not with_similarity or generated["similarities"] is None:
            gains = sorted((self.sign * low, self.sign * high))
            verdict = BETTER if gains[0] > 0 else WORSE if gains[1] < 0 else CLOSE
            return Comparison(difference, (low, high), verdict)
        gain, closer = self.sign * resampled, generated["similarities"] - other["similarities"]
        better = (gain >= 0) & (closer <= 0) & ((gain > 0) | (closer < 0))
        worse = (gain <= 0) & (closer >= 0) & ((gain < 0) | (closer > 0))
        return judged(difference, (low, high), better, worse)

    def _scores(self, own: Tensor, units: Tensor | None) -> tuple[Tensor, Tensor]:
        """The group's mean score in each resample `(R,)`, and how often each network is in it `(R, N)`."""
        if units is None:
            values = own[:, None].expand(-1, self.num_resamples)
        else:
            num_units = units.shape[1]
            values = torch.empty(len(units), self.num_resamples, dtype=torch.float64)
            for rows in chunks(len(values), 8 * num_units):
                values[rows] = (units[rows].float() @ self.weights).double() / num_units
            if units.dtype == torch.bool:
                values = 100 - 100 * values
        draws = torch.randint(len(values), (self.num_resamples, len(values)), generator=self.generator)
        counts = torch.zeros(draws.shape, dtype=torch.float64).scatter_add_(1, draws, torch.ones(draws.shape).double())
        defined = ~values.isnan()
        return (counts.T * values.nan_to_num()).sum(0) / (counts.T * defined).sum(0), counts

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


def paired_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Comparison:
    """Two methods by their scores for the same members, of which more is better."""
    a, b = (torch.as_tensor(values, dtype=torch.float64) for values in (first, second))
    bootstrap = Bootstrap(len(a), 1, torch.Generator().manual_seed(seed))
    own, other = (bootstrap.place(values, values[None]) for values in (a, b))
    return bootstrap.compare(own, other)


def interval(resamples: Tensor) -> tuple[float, float]:
    """The central 95%."""
    tail = (1 - CONFIDENCE) / 2
    return resamples.nanquantile(tail).item(), resamples.nanquantile(1 - tail).item()


def judged(difference: float, ends: tuple[float, float], better: Tensor, worse: Tensor) -> Comparison:
    """By the resamples in which the generated networks are better and worse, bool of shape `(R,)`."""
    shares = [resamples.double().mean().item() for resamples in (better, worse)]
    verdict = BETTER if shares[0] >= CONFIDENCE else WORSE if shares[1] >= CONFIDENCE else CLOSE
    return Comparison(difference, ends, verdict, *shares)
