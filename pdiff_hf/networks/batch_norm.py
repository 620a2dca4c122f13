"""Batch-norm statistics of many networks, recomputed in one pass over data, as SWAG does (arXiv 1902.02476)."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ..layout import ParameterLayout
from .batched import Forward
from .replacement import Replacement

logger = logging.getLogger(__name__)


def find_batch_norms(model: nn.Module) -> dict[str, _NormBase]:
    """The layers of batch norm with running statistics, by name."""
    modules = dict(model.named_modules())
    return {n: m for n, m in modules.items() if isinstance(m, _NormBase) and m.running_mean is not None}


@torch.no_grad()
def recompute_batch_norm(
    model: nn.Module,
    layout: ParameterLayout,
    batches: Iterable[Forward],
    parameters: torch.Tensor,
    networks_at_once: int = 16,
) -> dict[str, torch.Tensor]:
    """
    The statistics that `torch.optim.swa_utils.update_bn` would give each network: the mean over all batches of each
    batch's mean and unbiased variance, while its layers normalise by the batch. Everything else is in eval mode.

    Args:
        model (`nn.Module`): The base model; it is left as it was.
        layout (`ParameterLayout`): The tensors that differ between the networks.
        batches (`Iterable[Forward]`): For each batch of data a forward pass, `forward(call)`, where `call` takes the
            place of the model. They are gone through once.
        parameters (`torch.Tensor`): Shape `(N, D)`, on the model's device.
        networks_at_once (`int`, *optional*, defaults to 16): So many run side by side, where `vmap` allows it and no
            weights of convolutions differ.

    Returns:
        `dict[str, torch.Tensor]`: `running_mean` and `running_var` of every layer by their names, shape `(N, C)` each.
        Empty if the network has no batch norm.

    Raises:
        ValueError: if there are no batches.
    """
    layers = find_batch_norms(model)
    if not layers:
        return {}
    replacement = Replacement(model, layout.names)
    owners = {name.rpartition(".")[0] for name in layout.names}
    side_by_side = not any(isinstance(model.get_submodule(owner), _ConvNd) for owner in owners)
    names = [f"{layer}.{statistic}" for layer in layers for statistic in ("running_mean", "running_var")]
    buffers = dict(model.named_buffers())
    sums = {name: buffers[name].new_zeros(len(parameters), *buffers[name].shape) for name in names}

    def statistics_of(tensors: dict[str, torch.Tensor], statistics: dict[str, torch.Tensor], forward: Forward):
        # A momentum of 1 leaves the statistics of this batch alone in the running ones.
        counts = {name: b.clone() for name, b in buffers.items() if name.endswith("num_batches_tracked")}
        state = replacement.tensors(model, tensors) | statistics | counts
        forward(lambda *args, **kwargs: functional_call(model, state, args, kwargs, tie_weights=False))
        return statistics

    num_batches = 0
    with _learning(model, layers):
        for forward in batches:
            num_batches += 1
            start = 0
            while start < len(parameters):
                size = networks_at_once if side_by_side else 1
                rows = slice(start, min(start + size, len(parameters)))
                tensors = layout.unflatten(parameters[rows])
                empty = {name: torch.zeros_like(total[rows]) for name, total in sums.items()}
                try:
                    if side_by_side:
                        found = vmap(lambda t, s, f=forward: statistics_of(t, s, f), randomness="same")(tensors, empty)
                    else:
                        found = statistics_of(_first(tensors), _first(empty), forward)
                except RuntimeError as error:
                    if not side_by_side:
                        raise
                    logger.warning("%s does not run under vmap: one network at a time", type(model).__name__)
                    logger.debug("vmap failed", exc_info=error)
                    side_by_side = False
                    continue
                for name, total in sums.items():
                    total[rows] += found[name]
                start = rows.stop
    if not num_batches:
        raise ValueError("there are no batches of data to compute the statistics of batch norm from")
    return {name: total / num_batches for name, total in sums.items()}


def _first(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor[0] for name, tensor in tensors.items()}


@contextmanager
def _learning(model: nn.Module, layers: dict[str, _NormBase]) -> Iterator[None]:
    """The layers normalise by their batch, and take over its statistics, in this block."""
    training = {module: module.training for module in model.modules()}
    momenta = {layer: layer.momentum for layer in layers.values()}
    model.eval()
    for layer in momenta:
        layer.momentum = 1.0
        layer.train()
    try:
        yield
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for module, mode in training.items():
            module.training = mode
