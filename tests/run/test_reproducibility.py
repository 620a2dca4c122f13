"""The same seed gives the same bits, however many networks are asked for and however many are computed at once."""

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from pdiff_hf import LatentDenoiser, ParameterAutoencoder, ParameterLayout, PDiffPipeline
from pdiff_hf.models import DENOISER_PRESETS, autoencoder_architecture
from pdiff_hf.training import make_sampling_scheduler, make_training_scheduler

SIZES = {
    "small": (2048, 128, autoencoder_architecture("tokens", 2048), DENOISER_PRESETS["small"]),
    "narrow": (70, 5, {"block_out_channels": (3, 2)}, {"block_out_channels": (2, 3), "bottleneck_dim": 7}),
    # Blocks of 3 networks of so many numbers are decoded at once.
    "long": (1_200_000, 4, {"block_out_channels": (2, 2, 2, 2, 1)}, {"block_out_channels": (2, 2)}),
}


def make_pipeline(size: str) -> PDiffPipeline:
    num_parameters, latent_dim, widths, denoiser_widths = SIZES[size]
    torch.manual_seed(0)
    layout = ParameterLayout(["weight"], [(num_parameters,)], ["float32"])
    autoencoder = ParameterAutoencoder(layout.to_dict(), latent_dim=latent_dim, **widths)
    autoencoder.fit_parameter_statistics(torch.randn(9, num_parameters))
    denoiser = LatentDenoiser(latent_dim, **denoiser_widths)
    torch.nn.init.normal_(denoiser.conv_out.weight, std=0.1)
    pipe = PDiffPipeline(autoencoder.eval(), denoiser.eval(), make_sampling_scheduler(make_training_scheduler()))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, num_models, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    kwargs = {"num_inference_steps": 3, "output_type": "pt"} | kwargs
    return pipe(num_models, generator=generator, **kwargs).parameters


@pytest.mark.parametrize("scheduler_class", [None, DDPMScheduler])
@pytest.mark.parametrize("size", ["small", "narrow"])
def test_the_number_of_networks_does_not_change_a_bit(size, scheduler_class):
    pipe = make_pipeline(size)
    if scheduler_class is not None:
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    many = sample(pipe, 130)
    assert len(many.unique(dim=0)) == 130
    for num_models in (1, 3, 8, 9, 40, 41, 129):
        assert torch.equal(sample(pipe, num_models), many[:num_models])
    latents = sample(pipe, 130, output_type="latent")
    assert torch.equal(sample(pipe, 3, output_type="latent"), latents[:3])
    assert torch.equal(pipe.decode_latents(latents), many)
    assert torch.equal(pipe.decode_latents(latents[:45]), many[:45])


def test_long_vectors_are_decoded_in_smaller_blocks_with_the_same_bits():
    pipe = make_pipeline("long")
    many = sample(pipe, 7, num_inference_steps=2)
    for num_models in (1, 2, 4):
        few = sample(pipe, num_models, num_inference_steps=2)
        assert torch.equal(few, many[:num_models])


def test_another_process_gives_the_same_bits_from_the_saved_folder(run_server, tmp_path):
    pipe = make_pipeline("small")
    pipe.save_pretrained(tmp_path / "pipeline")
    program = """
import sys, torch
from pdiff_hf import PDiffPipeline
from safetensors.torch import save_file
pipe = PDiffPipeline.from_pretrained(sys.argv[1])
networks = pipe(11, 3, torch.Generator().manual_seed(1), output_type="pt").parameters
save_file({"networks": networks}, sys.argv[2])
"""
    written = tmp_path / "networks.safetensors"
    result = run_server.program(program, tmp_path / "pipeline", written)
    assert result.status == 0, result.errors
    assert load_file(written)["networks"].numpy().tobytes() == sample(pipe, 11).numpy().tobytes()
