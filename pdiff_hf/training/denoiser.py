"""Trains the latent denoiser (paper, section 2.4), with or without conditions."""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import nn

from ..models import ConditionEncoder, LatentDenoiser
from ..utils.seeds import derive_seed
from .loop import Loop, LoopArguments


class LatentGenerator(nn.Module):
    """
    A denoiser, and the encoder of its conditions where it has them, as one network.

    Args:
        denoiser (`LatentDenoiser`): With the `condition_dim` of the encoder.
        encoder (`ConditionEncoder`, *optional*): Without it, conditions are not looked at.
    """

    def __init__(self, denoiser: LatentDenoiser, encoder: ConditionEncoder | None = None):
        super().__init__()
        self.denoiser, self.encoder = denoiser, encoder

    def encode(self, table: torch.Tensor | None) -> torch.Tensor | None:
        """Embeddings of conditions, shape `(N, E)`, if there is an encoder."""
        return None if self.encoder is None else self.encoder(table)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | int,
        table: torch.Tensor | None = None,
        dropped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            sample (`torch.Tensor`): Noisy latents, shape `(N, L)`.
            timestep (`torch.Tensor` or `int`): One for all, or one for each: shape `(N,)`.
            table (`torch.Tensor`, *optional*): Conditions without unknown fields, shape `(N, width)`.
            dropped (`torch.Tensor`, *optional*): Which of them are replaced by "no condition", bool of shape `(N,)`.
        """
        condition = self.encode(table)
        if condition is not None and dropped is not None:
            condition = torch.where(dropped.unsqueeze(1), self.denoiser.null_condition, condition)
        return self.denoiser(sample, timestep, condition).sample


def make_training_scheduler(num_train_timesteps: int = 1000, prediction_type: str = "epsilon") -> DDPMScheduler:
    """
    The paper's (Table 5d): linear betas from 1e-4 to 2e-2, and a denoiser that predicts the noise. Latents are
    unbounded, so nothing is clipped.
    """
    return DDPMScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=2e-2,
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type=prediction_type,
    )


def make_sampling_scheduler(scheduler: DDPMScheduler) -> DPMSolverMultistepScheduler:
    """The scheduler that a pipeline is saved with: DPM-Solver++, which needs 10 steps where DDPM needs 1000."""
    return DPMSolverMultistepScheduler.from_config(
        scheduler.config, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )


def train_denoiser(
    loop: Loop,
    latents: torch.Tensor,
    args: LoopArguments,
    *,
    scheduler: DDPMScheduler,
    block_out_channels: tuple[int, ...],
    bottleneck_dim: int,
    encoder: ConditionEncoder | None = None,
    table: torch.Tensor | None = None,
    condition_dropout: float = 0.0,
) -> tuple[LatentDenoiser, torch.Tensor]:
    """
    Trains a denoiser on the standardised latents of snapshots, shape `(N, L)`, to predict the noise in them (paper,
    equation 6), or what else the scheduler's `prediction_type` says.

    Args:
        loop (`Loop`): Where the training runs.
        encoder (`ConditionEncoder`, *optional*): Of conditions; it is trained along, in place.
        table (`torch.Tensor`, *optional*): With an encoder, the conditions of the snapshots, shape `(N, width)`, or
            `(N, K, width)`, of which one is drawn anew at every step. So are unknown fields.
        condition_dropout (`float`, *optional*, defaults to 0): Share of conditions that are replaced by "no condition",
            for classifier-free guidance.

    Returns:
        `tuple`: The denoiser in eval mode on the CPU, with averaged weights if `args.ema_decay` is set, and the loss at
        every step, shape `(args.num_steps,)`.
    """
    latents = latents.to(loop.device)
    torch.manual_seed(derive_seed(loop.seed, 0))
    denoiser = LatentDenoiser(
        latents.shape[1],
        block_out_channels=block_out_channels,
        bottleneck_dim=bottleneck_dim,
        condition_dim=None if encoder is None else encoder.config.embedding_dim,
        condition_dropout=None if encoder is None else condition_dropout,
    )
    # What does not take part in the training has no gradients, which DistributedDataParallel would wait for.
    if encoder is not None:
        denoiser.null_condition.requires_grad_(condition_dropout > 0)

    def loss_function(model, indices, generator):
        clean = latents[indices.to(latents.device)]  # (B, L)
        rows, dropped = None, None
        if encoder is not None and table is not None:
            draws = torch.rand(2, len(clean), generator=generator, device=clean.device)
            rows = table[indices].to(clean.device)
            if rows.ndim == 3 and rows.shape[1] == 1:
                rows = rows[:, 0]
            elif rows.ndim == 3:
                ways = torch.randint(rows.shape[1], (len(rows),), generator=generator, device=clean.device)
                rows = rows[torch.arange(len(rows), device=clean.device), ways]
            rows = encoder.complete(rows, draws[0])
            dropped = draws[1] < condition_dropout if condition_dropout > 0 else None
        return denoising_loss(model, scheduler, clean, generator, rows, dropped)

    model = LatentGenerator(denoiser, encoder)
    losses = loop.train(model, loss_function, len(latents), args, description="denoiser")
    if encoder is not None:
        denoiser.null_condition.requires_grad_(True)
        encoder.to("cpu").eval()
    return denoiser.to("cpu").eval(), losses


def gaussian_loss(latents: torch.Tensor, scheduler: DDPMScheduler) -> float:
    """
    The least loss of a denoiser that knows the mean and the covariance of latents, `(N, L)`, and nothing else: one with
    a higher loss has not learned more than a Gaussian.
    """
    variances = torch.linalg.eigvalsh(torch.cov(latents.double().T, correction=0).view(latents.shape[1], -1))
    level = scheduler.alphas_cumprod.double().unsqueeze(1)  # ᾱ: (T, 1)
    clean = variances.clamp(min=0) / (level * variances.clamp(min=0) + 1 - level)  # (T, L)
    # Of the clean latent the error is (1 - ᾱ) of this; that of the noise is ᾱ of it, and that of the velocity is all.
    factor = {"epsilon": level, "sample": 1 - level}.get(scheduler.config.prediction_type)
    return (clean if factor is None else factor * clean).mean().item()


def denoising_loss(
    model: nn.Module,
    scheduler: DDPMScheduler,
    clean: torch.Tensor,
    generator: torch.Generator,
    table: torch.Tensor | None = None,
    dropped: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of a [`LatentGenerator`] on latents `(N, L)` with random noise at random timesteps, a scalar."""
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    timesteps = torch.randint(
        scheduler.config.num_train_timesteps, (len(clean),), generator=generator, device=clean.device
    )
    target = {"epsilon": noise, "sample": clean}.get(scheduler.config.prediction_type)
    if target is None:
        target = scheduler.get_velocity(clean, noise, timesteps)
    return F.mse_loss(model(scheduler.add_noise(clean, noise, timesteps), timesteps, table, dropped), target)
