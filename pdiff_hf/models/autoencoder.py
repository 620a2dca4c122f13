"""The parameter autoencoder (paper, section 2.3): a 1-D convolutional network from parameters to latents and back."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn

from ..parameters import LayoutError, ParameterLayout
from .saved import FORMAT_VERSION, SavedModel, check_format_version

# `paper` has the published widths. Those of `small` need 1/35 of its operations and, at a higher
# learning rate, explain more of the variance of the snapshots in fewer steps.
AUTOENCODER_PRESETS = {
    "paper": {"block_out_channels": (64, 128, 256, 256, 32)},
    "small": {"block_out_channels": (8, 16, 32, 64, 32)},
}


@dataclass
class ParameterAutoencoderOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor`): Shape `(N, D)`. The reconstruction, in normalised units.
        target (`torch.Tensor`): Shape `(N, D)`. What it should be: the normalised parameters without noise.
        kl (`torch.Tensor`, *optional*): Shape `(N,)`, of a variational autoencoder: the divergence of each posterior
            from the prior N(0, I), in nats.
    """

    sample: torch.Tensor
    target: torch.Tensor | None = None  # always given; Accelerate's mixed precision makes outputs from one dict
    kl: torch.Tensor | None = None


@dataclass
class ParameterEncoderOutput(BaseOutput):
    """
    Args:
        latents (`torch.Tensor`): Shape `(N, L)`. Each coordinate has mean 0 and variance 1 over the training snapshots.
    """

    latents: torch.Tensor


@dataclass
class ParameterDecoderOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor`): Shape `(N, D)`. Parameters, in their natural units.
    """

    sample: torch.Tensor


class ParameterAutoencoder(SavedModel, ConfigMixin):
    r"""
    Encodes parameter vectors as latents and decodes latents to parameters.

    The encoder is a stack of strided 1-D convolutions and one fully-connected layer; the decoder mirrors it. Group
    normalization with one group takes the place of the batch normalization of the published implementation: it does the
    same in training and in use, for one network and for many, on one process and on several.

    This model inherits from [`ModelMixin`]. Its buffers hold what the trained weights need to be of use: the mean of
    every parameter and the standard deviation of every tensor, and the mean and standard deviation of every latent
    coordinate.

    Args:
        layout (`dict`): The tensors that make up a vector of D parameters, as [`ParameterLayout.to_dict`] gives them.
        latent_dim (`int`, *optional*, defaults to 128): L, the length of a latent.
        block_out_channels (`tuple[int, ...]`, *optional*, defaults to `(64, 128, 256, 256, 32)`): Channels of the
            encoder's convolutions, each of which halves the length.
        kernel_size (`int`, *optional*, defaults to 7): Of every convolution; odd.
        variational (`bool`, *optional*, defaults to `False`): A VAE (paper, appendix B.2): the encoder gives the mean
            and the log-variance of a latent, `forward` samples from them, and `encode` returns the mean.
        format_version (`int`, *optional*): Of the saved files, which carry it so that an older release can refuse them.

    Raises:
        LayoutError: if the latent is longer than the vector, or the kernel size is even.
    """

    # What is stored in them is lost in half precision: the spread of a tensor is a small part of its mean.
    _keep_in_fp32_modules = ["parameter_mean", "parameter_std", "latent_mean", "latent_std"]

    @register_to_config
    def __init__(
        self,
        layout: dict,
        latent_dim: int = 128,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 256, 32),
        kernel_size: int = 7,
        variational: bool = False,
        format_version: int = FORMAT_VERSION,
    ):
        super().__init__()
        check_format_version(format_version)
        self.layout = ParameterLayout.from_dict(layout)
        num_parameters = self.layout.num_parameters
        if not 1 <= latent_dim <= num_parameters:
            raise LayoutError(
                f"latent_dim must lie between 1 and the {num_parameters} selected parameters, got {latent_dim}: a "
                "latent that is longer than the vector compresses nothing"
            )
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise LayoutError(f"kernel_size must be odd, so that a convolution keeps the length, got {kernel_size}")
        stride = 2 ** len(block_out_channels)
        self.padded_length = -(-num_parameters // stride) * stride
        length, padding = self.padded_length // stride, kernel_size // 2

        encoder, channels = [], 1
        for out_channels in block_out_channels:
            encoder += [
                nn.Conv1d(channels, out_channels, kernel_size, stride=2, padding=padding),
                nn.GroupNorm(1, out_channels),
                nn.LeakyReLU(),
            ]
            channels = out_channels
        num_outputs = 2 * latent_dim if variational else latent_dim
        self.encoder = nn.Sequential(*encoder, nn.Flatten(), nn.Linear(channels * length, num_outputs))

        decoder = [nn.Linear(latent_dim, channels * length), nn.Unflatten(1, (channels, length))]
        for out_channels in (*block_out_channels[-2::-1], block_out_channels[0]):
            decoder += [
                nn.ConvTranspose1d(channels, out_channels, kernel_size, stride=2, padding=padding, output_padding=1),
                nn.GroupNorm(1, out_channels),
                nn.ELU(),
            ]
            channels = out_channels
        self.decoder = nn.Sequential(*decoder, nn.Conv1d(channels, 1, kernel_size, padding=padding))

        self.register_buffer("parameter_mean", torch.zeros(num_parameters))
        self.register_buffer("parameter_std", torch.ones(len(self.layout.names)))
        self.register_buffer("latent_mean", torch.zeros(latent_dim))
        self.register_buffer("latent_std", torch.ones(latent_dim))

    @torch.no_grad()
    def fit_parameter_statistics(self, parameters: torch.Tensor) -> None:
        """
        Sets the normalisation from snapshots, shape `(N, D)`: the mean of every parameter, and for every tensor the
        standard deviation around it. (The published implementation takes one mean a tensor; with a mean a parameter,
        the network need not learn the mean network, and explains more of what differs between snapshots.)
        """
        mean = parameters.double().mean(0)
        self.parameter_mean.copy_(mean)
        for i, piece in enumerate((parameters - mean).split(self.layout.sizes, dim=1)):
            std = piece.square().mean().sqrt()
            self.parameter_std[i] = std if std > 0 else 1.0  # a tensor that never changes, or an empty one (NaN)

    @torch.no_grad()
    def fit_latent_statistics(self, parameters: torch.Tensor, batch_size: int = 64) -> None:
        """Sets the latents' mean and standard deviation from snapshots, shape `(N, D)`. Call it after training."""
        latents = torch.cat([self._encode(self.normalize(batch))[0] for batch in parameters.split(batch_size)]).double()
        std = latents.std(0, correction=0)
        self.latent_mean.copy_(latents.mean(0))
        self.latent_std.copy_(torch.where(std > 0, std, 1.0))

    def _scale(self) -> torch.Tensor:
        """Standard deviation that belongs to every parameter, shape `(D,)`."""
        sizes = torch.tensor(self.layout.sizes, device=self.parameter_std.device)
        return self.parameter_std.repeat_interleave(sizes, output_size=self.layout.num_parameters)

    def normalize(self, parameters: torch.Tensor) -> torch.Tensor:
        """Natural to normalised units, shape `(N, D)`."""
        return (parameters - self.parameter_mean) / self._scale()

    def _encode(self, normalized: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The network's own latents, `(N, L)`, and their log-variances where it is variational."""
        padded = F.pad(normalized, (0, self.padded_length - normalized.shape[1]))  # (N, D) -> (N, padded length)
        encoded = self.encoder(padded.unsqueeze(1).to(self.dtype))  # (N, 1, padded length) -> (N, L) or (N, 2 L)
        return encoded.chunk(2, dim=1) if self.config.variational else (encoded, None)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        sample = self.decoder(latents.to(self.dtype)).squeeze(1)  # (N, L) -> (N, padded length)
        return sample[:, : self.layout.num_parameters].float()

    def encode(self, parameters: torch.Tensor) -> ParameterEncoderOutput:
        """Parameters in natural units, shape `(N, D)`, to standardised latents, shape `(N, L)`."""
        latents = self._encode(self.normalize(parameters))[0].float()
        return ParameterEncoderOutput(latents=(latents - self.latent_mean) / self.latent_std)

    def decode(self, latents: torch.Tensor) -> ParameterDecoderOutput:
        """Standardised latents, shape `(N, L)`, to parameters in natural units, shape `(N, D)`, always float32."""
        normalized = self._decode(latents * self.latent_std + self.latent_mean)
        return ParameterDecoderOutput(sample=normalized * self._scale() + self.parameter_mean)

    @torch.no_grad()
    def sample_prior(self, num_models: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Parameters, shape `(num_models, D)`, from the prior N(0, I) of a variational autoencoder's own latent."""
        if not self.config.variational:
            raise ValueError("only a variational autoencoder has a prior to sample from")
        shape = (num_models, self.config.latent_dim)
        latents = torch.randn(shape, generator=generator).to(self.device)
        return self._decode(latents) * self._scale() + self.parameter_mean

    def forward(
        self,
        parameters: torch.Tensor,
        parameter_noise: float = 0.0,
        latent_noise: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> ParameterAutoencoderOutput:
        """
        Encodes with noise and decodes with noise, as in training (paper, equation 5).

        Args:
            parameters (`torch.Tensor`): Shape `(N, D)`, in natural units.
            parameter_noise (`float`, *optional*, defaults to 0): σ_v, in normalised units.
            latent_noise (`float`, *optional*, defaults to 0): σ_z, in units of the network's own latent. A variational
                autoencoder samples its latent instead.
            generator (`torch.Generator`, *optional*): Of the noise.
        """
        target = self.normalize(parameters)
        noisy = target
        if parameter_noise > 0:
            noise = torch.randn(target.shape, generator=generator, device=target.device)
            noisy = target + parameter_noise * noise
        latents, log_variance = self._encode(noisy)
        kl = None
        if log_variance is not None:
            latent_noise = (0.5 * log_variance).exp()
            kl = 0.5 * (latents.square() + log_variance.exp() - 1 - log_variance).float().sum(1)  # (N, L) -> (N,)
        if log_variance is not None or latent_noise > 0:
            latents = latents + latent_noise * torch.randn(latents.shape, generator=generator, device=latents.device)
        return ParameterAutoencoderOutput(sample=self._decode(latents), target=target, kl=kl)
