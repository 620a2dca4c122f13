"""Small but real generators."""

import torch
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from pdiff_hf import LatentDenoiser, ParameterAutoencoder, ParameterLayout, PDiffPipeline, select_parameters
from pdiff_hf.run.stages import make_sampling_scheduler
from pdiff_hf.training import make_training_scheduler

LATENT_DIM = 6


def make_network(seed: int = 0) -> PreTrainedModel:
    """timm's smallest ResNet, for 4 classes, with the weights of a seed."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model("timm_wrapper", architecture="test_resnet", num_labels=4)
    return AutoModelForImageClassification.from_config(config).eval()


def make_pipeline(network, select="norm[-2:]", seed=0, **components) -> PDiffPipeline:
    """A generator of parts of `network` with the weights of a seed; `components` take the place of its own."""
    torch.manual_seed(seed)
    layout = ParameterLayout.from_state_dict(network.state_dict(), select_parameters(network, select))
    autoencoder = ParameterAutoencoder(layout.to_dict(), latent_dim=LATENT_DIM, block_out_channels=(4, 4, 4))
    autoencoder.fit_parameter_statistics(1 + torch.randn(8, layout.num_parameters))
    denoiser = LatentDenoiser(LATENT_DIM, block_out_channels=(4, 4), bottleneck_dim=8, embedding_dim=16)
    torch.nn.init.normal_(denoiser.conv_out.weight, std=0.1)
    components = {
        "autoencoder": autoencoder.eval(),
        "denoiser": denoiser.eval(),
        "scheduler": make_sampling_scheduler(make_training_scheduler()),
        "base_model": network,
    } | components
    pipe = PDiffPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, num_models=4, seed=0, output_type="pt", **kwargs):
    """What `pipe` generates from a seed in 3 steps."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        num_models, generator=generator, output_type=output_type, **{"num_inference_steps": 3} | kwargs
    ).parameters
