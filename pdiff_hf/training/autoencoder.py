"""Trains the parameter autoencoder (paper, section 2.3)."""

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator

from ..layout import ParameterLayout
from ..models import ParameterAutoencoder
from ..utils.seeds import derive_seed
from .loop import LoopArguments, train

logger = logging.getLogger(__name__)

# So many snapshots are turned into tokens at once.
BATCH_SIZE = 64


@dataclass(frozen=True)
class NoiseArguments:
    """
    Args:
        parameter_noise (`float`, *optional*, defaults to 0.001): σ_v, in normalised units.
        latent_noise (`float`, *optional*, defaults to 0.1): σ_z.
    """

    parameter_noise: float = 1e-3
    latent_noise: float = 0.1


def train_autoencoder(
    accelerator: Accelerator,
    snapshots: torch.Tensor,
    layout: ParameterLayout,
    args: LoopArguments,
    noise: NoiseArguments,
    *,
    latent_dim: int,
    architecture: Mapping[str, Any],
    normalization: str = "coordinate",
    kl_weight: float = 0.0,
    seed: int,
    checkpoint_dir: str | os.PathLike,
    resume: bool = False,
) -> tuple[ParameterAutoencoder, torch.Tensor]:
    """
    Trains an autoencoder on `snapshots`, shape `(N, D)`, to return the clean vector for a noisy one, and sets its
    statistics from them.

    With `kl_weight` above 0 it is a variational one. At 1 its loss is the negative evidence lower bound of a decoder
    with unit variance in normalised units (times 2 / D, plus a constant).

    Args:
        architecture (`Mapping[str, Any]`): More arguments of [`ParameterAutoencoder`], see
            [`autoencoder_architecture`]. Without convolutions there is nothing to train, and no step is taken.
        normalization (`str`, *optional*, defaults to `"coordinate"`): Of `fit_parameter_statistics`.

    Returns:
        `tuple`: The autoencoder in eval mode on the CPU, and the loss (mean squared error in normalised units, plus the
        weighted divergence of a variational one) at every step, shape `(args.num_steps,)`.
    """
    torch.manual_seed(derive_seed(seed, 0))
    autoencoder = ParameterAutoencoder(
        layout.to_dict(), latent_dim=latent_dim, variational=kl_weight > 0, **architecture
    )
    autoencoder.fit_parameter_statistics(snapshots, normalization)
    with torch.no_grad():  # what comes before the network never changes, so it is computed once
        tokens = torch.cat([autoencoder.tokenize(batch) for batch in snapshots.split(BATCH_SIZE)])

    def loss_function(model, indices, generator):
        output = model(tokens[indices].to(accelerator.device), **asdict(noise), generator=generator)
        loss = autoencoder.reconstruction_loss(output)
        return loss if output.kl is None else loss + kl_weight * 2 / layout.num_parameters * output.kl.mean()

    losses = torch.empty(0)
    if any(True for _ in autoencoder.parameters()):
        losses = train(
            accelerator,
            autoencoder,
            loss_function,
            len(tokens),
            args,
            seed=seed,
            checkpoint_dir=checkpoint_dir,
            description="VAE" if kl_weight > 0 else "autoencoder",
            resume=resume,
        )
    autoencoder.to("cpu").eval()
    autoencoder.fit_latent_statistics(tokens)
    return autoencoder, losses
