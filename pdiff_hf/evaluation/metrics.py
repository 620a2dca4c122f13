"""What is measured about a group of networks.

The functions are pure, of arrays on the CPU. Accuracies are in percent, sums are taken in float64, and what is expanded
to float32 or float64 on the way is expanded in chunks of about 64 MiB.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .geometry import chunks


def accuracy(predictions: Tensor, labels: Tensor) -> Tensor:
    """Accuracy of N models in percent: `predictions` (N, M) integers against `labels` (M,), returns (N,) float64."""
    return 100 * (predictions == labels).sum(1).double() / labels.numel()


# How alike models behave


def wrong_prediction_iou(wrong_a: Tensor, wrong_b: Tensor) -> Tensor:
    """Similarity of every pair of models: the IoU of the sets of images that they get wrong (paper, equation 7).

    Where neither model of a pair errs the equation is 0/0; the two behave identically, so their IoU is 1.

    Args:
        wrong_a (`torch.Tensor`): (N, M) bool, True where a model errs on an image.
        wrong_b (`torch.Tensor`): (K, M) bool.

    Returns:
        `torch.Tensor`: (N, K) float64 in [0, 1].
    """
    num_images = wrong_a.shape[1]
    intersection = torch.zeros(len(wrong_a), len(wrong_b), dtype=torch.float64)
    # A count is exact in float32 up to 2^24; a chunk has fewer images than that, and chunks are added in float64.
    for images in chunks(num_images, 4 * (len(wrong_a) + len(wrong_b))):
        intersection += wrong_a[:, images].float() @ wrong_b[:, images].float().T
    union = wrong_a.sum(1)[:, None] + wrong_b.sum(1) - intersection
    return torch.where(union > 0, intersection / union, 1.0)


def iou_within(wrong: Tensor) -> float:
    """Mean IoU of wrong predictions over the distinct pairs of one group, `wrong` (N, M) bool; nan for one model."""
    count = len(wrong)
    if count < 2:
        return math.nan
    iou = wrong_prediction_iou(wrong, wrong)
    return ((iou.sum() - iou.trace()) / (count * (count - 1))).item()


def max_iou(wrong: Tensor, wrong_snapshots: Tensor, exclude_self: bool = False) -> Tensor:
    """Similarity of each model to the snapshot that it is most like (paper, section 4, "maximum similarity").

    Args:
        wrong (`torch.Tensor`): (N, M) bool.
        wrong_snapshots (`torch.Tensor`): (K, M) bool.
        exclude_self (`bool`, defaults to `False`): `wrong` *is* `wrong_snapshots`: row i is not compared with itself.

    Returns:
        `torch.Tensor`: (N,) float64; nan where excluding itself leaves nothing to compare with.
    """
    return nearest_in_predictions(wrong, wrong_snapshots, exclude_self)[0]


def nearest_in_predictions(wrong: Tensor, wrong_snapshots: Tensor, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    """As `max_iou`, and the index (N,) of the snapshot that it is reached with (the first one of equals)."""
    iou = wrong_prediction_iou(wrong, wrong_snapshots)
    if exclude_self:
        iou.fill_diagonal_(-1)
    largest, index = iou.max(1)
    return largest.where(largest >= 0, math.nan), index


# How good the probabilities are


def negative_log_likelihood(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats: `log_probs` (N, M, C) float16 or float32, `labels` (M,); (N,) float64."""
    nll = torch.empty(len(log_probs), dtype=torch.float64)
    for models in chunks(len(log_probs), 16 * labels.numel()):
        index = labels.expand(len(log_probs[models]), -1)[..., None]  # (n, M, 1), a view
        nll[models] = -log_probs[models].gather(2, index)[..., 0].double().mean(1)
    return nll


def expected_calibration_error(log_probs: Tensor, labels: Tensor, num_bins: int = 15) -> Tensor:
    """Expected calibration error (Guo et al. 2017) as torchmetrics defines it: equal bins, L1 norm, top-1 confidence.

    Bins include their lower edge, so confidences of exactly 1 form a bin of their own, as they do in torchmetrics.

    Args:
        log_probs (`torch.Tensor`): (N, M, C) float16 or float32 log-probabilities.
        labels (`torch.Tensor`): (M,) int64.
        num_bins (`int`, defaults to 15): bins of equal width between 0 and 1.

    Returns:
        `torch.Tensor`: (N,) float64 in [0, 1].
    """
    edges = torch.linspace(0, 1, num_bins + 1)
    error = torch.empty(len(log_probs), dtype=torch.float64)
    for models in chunks(len(log_probs), 40 * labels.numel()):
        confidence, prediction = log_probs[models].max(2)  # (n, M); only the largest is expanded to float32
        confidence = confidence.float().exp()
        bins = (torch.bucketize(confidence, edges, right=True) - 1).clamp(max=num_bins)  # nan goes on to the sum
        # |accuracy - confidence| of a bin times its share of the images is |sum of the gaps in it| / M.
        gaps = (prediction == labels).double() - confidence
        per_bin = torch.zeros(len(gaps), num_bins + 1, dtype=torch.float64).scatter_add_(1, bins, gaps)
        error[models] = per_bin.abs().sum(1) / labels.numel()
    return error


def ensemble_log_probs(log_probs: Tensor) -> Tensor:
    """Log of the mean probability of the n members of a prediction ensemble: (n, M, C) to (M, C) float32."""
    num_members, num_images, num_classes = log_probs.shape
    mean = torch.empty(num_images, num_classes)
    for images in chunks(num_images, 16 * num_members * num_classes):
        mean[images] = (log_probs[:, images].double().logsumexp(0) - math.log(num_members)).float()
    return mean


def ensemble_metrics(log_probs: Tensor, labels: Tensor, sizes: Sequence[int | None] = (1, 5, 20, None)) -> list[dict]:
    """Accuracy, NLL and calibration error of prediction ensembles of several sizes drawn from one group.

    An ensemble is wrong where a member's probabilities are not finite, and its NLL and calibration error are nan then.
    A size smaller than the group is averaged over up to 10 disjoint ensembles, so that the number is not one draw.
    Their members come from a fixed permutation: neighbouring snapshots of a run are more alike than random ones.

    Args:
        log_probs (`torch.Tensor`): (N, M, C) float16 or float32 log-probabilities.
        labels (`torch.Tensor`): (M,) int64.
        sizes (`Sequence[int | None]`): members of an ensemble; `None` is the whole group. Sizes larger than the group
            are left out, equal ones are reported once.

    Returns:
        `list[dict]`: `size`, `num_ensembles`, `accuracy` (percent), `nll` (nats), `ece`, in the order of `sizes`.
    """
    num_models = len(log_probs)
    order = torch.randperm(num_models, generator=torch.Generator().manual_seed(0))
    results = []
    for size in dict.fromkeys(num_models if size is None else size for size in sizes):
        if size > num_models:
            continue
        num_ensembles = min(10, num_models // size)
        members = order[: num_ensembles * size].view(num_ensembles, size)
        means = torch.stack([ensemble_log_probs(log_probs[rows]) for rows in members])  # (num_ensembles, M, C)
        results.append(
            {
                "size": size,
                "num_ensembles": num_ensembles,
                "accuracy": accuracy(means.argmax(2).masked_fill(means.isnan().any(2), -1), labels).mean().item(),
                "nll": negative_log_likelihood(means, labels).mean().item(),
                "ece": expected_calibration_error(means, labels).mean().item(),
            }
        )
    return results


# What a report shows

COVERAGE = ("precision", "recall", "density", "coverage")


def measures(
    values: Tensor,
    validation: Tensor,
    sign: int,
    place: Mapping[str, Any],
    scores: Any = None,
    similarities: Tensor | None = None,
) -> dict[str, float]:
    """
    Numbers about a group of N networks. A mean over networks leaves out those that have none (nan), and is infinite
    where one of them is.

    Args:
        values (`torch.Tensor`): Shape `(N,)`, the metric on test data, nan where it is not defined.
        validation (`torch.Tensor`): The same on validation data.
        sign (`int`): What values are multiplied with, so that larger is better.
        place (`Mapping`): What `geometry.Yardstick.place` returns.
        scores (`Scores`, *optional*): Of classifiers, on test data.
        similarities (`torch.Tensor`, *optional*): Shape `(N,)`, their maximum IoU with a snapshot.
    """
    defined = values[~values.isnan()]
    found = {
        "score_mean": values.nanmean().item(),
        "score_std": defined.std().item() if len(defined) > 1 else 0.0,
        "score_best": values[(sign * validation).nan_to_num(nan=-math.inf).argmax()].item(),
        "score_best_on_test": sign * (sign * values).nan_to_num(nan=-math.inf).max().item(),
        "validation_score_mean": validation.nanmean().item(),
    }
    if scores is not None and similarities is not None:
        found["iou_within"] = iou_within(scores.wrong)
        found["max_iou"] = similarities.nanmean().item()
        found["nll"] = negative_log_likelihood(scores.log_probs, scores.labels).nanmean().item()
        found["ece"] = expected_calibration_error(scores.log_probs, scores.labels).nanmean().item()
    # The median, and the root mean square that the yardstick is too.
    found["distance_nearest"] = place["nearest_relative"].quantile(0.5).item()
    found["distance_to_mean"] = place["to_mean_relative"].square().mean().sqrt().item()
    return found | {name: place[name] for name in COVERAGE}
