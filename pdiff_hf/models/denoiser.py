"""The denoiser (paper, section 2.4): a 1-D convolutional network that predicts the noise in a latent."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import BaseOutput
from torch import nn

from .saved import FORMAT_VERSION, SavedModel, check_format_version

# `paper` has the widths of the published denoiser, which never shortens its signal.
DENOISER_PRESETS = {
    "paper": {"block_out_channels": (64, 128, 256, 512, 512), "bottleneck_dim": 512},
    "small": {"block_out_channels": (16, 32, 64, 64), "bottleneck_dim": 512},
}


@dataclass
class LatentDenoiserOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor`): Shape `(N, L)`. The prediction, for training the noise.
    """

    sample: torch.Tensor


class ConvBlock(nn.Module):
    """Normalization, timestep, activation, and a convolution that halves or doubles the length."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, embedding_dim: int, up: bool):
        super().__init__()
        self.norm = nn.GroupNorm(1, in_channels)
        self.embedding = nn.Linear(embedding_dim, in_channels)
        arguments = {"stride": 2, "padding": kernel_size // 2} | ({"output_padding": 1} if up else {})
        self.conv = (nn.ConvTranspose1d if up else nn.Conv1d)(in_channels, out_channels, kernel_size, **arguments)

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        return self.conv(F.silu(self.norm(hidden) + self.embedding(embedding).unsqueeze(-1)))


class LatentDenoiser(SavedModel, ConfigMixin):
    r"""
    Predicts the noise in latents, with any scheduler of diffusers.

    An encoder of 1-D convolutions, all but the first of which halve the length, one fully-connected bottleneck, and the
    mirrored decoder with skip connections. The coordinates of a latent have no order, so that only a network that
    sees all of them at once can learn how they vary together; the convolutions with stride 1 of the published
    implementation cannot, and the networks that it generates vary too little.

    Args:
        latent_dim (`int`): L, the length of a latent.
        block_out_channels (`tuple[int, ...]`, *optional*, defaults to `(16, 32, 64, 64)`): Channels of the encoder.
        kernel_size (`int`, *optional*, defaults to 7): Of every convolution; odd.
        bottleneck_dim (`int`, *optional*, defaults to 512): Width of the fully-connected bottleneck.
        embedding_dim (`int`, *optional*, defaults to 128): Width of the timestep embedding.
        num_class_embeds (`int`, *optional*): Number of classes, for a denoiser that is conditioned on them.
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
        num_class_embeds: int | None = None,
        format_version: int = FORMAT_VERSION,
    ):
        super().__init__()
        check_format_version(format_version)
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise ValueError(f"kernel_size must be odd, so that a convolution keeps the length, got {kernel_size}")
        stride = 2 ** (len(block_out_channels) - 1)
        self.padded_length = -(-latent_dim // stride) * stride
        self.time_proj = Timesteps(embedding_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(embedding_dim, embedding_dim)
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, embedding_dim)

        channels, padding = block_out_channels, kernel_size // 2
        self.conv_in = nn.Conv1d(1, channels[0], kernel_size, padding=padding)
        self.down_blocks = nn.ModuleList(
            ConvBlock(before, after, kernel_size, embedding_dim, up=False)
            for before, after in zip(channels[:-1], channels[1:], strict=True)
        )
        bottleneck = channels[-1] * self.padded_length // stride
        self.mid_in = nn.Linear(bottleneck, bottleneck_dim)
        self.mid_embedding = nn.Linear(embedding_dim, bottleneck_dim)
        self.mid_out = nn.Linear(bottleneck_dim, bottleneck)
        self.up_blocks = nn.ModuleList(
            ConvBlock(2 * before, after, kernel_size, embedding_dim, up=True)  # a skip doubles the channels
            for before, after in zip(channels[:0:-1], channels[-2::-1], strict=True)
        )
        self.conv_out = nn.Conv1d(2 * channels[0], 1, kernel_size, padding=padding)
        # It starts by predicting no noise, whatever the input.
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> LatentDenoiserOutput | tuple[torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor`): Noisy latents, shape `(N, L)`.
            timestep (`torch.Tensor` or `float` or `int`): One for all, or one for each: shape `(N,)`.
            class_labels (`torch.Tensor`, *optional*): Shape `(N,)`; needed if and only if the network has classes.
            return_dict (`bool`, *optional*, defaults to `True`): A [`LatentDenoiserOutput`] instead of a tuple.
        """
        if sample.ndim != 2 or sample.shape[1] != self.config.latent_dim:
            raise ValueError(f"sample must have shape (N, {self.config.latent_dim}), got {tuple(sample.shape)}")
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(
                "class_labels are needed because num_class_embeds is set"
                if class_labels is None
                else "class_labels were given, but the denoiser has no num_class_embeds"
            )
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        embedding = self.time_embedding(self.time_proj(timestep).to(self.dtype))  # (N, embedding_dim)
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(class_labels)
        embedding = F.silu(embedding)

        hidden = F.pad(sample, (0, self.padded_length - sample.shape[1])).unsqueeze(1)  # (N, 1, padded length)
        hidden = self.conv_in(hidden)
        skips = [hidden]
        for block in self.down_blocks:
            hidden = block(hidden, embedding)  # the length halves
            skips.append(hidden)
        mid = self.mid_in(F.silu(hidden.flatten(1))) + self.mid_embedding(embedding)  # (N, bottleneck_dim)
        hidden = hidden + self.mid_out(F.silu(mid)).view_as(hidden)
        for block in self.up_blocks:
            hidden = block(torch.cat([hidden, skips.pop()], dim=1), embedding)  # the length doubles
        hidden = self.conv_out(F.silu(torch.cat([hidden, skips.pop()], dim=1)))
        prediction = hidden.squeeze(1)[:, : sample.shape[1]]  # (N, 1, padded length) -> (N, L)
        return LatentDenoiserOutput(sample=prediction) if return_dict else (prediction,)
