"""Neural fields: networks from coordinates to values, each of which is one datum."""

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

KINDS = ("siren", "fourier")


class ScaledLinear(nn.Linear):
    """A linear layer times a constant, which multiplies the few weights and not the many outputs."""

    def __init__(self, in_features: int, out_features: int, scale: float):
        super().__init__(in_features, out_features)
        self.scale = scale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.scale * self.weight, self.scale * self.bias)


class NeuralField(ModelMixin, ConfigMixin):
    r"""
    A network that is one datum: an image as a function of the position, a shape as one of a point in space.

    Args:
        in_features (`int`, *optional*, defaults to 2), out_features (`int`, *optional*, defaults to 1):
            Of a coordinate, and of what is there.
        kind (`str`, *optional*, defaults to `"siren"`):
            `"siren"` has sines as activations (arXiv 2006.09661); `"fourier"` has ReLU, and sines and cosines of the
            coordinates beside them as inputs, as HyperDiffusion has it (arXiv 2303.17015).
        width (`int`, *optional*, defaults to 24), num_layers (`int`, *optional*, defaults to 2):
            Of hidden layers.
        omega (`float`, *optional*, defaults to 5):
            Of a SIREN: what its sines multiply their argument with. More of it fits finer detail.
        num_frequencies (`int`, *optional*, defaults to 4):
            Of `"fourier"`: π, 2π, 4π and so on.
    """

    @register_to_config
    def __init__(
        self,
        in_features: int = 2,
        out_features: int = 1,
        kind: str = "siren",
        width: int = 24,
        num_layers: int = 2,
        omega: float = 5.0,
        num_frequencies: int = 4,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if min(in_features, out_features, width, num_layers) < 1:
            raise ValueError("in_features, out_features, width and num_layers must be at least 1")
        inputs = in_features * (1 + 2 * num_frequencies) if kind == "fourier" else in_features
        sizes = [inputs, *[width] * num_layers, out_features]
        *hidden, last = zip(sizes[:-1], sizes[1:], strict=True)
        scale = omega if kind == "siren" else 1.0
        layers = [*(ScaledLinear(*pair, scale) for pair in hidden), nn.Linear(*last)]
        self.layers = nn.ModuleList(layers)
        if kind == "siren":
            for i, layer in enumerate(layers):
                bound = math.sqrt(6 / layer.in_features) / omega if i else 1 / layer.in_features
                nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Coordinates of shape `(..., in_features)`, about -1 to 1, to values of shape `(..., out_features)`."""
        hidden = coordinates
        if self.config.kind == "fourier":
            frequencies = math.pi * 2.0 ** torch.arange(self.config.num_frequencies, device=hidden.device)
            angles = (hidden.unsqueeze(-1) * frequencies).flatten(-2)
            hidden = torch.cat([hidden, angles.sin(), angles.cos()], dim=-1)
        *layers, last = self.layers
        for layer in layers:
            hidden = layer(hidden).sin() if self.config.kind == "siren" else layer(hidden).relu()
        return last(hidden)
