"""The generator: autoencoder and denoiser."""

from .autoencoder import AUTOENCODER_PRESETS, ParameterAutoencoder, autoencoder_architecture
from .denoiser import DENOISER_PRESETS, LatentDenoiser

__all__ = [
    "AUTOENCODER_PRESETS",
    "DENOISER_PRESETS",
    "LatentDenoiser",
    "ParameterAutoencoder",
    "autoencoder_architecture",
]
