"""Sampling that a loss of the user's steers, with particles that are resampled so that the loss counts as it should."""

import logging
from collections.abc import Callable

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from pdiff_hf.models import ParameterAutoencoder
from pdiff_hf.models.scheduler import clean_sample, signal_levels
from pdiff_hf.networks.posterior import FEW, LossFunction, resample
from pdiff_hf.utils.memory import InParts, in_blocks

logger = logging.getLogger(__name__)

# Particles are drawn anew where their effective sample size is below this share of their number.
RESAMPLE_BELOW = 0.5
# A gradient moves a particle by no more than so many standard deviations of a step.
MAX_SHIFT = 2.0


def guided_latents(
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    autoencoder: ParameterAutoencoder,
    scheduler: SchedulerMixin,
    rows: torch.Tensor,
    generators: list[torch.Generator],
    group_size: int,
    log_twist: LossFunction,
    on_step_end: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    progress_bar: Callable = iter,
) -> torch.Tensor:
    r"""
    Twisted sequential Monte Carlo (arXiv 2306.17775): a sample of p(z) exp(log_twist(decode(z))) / Z, where p is what
    ancestral sampling gives at the timesteps of the scheduler: N(0, 1) at the first; from each timestep t to the
    next one, s, the Gaussian q(z_s | z_t, ẑ) of the noising process with the denoiser's estimate ẑ of the clean latent;
    and at the end ẑ itself. The sample becomes exact as a group grows, whatever the gradients are: they only move
    particles to where the loss is low, and weights correct for that. A group of one particle has no correction.

    Args:
        denoise (`Callable`): `denoise(rows, timestep)` gives the denoiser's prediction, shape `(n, L)`.
        scheduler (`SchedulerMixin`): With its timesteps set.
        rows (`torch.Tensor`): Starting noise, with what else belongs to a particle beside it: shape `(N, L + E)`.
        generators (`list[torch.Generator]`): One for each particle.
        group_size (`int`): Particles of one condition; they lie side by side, and are resampled among themselves.
        log_twist (`Callable`): Parameters `(n, D)` to a value for each network, `(n,)`, such as -loss.
        on_step_end (`Callable`): `on_step_end(step, timestep, latents)` may return other latents.

    Returns:
        `torch.Tensor`: Latents, shape `(N, L)`; the same may come several times.
    """
    length, num_parameters = autoencoder.config.latent_dim, autoencoder.layout.num_parameters
    levels = signal_levels(scheduler).to(rows.device)  # ᾱ
    timesteps = scheduler.timesteps.round().long().clamp(0, len(levels) - 1).unique().flip(0)  # some come twice
    in_parts = InParts("networks")
    log_weights = torch.zeros(len(rows) // group_size, group_size)
    twist = torch.zeros_like(log_weights)
    for step, timestep in enumerate(progress_bar(timesteps)):
        level = levels[timestep]

        def estimate(rows: torch.Tensor, timestep=timestep, level=level) -> torch.Tensor:
            """ẑ, its twist, and the gradient of that: shape `(n, L + 1 + L)`."""
            with torch.enable_grad():
                noisy = rows[:, :length].detach().requires_grad_()
                prediction = denoise(torch.cat([noisy, rows[:, length:]], dim=1), timestep).float()
                clean = clean_sample(scheduler, prediction, noisy, level)
                share = 1.0 if timestep == timesteps[-1] else level  # ẑ says little where there is much noise
                value = share * log_twist(autoencoder.decode(clean).sample)
                (gradient,) = torch.autograd.grad(value.sum(), noisy)
            return torch.cat([clean, value.unsqueeze(1), gradient], dim=1).detach()

        estimates = torch.cat(list(in_blocks(estimate, rows, num_parameters, in_parts)))
        value = estimates[:, length].cpu().view_as(twist)
        log_weights, is_last = log_weights + value - twist, step == len(timesteps) - 1
        chosen, log_weights = _resample_groups(log_weights, generators, is_last)
        twist = value.flatten()[chosen].view_as(twist)
        rows, estimates = rows[chosen.to(rows.device)], estimates[chosen.to(rows.device)]
        clean, gradient = estimates[:, :length], estimates[:, length + 1 :]
        if is_last:
            latents = clean
        else:
            after = levels[timesteps[step + 1]]
            variance = (1 - after) / (1 - level) * (1 - level / after)
            of_clean = after.sqrt() * (1 - level / after) / (1 - level)
            of_noisy = (level / after).sqrt() * (1 - after) / (1 - level)
            noise = randn_tensor(clean.shape, generator=generators, device=clean.device)
            shift = variance.sqrt() * gradient  # in standard deviations
            shift = shift * (MAX_SHIFT / shift.norm(dim=1, keepdim=True)).clamp(max=1)
            latents = of_clean * clean + of_noisy * rows[:, :length] + variance.sqrt() * (shift + noise)
            log_weights = log_weights - (shift * (noise + shift / 2)).sum(1).cpu().view_as(twist)
        latents = on_step_end(step, timestep, latents)
        rows = torch.cat([latents, rows[:, length:]], dim=1)
    return latents


def check_losses(losses: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """What a loss function returned for networks `(n, D)`, as float32. Raises a `ValueError` if it is no use."""
    if not isinstance(losses, torch.Tensor) or losses.shape != parameters.shape[:1] or not losses.requires_grad:
        got = repr(losses) if not isinstance(losses, torch.Tensor) else f"shape {tuple(losses.shape)}"
        got += " without gradients" if isinstance(losses, torch.Tensor) and not losses.requires_grad else ""
        raise ValueError(
            f"loss_fn takes parameters of shape {tuple(parameters.shape)} and must return one loss for each network, "
            f"shape ({len(parameters)},), with gradients; got {got}"
        )
    return losses.float()


def _resample_groups(
    log_weights: torch.Tensor, generators: list[torch.Generator], is_last: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Draws the particles of a group anew, after the last step or where few of them have most of the weight.

    Args:
        log_weights (`torch.Tensor`): Shape `(M, K)`, for M groups of K particles.

    Returns:
        `tuple`: Indices of particles, shape `(M K,)`, and their new logarithmic weights, `(M, K)`.

    Raises:
        ValueError: if no particle of a group has a finite weight.
    """
    num_groups, size = log_weights.shape
    usable = log_weights.isfinite()
    if not usable.any(1).all():
        raise ValueError("the losses of loss_fn are not finite for any network of a condition")
    log_weights = torch.where(usable, log_weights, -torch.inf)
    weights = log_weights.softmax(1)
    sizes = 1 / weights.double().square().sum(1)
    if is_last and size >= FEW and sizes.min() < FEW:
        logger.warning(
            "the effective sample size of guided sampling is %.1f of %d: take more models, more steps, or a smaller "
            "loss_guidance_scale",
            sizes.min().item(),
            size,
        )
    chosen = torch.arange(num_groups * size).view(num_groups, size)
    for i in (torch.ones_like(sizes) if is_last else sizes < RESAMPLE_BELOW * size).nonzero().flatten().tolist():
        chosen[i] = i * size + resample(weights[i], size, generators[i * size])
        log_weights[i] = 0
    return chosen.flatten(), log_weights
