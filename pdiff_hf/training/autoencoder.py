"""Trains the parameter autoencoder (paper, section 2.3)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..layout import ParameterLayout
from ..models import ParameterAutoencoder
from ..models.autoencoder import BATCH_SIZE
from ..utils.seeds import derive_seed
from .loop import Loop, LoopArguments

# Of decoded networks `(n, D)`, the snapshots `(n,)` that they stand for, and a source of noise; a scalar.
OutputLoss = Callable[[torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]


def train_autoencoder(
    loop: Loop,
    snapshots: torch.Tensor,
    layout: ParameterLayout,
    args: LoopArguments,
    *,
    seen: torch.Tensor | None = None,
    latent_dim: int,
    architecture: Mapping[str, Any],
    normalization: str = "coordinate",
    latent_scaling: str = "each",
    parameter_noise: float = 1e-3,
    latent_noise: float = 0.1,
    model_class: type[ParameterAutoencoder] = ParameterAutoencoder,
    output_loss: OutputLoss | None = None,
) -> tuple[ParameterAutoencoder, torch.Tensor]:
    """
    Trains an autoencoder on snapshots to return the clean vector for a noisy one, and sets its statistics from them.
    Memory grows with D as the autoencoder does: the snapshots stay where they lie, the bases of tokens are kept once,
    outside of the optimizer and of checkpoints.

    Args:
        loop (`Loop`): Where the training runs.
        snapshots (`torch.Tensor`): Shape `(K, D)`; it may be mapped from a file.
        seen (`torch.Tensor`, *optional*): Indices of the snapshots to train on, shape `(N,)`; all by default.
        architecture (`Mapping[str, Any]`): More arguments of [`ParameterAutoencoder`], see
            [`autoencoder_architecture`]. Without convolutions there is nothing to train, and no step is taken.
        normalization (`str`, *optional*, defaults to `"coordinate"`): Of `fit_parameter_statistics`.
        latent_scaling (`str`, *optional*, defaults to `"each"`): Of `fit_latent_statistics`.
        parameter_noise (`float`, *optional*, defaults to 0.001), latent_noise (`float`, *optional*, defaults to 0.1):
            σ_v and σ_z; see [`ParameterAutoencoder.forward`].
        model_class (`type`, *optional*): A subclass of [`ParameterAutoencoder`] to train.
        output_loss (`Callable`, *optional*): `output_loss(parameters, rows, generator)` of the decoded networks, shape
            `(n, D)`, in place of the snapshots with the indices `rows`: what it is trained on, in place of parameters.

    Returns:
        `tuple`: The autoencoder in eval mode on the CPU, and the loss (mean squared error in normalised units, or
        that of outputs) at every step, shape `(args.num_steps,)`.
    """
    torch.manual_seed(derive_seed(loop.seed, 0))
    autoencoder = model_class(layout.to_dict(), latent_dim=latent_dim, **architecture)
    seen = torch.arange(len(snapshots)) if seen is None else seen
    geometry = autoencoder.fit_parameter_statistics(snapshots, normalization, rows=seen)
    if geometry is not None:
        autoencoder.adapter_geometry = geometry.report()  # warnings come before anything is trained
    with torch.no_grad():  # what comes before the network never changes, so it is computed once
        tokens = torch.cat([autoencoder.tokenize(snapshots, rows) for rows in seen.split(BATCH_SIZE)])
    basis, products = getattr(autoencoder, "token_basis", None), autoencoder.products

    def loss_function(model, indices, generator):
        output = model(tokens[indices].to(loop.device), parameter_noise, latent_noise, generator)
        if output_loss is not None:
            return output_loss(
                autoencoder.with_factors(autoencoder.detokenize(output.sample)), seen[indices], generator
            )
        return autoencoder.reconstruction_loss(output)

    losses = torch.empty(0)
    if any(True for _ in autoencoder.parameters()):
        if output_loss is None:  # training needs tokens alone
            if basis is not None:
                autoencoder.token_basis = None
            autoencoder.products = None
        losses = loop.train(autoencoder, loss_function, len(tokens), args, description="autoencoder")
    if basis is not None:
        autoencoder.token_basis = basis
    autoencoder.products = products
    autoencoder.to("cpu").eval()
    autoencoder.fit_latent_statistics(tokens, scaling=latent_scaling)
    return autoencoder, losses
