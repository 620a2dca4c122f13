"""Every scheduler of the installed diffusers gives latents of the right spread, or an error that names it."""

import inspect

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, schedulers
from support.pipelines import make_network, make_pipeline

from pdiff_hf.models.scheduler import check_scheduler
from pdiff_hf.training import make_sampling_scheduler, make_training_scheduler

CLASSES = {
    name: kind
    for name, kind in vars(schedulers).items()
    if inspect.isclass(kind) and issubclass(kind, SchedulerMixin) and kind is not SchedulerMixin
}
FITTING = {
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
}
SPREAD = 3.0  # of the latents that the denoiser below knows


class GaussianDenoiser(torch.nn.Module):
    """Knows latents of N(0, SPREAD²) exactly: as well trained as a network can be."""

    def __init__(self, scheduler: DDPMScheduler):
        super().__init__()
        self.kept, self.prediction_type = scheduler.alphas_cumprod, scheduler.config.prediction_type

    def forward(self, sample, timestep, condition=None):
        place = torch.as_tensor(timestep).double().clamp(0, len(self.kept) - 1)
        low, high = self.kept[place.floor().long()], self.kept[place.ceil().long()]
        kept = low + (place - place.floor()) * (high - low)
        share = sample / (kept * SPREAD**2 + 1 - kept)
        noise, clean = (1 - kept).sqrt() * share, kept.sqrt() * SPREAD**2 * share
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean
        predicted = {"epsilon": noise, "sample": clean, "v_prediction": velocity}[self.prediction_type]
        return type("Output", (), {"sample": predicted.float()})


@pytest.fixture(scope="module")
def pipe():
    pipe = make_pipeline(make_network())
    gaussian = GaussianDenoiser(make_training_scheduler())
    pipe.denoiser.forward = gaussian.forward
    return pipe


def make(name: str, config) -> SchedulerMixin:
    """From the settings of the saved scheduler, but for what a class does not know."""
    if name == "SASolverScheduler":
        return CLASSES[name].from_config(config, algorithm_type="data_prediction")
    return CLASSES[name].from_config(config)


@pytest.mark.parametrize("name", sorted(CLASSES))
@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")
def test_a_scheduler_samples_the_right_spread_or_is_named(pipe, name):
    config = make_sampling_scheduler(make_training_scheduler()).config
    try:
        scheduler = make(name, config)
    except Exception:  # it cannot be made from these settings, so that nobody can put it into a pipeline
        assert name not in FITTING
        return
    pipe.scheduler = scheduler
    generator = torch.Generator().manual_seed(0)
    if name not in FITTING:
        with pytest.raises(ValueError, match=f"^{name} cannot sample latents with the settings that it has"):
            pipe(2, num_inference_steps=2, output_type="latent", generator=generator)
        return
    latents = pipe(300, num_inference_steps=50, output_type="latent", generator=generator).parameters
    assert latents.std().item() == pytest.approx(SPREAD, rel=0.1)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(),  # clips to (-1, 1)
        DDIMScheduler(thresholding=True, clip_sample=False),
        DPMSolverMultistepScheduler.from_config(make_training_scheduler().config, prediction_type="no such"),
    ],
)
def test_settings_that_change_the_spread_are_refused(pipe, scheduler):
    with pytest.raises(ValueError, match=f"^{type(scheduler).__name__} cannot sample latents"):
        check_scheduler(scheduler)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_what_a_run_trains_with_samples_the_right_spread(prediction_type, kind):
    training = make_training_scheduler(prediction_type=prediction_type)
    pipe = make_pipeline(make_network(), scheduler=make_sampling_scheduler(training))
    if kind is not DPMSolverMultistepScheduler:
        pipe.scheduler = kind.from_config(training.config)
    pipe.denoiser.forward = GaussianDenoiser(training).forward
    generator = torch.Generator().manual_seed(0)
    latents = pipe(300, num_inference_steps=50, output_type="latent", generator=generator).parameters
    assert latents.std().item() == pytest.approx(SPREAD, rel=0.15)
