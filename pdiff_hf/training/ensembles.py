"""Tunes a map of noise to latents for one task: rewards accurate, diverse ensembles of its networks."""

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..tasks.task import Batch, ClassificationTask, evenly, load_batch
from .tune import GeneratedNetworks

VALIDATION_EXAMPLES = 1000
LOGIT_TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class EnsembleObjective:
    """
    What networks for one task are tuned on.

    Args:
        ensemble_size (`int`, *optional*, defaults to 1): M, networks whose mean probabilities are to be right.
        diversity (`float`, *optional*, defaults to 0): Weight of the overlap of their errors.
        penalty (`float`, *optional*, defaults to 0): Weight of the squared distance to what the same noise gave before,
            the mean over latent coordinates, whose standard deviation is 1 over the snapshots.
    """

    ensemble_size: int = 1
    diversity: float = 0.0
    penalty: float = 0.0

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, latents: torch.Tensor, before: torch.Tensor | None
    ) -> torch.Tensor:
        """
        The loss, a scalar.

        Args:
            logits (`torch.Tensor`): Of N networks on one batch, shape `(N, B, C)`, N a multiple of the size.
            labels (`torch.Tensor`): Shape `(B,)`.
            latents (`torch.Tensor`): Of the networks, shape `(N, L)`.
            before (`torch.Tensor`, *optional*): Of what the same noise gave before; needed for the penalty alone.
        """
        loss = ensemble_loss(logits, labels, self.ensemble_size)
        if self.diversity:
            loss = loss + self.diversity * error_overlap(logits, labels, self.ensemble_size)
        if self.penalty:
            assert before is not None
            loss = loss + self.penalty * (latents - before).square().mean()
        return loss


@dataclass(frozen=True)
class Tuning:
    """
    How a generator was tuned, which is saved with it: trivial generators can then be given the same.

    Args:
        objective (`EnsembleObjective`): With the diversity that was chosen on validation data.
        num_steps (`int`): Of the optimizer, for each diversity that was tried.
        num_networks (`int`): In a step.
        num_examples (`int`): Of the training split in a step, the same for all networks.
        passes (`int`): Forward passes of an image through a network that all of it took, a backward pass counted as
            two.
    """

    objective: EnsembleObjective
    num_steps: int
    num_networks: int
    num_examples: int
    passes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Tuning":
        return cls(**values | {"objective": EnsembleObjective(**values["objective"])})


def ensemble_loss(logits: torch.Tensor, labels: torch.Tensor, ensemble_size: int) -> torch.Tensor:
    """
    Mean negative log-likelihood of ensembles of consecutive networks, in nats.

    Args:
        logits (`torch.Tensor`): Shape `(N, B, C)`, N a multiple of `ensemble_size`.
        labels (`torch.Tensor`): Shape `(B,)`.
    """
    ensembles = _of_labels(logits.log_softmax(-1), labels).unflatten(0, (-1, ensemble_size))  # (N / M, M, B)
    return (math.log(ensemble_size) - ensembles.logsumexp(1)).mean()


def validation_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    [`ensemble_loss`] of all networks together, to which both their own quality and their diversity contribute, whatever
    they were tuned on. All logits are divided by the one of `LOGIT_TEMPERATURES` that makes it least: networks that
    have been trained for long are too sure of themselves, which says nothing about how good their answers are.
    """
    return torch.stack([ensemble_loss(logits / t, labels, len(logits)) for t in LOGIT_TEMPERATURES]).amin()


def error_overlap(logits: torch.Tensor, labels: torch.Tensor, ensemble_size: int) -> torch.Tensor:
    """
    The IoU of wrong predictions (paper, equation 7) of two networks of an ensemble, averaged, with the probability of
    an error in the place of an error: between 0 and 1, and differentiable. Arguments as of [`ensemble_loss`].
    """
    wrong = (1 - _of_labels(logits.softmax(-1), labels)).unflatten(0, (-1, ensemble_size))  # (N / M, M, B)
    first, second = torch.triu_indices(ensemble_size, ensemble_size, offset=1).unbind()
    both = (wrong[:, first] * wrong[:, second]).sum(-1)  # (N / M, pairs)
    either = (wrong[:, first] + wrong[:, second]).sum(-1) - both
    return (both / either.clamp_min(1e-12)).mean()


def _of_labels(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Those of the right classes: `(N, B, C)` to `(N, B)`."""
    return values.gather(-1, labels.view(1, -1, 1).expand(len(values), -1, 1)).squeeze(-1)


def validation_batch(task: ClassificationTask, device: torch.device) -> Batch:
    """Up to `VALIDATION_EXAMPLES` examples of the validation split, evenly spaced over it."""
    indices = evenly(len(task.load_split("validation")), VALIDATION_EXAMPLES).tolist()
    return load_batch(task, "validation", indices, device)


class TunedEnsembles(nn.Module):
    """
    The loss of networks for one task that a generator gives, for [`~pdiff_hf.training.tune.tune`].

    Args:
        generated (`GeneratedNetworks`): Without conditions.
        objective (`EnsembleObjective`): What the loss is made of.
        num_networks (`int`): In a step, a multiple of the size of an ensemble.
    """

    def __init__(self, generated: GeneratedNetworks, objective: EnsembleObjective, num_networks: int):
        super().__init__()
        self.generated, self.objective, self.num_networks = generated, objective, num_networks
        # In a list, it is no part of this module.
        self._start = [copy.deepcopy(generated.generator).requires_grad_(False)] if objective.penalty else []

    def sample_noise(self, generator: torch.Generator) -> torch.Tensor:
        """Shape `(num_networks, L)`."""
        shape = (self.num_networks, self.generated.autoencoder.config.latent_dim)
        return torch.randn(shape, generator=generator, device=generator.device)

    def logits(self, latents: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Of the networks of latents `(N, L)` on one batch, shape `(N, B, C)`."""
        generated = self.generated
        parameters = generated.autoencoder.decode(latents).sample
        return generated.networks.stack(generated.predict, parameters, batch, shared=True)

    def forward(self, table: None, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """The loss, a scalar."""
        noise = self.sample_noise(generator)
        latents, before = self.generated.denoise(noise), None
        if self.objective.penalty:
            with torch.no_grad():
                before = self.generated.denoise(noise, generator=self._start[0].to(noise.device))
        return self.objective(self.logits(latents, batch), batch["labels"], latents, before)

    @torch.no_grad()
    def validate(self, batch: Batch, generator: torch.Generator) -> float:
        """The [`validation_loss`] on a batch."""
        logits = self.logits(self.generated.denoise(self.sample_noise(generator)), batch)
        return validation_loss(logits, batch["labels"]).item()
