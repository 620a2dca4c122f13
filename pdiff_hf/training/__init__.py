"""Training of the autoencoder and the denoiser in one loop."""

from .autoencoder import train_autoencoder
from .denoiser import gaussian_loss, make_sampling_scheduler, make_training_scheduler, train_denoiser
from .loop import Loop, LoopArguments, TrainingError, warn_of_rise
from .state import LoopState
