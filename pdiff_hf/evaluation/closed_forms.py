"""What answers to a condition with nothing but networks whose conditions are known: means, neighbours, regression."""

from collections.abc import Callable, Iterator

import torch

from ..models.kernel_ridge import KernelRidge
from ..models.products import AdapterProducts, contracted, expanded
from ..networks.runner import NetworkRunner
from ..tasks.family import Family
from .groups import Cost, Group, Kind
from .opponents import VALIDATION_EXAMPLES, Pending
from .score import MemberScorer

NEIGHBORS = (2, 3, 5, 8)
NUM_SAMPLES = 4
NEAREST = "nearest snapshot"


def mean_networks(
    snapshots: torch.Tensor, table: torch.Tensor, products: AdapterProducts | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The mean of the snapshots of each task.

    Args:
        snapshots (`torch.Tensor`): Shape `(N, D)`.
        table (`torch.Tensor`): Their conditions without unknown fields, shape `(N, width)`.
        products (`AdapterProducts`, *optional*): Means are of these, where they are given.

    Returns:
        `tuple`: The M different conditions, which of them each snapshot has, shape `(N,)`, and the means, `(M, D)`, or
        vectors with products.
    """
    seen, inverse = table.unique(dim=0, return_inverse=True)
    vectors = expanded(snapshots, products)
    sums = torch.zeros(len(seen), vectors.shape[1]).index_add_(0, inverse, vectors)
    return seen, inverse, sums / torch.bincount(inverse).unsqueeze(1)


def nearest(features: torch.Tensor, seen: torch.Tensor, k: int) -> torch.Tensor:
    """Which k of the seen conditions are nearest, `(M, k)`; both have features, of shape `(M, F)` and `(S, F)`."""
    return torch.cdist(features, seen).topk(k, largest=False).indices


def tuned_ridge(
    family: Family,
    networks: NetworkRunner,
    seen: torch.Tensor,
    means: torch.Tensor,
    validation: torch.Tensor,
    products: AdapterProducts | None = None,
) -> KernelRidge:
    """
    Kernel ridge regression whose settings are chosen by the loss on validation tasks.

    Args:
        seen (`torch.Tensor`), means (`torch.Tensor`): Conditions and their networks, of [`mean_networks`].
        validation (`torch.Tensor`): Conditions of validation tasks, shape `(M, width)`.
    """
    scorer = MemberScorer(family, networks, validation, VALIDATION_EXAMPLES)

    def loss(vectors_of: Callable[[torch.Tensor], torch.Tensor]) -> float:
        return scorer.score("validation", contracted(vectors_of(validation), products)).losses.mean().item()

    return KernelRidge.tuned(family.fields, seen, means, loss)


def closed_forms(
    family: Family,
    networks: NetworkRunner,
    snapshots: torch.Tensor,
    table: torch.Tensor,
    validation: torch.Tensor,
    cost: Cost,
    size: int,
    *,
    seed: int = 0,
    products: AdapterProducts | None = None,
) -> Iterator[Pending]:
    """
    The nearest snapshot, means of all and of the nearest ones, an ensemble of the nearest ones, and kernel ridge
    regression alone and with its residual covariance. What they have to choose, they choose by the loss on validation
    tasks.

    Args:
        snapshots (`torch.Tensor`): Shape `(N, D)`.
        table (`torch.Tensor`): Their conditions without unknown fields, shape `(N, width)`; equal rows are snapshots of
            one task, and averaged.
        validation (`torch.Tensor`): Conditions of validation tasks.
        cost (`Cost`): Of the snapshots.
        size (`int`): Parameters of a network.
        products (`AdapterProducts`, *optional*): Means and regressions are of these, where they are given.
    """
    fields = family.fields
    seen, inverse, means = mean_networks(snapshots, table, products)
    last = torch.zeros(len(seen), dtype=torch.long).scatter_reduce_(
        0, inverse, torch.arange(len(table)), "amax", include_self=False
    )
    features, known = fields.features(seen), snapshots[last]
    scorer = MemberScorer(family, networks, validation, VALIDATION_EXAMPLES)
    counts = [k for k in NEIGHBORS if k <= len(seen)] or [1]
    ridges: list[KernelRidge] = []

    def rows_of(rows: torch.Tensor, k: int) -> torch.Tensor:
        return nearest(fields.features(rows), features, k)

    def group(name: str, networks_of: Callable, note: str = "", kind: Kind = Kind.BASELINE, **more) -> Group:
        return Group(name, networks_of, kind, cost=cost, note=note, **{"size": size} | more)

    def mean_of_nearest() -> Group:
        def answer(rows: torch.Tensor, k: int) -> torch.Tensor:
            return contracted(means[rows_of(rows, k)].mean(1), products)

        tried = {k: scorer.score("validation", answer(validation, k)).losses.mean().item() for k in counts}
        best = min(tried, key=lambda k: tried[k])
        shown = {str(k): loss for k, loss in tried.items()}
        return group("mean of nearest snapshots", lambda _, t: answer(t, best), f"{best} tasks", tried=shown)

    def ensemble_of_nearest() -> Group:
        def loss(k: int) -> float:
            return scorer.score("validation", known[rows_of(validation, k)], vote=True).losses.mean().item()

        tried = {k: loss(k) for k in counts}
        best = min(tried, key=lambda k: tried[k])
        shown = {str(k): value for k, value in tried.items()}
        return group(
            "ensemble of nearest snapshots",
            lambda _, t: known[rows_of(t, best)],
            f"{best} tasks",
            vote=True,
            size=best * size,
            tried=shown,
        )

    def ridge() -> KernelRidge:
        if not ridges:
            ridges.append(tuned_ridge(family, networks, seen, means, validation, products))
        return ridges[0]

    def note() -> str:
        return f"ridge {ridge().ridge:g}, scales {', '.join(f'{scale:g}' for scale in ridge().scales)}"

    def regression() -> Group:
        return group("kernel ridge", lambda _, t: contracted(ridge()(t), products), note())

    def regression_with_residuals() -> Group:
        noise = torch.Generator().manual_seed(seed)
        sample = lambda _, t: contracted(ridge().sample(t, NUM_SAMPLES, noise), products)  # noqa: E731
        return group("kernel ridge + residuals", sample, note())

    mean = contracted(means.mean(0), products)
    yield NEAREST, lambda: group(NEAREST, lambda _, t: known[rows_of(t, 1)[:, 0]], kind=Kind.SNAPSHOTS)
    yield (
        "mean of all snapshots",
        lambda: group("mean of all snapshots", lambda _, t: mean.expand(len(t), -1)),
    )
    yield "mean of nearest snapshots", mean_of_nearest
    yield "ensemble of nearest snapshots", ensemble_of_nearest
    yield "kernel ridge", regression
    yield "kernel ridge + residuals", regression_with_residuals
