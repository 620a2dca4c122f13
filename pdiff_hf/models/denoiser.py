"""The denoiser (paper, section 2.4): predicts the noise in a latent, given what is known of the task."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import BaseOutput
from torch import nn

from .saved import FORMAT_VERSION, SavedModel, check_format_version

# `paper` has the widths of the published denoiser, which never shortens its signal. `mlp` has no convolutions.
DENOISER_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"block_out_channels": (64, 128, 256, 512, 512), "bottleneck_dim": 512},
    "small": {"block_out_channels": (16, 32, 64, 64), "bottleneck_dim": 512},
    "mlp": {"block_out_channels": (), "bottleneck_dim": 384},
}


# A product of fewer rows than this has last bits that depend on where in memory the weights lie.
FEWEST_ROWS = 8


@dataclass
class LatentDenoiserOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor`): Shape `(N, L)`. The prediction, for training the noise.
    """

    sample: torch.Tensor


class ConvBlock(nn.Module):
    """Normalization, timestep, activation, and a convolution that halves or doubles the length."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        embedding_dim: int,
        condition_dim: int | None,
        up: bool,
    ):
        super().__init__()
        self.norm = nn.GroupNorm(1, in_channels)
        self.embedding = nn.Linear(embedding_dim, in_channels)
        self.modulation = None if condition_dim is None else zero_linear(condition_dim, 2 * in_channels)
        channels, padding = (in_channels, out_channels), kernel_size // 2
        self.conv = (
            nn.ConvTranspose1d(*channels, kernel_size, stride=2, padding=padding, output_padding=1)
            if up
            else nn.Conv1d(*channels, kernel_size, stride=2, padding=padding)
        )

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        hidden = self.norm(hidden)
        if self.modulation is not None:
            scale, shift = self.modulation(condition).unsqueeze(-1).chunk(2, dim=1)  # (N, C, 1)
            hidden = hidden * (1 + scale) + shift
        return self.conv(F.silu(hidden + of_rows(self.embedding, embedding).unsqueeze(-1)))


class MLPBlock(nn.Module):
    """A residual block of two fully-connected layers with adaptive normalization (arXiv 2212.09748)."""

    def __init__(self, width: int, embedding_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zero_linear(embedding_dim, 3 * width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        scale, shift, gate = of_rows(self.modulation, embedding).chunk(3, dim=1)  # (1 or N, width)
        return hidden + gate * self.layers(self.norm(hidden) * (1 + scale) + shift)


def of_rows(layer: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """`layer(rows)`; what is one row for all latents is computed as often as gives it the same bits everywhere."""
    return layer(rows) if len(rows) > 1 else layer(rows.expand(FEWEST_ROWS, -1))[:1]


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that gives 0 until it is trained."""
    layer = nn.Linear(in_features, out_features)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class LatentDenoiser(SavedModel, ConfigMixin):
    r"""
    Predicts the noise in latents, with any scheduler of diffusers.

    An encoder of 1-D convolutions, all but the first of which halve the length, one fully-connected bottleneck, and the
    mirrored decoder with skip connections. The coordinates of a latent have no order, so that only a network that
    sees all of them at once can learn how they vary together; the convolutions with stride 1 of the published
    implementation cannot, and the networks that it generates vary too little. Without convolutions
    (`block_out_channels=()`) it is a residual network of fully-connected layers.

    With `condition_dim` it takes the embedding of a condition, which changes how activations are normalised. At first
    that has no effect: the layers that see it start at zero.

    Args:
        latent_dim (`int`): L, the length of a latent.
        block_out_channels (`tuple[int, ...]`, *optional*, defaults to `(16, 32, 64, 64)`): Channels of the encoder.
        kernel_size (`int`, *optional*, defaults to 7): Of every convolution; odd.
        bottleneck_dim (`int`, *optional*, defaults to 512): Width of the fully-connected bottleneck, or of all layers.
        embedding_dim (`int`, *optional*, defaults to 128): Width of the timestep embedding.
        num_layers (`int`, *optional*, defaults to 4): Residual blocks of a denoiser without convolutions.
        condition_dim (`int`, *optional*): E, the length of the embeddings of a [`ConditionEncoder`].
        condition_dropout (`float`, *optional*): The share of conditions that it is trained without; above 0, it can be
            guided. Files of older releases do not say.
        format_version (`int`, *optional*): Of the saved files, which carry it so that an older release can refuse them.
    """

    @register_to_config
    def __init__(
        self,
        latent_dim: int,
        block_out_channels: tuple[int, ...] = (16, 32, 64, 64),
        kernel_size: int = 7,
        bottleneck_dim: int = 512,
        embedding_dim: int = 128,
        num_layers: int = 4,
        condition_dim: int | None = None,
        condition_dropout: float | None = None,
        format_version: int = FORMAT_VERSION,
    ):
        super().__init__()
        check_format_version(format_version)
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise ValueError(f"kernel_size must be odd, so that a convolution keeps the length, got {kernel_size}")
        self.time_proj = Timesteps(embedding_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(embedding_dim, embedding_dim)
        if condition_dim is not None:
            self.null_condition = nn.Parameter(torch.zeros(condition_dim))  # stands for no condition
        if block_out_channels:
            self._init_convolutions(latent_dim, block_out_channels, kernel_size, bottleneck_dim)
        else:
            self._init_mlp(latent_dim, bottleneck_dim, num_layers)

    def _init_mlp(self, latent_dim: int, width: int, num_layers: int) -> None:
        embedding_dim, condition_dim = self.config.embedding_dim, self.config.condition_dim
        self.condition_embedding = None if condition_dim is None else nn.Linear(condition_dim, embedding_dim)
        self.layer_in = nn.Linear(latent_dim, width)
        self.blocks = nn.ModuleList(MLPBlock(width, embedding_dim) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation_out = zero_linear(embedding_dim, 2 * width)
        self.layer_out = zero_linear(width, latent_dim)

    def _init_convolutions(
        self, latent_dim: int, channels: tuple[int, ...], kernel_size: int, bottleneck_dim: int
    ) -> None:
        embedding_dim, condition_dim = self.config.embedding_dim, self.config.condition_dim
        stride, padding = 2 ** (len(channels) - 1), kernel_size // 2
        self.padded_length = -(-latent_dim // stride) * stride
        self.conv_in = nn.Conv1d(1, channels[0], kernel_size, padding=padding)
        self.down_blocks = nn.ModuleList(
            ConvBlock(before, after, kernel_size, embedding_dim, condition_dim, up=False)
            for before, after in zip(channels[:-1], channels[1:], strict=True)
        )
        bottleneck = channels[-1] * self.padded_length // stride
        self.mid_in = nn.Linear(bottleneck, bottleneck_dim)
        self.mid_embedding = nn.Linear(embedding_dim, bottleneck_dim)
        self.mid_condition = None if condition_dim is None else zero_linear(condition_dim, bottleneck_dim)
        self.mid_out = nn.Linear(bottleneck_dim, bottleneck)
        self.up_blocks = nn.ModuleList(
            # a skip doubles the channels
            ConvBlock(2 * before, after, kernel_size, embedding_dim, condition_dim, up=True)
            for before, after in zip(channels[:0:-1], channels[-2::-1], strict=True)
        )
        self.conv_out = nn.Conv1d(2 * channels[0], 1, kernel_size, padding=padding)
        # It starts by predicting no noise, whatever the input.
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    @property
    def knows_no_condition(self) -> bool:
        """Whether it has learned what to predict without a condition, which guidance needs."""
        if self.config.condition_dim is None:
            return False
        if self.config.condition_dropout is not None:
            return self.config.condition_dropout > 0
        return bool(self.null_condition.any())  # it is zero until it is trained

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        condition: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> LatentDenoiserOutput | tuple[torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor`): Noisy latents, shape `(N, L)`.
            timestep (`torch.Tensor` or `float` or `int`): One for all, or one for each: shape `(N,)`.
            condition (`torch.Tensor`, *optional*): Embeddings of conditions, shape `(N, E)`; without them, a denoiser
                with `condition_dim` uses its own embedding for "no condition".
            return_dict (`bool`, *optional*, defaults to `True`): A [`LatentDenoiserOutput`] instead of a tuple.
        """
        if sample.ndim != 2 or sample.shape[1] != self.config.latent_dim:
            raise ValueError(f"sample must have shape (N, {self.config.latent_dim}), got {tuple(sample.shape)}")
        if condition is not None and condition.shape != (len(sample), self.config.condition_dim):
            shape = (len(sample), self.config.condition_dim)
            raise ValueError(
                "a condition was given, but the denoiser has no condition_dim"
                if self.config.condition_dim is None
                else f"condition must have shape {shape}, got {tuple(condition.shape)}"
            )
        if condition is None and self.config.condition_dim is not None:
            condition = self.null_condition.expand(len(sample), -1)
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1)  # one for all is embedded once
        if len(timestep) not in (1, len(sample)):
            raise ValueError(f"timestep must be one, or one for each of {len(sample)} latents, got {len(timestep)}")
        embedding = of_rows(self.time_embedding, self.time_proj(timestep).to(sample.dtype))  # (1 or N, embedding_dim)
        compute = self._convolve if self.config.block_out_channels else self._connect
        prediction = compute(sample, embedding, condition)
        return LatentDenoiserOutput(sample=prediction) if return_dict else (prediction,)

    def _connect(self, sample: torch.Tensor, embedding: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        if self.condition_embedding is not None:
            embedding = embedding + self.condition_embedding(condition)
        embedding = F.silu(embedding)
        hidden = self.layer_in(sample)  # (N, L) -> (N, width)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        scale, shift = of_rows(self.modulation_out, embedding).chunk(2, dim=1)
        return self.layer_out(self.norm_out(hidden) * (1 + scale) + shift)

    def _convolve(self, sample: torch.Tensor, embedding: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        embedding = F.silu(embedding)
        hidden = F.pad(sample, (0, self.padded_length - sample.shape[1])).unsqueeze(1)  # (N, 1, padded length)
        hidden = self.conv_in(hidden)
        skips = [hidden]
        for block in self.down_blocks:
            hidden = block(hidden, embedding, condition)  # the length halves
            skips.append(hidden)
        mid = self.mid_in(F.silu(hidden.flatten(1))) + of_rows(self.mid_embedding, embedding)
        if self.mid_condition is not None:
            mid = mid + self.mid_condition(condition)
        hidden = hidden + self.mid_out(F.silu(mid)).view_as(hidden)
        for block in self.up_blocks:
            hidden = block(torch.cat([hidden, skips.pop()], dim=1), embedding, condition)  # the length doubles
        hidden = self.conv_out(F.silu(torch.cat([hidden, skips.pop()], dim=1)))
        return hidden.squeeze(1)[:, : sample.shape[1]]  # (N, 1, padded length) -> (N, L)
