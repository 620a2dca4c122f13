"""Whether a scheduler samples what a denoiser of latents was trained for."""

import functools
import inspect
import json

import torch
from diffusers import DDPMScheduler, SchedulerMixin

# What a scheduler's config says of the process that noise was added by in training.
PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
# A scheduler is tried with so many steps on Gaussian latents of each standard deviation, which must come out again but
# for so large a part. Of the schedulers that fit, DDPM is off most with so few steps: by 12% of the smaller and 6% of
# the larger one. Of the others the nearest is one for consistency models (12% of both); the next are off by a third.
NUM_STEPS = 50
TOLERANCES = {0.5: 0.2, 2.0: 0.08}
NUM_SAMPLES = 2048


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """
    Tries a scheduler on latents for which the best denoiser is known: those of N(0, σ²), where the noise in a noisy
    latent x is expected to be √(1 − ᾱ) x / (ᾱ σ² + 1 − ᾱ). Sampling has to give that σ again.

    Raises:
        ValueError: names the scheduler if it fails, or if its latents have another spread: it is made for another
            process than adding noise at constant variance (flow matching, EDM), for other networks (consistency
            models), for another direction (inversion), or its settings cut latents off (`clip_sample`).
    """
    name = type(scheduler).__name__
    try:
        spreads = _spreads(type(scheduler), scheduler.to_json_string())  # type: ignore[arg-type]  # classes are hashable
    except Exception as error:  # what schedulers raise where they are used in another way has no common type
        raise ValueError(f"{name} cannot sample latents with the settings that it has: {error!r}") from error
    for (std, tolerance), spread in zip(TOLERANCES.items(), spreads, strict=True):
        if not abs(spread / std - 1) < tolerance:
            raise ValueError(
                f"{name} cannot sample latents with the settings that it has: where it should give a standard "
                f"deviation of {std}, it gives {spread:.2f}. It is made for another process or another network than a "
                "denoiser of latents, or it clips them. Use another one, such as "
                "DDIMScheduler.from_config(pipe.scheduler.config)"
            )


def signal_levels(scheduler: SchedulerMixin) -> torch.Tensor:
    """ᾱ of every timestep of the process that noise was added by in training, shape `(T,)`, float32."""
    process = {key: scheduler.config[key] for key in PROCESS if scheduler.config.get(key) is not None}
    if not {"num_train_timesteps", "beta_schedule"} <= process.keys():
        raise ValueError("its config does not say how noise was added in training (num_train_timesteps, beta_schedule)")
    return DDPMScheduler(**process).alphas_cumprod


def clean_sample(
    scheduler: SchedulerMixin, prediction: torch.Tensor, noisy: torch.Tensor, level: torch.Tensor
) -> torch.Tensor:
    """The clean latents that a denoiser's prediction for noisy ones stands for; `level` is their ᾱ."""
    predicts = scheduler.config.get("prediction_type", "epsilon")
    if predicts == "sample":
        return prediction
    if predicts == "v_prediction":
        return level.sqrt() * noisy - (1 - level).sqrt() * prediction
    return (noisy - (1 - level).sqrt() * prediction) / level.sqrt()


@functools.lru_cache(maxsize=64)
def _spreads(scheduler_class: type[SchedulerMixin], config: str) -> tuple[float, ...]:
    """Standard deviations of what such a scheduler samples, for each of `TOLERANCES`."""
    scheduler = scheduler_class.from_config(json.loads(config))
    kept = signal_levels(scheduler).double()  # ᾱ of every step, (T,)
    predicts, last = scheduler.config.get("prediction_type", "epsilon"), len(kept) - 1
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    generator = torch.Generator().manual_seed(0)
    extra = {"generator": generator} if takes_generator else {}
    variance = torch.tensor(list(TOLERANCES), dtype=torch.float64).square().unsqueeze(1)  # (2, 1)

    def denoise(noisy: torch.Tensor, timestep: float) -> torch.Tensor:
        timestep = min(max(timestep, 0.0), last)  # some schedulers take steps between those of training
        low, share = int(timestep), timestep % 1
        alpha = kept[low] + share * (kept[min(low + 1, last)] - kept[low])
        total = alpha * variance + 1 - alpha
        clean, noise = alpha.sqrt() * variance / total, (1 - alpha).sqrt() / total
        factors = {"epsilon": noise, "sample": clean, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * clean}
        return factors[predicts].float() * noisy

    scheduler.set_timesteps(min(NUM_STEPS, len(kept)))
    noise = torch.randn(len(variance), NUM_SAMPLES, generator=generator)
    noise = noise / noise.std(1, keepdim=True)
    latents = noise * (kept[-1] * variance + 1 - kept[-1]).sqrt().float() * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        prediction = denoise(scheduler.scale_model_input(latents, timestep), float(timestep))
        latents = scheduler.step(prediction, timestep, latents, **extra).prev_sample
    return tuple(latents.std(1).tolist())
