"""Accuracy against similarity: is a generator on the frontier, or does a trivial one reach more of both?

A good group of models is accurate and unlike the originals. One group dominates another where it is at least as
accurate and at most as similar (mean over its models of the maximum IoU to the originals), and better in one of these.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from pdiff_hf.evaluation.metrics import chunks, nearest_in_predictions

CONFIDENCE = 0.95


@dataclass(frozen=True)
class FrontierGroup:
    """A group of models on the test images.

    Args:
        name (`str`): shown in the report.
        family (`str`): what the settings of one sweep have in common.
        value (`float | str`, *optional*): the setting, where the family has one.
        wrong (`torch.Tensor`): (N, M) bool, True where a model errs on an image.
    """

    name: str
    family: str
    value: float | str | None
    wrong: Tensor


@dataclass(frozen=True)
class FrontierRow:
    """A group's place on the plane, and the generated group's relation to it.

    Intervals are the central 95% of the bootstrap. The last three fields are seen from the generated group, and `None`
    in its own row: `dominated` is the share of resamples in which this group dominates it, `dominates` that in which it
    dominates this group, and `verdict` is which of the two reaches 95% (`"dominated"`, `"dominates"`), or `"neither"`.
    """

    name: str
    family: str
    value: float | str | None
    num_models: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    max_iou: float
    max_iou_interval: tuple[float, float]
    dominated: float | None = None
    dominates: float | None = None
    verdict: str | None = None


def frontier(
    generated: FrontierGroup,
    baselines: Sequence[FrontierGroup],
    wrong_originals: Tensor,
    generator: Generator,
    num_resamples: int = 200,
) -> list[FrontierRow]:
    """Mean accuracy and mean maximum IoU of every group, and whether the generated one is on the frontier.

    The bootstrap resamples the models of each group and the test images; all groups see the same images. What it keeps
    fixed: the originals, because they define the reference, and which of them each model is nearest to. Choosing the
    nearest anew in each resample takes the maximum over noise once more: it shifts each group's similarity upwards by a
    different amount, and the intervals then miss the true difference far too often. The 95% hold for each comparison
    alone, not for all of them together. A group of one model has no spread over models, only over images.

    Args:
        generated (`FrontierGroup`): the group to judge.
        baselines (`Sequence[FrontierGroup]`): the groups to judge it by.
        wrong_originals (`torch.Tensor`): (K, M) bool.
        generator (`torch.Generator`): of the bootstrap.
        num_resamples (`int`, defaults to 200): of the bootstrap.

    Returns:
        `list[FrontierRow]`: the generated group, then the baselines in their order.
    """
    num_images = wrong_originals.shape[1]
    draws = [torch.randint(num_images, (num_images,), generator=generator) for _ in range(num_resamples)]
    weights = torch.stack([draw.bincount(minlength=num_images) for draw in draws], dim=1).float()  # (M, R)

    reference, reference_accuracy, reference_iou = _place(generated, wrong_originals, weights, generator)
    rows = [FrontierRow(**reference)]
    for group in baselines:
        place, accuracy, iou = _place(group, wrong_originals, weights, generator)
        dominated = _dominates(accuracy, iou, reference_accuracy, reference_iou)
        dominates = _dominates(reference_accuracy, reference_iou, accuracy, iou)
        verdict = "dominated" if dominated >= CONFIDENCE else "dominates" if dominates >= CONFIDENCE else "neither"
        rows.append(FrontierRow(**place, dominated=dominated, dominates=dominates, verdict=verdict))
    return rows


def frontier_sentence(rows: Sequence[FrontierRow]) -> str:
    """What the rows of `frontier` say, in one sentence: for each verdict the families and their values."""
    reference, *baselines = rows
    listed = []
    for verdict in ("dominated", "dominates", "neither"):
        families: dict[str, list[str]] = {}
        for row in baselines:
            if row.verdict == verdict:
                families.setdefault(row.family, []).extend([] if row.value is None else [str(row.value)])
        names = [f"{family} ({', '.join(values)})" if values else family for family, values in families.items()]
        count = sum(row.verdict == verdict for row in baselines)
        listed.append(f"{count}" + (f": {', '.join(names)}" if names else ""))
    dominated, dominates, neither = listed
    return (
        f"{reference.name} (accuracy {reference.accuracy:.2f} %, max IoU {reference.max_iou:.3f}) is dominated by "
        f"{dominated}; dominates {dominates}; does neither with {neither}; of {len(baselines)} baseline settings, at "
        f"{CONFIDENCE:.0%} of a joint bootstrap over models and test images."
    )


def _place(
    group: FrontierGroup, wrong_originals: Tensor, weights: Tensor, generator: Generator
) -> tuple[dict, Tensor, Tensor]:
    """The fields of a row, and the group's mean accuracy and mean maximum IoU in each resample, (R,) float64."""
    wrong = group.wrong
    num_models, num_images = wrong.shape
    iou, nearest = nearest_in_predictions(wrong, wrong_originals)
    resampled_accuracy = torch.empty(num_models, weights.shape[1], dtype=torch.float64)
    resampled_iou = torch.empty_like(resampled_accuracy)
    for models in chunks(num_models, 16 * num_images):
        original = wrong_originals[nearest[models]]
        resampled_accuracy[models] = 100 - 100 * (wrong[models].float() @ weights).double() / num_images
        intersection = (wrong[models] & original).float() @ weights  # (n, R), counts
        union = (wrong[models] | original).float() @ weights
        resampled_iou[models] = torch.where(union > 0, intersection.double() / union, 1.0)

    draws = torch.randint(num_models, (weights.shape[1], num_models), generator=generator)
    counts = torch.zeros(draws.shape, dtype=torch.float64).scatter_add_(1, draws, torch.ones(draws.shape).double())
    accuracy = (counts.T * resampled_accuracy).mean(0)  # (R,)
    max_iou = (counts.T * resampled_iou).mean(0)
    fields = {
        "name": group.name,
        "family": group.family,
        "value": group.value,
        "num_models": num_models,
        "accuracy": 100 - 100 * wrong.sum().item() / wrong.numel(),
        "accuracy_interval": _interval(accuracy),
        "max_iou": iou.mean().item(),
        "max_iou_interval": _interval(max_iou),
    }
    return fields, accuracy, max_iou


def _interval(resamples: Tensor) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    return resamples.quantile(tail).item(), resamples.quantile(1 - tail).item()


def _dominates(accuracy: Tensor, iou: Tensor, other_accuracy: Tensor, other_iou: Tensor) -> float:
    """Share of the resamples in which the first group is nowhere worse than the other and somewhere better."""
    nowhere_worse = (accuracy >= other_accuracy) & (iou <= other_iou)
    somewhere_better = (accuracy > other_accuracy) | (iou < other_iou)
    return (nowhere_worse & somewhere_better).double().mean().item()
