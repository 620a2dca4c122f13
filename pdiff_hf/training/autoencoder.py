"""Trains the parameter autoencoder (paper, section 2.3)."""

import logging
import os
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from ..loop import LoopArguments, derive_seed, train
from ..models import ParameterAutoencoder
from ..parameters import ParameterLayout

logger = logging.getLogger(__name__)


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
    block_out_channels: tuple[int, ...],
    seed: int,
    checkpoint_dir: str | os.PathLike,
    resume: bool = False,
) -> tuple[ParameterAutoencoder, torch.Tensor]:
    """
    Trains an autoencoder on `snapshots`, shape `(N, D)`, to return the clean vector for a noisy one, and sets its
    statistics from them.

    Returns:
        `tuple`: The autoencoder in eval mode on the CPU, and the loss (mean squared error in normalised units) at every
        step, shape `(args.num_steps,)`.
    """
    torch.manual_seed(derive_seed(seed, 0))
    autoencoder = ParameterAutoencoder(layout.to_dict(), latent_dim=latent_dim, block_out_channels=block_out_channels)
    autoencoder.fit_parameter_statistics(snapshots)

    def loss_function(model, indices, generator):
        output = model(snapshots[indices].to(accelerator.device), **asdict(noise), generator=generator)
        return F.mse_loss(output.sample, output.target)

    losses = train(
        accelerator,
        autoencoder,
        loss_function,
        len(snapshots),
        args,
        seed=seed,
        checkpoint_dir=checkpoint_dir,
        description="autoencoder",
        resume=resume,
    )
    autoencoder.to("cpu").eval()
    autoencoder.fit_latent_statistics(snapshots)
    return autoencoder, losses


@torch.no_grad()
def reconstruct(autoencoder: ParameterAutoencoder, parameters: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """What the autoencoder makes of `parameters`, shape `(N, D)`, without noise."""
    batches = [autoencoder.decode(autoencoder.encode(batch).latents).sample for batch in parameters.split(batch_size)]
    return torch.cat(batches)
