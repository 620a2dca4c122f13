"""Audit of memorisation: does a group of models copy the snapshots that it was made from?

A copy lies nearer to one snapshot than snapshots lie to each other, *and* nearer to it than to the mean of them all: a
model that has contracted to the mean can be near to every snapshot without copying one. Nor is a large distance to the
nearest snapshot novelty: it may only say that the model lies near the mean. So the two distances stand side by side.

The yardstick is the snapshots themselves. Where they are one optimisation step apart it is short, and a snapshot plus
noise that is larger than a step is no copy by this rule: `fraction_nearer_than_mean` and the IoU then say more.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from scipy.stats import binom
from torch import Tensor

TOO_NEAR_PERCENTILE = 0.05  # of the snapshots' own distances: what as many independent draws would be nearer than
CHANCE = 0.99  # of a binomial with that probability: more models than this are too many
NEAR_IDENTICAL = 0.5  # times the smallest of the snapshots' own distances: one model is enough


def find_copies(
    place: Mapping[str, Any],
    snapshots_nearest: Tensor,
    similarity: tuple[Tensor, Tensor] | None = None,
    snapshots_iou: Tensor | None = None,
) -> dict[str, Any]:
    """
    Nearest snapshot of each of N models in weights and in predictions, against how near snapshots are to each other.

    Args:
        place (`Mapping`): What `geometry.Yardstick.place` returns for the group.
        snapshots_nearest (`torch.Tensor`): Shape `(K,)`, distance of each snapshot to its nearest other one.
        similarity (`tuple`, *optional*): What `metrics.nearest_in_predictions` returns for the group.
        snapshots_iou (`torch.Tensor`, *optional*): Shape `(K,)`, maximum IoU of each snapshot with another one; given
            together with `similarity`, for classifiers.

    Returns:
        `dict`: Lists with one entry a model, those about predictions with none without classes:
            - `nearest_in_weights`, `distance`: Which snapshot is nearest in L2, and how far it is.
            - `nearest_in_predictions`, `iou`: Which shares most wrong predictions, and the IoU with it.

        and numbers:
            - `fraction_nearer_than_mean`: Share of the models that are nearer to a snapshot than to the mean.
            - `fraction_alike`: Share of the models whose `iou` is above the 95th percentile of the snapshots' own; nan
              without predictions.
            - `num_too_near`: Models below the 5th percentile that are also nearer to the snapshot than to the mean.
            - `num_allowed`: How many of those chance allows, the 99% quantile of Binomial(N, 0.05).
            - `num_near_identical`: Models nearer than half of the minimum that are also nearer to it than to the mean.
            - `copies`: Whether a model is nearly identical to a snapshot, or more are too near than chance allows.
    """
    nearest, own = place["nearest"], snapshots_nearest
    iou, most_alike, alike = torch.empty(0), torch.empty(0, dtype=torch.long), math.nan
    if similarity is not None and snapshots_iou is not None:
        iou, most_alike = similarity
        alike = _share(iou > snapshots_iou.quantile(1 - TOO_NEAR_PERCENTILE))
    percentile = own.quantile(TOO_NEAR_PERCENTILE)
    nearer_than_mean = nearest < place["to_mean"]
    num_too_near = int((nearer_than_mean & (nearest < percentile)).sum())
    num_allowed = int(binom.ppf(CHANCE, len(nearest), TOO_NEAR_PERCENTILE))
    num_near_identical = int((nearer_than_mean & (nearest <= NEAR_IDENTICAL * own.min())).sum())
    return {
        "nearest_in_weights": place["nearest_index"].tolist(),
        "distance": nearest.tolist(),
        "nearest_in_predictions": most_alike.tolist(),
        "iou": iou.tolist(),
        "fraction_nearer_than_mean": _share(nearer_than_mean),
        "fraction_alike": alike,
        "num_too_near": num_too_near,
        "num_allowed": num_allowed,
        "num_near_identical": num_near_identical,
        "copies": num_near_identical > 0 or num_too_near > num_allowed,
    }


def _share(condition: Tensor) -> float:
    return condition.to(torch.float64).mean().item()
