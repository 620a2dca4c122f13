"""Trains the latent denoiser (paper, section 2.4)."""

import os

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler

from ..models import LatentDenoiser
from ..utils.seeds import derive_seed
from .loop import LoopArguments, train


def make_training_scheduler(num_train_timesteps: int = 1000) -> DDPMScheduler:
    """The paper's (Table 5d): linear betas from 1e-4 to 2e-2. Latents are unbounded, so nothing is clipped."""
    return DDPMScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=2e-2,
        clip_sample=False,
        timestep_spacing="trailing",
    )


def train_denoiser(
    accelerator: Accelerator,
    latents: torch.Tensor,
    args: LoopArguments,
    *,
    scheduler: DDPMScheduler,
    block_out_channels: tuple[int, ...],
    bottleneck_dim: int,
    seed: int,
    checkpoint_dir: str | os.PathLike,
    resume: bool = False,
) -> tuple[LatentDenoiser, torch.Tensor]:
    """
    Trains a denoiser on the standardised latents of snapshots, shape `(N, L)`, to predict the noise in them (paper,
    equation 6).

    Returns:
        `tuple`: The denoiser in eval mode on the CPU, with averaged weights if `args.ema_decay` is set, and the loss at
        every step, shape `(args.num_steps,)`.
    """
    latents = latents.to(accelerator.device)
    torch.manual_seed(derive_seed(seed, 0))
    denoiser = LatentDenoiser(
        latents.shape[1],
        block_out_channels=block_out_channels,
        bottleneck_dim=bottleneck_dim,
    )

    def loss_function(model, indices, generator):
        clean = latents[indices.to(latents.device)]  # (B, L)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        timesteps = torch.randint(
            scheduler.config.num_train_timesteps, (len(clean),), generator=generator, device=clean.device
        )
        return F.mse_loss(model(scheduler.add_noise(clean, noise, timesteps), timesteps).sample, noise)

    losses = train(
        accelerator,
        denoiser,
        loss_function,
        len(latents),
        args,
        seed=seed,
        checkpoint_dir=checkpoint_dir,
        description="denoiser",
        resume=resume,
    )
    return denoiser.to("cpu").eval(), losses
