"""The generator: autoencoder, condition encoder and denoiser."""

from .autoencoder import AUTOENCODER_PRESETS, ParameterAutoencoder, autoencoder_architecture, encode_in_batches
from .condition import Fields
from .condition_encoder import ConditionEncoder
from .denoiser import DENOISER_PRESETS, LatentDenoiser
from .fields import ConditionError
