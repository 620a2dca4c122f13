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

    Returns:
        `tuple`: The autoencoder in eval mode on the CPU, and the loss (mean squared error in normalised units, plus the
        weighted divergence of a variational one) at every step, shape `(args.num_steps,)`.
    """
    torch.manual_seed(derive_seed(seed, 0))
    autoencoder = ParameterAutoencoder(
        layout.to_dict(), latent_dim=latent_dim, block_out_channels=block_out_channels, variational=kl_weight > 0
    )
    autoencoder.fit_parameter_statistics(snapshots)

    def loss_function(model, indices, generator):
        output = model(snapshots[indices].to(accelerator.device), **asdict(noise), generator=generator)
        loss = F.mse_loss(output.sample, output.target)
        return loss if output.kl is None else loss + kl_weight * 2 / layout.num_parameters * output.kl.mean()

    losses = train(
        accelerator,
        autoencoder,
        loss_function,
        len(snapshots),
        args,
        seed=seed,
        checkpoint_dir=checkpoint_dir,
        description="VAE" if kl_weight > 0 else "autoencoder",
        resume=resume,
    )
    autoencoder.to("cpu").eval()
    autoencoder.fit_latent_statistics(snapshots)
    return autoencoder, losses
