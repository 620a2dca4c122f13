"""What an autoencoder is trained on, and what a denoiser must be better than."""

import pytest
import torch
from accelerate import Accelerator

from pdiff_hf.layout import ParameterLayout
from pdiff_hf.models import ParameterAutoencoder, autoencoder_architecture
from pdiff_hf.training import (
    Loop,
    LoopArguments,
    gaussian_loss,
    make_training_scheduler,
    train_autoencoder,
)
from pdiff_hf.training.denoiser import denoising_loss


@pytest.fixture(scope="module")
def snapshots():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(60, 30, generator=generator) * torch.linspace(3, 0.2, 30)


LAYOUT = ParameterLayout(("weight",), ((30,),), ("float32",))


def train(snapshots, num_steps, output_loss=None, preset="linear"):
    return train_autoencoder(
        Loop(Accelerator(cpu=True), 0),
        snapshots,
        LAYOUT,
        LoopArguments(num_steps, 20, 0.01),
        parameter_noise=0.0,
        latent_noise=0.0,
        latent_dim=4,
        architecture=autoencoder_architecture(preset, 30, num_snapshots=60),
        output_loss=output_loss,
    )[0]


def test_linear_maps_start_from_principal_components(snapshots):
    linear, pca = train(snapshots, 1), train(snapshots, 1, preset="pca")
    decoded = [one.decode(one.encode(snapshots).latents).sample for one in (linear, pca)]
    error = (decoded[0] - decoded[1]).square().mean() / decoded[1].square().mean()
    assert error < 0.01  # one step has been taken
    assert linear.config.token_dim == 30 and linear.config.linear


def test_an_autoencoder_of_outputs_keeps_what_networks_compute(snapshots, tmp_path):
    """Outputs follow from the last parameters alone, which vary least: principal components leave them out."""

    def output_loss(parameters, rows, generator):
        return (parameters[:, -3:] - snapshots[rows, -3:]).square().mean()

    def error(autoencoder):
        return output_loss(autoencoder.decode(autoencoder.encode(snapshots).latents).sample, torch.arange(60), None)

    autoencoder = train(snapshots, 400, output_loss)
    with torch.no_grad():
        assert error(autoencoder) < 0.1 * error(train(snapshots, 1, preset="pca"))
    autoencoder.save_pretrained(tmp_path)
    again = ParameterAutoencoder.from_pretrained(tmp_path)
    torch.testing.assert_close(again.encode(snapshots).latents, autoencoder.encode(snapshots).latents)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_of_a_gaussian_is_that_of_its_best_linear_denoiser(prediction_type):
    """Against a denoiser that knows the covariance, on many samples of the Gaussian itself."""
    variances = torch.tensor([4.0, 1.0, 0.1])
    clean = torch.randn(40_000, 3, generator=torch.Generator().manual_seed(0)) * variances.sqrt()
    scheduler = make_training_scheduler(1000, prediction_type)

    def best(noisy, timesteps, table=None, dropped=None):
        level = scheduler.alphas_cumprod[timesteps].unsqueeze(1)
        expected = level.sqrt() * variances / (level * variances + 1 - level) * noisy  # of the clean latent
        noise = (noisy - level.sqrt() * expected) / (1 - level).sqrt()
        return noise if prediction_type == "epsilon" else level.sqrt() * noise - (1 - level).sqrt() * expected

    measured = denoising_loss(best, scheduler, clean, torch.Generator().manual_seed(1))
    assert gaussian_loss(clean, scheduler) == pytest.approx(measured.item(), rel=0.02)
    assert gaussian_loss(clean * torch.tensor([0.5, 1.0, 3.0]), make_training_scheduler()) < 1
