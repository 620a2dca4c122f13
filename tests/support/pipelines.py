"""Small but real generators."""

import torch
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from pdiff_hf import LatentDenoiser, ParameterAutoencoder, ParameterLayout, PDiffPipeline, select_parameters
from pdiff_hf.models import ConditionEncoder
from pdiff_hf.training import make_sampling_scheduler, make_training_scheduler

LATENT_DIM = 6
FIELDS = {
    "angle": {"type": "angle"},
    "blur": {"type": "scalar", "low": 0.0, "high": 2.0},
    "kind": {"type": "category", "values": ["plain", "inverted"]},
    "bits": {"type": "vector", "length": 3},
}
EMBEDDING_DIM = 12


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


def make_conditional_pipeline() -> PDiffPipeline:
    """A generator that takes conditions of `FIELDS`."""
    torch.manual_seed(1)
    encoder = ConditionEncoder(FIELDS, embedding_dim=EMBEDDING_DIM)
    generator = torch.Generator().manual_seed(0)
    seen = [
        {
            "angle": 360 * torch.rand((), generator=generator).item(),
            "blur": 2 * torch.rand((), generator=generator).item(),
            "kind": ["plain", "inverted"][i % 2],
            "bits": [i % 2, i // 2 % 2, 1],
        }
        for i in range(8)
    ]
    encoder.remember(encoder.fields.table(seen))
    denoiser = LatentDenoiser(
        LATENT_DIM,
        block_out_channels=(4, 4),
        bottleneck_dim=8,
        embedding_dim=16,
        condition_dim=EMBEDDING_DIM,
        condition_dropout=0.1,
    )
    for parameter in denoiser.parameters():  # some start at zero, so that a condition would make no difference
        torch.nn.init.normal_(parameter, std=0.2)
    return make_pipeline(make_network(), denoiser=denoiser.eval(), condition_encoder=encoder.eval())


def sample(pipe, num_models=4, seed=0, output_type="pt", **kwargs):
    """What `pipe` generates from a seed in 3 steps."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        num_models, generator=generator, output_type=output_type, **{"num_inference_steps": 3} | kwargs
    ).parameters
