"""Whether snapshots lie in one basin of the loss: what happens on the straight line between two of them."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from ..networks.runner import NetworkRunner
from ..tasks import ClassificationTask, predict_logits
from ..utils.files import without_nan

logger = logging.getLogger(__name__)

NUM_POINTS = 5  # on the line, with its ends
MAX_EXAMPLES = 1000  # evenly spaced over the validation split
MAX_PAIRS = 3
# In percentage points of accuracy. Below 2, arXiv 1912.05671 calls two networks linearly connected.
MAX_BARRIER = 2.0
# In percent of the examples. Where the two snapshots that lie farthest apart answer fewer of them differently, there is
# next to nothing that networks could be compared in.
MIN_DIFFERENCE = 1.0


@dataclass(frozen=True)
class Barrier:
    """
    What lies between two networks.

    Args:
        barrier (`float`): In percentage points: the most by which accuracy on the line between the networks is below
            the straight line between their own accuracies. 0 if it never is.
        loss_barrier (`float`): In nats: the most by which the cross-entropy is above the line between theirs.
        accuracies (`list[float]`): In percent at evenly spaced points, the networks themselves first and last.
        losses (`list[float]`): Cross-entropies there.
        difference (`float`): Percentage of the examples for which the two networks predict different classes.
        num_examples (`int`): Of the validation split.
    """

    barrier: float
    loss_barrier: float
    accuracies: list[float]
    losses: list[float]
    difference: float
    num_examples: int


def measure_barrier(
    task: ClassificationTask,
    models: NetworkRunner,
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    num_points: int = NUM_POINTS,
) -> Barrier:
    """
    Scores the networks on the straight line between two networks on validation data, all in one pass.

    Args:
        task (`ClassificationTask`): Gives the data and the prediction.
        models (`NetworkRunner`): Runs the networks.
        first, second (`torch.Tensor`): Parameters, shape `(D,)` each.
        num_points (`int`, *optional*, defaults to 5): On the line, with its ends; at least 3.
    """
    weights = torch.linspace(0, 1, num_points)  # (P,)
    line = torch.lerp(first, second, weights[:, None])  # (P, D)
    num_examples = min(MAX_EXAMPLES, len(task.load_split("validation")))
    correct, loss = torch.zeros(num_points, num_examples), torch.zeros(num_points, num_examples)
    predicted = torch.zeros(num_points, num_examples, dtype=torch.int64)
    for rows, examples, logits, labels in predict_logits(task, models, "validation", line, MAX_EXAMPLES):
        predicted[rows, examples] = logits.argmax(-1).cpu()
        correct[rows, examples] = (logits.argmax(-1) == labels).float().cpu()
        targets = labels.expand(len(logits), -1)
        loss[rows, examples] = F.cross_entropy(logits.float().mT, targets, reduction="none").cpu()
    accuracies, losses = 100 * correct.mean(1), loss.mean(1)
    return Barrier(
        barrier=(torch.lerp(accuracies[0], accuracies[-1], weights) - accuracies).max().item(),
        loss_barrier=(losses - torch.lerp(losses[0], losses[-1], weights)).max().item(),
        accuracies=accuracies.tolist(),
        losses=losses.tolist(),
        difference=100 * (predicted[0] != predicted[-1]).float().mean().item(),
        num_examples=num_examples,
    )


def choose_pairs(parameters: torch.Tensor, seeds: Sequence[int]) -> list[tuple[int, int]]:
    """
    The pairs of snapshots, `MAX_PAIRS` at most, that are most likely to lie in different basins: one that is as far
    apart as two sweeps over the snapshots can find, and the last snapshots of the first run and of others.

    Args:
        parameters (`torch.Tensor`): Shape `(K, D)`, with K at least 2.
        seeds (`Sequence[int]`): K numbers, one for each run.
    """
    far = _farthest(parameters, parameters.mean(0))
    farthest = _farthest(parameters, parameters[far])
    last = list({seed: row for row, seed in enumerate(seeds)}.values())
    pairs = [(far, farthest), *((last[0], other) for other in last[1:])]
    return list(dict.fromkeys((min(pair), max(pair)) for pair in pairs))[:MAX_PAIRS]


def _farthest(parameters: torch.Tensor, place: torch.Tensor) -> int:
    # Row by row, because a difference of all rows would take as much memory as the snapshots.
    return int(torch.stack([torch.dist(row, place) for row in parameters]).argmax())


def _describe(row: int, seeds: Sequence[int], steps: Sequence[int]) -> str:
    """A snapshot in words: the run that it is from, where there are several, and the step."""
    runs = list(dict.fromkeys(seeds))
    run = f"run {runs.index(seeds[row]) + 1} of {len(runs)}, " if len(runs) > 1 else ""
    return f"snapshot {row} ({run}step {steps[row]})"


def check_basins(
    task: ClassificationTask,
    models: NetworkRunner,
    parameters: torch.Tensor,
    seeds: Sequence[int],
    steps: Sequence[int],
    aligned: bool = False,
) -> dict:
    """
    Measures the barrier between a few pairs of snapshots, and warns if it is above `MAX_BARRIER` anywhere, and if they
    hardly differ.

    Args:
        parameters (`torch.Tensor`): Shape `(K, D)`.
        seeds, steps (`Sequence[int]`): The run and the step of each snapshot.
        aligned (`bool`, *optional*, defaults to `False`): Whether they have been brought into one order already.

    Returns:
        `dict`: The highest barrier, with the pair that it lies between.
    """
    pairs = choose_pairs(parameters, seeds)
    measured = [measure_barrier(task, models, parameters[a], parameters[b]) for a, b in pairs]
    worst, (a, b) = max(zip(measured, pairs, strict=True), key=lambda item: item[0].barrier)
    message = (
        f"between {_describe(a, seeds, steps)} and {_describe(b, seeds, steps)}, accuracy falls up to "
        f"{worst.barrier:.1f} points below the straight line between their {worst.accuracies[0]:.1f}% and "
        f"{worst.accuracies[-1]:.1f}%, and the loss rises up to {worst.loss_barrier:.2f} above it (pairs "
        f"measured: {len(pairs)}, validation examples: {worst.num_examples})"
    )
    if worst.barrier > MAX_BARRIER:
        each = "train a generator for each basin"
        advice = f"Align them (scripts/collect.py --import ... --align, for MLPs and plain CNNs), or {each}"
        if aligned:
            advice = f"They are aligned as well as their units can be matched: {each}, or collect from one network"
        logger.warning(
            f"the snapshots lie in different basins: {message}. Above {MAX_BARRIER:g} points, networks between them "
            f"work badly, and one generator may learn little. {advice}"
        )
    else:
        logger.info(f"the snapshots lie in one basin: {message}")
        difference = max(barrier.difference for barrier in measured)
        if difference < MIN_DIFFERENCE:
            logger.warning(
                f"the snapshots hardly differ: of {worst.num_examples} validation examples, the two farthest apart "
                f"answer {difference:.1f}% differently, so that a report will find all networks alike. When snapshots "
                "are collected, a higher collect_learning_rate or collect_every makes them differ more"
            )
    return without_nan({"snapshots": [a, b], **asdict(worst)})
