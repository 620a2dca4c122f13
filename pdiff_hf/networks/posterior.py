"""Which of many networks fit a few labelled examples: likelihoods, weights, resampling, and refinement."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import nn

from ..layout import ParameterLayout
from .runner import NetworkRunner

# With an effective sample size below this, a few candidates decide everything.
FEW = 5.0
# What labels say: classes, whose likelihood counts, or values, whose squared error does.
LOSSES = ("nll", "mse")

Predict = Callable[[Callable, Mapping[str, Any]], torch.Tensor]
# Parameters of shape `(n, D)` to one loss for each network, shape `(n,)`.
LossFunction = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class PosteriorOutput(BaseOutput):
    """
    Networks that fit some labelled examples.

    Args:
        parameters (`torch.Tensor`): Shape `(n, D)`: the different networks among those that were drawn.
        weights (`torch.Tensor`): How often each was drawn, as a share, shape `(n,)`; their sum is 1.
        effective_sample_size (`float`): Of all candidates, 1 / Σ w².
        log_likelihoods (`torch.Tensor`): Of the networks, before refinement, in nats, shape `(n,)`.
    """

    parameters: torch.Tensor
    weights: torch.Tensor
    effective_sample_size: float
    log_likelihoods: torch.Tensor


def logits_of(call: Callable, examples: Mapping[str, Any]) -> torch.Tensor:
    """What a classifier of transformers says about a batch: logits of shape `(B, C)`."""
    output = call(**{name: value for name, value in examples.items() if name != "labels"})
    return output if isinstance(output, torch.Tensor) else output.logits


def check_examples(examples: Mapping[str, Any], loss: str = "nll", sigma: float | None = None) -> None:
    """
    Raises a `ValueError` unless `loss` is `"nll"`, and `labels` are whole numbers of shape `(B,)`; or it is `"mse"`,
    with a positive standard deviation, and they are floats of shape `(B,)` or `(B, C)`; and all other tensors have B
    rows.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if (loss == "mse") != (sigma is not None) or (sigma is not None and not 0 < sigma < math.inf):
        raise ValueError(
            f"loss='mse' needs sigma, above 0: how far labels are from what the right network gives; got loss={loss!r} "
            f"and sigma={sigma}"
        )
    labels, wanted = (
        examples.get("labels"),
        "whole numbers of shape (B,)" if loss == "nll" else "floats of shape (B, C)",
    )
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"examples need labels, {wanted}, got {labels!r}")
    if labels.is_floating_point() != (loss == "mse") or labels.ndim not in ((1,) if loss == "nll" else (1, 2)):
        raise ValueError(f"examples need labels, {wanted}, got {labels.dtype} of shape {tuple(labels.shape)}")
    for name, value in examples.items():
        if isinstance(value, torch.Tensor) and value.shape[:1] != labels.shape[:1]:
            raise ValueError(f"there are {len(labels)} labels, but {name} has the shape {tuple(value.shape)}")


def _losses(outputs: torch.Tensor, labels: torch.Tensor, sigma: float | None) -> torch.Tensor:
    """Negative log-likelihood of labels under each of some networks, of outputs `(n, B, C)` to `(n,)`, in nats."""
    outputs, labels = outputs.float(), labels.to(outputs.device)
    if sigma is not None:
        return ((outputs - labels.view(outputs.shape[1:])) / sigma).square().flatten(1).sum(1) / 2
    if len(labels) and not 0 <= labels.min() <= labels.max() < outputs.shape[-1]:
        raise ValueError(
            f"labels must lie between 0 and {outputs.shape[-1] - 1}, got {labels.unique().tolist()!s:.200}"
        )
    return -outputs.log_softmax(-1).gather(-1, labels.expand(len(outputs), -1).unsqueeze(-1)).sum((1, 2))


@torch.no_grad()
def log_likelihoods(
    models: NetworkRunner,
    examples: Mapping[str, Any],
    parameters: torch.Tensor,
    predict: Predict = logits_of,
    sigma: float | None = None,
) -> torch.Tensor:
    """
    Logarithm of the probability that each of N networks gives to the labels of B examples, in nats, shape `(N,)`.

    Args:
        models (`NetworkRunner`): Runs the networks.
        examples (`Mapping[str, Any]`): A batch of the task with `labels`, int64 of shape `(B,)`.
        parameters (`torch.Tensor`): Shape `(N, D)`.
        predict (`Callable`, *optional*): As `predict` of a task.
        sigma (`float`, *optional*): Labels are values of shape `(B, C)`, each with a Gaussian error of this standard
            deviation; a constant is left out.

    Raises:
        ValueError: for a label that the networks have no output for.
    """
    total = torch.zeros(len(parameters))
    if len(examples["labels"]):
        rows = parameters.to(next(models.model.parameters()).device)
        for part, outputs in models(lambda call: predict(call, examples), rows):
            total[part] = -_losses(outputs, examples["labels"], sigma).cpu()
    return total


def posterior_weights(log_likelihood: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    Weights in proportion to likelihood^(1 / temperature), shape `(N,)`, of sum 1. A network whose likelihood is not
    finite gets none.

    Args:
        log_likelihood (`torch.Tensor`): Shape `(N,)`.

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


def example_loss(
    model: nn.Module,
    layout: ParameterLayout,
    examples: Mapping[str, Any],
    *,
    predict: Predict = logits_of,
    sigma: float | None = None,
) -> LossFunction:
    """
    Negative log-likelihood of labelled examples, in nats, as a function of parameters with gradients.

    Args:
        examples (`Mapping[str, Any]`): A batch of the task with `labels`, int64 of shape `(B,)`.
        predict (`Callable`, *optional*): As `predict` of a task.
        sigma (`float`, *optional*): See [`log_likelihoods`].

    Returns:
        `Callable`: Parameters of shape `(n, D)` to the loss of each network, shape `(n,)`.
    """
    runner = NetworkRunner(model, layout)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        outputs = runner.stack(lambda call, _: predict(call, examples), rows, {}, shared=True)
        return _losses(outputs, examples["labels"], sigma)

    return loss


def refine(
    model: nn.Module,
    layout: ParameterLayout,
    parameters: torch.Tensor,
    examples: Mapping[str, Any],
    *,
    num_steps: int,
    learning_rate: float = 1e-3,
    predict: Predict = logits_of,
    sigma: float | None = None,
) -> torch.Tensor:
    """
    Fine-tunes N networks on the same examples, side by side, with AdamW.

    Args:
        parameters (`torch.Tensor`): Shape `(N, D)`; where each network starts.

    Returns:
        `torch.Tensor`: Shape `(N, D)`, on the CPU.
    """
    rows = parameters.to(next(model.parameters()).device, torch.float32, copy=True).requires_grad_()
    optimizer = torch.optim.AdamW([rows], lr=learning_rate, weight_decay=0.0)
    losses = example_loss(model, layout, examples, predict=predict, sigma=sigma)
    for _ in range(num_steps):
        optimizer.zero_grad()
        (losses(rows).sum() / len(examples["labels"])).backward()  # each gets its own gradient
        optimizer.step()
    return rows.detach().cpu()
