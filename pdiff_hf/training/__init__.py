"""Training of the autoencoder and the denoiser in one loop."""

from .autoencoder import NoiseArguments, train_autoencoder
from .denoiser import make_training_scheduler, train_denoiser

__all__ = [
    "NoiseArguments",
    "make_training_scheduler",
    "train_autoencoder",
    "train_denoiser",
]
