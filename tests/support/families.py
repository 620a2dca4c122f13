"""Small families of tasks over the digits, and a network for them."""

import torch
from diffusers import DPMSolverMultistepScheduler

from pdiff_hf import LatentDenoiser, ParameterAutoencoder, ParameterLayout
from pdiff_hf.models import ConditionEncoder
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.tasks import ImageClassificationTask
from pdiff_hf.tasks.family import Family
from pdiff_hf.tasks.image_families import TransformedFamily
from pdiff_hf.tasks.label_groups import GroupedFamily
from pdiff_hf.training import make_training_scheduler
from pdiff_hf.training.denoiser import LatentGenerator
from pdiff_hf.training.tune import GeneratedNetworks


def make_family(kind: str = "transformed", **arguments) -> Family:
    base = ImageClassificationTask(
        model="perceptron_mini",
        dataset="digits",
        image_size=8,
        model_args={"img_size": 8, "hidden_size": 6},
        max_train_samples=200,
        max_eval_samples=60,
    )
    return (TransformedFamily if kind == "transformed" else GroupedFamily)(base, **arguments)


def make_networks(family: Family) -> NetworkRunner:
    torch.manual_seed(0)
    model = family.load_base_model()
    names = [name for name, _ in model.named_parameters()]
    return NetworkRunner(model, ParameterLayout.from_state_dict(model.state_dict(), names))


def make_generated(
    family, networks, conditional: bool, deterministic: bool = False, tuned_map: bool = False
) -> GeneratedNetworks:
    """An untrained generator with its networks."""
    torch.manual_seed(0)
    snapshots = networks.base_parameters() + 0.3 * torch.randn(12, networks.layout.num_parameters)
    autoencoder = ParameterAutoencoder(networks.layout.to_dict(), latent_dim=8, block_out_channels=())
    autoencoder.fit_parameter_statistics(snapshots)
    autoencoder.fit_latent_statistics(autoencoder.tokenize(snapshots))
    if tuned_map:
        autoencoder.add_tuned_map()
    encoder = ConditionEncoder(family.fields.to_dict(), embedding_dim=8) if conditional else None
    denoiser = LatentDenoiser(
        8, block_out_channels=(), bottleneck_dim=16, embedding_dim=16, condition_dim=8 if conditional else None
    )
    sampler = DPMSolverMultistepScheduler.from_config(
        make_training_scheduler(prediction_type="v_prediction").config, final_sigmas_type="zero"
    )
    sampler = None if deterministic else sampler
    return GeneratedNetworks(LatentGenerator(denoiser, encoder), autoencoder, sampler, 3, networks, family.predict)
