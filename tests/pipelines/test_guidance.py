"""Sampling that a loss steers: the distribution where it is known, real networks, conditions, and wrong losses."""

import pytest
import torch
from diffusers import DDIMScheduler
from support.pipelines import make_network, make_pipeline, sample
from test_conditional_pipeline import KNOWN, make_conditional_pipeline

from pdiff_hf import ParameterAutoencoder, ParameterLayout, PDiffPipeline
from pdiff_hf.networks.posterior import log_likelihoods
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.pipelines import guidance

MEAN, COVARIANCE = torch.tensor([0.5, -0.3]), torch.tensor([[0.9, 0.4], [0.4, 0.6]])  # of clean latents
TARGET, SCALE = torch.tensor([1.0, -1.0, 0.5]), 1.5


def gaussian_case(predicts: str = "sample"):
    """A denoiser of Gaussian latents, a linear decoder, and the scheduler."""
    torch.manual_seed(0)
    layout = ParameterLayout.from_state_dict({"weight": torch.zeros(3)}, ["weight"])
    autoencoder = ParameterAutoencoder(layout.to_dict(), latent_dim=2, block_out_channels=()).eval()
    snapshots = torch.randn(50, 3) * torch.tensor([1.0, 0.7, 0.1])
    autoencoder.fit_parameter_statistics(snapshots)
    autoencoder.fit_latent_statistics(autoencoder.tokenize(snapshots))
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=predicts)
    scheduler.set_timesteps(6)

    def denoiser(level):
        """ẑ = A z + b."""
        gain = COVARIANCE * level.sqrt() @ torch.linalg.inv(level * COVARIANCE + (1 - level) * torch.eye(2))
        return gain, MEAN - gain @ MEAN * level.sqrt()

    return autoencoder, scheduler, denoiser


def draw(num_particles: int, predicts: str = "sample") -> torch.Tensor:
    autoencoder, scheduler, denoiser = gaussian_case(predicts)

    def denoise(rows, timestep):
        level = scheduler.alphas_cumprod[timestep]
        gain, shift = denoiser(level)
        clean = rows @ gain.T + shift
        noise = (rows - level.sqrt() * clean) / (1 - level).sqrt()
        velocity = level.sqrt() * noise - (1 - level).sqrt() * clean
        return {"sample": clean, "epsilon": noise, "v_prediction": velocity}[predicts]

    generators = [torch.Generator().manual_seed(i) for i in range(num_particles)]
    noise = torch.cat([torch.randn(1, 2, generator=one) for one in generators])
    twist = lambda parameters: -SCALE * (parameters - TARGET).square().sum(1) / 2  # noqa: E731
    return guidance.guided_latents(
        denoise,
        autoencoder,
        scheduler,
        noise,
        generators,
        num_particles,
        twist,
        lambda step, timestep, latents: latents,
    )


def tilted_gaussian() -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of what `draw` samples from: ancestral sampling in closed form, then the loss."""
    autoencoder, scheduler, denoiser = gaussian_case()
    levels = [*(scheduler.alphas_cumprod[t] for t in scheduler.timesteps), torch.tensor(1.0)]
    mean, covariance = torch.zeros(2), torch.eye(2)
    for level, after in zip(levels, levels[1:], strict=False):
        gain, shift = denoiser(level)
        of_clean = after.sqrt() * (1 - level / after) / (1 - level)
        step = of_clean * gain + (level / after).sqrt() * (1 - after) / (1 - level) * torch.eye(2)
        mean = step @ mean + of_clean * shift
        covariance = step @ covariance @ step.T + (1 - after) / (1 - level) * (1 - level / after) * torch.eye(2)
    offset = autoencoder.decode(torch.zeros(1, 2)).sample[0].detach()
    matrix = (autoencoder.decode(torch.eye(2)).sample.detach() - offset).T  # (3, 2)
    precision = torch.linalg.inv(covariance) + SCALE * matrix.T @ matrix
    right = torch.linalg.inv(covariance) @ mean + SCALE * matrix.T @ (TARGET - offset)
    return torch.linalg.solve(precision, right), torch.linalg.inv(precision)


def test_particles_are_a_sample_of_the_tilted_gaussian(monkeypatch):
    mean, covariance = tilted_gaussian()
    particles = draw(4000)
    torch.testing.assert_close(particles.mean(0), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(torch.cov(particles.T), covariance, atol=0.05, rtol=0)
    # Without the gradients they still are, and without the weights they are not.
    with monkeypatch.context() as patch:
        patch.setattr(guidance, "MAX_SHIFT", 1e-6)
        torch.testing.assert_close(draw(4000).mean(0), mean, atol=0.08, rtol=0)
    keep = lambda weights, *_: (torch.arange(weights.numel()), weights)  # noqa: E731
    monkeypatch.setattr(guidance, "_resample_groups", keep)
    assert (draw(4000).mean(0) - mean).abs().max() > 0.1


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_every_kind_of_prediction_gives_the_same_particles(predicts):
    torch.testing.assert_close(draw(60, predicts), draw(60), atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def examples() -> dict:
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": images, "labels": torch.tensor([0, 1, 2, 3, 0, 1])}


def test_labels_steer_real_networks(examples):
    pipe = make_pipeline(make_network())
    models = NetworkRunner(pipe.base_model, pipe.autoencoder.layout)
    plain = log_likelihoods(models, examples, sample(pipe, 30))
    loss_fn = pipe.example_loss(examples)
    # The labels are of noise, and networks differ little in them, so that the loss must count much.
    steered = sample(pipe, 30, loss_fn=loss_fn, loss_guidance_scale=20.0)
    assert log_likelihoods(models, examples, steered).mean() > plain.mean() + plain.std()
    torch.testing.assert_close(-loss_fn(steered).detach(), log_likelihoods(models, examples, steered))
    assert torch.equal(steered, sample(pipe, 30, loss_fn=loss_fn, loss_guidance_scale=20.0))
    assert torch.equal(sample(pipe, 30), sample(pipe, 30, guidance_scale=1.0))


def test_networks_of_a_condition_compete_among_themselves(examples):
    pipe = make_conditional_pipeline()
    settings = {"loss_fn": pipe.example_loss(examples), "loss_guidance_scale": 20.0}
    both = sample(pipe, 5, condition=[KNOWN, KNOWN | {"angle": 211.0}], **settings)
    assert torch.equal(both[:5], sample(pipe, 5, condition=KNOWN, **settings))
    assert not any(torch.equal(one, other) for one in both[:5] for other in both[5:])
    assert len(both[:5].unique(dim=0)) < 5
    steps = []
    watch = lambda pipe, step, timestep, values: steps.append(values["latents"].shape) or {}  # noqa: E731
    sample(pipe, 2, callback_on_step_end=watch, **settings)  # what is unknown is drawn, and is a part of a particle
    assert len(steps) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_fn": lambda p: p.sum()}, r"one loss for each network, shape \(8,\), with gradients; got shape \(\)"),
        ({"loss_fn": lambda p: p.detach().sum(1)}, r"got shape \(8,\) without gradients"),
        ({"loss_fn": lambda p: 0.0}, "got 0.0"),
        ({"loss_fn": lambda p: p.sum(1) * torch.nan}, "not finite for any network"),
        ({"loss_fn": lambda p: p.sum(1), "loss_guidance_scale": -1.0}, "loss_guidance_scale must be above 0"),
        ({"loss_guidance_scale": 2.0}, "loss_guidance_scale needs a loss_fn"),
        ({"loss_fn": lambda p: p.sum(1), "temperature": 0.5}, "at temperature 1; got 0.5"),
    ],
)
def test_wrong_losses(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(make_pipeline(make_network()), **arguments)


def test_a_loss_of_examples_needs_a_network_and_labels(examples):
    pipe = make_pipeline(make_network())
    with pytest.raises(ValueError, match="examples need labels"):
        pipe.example_loss({"pixel_values": examples["pixel_values"]})
    without = PDiffPipeline(**pipe.components | {"base_model": None})
    with pytest.raises(ValueError, match="needs a base model"):
        without.example_loss(examples)
