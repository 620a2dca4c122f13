"""The generator: autoencoder and denoiser."""

from .autoencoder import AUTOENCODER_PRESETS, ParameterAutoencoder, autoencoder_architecture, encode_in_batches
from .denoiser import DENOISER_PRESETS, LatentDenoiser

__all__ = [
    "AUTOENCODER_PRESETS",
    "DENOISER_PRESETS",
    "LatentDenoiser",
    "ParameterAutoencoder",
    "autoencoder_architecture",
    "encode_in_batches",
]
