"""Many networks as one, whose prediction is the weighted mean of theirs, and what they disagree about."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput
from torch import nn

from ..layout import LayoutError, ParameterLayout
from ..utils.memory import InParts
from .replacement import Replacement
from .runner import NetworkRunner


@dataclass
class EnsembleOutput(BaseOutput):
    """
    Args:
        logits (`torch.Tensor`): Logarithm of the mean probability of every class, shape `(B, C)`: `softmax` gives the
            mean probabilities back, `argmax` the prediction.
    """

    logits: torch.Tensor


@dataclass
class EnsemblePrediction(BaseOutput):
    """
    What an ensemble says about B examples, and how sure it is.

    Args:
        probabilities (`torch.Tensor`): Mean probability of every class, shape `(B, C)`.
        total_uncertainty (`torch.Tensor`): Entropy of the mean, in nats, shape `(B,)`.
        mutual_information (`torch.Tensor`): The part of it that the networks disagree about, in nats, shape `(B,)`:
            what a label would say about which of them is right, so that it is high where labels are worth most.
    """

    probabilities: torch.Tensor
    total_uncertainty: torch.Tensor
    mutual_information: torch.Tensor


class EnsembleModel(nn.Module):
    """
    N networks that differ in the tensors of `layout` and share everything else, as one network. It can be moved to a
    device, evaluated in place of the base model, saved with `safetensors.torch.save_model` and exported with
    `torch.export.export`.

    What is computed before the first of those tensors is used is computed once, because `vmap` runs an operation many
    times only if one of its inputs differs; the rest takes N times the memory, and where that runs out, fewer networks
    run at once. The networks run one after the other where convolutions would become grouped ones, which are no faster,
    or where the base model writes in place to what they share, which `vmap` refuses. An export with `vmap` has the
    batch size of its example inputs, because most of torch's rules for `vmap` fix it.

    Args:
        base_model (`nn.Module`): A classifier that returns logits, or an output that has them. It is copied.
        layout (`ParameterLayout`): The tensors that differ.
        parameters (`torch.Tensor`): Shape `(N, D)`, N at least 1.
        weights (`torch.Tensor`, *optional*): Of the networks, shape `(N,)`, not negative; their sum becomes 1. All the
            same by default.

    Raises:
        LayoutError: if layout, base model, parameters and weights do not fit together.
    """

    parameters_of_networks: torch.Tensor
    weights: torch.Tensor

    def __init__(
        self,
        base_model: nn.Module,
        layout: ParameterLayout,
        parameters: torch.Tensor,
        weights: torch.Tensor | None = None,
    ):
        super().__init__()
        layout.check_fits(base_model.state_dict())
        if parameters.ndim != 2 or len(parameters) == 0 or parameters.shape[1] != layout.num_parameters:
            raise LayoutError(
                f"an ensemble needs parameters of shape (N, {layout.num_parameters}) with N at least 1, got "
                f"{tuple(parameters.shape)}"
            )
        weights = torch.ones(len(parameters)) if weights is None else weights
        if weights.shape != (len(parameters),) or not (weights >= 0).all() or not 0 < weights.sum() < torch.inf:
            raise LayoutError(
                f"an ensemble of {len(parameters)} networks needs as many weights, not negative and not all 0, got "
                f"{weights.tolist()!r:.100}"
            )
        self.layout = layout
        # A copy, because moving or casting the ensemble must not move or cast somebody else's network.
        self.base_model = copy.deepcopy(base_model)
        device = next(base_model.parameters()).device
        self.register_buffer("parameters_of_networks", parameters.detach().to(device, torch.float32, copy=True))
        self.register_buffer("weights", (weights.detach() / weights.sum()).to(device, torch.float32))
        self.base_model.requires_grad_(False)
        self._runner = NetworkRunner(self.base_model, layout, Replacement(base_model, layout.names))
        self._in_parts = InParts("networks")
        self.eval()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # Files of version 0.1 have no weights.
        state_dict.setdefault(f"{prefix}weights", torch.full_like(self.weights, 1 / len(self.weights)))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, *args, **kwargs) -> EnsembleOutput:
        """Takes what the base model takes."""
        log_probs = self._log_probs(*args, **kwargs)
        return EnsembleOutput(logits=(log_probs + self.weights.log().view(-1, 1, 1)).logsumexp(0))

    @torch.no_grad()
    def predict(self, *args, **kwargs) -> EnsemblePrediction:
        """Takes what the base model takes; probabilities and uncertainty in place of logits."""
        log_probs = self._log_probs(*args, **kwargs)  # (N, B, C)
        weights = self.weights.view(-1, 1, 1)
        mean = (weights * log_probs.exp()).sum(0)  # (B, C)
        total = torch.special.entr(mean).sum(-1)
        own = (weights * torch.special.entr(log_probs.exp())).sum((0, 2))  # (B,): mean entropy of the networks
        return EnsemblePrediction(mean, total, (total - own).clamp(min=0))

    def _log_probs(self, *args, **kwargs) -> torch.Tensor:
        """Log-probabilities of every network, shape `(N, B, C)`."""

        def predict(call: Callable, _: Mapping) -> torch.Tensor:
            output = call(*args, **kwargs)
            return (output if isinstance(output, torch.Tensor) else output.logits).float().log_softmax(-1)  # (B, C)

        def log_probs(rows: torch.Tensor) -> torch.Tensor:
            side_by_side = not self._runner.has_convolutions
            return self._runner.stack(predict, rows, {}, shared=True, side_by_side=side_by_side)

        return self._in_parts(log_probs, self.parameters_of_networks)
