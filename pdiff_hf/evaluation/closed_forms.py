"""What answers to a condition with nothing but networks whose conditions are known: means, neighbours, regression."""

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch

from ..models.embedded import EmbeddedField
from ..models.kernel_ridge import KernelRidge
from ..models.products import AdapterProducts, contracted, expanded
from ..tasks.family import Family
from .groups import Group, Pending
from .member_score import MemberScorer
from .opponents import Regime
from .report_data import Cost, Kind

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


def nearest_seen(features: torch.Tensor, seen: torch.Tensor, k: int) -> torch.Tensor:
    """Which k of the seen conditions are nearest, `(M, k)`; features are `(M, F)` and `(S, F)` or `(S, K, F)`."""
    distances = torch.cdist(features, seen.flatten(0, -2)).unflatten(1, (len(seen), -1))
    return distances.amin(2).topk(k, largest=False).indices


def all_ways(family: Family, seen: torch.Tensor) -> torch.Tensor:
    """Seen conditions, shape `(S, width)`, with all ways to say them, such as several descriptions: `(S, K, width)`."""
    if not any(isinstance(field, EmbeddedField) for field in family.fields.values()):
        return seen.unsqueeze(1)
    return family.fields.alternatives(map(family.described, family.fields.conditions(seen)))


def tuned_ridge(
    scorer: MemberScorer, seen: torch.Tensor, means: torch.Tensor, products: AdapterProducts | None = None
) -> KernelRidge:
    """
    Kernel ridge regression whose settings are chosen by the loss on validation tasks.

    Args:
        scorer (`MemberScorer`): Of the validation tasks.
        seen (`torch.Tensor`), means (`torch.Tensor`): Conditions and their networks, of [`mean_networks`].
    """

    def loss(vectors_of: Callable[[torch.Tensor], torch.Tensor]) -> float:
        return scorer.loss(contracted(vectors_of(scorer.table.cpu()), products))

    return KernelRidge.tuned(scorer.family.fields, all_ways(scorer.family, seen), means, loss)


def closed_forms(
    regime: Regime,
    snapshots: torch.Tensor,
    table: torch.Tensor,
    cost: Cost,
    products: AdapterProducts | None = None,
) -> Iterator[Pending]:
    """
    The nearest snapshot, means of all and of the nearest ones, an ensemble of the nearest ones, and kernel ridge
    regression alone and with its residual covariance. What they have to choose, they choose by the loss on validation
    tasks.

    Args:
        regime (`Regime`): The family, and what scores on its validation tasks.
        snapshots (`torch.Tensor`): Shape `(N, D)`.
        table (`torch.Tensor`): Their conditions without unknown fields, shape `(N, width)`; equal rows are snapshots of
            one task, and averaged.
        cost (`Cost`): Of the snapshots.
        products (`AdapterProducts`, *optional*): Means and regressions are of these, where they are given.
    """
    fields, scorer = regime.family.fields, regime.scorer
    validation, size = scorer.table.cpu(), regime.size
    seen, inverse, means = mean_networks(snapshots, table, products)
    last = torch.zeros(len(seen), dtype=torch.long).scatter_reduce_(
        0, inverse, torch.arange(len(table)), "amax", include_self=False
    )
    ways, known = all_ways(regime.family, seen), snapshots[last]
    features = fields.features(ways.flatten(0, 1)).unflatten(0, ways.shape[:2])
    counts = [k for k in NEIGHBORS if k <= len(seen)] or [1]
    ridge = cache(lambda: tuned_ridge(scorer, seen, means, products))
    noise = torch.Generator().manual_seed(regime.seed)

    def mean_of_nearest(rows: torch.Tensor, k: int) -> torch.Tensor:
        return contracted(means[nearest_seen(fields.features(rows), features, k)].mean(1), products)

    def nearest_ones(rows: torch.Tensor, k: int) -> torch.Tensor:
        return known[nearest_seen(fields.features(rows), features, k)]

    def best_of(name: str, answer: Callable[[torch.Tensor, int], torch.Tensor], vote: bool) -> Group:
        tried = {k: scorer.loss(answer(validation, k), vote) for k in counts}
        best = min(tried, key=lambda k: tried[k])
        return Group(
            name,
            lambda _, t: answer(t, best),
            cost=cost,
            size=best * size if vote else size,
            note=f"{best} tasks",
            tried={str(k): loss for k, loss in tried.items()},
            vote=vote,
        )

    def regression(name: str, answer: Callable[[torch.Tensor], torch.Tensor]) -> Group:
        note = f"ridge {ridge().ridge:g}, scales {', '.join(f'{scale:g}' for scale in ridge().scales)}"
        return Group(name, lambda _, t: contracted(answer(t), products), cost=cost, note=note)

    mean = contracted(means.mean(0), products)
    yield NEAREST, partial(Group, NEAREST, lambda _, t: nearest_ones(t, 1)[:, 0], Kind.SNAPSHOTS, cost=cost)
    name = "mean of all snapshots"
    yield name, partial(Group, name, lambda _, t: mean.expand(len(t), -1), cost=cost)
    name = "mean of nearest snapshots"
    yield name, partial(best_of, name, mean_of_nearest, vote=False)
    name = "ensemble of nearest snapshots"
    yield name, partial(best_of, name, nearest_ones, vote=True)
    name = "kernel ridge"
    yield name, partial(regression, name, lambda t: ridge()(t))
    name = "kernel ridge + residuals"
    yield name, partial(regression, name, lambda t: ridge().sample(t, NUM_SAMPLES, noise))
