"""
Networks that were trained from different initialisations, with their hidden units brought into one common order.

The order of the hidden units of a layer means nothing to the network, but everything to a generator that sees a vector.
Weight matching (arXiv 2209.04836, algorithm 1) chooses, layer by layer, the order in which the weights of one network
are most like those of another. No network's function changes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from ..layout import ParameterLayout
from ..tasks import Task
from .hidden_units import Axis, HiddenUnits, find_hidden_units

# So many parameters are matched at a time.
CHUNK_SIZE = 2**24
MAX_SWEEPS = 100
MAX_ROUNDS = 100
# A new order must gain more than this share of what is there: less is rounding, and might go back and forth for ever.
MIN_GAIN = 1e-6


@torch.no_grad()
def align_snapshots(task: Task, model: nn.Module, layout: ParameterLayout, parameters: torch.Tensor) -> torch.Tensor:
    """
    Reorders the hidden units of networks so that their parameters become as alike as weight matching can make them:
    first all like the first network, then all like their mean, again and again until nothing changes. Each network
    computes what it computed before.

    Args:
        task (`Task`): What the networks are for; it says what goes into them.
        model (`nn.Module`): The base model: layers in a row of the kinds `Linear`, `Conv1d` and `Conv2d`, element-wise
            activations, pooling, `Flatten`, and layer and batch normalization.
        layout (`ParameterLayout`): Of the parameters. It must hold every tensor that is reordered.
        parameters (`torch.Tensor`): Shape `(K, D)`; left as it is.

    Returns:
        `torch.Tensor`: Shape `(K, D)`, the same values in another order.

    Raises:
        AlignmentError: for a network with anything else in it, such as a residual connection or attention, or a layout
            that lacks a tensor.
    """
    units = find_hidden_units(task, model, layout)
    aligned = parameters.clone()
    chunks = aligned.split(max(1, CHUNK_SIZE // layout.num_parameters))  # views
    first = aligned[0].clone()
    for chunk in chunks:
        match_weights(chunk, first, layout, units)
    for _ in range(MAX_ROUNDS):
        mean = aligned.mean(0)
        changed = [match_weights(chunk, mean, layout, units) for chunk in chunks]
        if not any(changed):
            break
    return aligned


def match_weights(
    parameters: torch.Tensor, reference: torch.Tensor, layout: ParameterLayout, units: Sequence[HiddenUnits]
) -> bool:
    """
    Reorders the units of networks in place, to be as near as possible to those of a reference: one layer after the
    other, each by a linear assignment, until no layer can be improved. All networks are matched at once.

    Args:
        parameters (`torch.Tensor`): Shape `(K, D)`.
        reference (`torch.Tensor`): Shape `(D,)`.

    Returns:
        `bool`: Whether anything has changed.
    """
    tensors = _views(parameters, layout)
    targets = _views(reference[None], layout)
    rng = np.random.default_rng(0)
    any_change = False
    for _ in range(MAX_SWEEPS):
        changed = False
        for i in rng.permutation(len(units)):
            size = units[i].size
            similarity = torch.zeros(len(parameters), size, size, device=parameters.device)  # (K, n, n)
            for axis in units[i].axes:
                target = _units_first(targets[axis.name], axis, size)  # (1, n, m)
                similarity += target @ _units_first(tensors[axis.name], axis, size).mT  # (K, m, n)
            order = _best_orders(similarity.double())
            if order is not None:
                changed = any_change = True
                for axis in units[i].axes:
                    _reorder(tensors[axis.name], axis, order)
        if not changed:
            break
    return any_change


def _views(parameters: torch.Tensor, layout: ParameterLayout) -> dict[str, torch.Tensor]:
    """`(K, D)` to the tensors by name, `(K, *shape)`, which share its memory."""
    pieces = parameters.split(layout.sizes, dim=1)
    return {
        name: piece.view(-1, *shape) for name, shape, piece in zip(layout.names, layout.shapes, pieces, strict=True)
    }


def _units_first(tensor: torch.Tensor, axis: Axis, size: int) -> torch.Tensor:
    """`(K, *shape)` to `(K, n, m)`: all that a tensor holds for each of n units."""
    return tensor.unflatten(axis.dim + 1, (size, axis.block)).movedim(axis.dim + 1, 1).flatten(2)


def _best_orders(similarity: torch.Tensor) -> torch.Tensor | None:
    """
    For `(K, n, n)` similarities of units of the reference (rows) and of K networks (columns): the unit of each network
    that belongs in each place, shape `(K, n)`, or `None` if all are where they belong.
    """
    identity = torch.arange(similarity.shape[1])
    orders = torch.stack(
        [torch.from_numpy(linear_sum_assignment(matrix, maximize=True)[1]) for matrix in similarity.cpu().numpy()]
    ).to(similarity.device)
    before = similarity.diagonal(dim1=1, dim2=2)  # (K, n)
    after = similarity.gather(2, orders[:, :, None]).squeeze(2)  # (K, n)
    better = (after - before).sum(1) > MIN_GAIN * before.abs().sum(1)  # (K,)
    return torch.where(better[:, None], orders, identity.to(orders.device)) if better.any() else None


def _reorder(tensor: torch.Tensor, axis: Axis, order: torch.Tensor) -> None:
    """Reorders the units of K networks in place: `tensor` has shape `(K, *shape)`, `order` `(K, n)`."""
    dim = axis.dim + 1
    blocks = tensor.unflatten(dim, (order.shape[1], axis.block))
    index = order.view(len(order), *[1] * (dim - 1), order.shape[1], *[1] * (blocks.ndim - dim - 1))
    tensor.copy_(blocks.take_along_dim(index, dim).flatten(dim, dim + 1))
