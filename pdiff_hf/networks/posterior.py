"""Which of many networks fit a few labelled examples: likelihoods, weights, resampling, and refinement."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap

from ..layout import ParameterLayout
from .batched import BatchedModels

Predict = Callable[[Callable, Mapping[str, Any]], torch.Tensor]


def predict_logits(call: Callable, examples: Mapping[str, Any]) -> torch.Tensor:
    """What a classifier of transformers says about a batch: logits of shape `(B, C)`."""
    output = call(**{name: value for name, value in examples.items() if name != "labels"})
    return output if isinstance(output, torch.Tensor) else output.logits


@torch.no_grad()
def log_likelihoods(
    models: BatchedModels, examples: Mapping[str, Any], parameters: torch.Tensor, predict: Predict = predict_logits
) -> torch.Tensor:
    """
    Logarithm of the probability that each of N networks gives to the labels of B examples, in nats, shape `(N,)`.

    Args:
        models (`BatchedModels`): Runs the networks.
        examples (`Mapping[str, Any]`): A batch of the task with `labels`, int64 of shape `(B,)`.
        parameters (`torch.Tensor`): Shape `(N, D)`.
        predict (`Callable`, *optional*): As `predict` of a task.
    """
    device = next(models.model.parameters()).device
    labels = examples["labels"].to(device)
    total = torch.zeros(len(parameters))
    if len(labels) == 0:
        return total
    for rows, logits in models(lambda call: predict(call, examples), parameters.to(device)):  # (n, B, C)
        log_probs = logits.float().log_softmax(-1)
        total[rows] = log_probs.gather(-1, labels.expand(len(log_probs), -1).unsqueeze(-1)).sum((1, 2)).cpu()
    return total


def posterior_weights(log_likelihood: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    Weights in proportion to likelihood^(1 / temperature), shape `(N,)`, of sum 1. A network whose likelihood is not
    finite gets none.

    Raises:
        ValueError: if no likelihood is finite.
    """
    usable = log_likelihood.isfinite()
    if not usable.any():
        raise ValueError("none of the networks gives the labels a finite likelihood")
    return torch.where(usable, log_likelihood / temperature, -math.inf).softmax(0)


def effective_sample_size(weights: torch.Tensor) -> float:
    """1 / Σ w², between 1 (one network has all weight) and N (all have the same)."""
    return (1 / weights.double().square().sum()).item()


def resample(weights: torch.Tensor, num_models: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    Systematic resampling: indices of `num_models` draws in proportion to `weights`, with the least variance that one
    random number allows, in order, int64 of shape `(num_models,)`.
    """
    start = torch.rand((), generator=generator, dtype=torch.float64)
    places = (torch.arange(num_models, dtype=torch.float64) + start) / num_models
    cumulative = weights.double().cumsum(0)
    return torch.searchsorted(cumulative / cumulative[-1], places, right=True).clamp(max=len(weights) - 1)


def refine(
    model: nn.Module,
    layout: ParameterLayout,
    parameters: torch.Tensor,
    examples: Mapping[str, Any],
    *,
    num_steps: int,
    learning_rate: float = 1e-3,
    predict: Predict = predict_logits,
) -> torch.Tensor:
    """
    Fine-tunes N networks on the same examples, side by side, with AdamW.

    Args:
        parameters (`torch.Tensor`): Shape `(N, D)`; where each network starts.

    Returns:
        `torch.Tensor`: Shape `(N, D)`, on the CPU.
    """
    device = next(model.parameters()).device
    labels = examples["labels"].to(device)
    rows = parameters.to(device, torch.float32, copy=True).requires_grad_()
    optimizer = torch.optim.AdamW([rows], lr=learning_rate, weight_decay=0.0)

    def loss(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = predict(lambda *args, **kwargs: functional_call(model, tensors, args, kwargs), examples)
        return F.cross_entropy(logits.float(), labels)

    for _ in range(num_steps):
        optimizer.zero_grad()
        vmap(loss)(layout.unflatten(rows)).sum().backward()  # the networks do not meet, so that the sum trains each
        optimizer.step()
    return rows.detach().cpu()
