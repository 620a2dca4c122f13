"""What is measured about a group of models: how well they do, how alike they are, how near to the snapshots they lie.

Everything here is a pure function of arrays on the CPU. Accuracies are in percent, sums are taken in float64, and what
is expanded to float32 or float64 on the way is expanded in chunks of about 64 MiB.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pdiff_hf.models.tokens import direction_weights

CHUNK_BYTES = 64 * 2**20


def chunks(length: int, bytes_each: int) -> Iterator[slice]:
    """Slices of `range(length)` whose items, `bytes_each` bytes each, fit into `CHUNK_BYTES` (at least one each)."""
    step = max(1, CHUNK_BYTES // bytes_each)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def accuracy(predictions: Tensor, labels: Tensor) -> Tensor:
    """Accuracy of N models in percent: `predictions` (N, M) integers against `labels` (M,), returns (N,) float64."""
    if predictions.ndim != 2 or labels.shape != predictions.shape[1:]:
        raise ValueError(
            f"`predictions` must be (N, M) and `labels` (M,), got {_shape(predictions)} and {_shape(labels)}"
        )
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

    Raises:
        ValueError: if an input is not a bool matrix or the numbers of images differ.
    """
    _check_wrong(wrong_a, wrong_b)
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


def max_iou(wrong: Tensor, wrong_originals: Tensor, exclude_self: bool = False) -> Tensor:
    """Similarity of each model to the original that it is most like (paper, section 4, "maximum similarity").

    Args:
        wrong (`torch.Tensor`): (N, M) bool.
        wrong_originals (`torch.Tensor`): (K, M) bool.
        exclude_self (`bool`, defaults to `False`): `wrong` *is* `wrong_originals`: row i is not compared with itself.

    Returns:
        `torch.Tensor`: (N,) float64; nan where excluding itself leaves nothing to compare with.
    """
    return nearest_in_predictions(wrong, wrong_originals, exclude_self)[0]


def nearest_in_predictions(wrong: Tensor, wrong_originals: Tensor, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    """As `max_iou`, and the index (N,) of the original that it is reached with (the first one of equals)."""
    iou = wrong_prediction_iou(wrong, wrong_originals)
    if exclude_self:
        _check_same_group(wrong, wrong_originals)
        iou.fill_diagonal_(-1)
    largest, index = iou.max(1)
    return largest.where(largest >= 0, math.nan), index


# How good the probabilities are


def negative_log_likelihood(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats: `log_probs` (N, M, C) float16 or float32, `labels` (M,); (N,) float64."""
    _check_log_probs(log_probs, labels)
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
    _check_log_probs(log_probs, labels)
    edges = torch.linspace(0, 1, num_bins + 1)
    error = torch.empty(len(log_probs), dtype=torch.float64)
    for models in chunks(len(log_probs), 40 * labels.numel()):
        confidence, prediction = log_probs[models].max(2)  # (n, M); only the largest is expanded to float32
        confidence = confidence.float().exp()
        bins = torch.bucketize(confidence, edges, right=True) - 1
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
    _check_log_probs(log_probs, labels)
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
                "accuracy": accuracy(means.argmax(2), labels).mean().item(),
                "nll": negative_log_likelihood(means, labels).mean().item(),
                "ece": expected_calibration_error(means, labels).mean().item(),
            }
        )
    return results


# Where the parameters lie


def distances(parameters: Tensor, snapshots: Tensor, exclude_self: bool = False) -> dict[str, Tensor]:
    """L2 distances of models to the snapshots and to their mean, in units of the snapshots' own spread too.

    A large distance to the nearest snapshot is not novelty by itself: compare the distance to the mean beside it.

    Args:
        parameters (`torch.Tensor`): (N, D) float32.
        snapshots (`torch.Tensor`): (K, D) float32.
        exclude_self (`bool`, defaults to `False`): `parameters` *is* `snapshots`: row i is not compared with itself.

    Returns:
        `dict[str, torch.Tensor]`, float64 but for the index. For each model, (N,):
            - `nearest`: distance to the nearest snapshot, and `nearest_index`, which one that is.
            - `nearest_relative`: the same over the median of `snapshots_nearest`.
            - `to_mean`: distance to the mean of the snapshots.
            - `to_mean_relative`: the same over `snapshots_to_mean`.

        For the snapshots: `snapshots_nearest` (K,), the distance of each to its nearest other one, and
        `snapshots_to_mean` (), the root mean square of their distances to their mean. One snapshot has no spread: what
        is relative to it is nan, or infinite.
    """
    _check_columns(parameters, snapshots)
    nearest, index = _nearest(parameters, snapshots, exclude_self)
    snapshots_nearest = nearest if exclude_self else _nearest(snapshots, snapshots, exclude_self=True)[0]
    squared = torch.zeros(len(parameters), dtype=torch.float64)
    spread = torch.zeros((), dtype=torch.float64)
    for columns in chunks(snapshots.shape[1], 16 * (len(parameters) + len(snapshots))):
        mean = snapshots[:, columns].double().mean(0)
        squared += (parameters[:, columns] - mean).square().sum(1)
        spread += (snapshots[:, columns] - mean).square().sum() / len(snapshots)
    to_mean, snapshots_to_mean = squared.sqrt(), spread.sqrt()
    return {
        "nearest": nearest,
        "nearest_index": index,
        "nearest_relative": nearest / snapshots_nearest.quantile(0.5),  # `median` would take the lower of two
        "to_mean": to_mean,
        "to_mean_relative": to_mean / snapshots_to_mean,
        "snapshots_nearest": snapshots_nearest,
        "snapshots_to_mean": snapshots_to_mean,
    }


def precision_recall_density_coverage(
    snapshots_features: Tensor, generated_features: Tensor, k: int = 5
) -> dict[str, float]:
    """How well a generated set covers the originals, by balls that reach to the k-th nearest neighbour in a set.

    `precision` is the share of generated points inside a ball of the originals and `recall` the share of originals
    inside a ball of the generated (Kynkäänniemi et al. 2019); `density` is the mean number of original balls around a
    generated point, divided by k, and `coverage` the share of original balls with a generated point in them (Naeem et
    al. 2020). A ball includes its surface. A set of no more than k points has its k lowered to one less than its size.

    Args:
        snapshots_features (`torch.Tensor`): (K, F), parameters or latents of the originals.
        generated_features (`torch.Tensor`): (N, F).
        k (`int`, defaults to 5): which neighbour is the radius.

    Returns:
        `dict[str, float]`: the four numbers; density is not bounded by 1, recall is nan for one generated point.

    Raises:
        ValueError: for fewer than two originals, k < 1 or different numbers of features.
    """
    _check_columns(snapshots_features, generated_features)
    if k < 1 or len(snapshots_features) < 2:
        raise ValueError(f"needs k >= 1 and at least 2 originals, got k={k} and {len(snapshots_features)} originals")
    k_snapshots = min(k, len(snapshots_features) - 1)
    between = _pairwise_distances(snapshots_features, generated_features)  # (K, N)
    inside = between <= _radii(snapshots_features, k_snapshots)[:, None]
    recall = math.nan
    if len(generated_features) > 1:
        radii = _radii(generated_features, min(k, len(generated_features) - 1))
        recall = (between <= radii).any(1).double().mean().item()
    return {
        "precision": inside.any(0).double().mean().item(),
        "recall": recall,
        "density": inside.sum(0).double().mean().item() / k_snapshots,
        "coverage": inside.any(1).double().mean().item(),
    }


def r2_score(parameters: Tensor, reconstructions: Tensor, mean: Tensor) -> float:
    """Share of the variance around `mean` that a reconstruction explains: 1 - SSE/SST over all rows and coordinates.

    Args:
        parameters (`torch.Tensor`): (N, D).
        reconstructions (`torch.Tensor`): (N, D).
        mean (`torch.Tensor`): (D,), usually that of the training snapshots.

    Returns:
        `float`: at most 1; nan where every row equals `mean`.
    """
    if parameters.ndim != 2 or reconstructions.shape != parameters.shape or mean.shape != parameters.shape[1:]:
        raise ValueError(
            f"`parameters` and `reconstructions` must be (N, D) and `mean` (D,), got {_shape(parameters)}, "
            f"{_shape(reconstructions)} and {_shape(mean)}"
        )
    error = total = 0.0
    for columns in chunks(parameters.shape[1], 24 * len(parameters)):
        rows = parameters[:, columns].double()
        error += (rows - reconstructions[:, columns]).square().sum().item()
        total += (rows - mean[columns]).square().sum().item()
    return 1 - error / total if total > 0 else math.nan


def pca_r2_score(train: Tensor, parameters: Tensor, num_components: int) -> float:
    """Share of the variance of `parameters` around the mean of `train` along the first principal components of `train`.

    That is what the best linear autoencoder with a latent of that length explains, the control for a learned one.

    Args:
        train (`torch.Tensor`): (K, D), K >= 2.
        parameters (`torch.Tensor`): (N, D), `train` itself or other networks.
        num_components (`int`): At least 1; K - 1 are all that there are.

    Returns:
        `float`: between 0 and 1; nan where every row equals the mean.
    """
    gram = cross = total = 0.0
    for columns in chunks(train.shape[1], 16 * (len(train) + len(parameters))):
        mean = train[:, columns].double().mean(0)
        centred, rows = train[:, columns] - mean, parameters[:, columns] - mean
        gram += centred @ centred.T
        cross += rows @ centred.T
        total += rows.square().sum().item()
    explained = (cross @ direction_weights(gram, num_components)).square().sum().item()
    return explained / total if total > 0 else math.nan


def _pairwise_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, D) and (K, D) to (N, K) float64."""
    squared = torch.zeros(len(a), len(b), dtype=torch.float64)
    for columns in chunks(a.shape[1], 16 * (len(a) + len(b))):
        # cdist multiplies out |x|² + |y|² - 2xy, which cancels where points are far from 0 and near to each other.
        centre = b[:, columns].double().mean(0)
        squared += torch.cdist(a[:, columns] - centre, b[:, columns] - centre).square()
    return squared.sqrt()


def _nearest(parameters: Tensor, snapshots: Tensor, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """Distance (N,) to the nearest snapshot and its index (N,); nan where excluding itself leaves none."""
    table = _pairwise_distances(parameters, snapshots)
    if exclude_self:
        _check_same_group(parameters, snapshots)
        table.fill_diagonal_(math.inf)
    smallest, index = table.min(1)
    # What is left of the cancellation would hide an exact copy (distance 0): take the difference of the pair itself.
    squared = torch.zeros(len(parameters), dtype=torch.float64)
    for columns in chunks(parameters.shape[1], 16 * len(parameters)):
        squared += (parameters[:, columns].double() - snapshots[index, columns]).square().sum(1)
    return squared.sqrt().where(smallest.isfinite(), math.nan), index


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance (N,) of each point to its k-th nearest other one."""
    return _pairwise_distances(features, features).fill_diagonal_(math.inf).kthvalue(k, dim=1).values


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _check_wrong(wrong_a: Tensor, wrong_b: Tensor) -> None:
    same = wrong_a.ndim == wrong_b.ndim == 2 and wrong_a.shape[1] == wrong_b.shape[1]
    if not same or wrong_a.dtype != torch.bool or wrong_b.dtype != torch.bool:
        raise ValueError(
            "wrong predictions must be bool matrices (models, images) over the same images, "
            f"got {_shape(wrong_a)} and {_shape(wrong_b)}"
        )


def _check_log_probs(log_probs: Tensor, labels: Tensor) -> None:
    if log_probs.ndim != 3 or labels.shape != log_probs.shape[1:2]:
        raise ValueError(
            f"`log_probs` must be (N, M, C) and `labels` (M,), got {_shape(log_probs)} and {_shape(labels)}"
        )


def _check_columns(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"needs two matrices (models, numbers) with equal numbers a model, got {_shape(a)} and {_shape(b)}"
        )


def _check_same_group(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"`exclude_self` compares a group with itself, got {_shape(a)} and {_shape(b)}")
