"""The parameter autoencoder (paper, section 2.3): a 1-D convolutional network from parameters to latents and back."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..layout import LayoutError, ParameterLayout
from ..utils.memory import InParts
from .products import AdapterProducts
from .saved import FORMAT_VERSION, check_format_version
from .tokens import BLOCK_SIZE, TokenModel

# `tokens` explains more of the variance of the snapshots than the published widths of `paper`, at a small part of their
# operations and memory. `pca` is the linear control.
AUTOENCODER_PRESETS: dict[str, dict[str, Any]] = {
    "tokens": {"block_out_channels": (128,), "norm_num_groups": None, "token_dim": 32},
    "paper": {"block_out_channels": (64, 128, 256, 256, 32)},
    "pca": {"block_out_channels": ()},
    "linear": {"block_out_channels": (), "linear": True},
}
# Of principal components that the preset `linear` starts from, which bound what it keeps of held-out networks: so many
# values in their bases, 128 MB of float32, but no fewer components than these.
BASES, COMPONENTS = 2**25, 256
# From so many parameters on, the bases of the preset `tokens` are kept as int8: they are most of a generator then.
LARGE = 2**22
# So many snapshots are encoded at once.
BATCH_SIZE = 64


@dataclass
class ParameterAutoencoderOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor`): Shape `(N, C, S)`. The reconstruction of the tokens.
        target (`torch.Tensor`): Shape `(N, C, S)`. What it should be: the tokens without noise.
    """

    sample: torch.Tensor
    target: torch.Tensor = None  # type: ignore[assignment]  # always given; Accelerate makes outputs from one dict


@dataclass
class ParameterEncoderOutput(BaseOutput):
    """
    Args:
        latents (`torch.Tensor`): Shape `(N, L)`. Each coordinate has mean 0 and variance 1 over the training snapshots.
    """

    latents: torch.Tensor


def autoencoder_architecture(
    preset: str,
    num_parameters: int,
    token_size: int | None = None,
    num_snapshots: int | None = None,
    has_frames: bool = False,
) -> dict[str, Any]:
    """
    Arguments of [`ParameterAutoencoder`] for a preset.

    Args:
        preset (`str`): One of `AUTOENCODER_PRESETS`.
        num_parameters (`int`): D.
        token_size (`int`, *optional*): Of the preset `tokens`; by default the power of two from 2 √D upwards, with
            which the number of tokens and their size grow alike with D.
        num_snapshots (`int`, *optional*): K. A large network (from `LARGE` parameters) has bases of no more components
            than K - 1, which is all that K snapshots span.
        has_frames (`bool`, *optional*, defaults to `False`): Whether these are adapters between frames, whose bases are
            kept as those of large networks.
    """
    if preset == "linear":
        return AUTOENCODER_PRESETS[preset] | {"token_dim": num_components(num_parameters, num_snapshots)}
    if preset != "tokens":
        return AUTOENCODER_PRESETS[preset]
    default = 2 ** math.ceil(math.log2(2 * math.sqrt(num_parameters)))
    architecture = AUTOENCODER_PRESETS[preset] | {"token_size": token_size or default}
    if (num_parameters < LARGE and not has_frames) or architecture["token_size"] > BLOCK_SIZE // 4:
        return architecture
    token_dim = architecture["token_dim"] if num_snapshots is None else num_snapshots - 1
    return architecture | {"basis_dtype": "int8", "token_dim": min(token_dim, architecture["token_dim"])}


def num_components(num_parameters: int, num_snapshots: int | None = None) -> int:
    """How many principal components of D parameters, of K snapshots, the preset `linear` starts from."""
    most = max(COMPONENTS, BASES // num_parameters)
    return min(most, num_parameters, num_parameters if num_snapshots is None else num_snapshots - 1)


@torch.no_grad()
def encode_in_batches(autoencoder: "ParameterAutoencoder", parameters: torch.Tensor) -> torch.Tensor:
    """
    Latents of many networks on the CPU, without a copy of their parameters.

    Args:
        parameters (`torch.Tensor`): Shape `(K, D)`; it may be mapped from a file, and be on another device.
    """
    in_parts = InParts("networks")

    def encode(part: torch.Tensor) -> torch.Tensor:
        return autoencoder.encode(part).latents.cpu()

    return torch.cat([in_parts(encode, batch) for batch in parameters.split(BATCH_SIZE)])


class ParameterAutoencoder(TokenModel, ConfigMixin):
    r"""
    Encodes parameter vectors as latents and decodes latents to parameters.

    The encoder is a stack of strided 1-D convolutions and one fully-connected layer; the decoder mirrors it. What they
    see of a network is a signal of C channels and length S, its *tokens*:

    - By default the normalised vector itself (C = 1, S = D), as in the paper. Memory and time of training grow with D.
    - With `token_size`, the vector is cut into pieces along the boundaries of tensors, and of each piece the
      `token_dim` first principal components over the training snapshots are kept (C = `token_dim`, S = number of
      pieces, of which the last one of a tensor may be shorter). The bases are fixed and fitted exactly before training,
      so that training sees tokens only: its time, weights and activations grow with the number of tokens, and only the
      bases, D · C values without gradients, with D. One latent for all tokens keeps those of a network coherent.
    - Without convolutions (`block_out_channels=()`) the vector is one token, and the latents are its first `latent_dim`
      principal components: the exact linear autoencoder, a control for the learned ones. Nothing is trained. With
      `linear`, the latents are learned linear maps of the first `token_dim` components, and back, which start there.

    This model inherits from [`ModelMixin`]. Its buffers hold what the trained weights need to be of use: those of
    `TokenModel`, and the mean and standard deviation of every latent coordinate.

    Args:
        layout (`dict`): The tensors that make up a vector of D parameters, as [`ParameterLayout.to_dict`] gives them.
        latent_dim (`int`, *optional*, defaults to 128): L, the length of a latent.
        block_out_channels (`tuple[int, ...]`, *optional*, defaults to `(64, 128, 256, 256, 32)`): Channels of the
            encoder's convolutions, each of which halves the length.
        kernel_size (`int`, *optional*, defaults to 7): Of every convolution; odd.
        norm_num_groups (`int`, *optional*, defaults to 1): Groups of the group normalization; `None` for none.
        token_size (`int`, *optional*): Most parameters in a token; `None` for the whole vector as the signal.
        token_dim (`int`, *optional*, defaults to 32): Principal components that are kept of a token.
        basis_dtype (`str`, *optional*, defaults to `"float32"`): Of the bases of tokens. `"int8"`, with a float32 scale
            for each direction, takes a quarter of the memory and of the files and loses some 0.00003 of the variance.
        tuned_map (`bool`, *optional*, defaults to `False`): Add a linear map of latents to what they are decoded to,
            see [`add_tuned_map`].
        adapter_products (`bool`, *optional*, defaults to `False`): Learn the factors of LoRA adapters as their
            products, see [`~models.products.AdapterProducts`]; D is then the number of values with products in what is
            said of the vector, of statistics and of bases.
        adapter_frame_size (`int`, *optional*): With `adapter_products`, most vectors in a basis of the rows or columns
            of products; None for whole products.
        adapter_rank (`int`, *optional*): Cut products to this rank; by default to that of the factors.
        linear (`bool`, *optional*, defaults to `False`): See above; without convolutions alone.
        format_version (`int`, *optional*): Of the saved files, which carry it so that an older release can refuse them.

    Raises:
        LayoutError: if the latent is longer than the vector, the kernel size is even, there are no factors
            to be multiplied, or there would be more than `MAX_TOKENS` tokens.
    """

    @register_to_config
    def __init__(
        self,
        layout: dict,
        latent_dim: int = 128,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 256, 32),
        kernel_size: int = 7,
        norm_num_groups: int | None = 1,
        token_size: int | None = None,
        token_dim: int = 32,
        tuned_map: bool = False,
        adapter_products: bool = False,
        adapter_frame_size: int | None = None,
        basis_dtype: str = "float32",
        adapter_rank: int | None = None,
        linear: bool = False,
        format_version: int = FORMAT_VERSION,
    ):
        super().__init__()
        check_format_version(format_version)
        self.adapter_geometry: dict | None = None  # what training has found out about adapters
        self.layout = ParameterLayout.from_dict(layout)
        self.products = AdapterProducts(self.layout, adapter_frame_size) if adapter_products else None
        if self.products is not None:
            self.products.most = adapter_rank
        vectors = self.layout if self.products is None else self.products.layout
        if not 1 <= latent_dim <= vectors.num_parameters:
            raise LayoutError(
                f"latent_dim must lie between 1 and the {vectors.num_parameters} selected parameters, got {latent_dim}"
                ": a latent that is longer than the vector compresses nothing"
            )
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise LayoutError(f"kernel_size must be odd, so that a convolution keeps the length, got {kernel_size}")
        if linear and (block_out_channels or not latent_dim <= token_dim <= vectors.num_parameters):
            raise LayoutError(
                f"linear maps need block_out_channels=() and latent_dim <= token_dim, got {tuple(block_out_channels)}, "
                f"{latent_dim} and {token_dim}: fewer latents, or more snapshots, which token_dim is less than"
            )
        kept = token_dim if linear or block_out_channels else latent_dim
        self._init_tokens(vectors, block_out_channels, token_size, kept, basis_dtype)
        stride = 2 ** len(block_out_channels)
        self.padded_length = -(-self.token_shape[1] // stride) * stride
        self._init_networks(latent_dim)
        self.register_buffer("parameter_mean", torch.zeros(vectors.num_parameters))
        self.register_buffer("parameter_std", torch.ones(len(vectors.names)))
        self.register_buffer("latent_mean", torch.zeros(latent_dim))
        self.register_buffer("latent_std", torch.ones(latent_dim))
        if tuned_map:
            self.add_tuned_map()

    @classmethod
    def from_config(cls, config: dict, **kwargs: Any):
        """Like that of `SavedModel`; a `ValueError` for a variational autoencoder, as version 0.2 could train one."""
        config = dict(config)
        if config.pop("variational", False) and cls is ParameterAutoencoder:
            raise ValueError(
                "it is a variational autoencoder, which is no part of the package any more; load it with the class "
                "VariationalAutoencoder of scripts/reproduce/vae.py, or train another one"
            )
        return super().from_config(config, **kwargs)

    def _init_networks(self, num_outputs: int) -> None:
        """
        Sets `encoder`, which has `num_outputs`, and `decoder`; without convolutions they are the identity, or linear.

        Group normalization with one group takes the place of the batch normalization of the published implementation:
        it does the same in training and in use, for one network and for many, on one process and on several. Tokens do
        without, because it would remove how far a network is from the mean, which their components say directly.
        """
        widths, size, groups = self.config.block_out_channels, self.config.kernel_size, self.config.norm_num_groups
        num_channels, length = self.token_shape[0], self.padded_length // 2 ** len(widths)
        if not widths:
            maps: list[nn.Linear] = []
            if self.config.linear:  # they start as the identity on the first principal components
                maps = [nn.Linear(num_channels, num_outputs), nn.Linear(num_outputs, num_channels)]
            for layer in maps:
                nn.init.eye_(layer.weight)
                nn.init.zeros_(layer.bias)
            self.encoder = nn.Sequential(nn.Flatten(), *maps[:1])
            self.decoder = nn.Sequential(*maps[1:], nn.Unflatten(1, (num_channels, length)))
            return

        def norm(channels: int) -> list[nn.Module]:
            return [] if groups is None else [nn.GroupNorm(groups, channels)]

        halving: dict[str, Any] = {"kernel_size": size, "stride": 2, "padding": size // 2}
        flat = widths[-1] * length
        encoder: list[nn.Module] = []
        for before, after in zip((num_channels, *widths), widths, strict=False):
            encoder += [nn.Conv1d(before, after, **halving), *norm(after), nn.LeakyReLU()]
        decoder: list[nn.Module] = [nn.Unflatten(1, (widths[-1], length))]
        back = (*widths[::-1], widths[0])
        for before, after in zip(back, back[1:], strict=False):
            decoder += [nn.ConvTranspose1d(before, after, output_padding=1, **halving), *norm(after), nn.ELU()]
        encoder += [nn.Flatten(), nn.Linear(flat, num_outputs)]
        decoder = [nn.Linear(self.config.latent_dim, flat), *decoder]
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*decoder, nn.Conv1d(widths[0], num_channels, size, padding=size // 2))

    def add_tuned_map(self) -> None:
        """
        Adds a linear map from latents to parameters, L · D values that are 0 at first, to what latents are decoded to.
        Tuning on the task loss learns it: networks are then no longer bound to what the snapshots span. `encode` stays
        as it is.
        """
        self.register_to_config(tuned_map=True)
        self.map_weight = nn.Parameter(torch.zeros(self.config.latent_dim, self.vector_layout.num_parameters))

    @torch.no_grad()
    def fit_latent_statistics(self, tokens: torch.Tensor, scaling: str = "each") -> None:
        """
        Sets the latents' mean and standard deviation from snapshots' tokens, `(N, C, S)`. Call it after training.

        Args:
            scaling (`str`, *optional*, defaults to `"each"`): `each` entry of a latent has a variance of 1 over the
                snapshots, or all `together` have it on average. Principal components keep their proportions then, so
                that a denoiser learns first what differs most between networks.
        """
        latents = torch.cat([self._encode(batch) for batch in tokens.split(BATCH_SIZE)]).double()
        std = latents.std(0, correction=0)
        if scaling == "together":
            std = std.square().mean().sqrt().expand_as(std)
        self.latent_mean.copy_(latents.mean(0))
        self.latent_std.copy_(torch.where(std > 0, std, 1.0))

    def _encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """The network's own latents, `(N, L)`."""
        padded = F.pad(tokens, (0, self.padded_length - tokens.shape[-1]))  # (N, C, S) -> (N, C, padded length)
        return self.encoder(padded.to(self.dtype))

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The network's own latents, `(N, L)`, to tokens, `(N, C, S)`."""
        return self.decoder(latents.to(self.dtype))[:, :, : self.token_shape[1]]

    @apply_forward_hook  # that moves an offloaded model to its device
    def encode(self, parameters: torch.Tensor) -> ParameterEncoderOutput:
        """Parameters `(N, D)` in natural units to standardised latents `(N, L)`."""
        latents = self._encode(self.tokenize(parameters)).float()
        return ParameterEncoderOutput(latents=(latents - self.latent_mean) / self.latent_std)

    @apply_forward_hook
    def decode(self, latents: torch.Tensor, rank: int | None = None) -> DecoderOutput:
        """
        Standardised latents, shape `(N, L)`, to parameters in natural units, shape `(N, D)`, always float32. Adapters
        that are learned as products may have another `rank` than the snapshots; see [`layout_of_rank`].
        """
        sample = self.detokenize(self._decode(latents * self.latent_std + self.latent_mean))
        if self.config.tuned_map:
            sample = sample + latents.float() @ self.map_weight.float()
        return DecoderOutput(sample=self.with_factors(sample, rank))

    def with_factors(self, vectors: torch.Tensor, rank: int | None = None) -> torch.Tensor:
        """Vectors as parameters, `(N, D)`: of adapters that are learned as products, their factors."""
        return vectors if self.products is None else self.products.contract(vectors, rank)

    def layout_of_rank(self, rank: int | None) -> ParameterLayout:
        """The layout of what `decode` gives for a rank; a `ValueError` if only adapters' factors are known."""
        if rank is not None and self.products is None:
            raise ValueError("another rank is for adapters that are learned as products (adapter_products)")
        return self.layout if self.products is None else self.products.layout_of_rank(rank)

    def forward(
        self,
        tokens: torch.Tensor,
        parameter_noise: float = 0.0,
        latent_noise: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> ParameterAutoencoderOutput:
        """
        Encodes with noise and decodes with noise, as in training (paper, equation 5).

        Args:
            tokens (`torch.Tensor`): Shape `(N, C, S)`, of [`tokenize`].
            parameter_noise (`float`, *optional*, defaults to 0): σ_v, in normalised units of the parameters.
            latent_noise (`float`, *optional*, defaults to 0): σ_z, in units of the network's own latent.
            generator (`torch.Generator`, *optional*): Of the noise.
        """
        latents = self._encode(self._with_noise(tokens, parameter_noise, generator))
        if latent_noise > 0:
            latents = latents + latent_noise * torch.randn(latents.shape, generator=generator, device=latents.device)
        return ParameterAutoencoderOutput(sample=self._decode(latents).float(), target=tokens)

    def _with_noise(self, tokens: torch.Tensor, scale: float, generator: torch.Generator | None) -> torch.Tensor:
        """Tokens of parameters with white noise."""
        if scale == 0:
            return tokens
        noise = torch.randn(tokens.shape, generator=generator, device=tokens.device)
        if self.token_lengths is not None:
            # White noise on the parameters is white along orthonormal directions, of which a short token has few.
            numbers = torch.arange(self.token_shape[0], device=noise.device).unsqueeze(1)
            noise = noise / self.token_scale * (numbers < self.token_num_parameters)
        return tokens + scale * noise

    def reconstruction_loss(self, output: ParameterAutoencoderOutput) -> torch.Tensor:
        """Mean squared error of the parameters in normalised units, apart from what tokens leave out; a scalar."""
        error = (output.sample - output.target).square()
        if self.token_lengths is None:
            return error.mean()
        return (error * self.token_scale.square()).sum() / (len(error) * self.vector_layout.num_parameters)
