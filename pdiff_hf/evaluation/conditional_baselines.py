"""What a conditional generator must beat: closed-form answers to a condition, and networks that are trained for it."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..models.condition import Fields
from ..networks.runner import NetworkRunner
from ..tasks.task import Batch


def nearest_mean(
    features: torch.Tensor, seen: torch.Tensor, parameters: torch.Tensor, num_neighbors: int
) -> torch.Tensor:
    """
    For each condition the mean of the networks of the nearest seen tasks.

    Args:
        features (`torch.Tensor`): Shape `(T, F)`.
        seen (`torch.Tensor`): Those of the seen tasks, shape `(S, F)`.
        parameters (`torch.Tensor`): Of the seen tasks, shape `(S, D)`.

    Returns:
        `torch.Tensor`: Shape `(T, D)`.
    """
    rows = torch.cdist(features, seen).topk(num_neighbors, largest=False).indices  # (T, k)
    return parameters[rows].mean(1)


class GenericNetwork(nn.Module):
    """One network for all tasks; with `fields`, the condition is a further input: a learned image of it is added."""

    def __init__(
        self,
        networks: NetworkRunner,
        predict: Callable,
        start: torch.Tensor,
        fields: Fields | None = None,
        image_shape: Sequence[int] = (),
    ):
        super().__init__()
        self.values = nn.Parameter(start.clone())
        self.fields, self.networks, self.predict = fields, networks, predict
        if fields is not None:
            # A linear layer sees the sum as it would see image and condition side by side.
            self.image = nn.Linear(fields.num_features, math.prod(image_shape))
            nn.init.zeros_(self.image.weight)
            nn.init.zeros_(self.image.bias)

    def forward(self, table: torch.Tensor, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        if self.fields is not None:
            values = batch["pixel_values"]  # (T, B, C, H, W)
            batch = {**batch, "pixel_values": values + self.image(self.fields.features(table)).view_as(values[:, :1])}
        return self.networks.stack(self.predict, self.values.expand(len(table), -1), batch)


class BasisNetworks(nn.Module):
    """
    Subspace-configurable networks (arXiv 2305.13536): a small network gives the weights with which a few learned basis
    networks are added.
    """

    def __init__(
        self, networks: NetworkRunner, predict: Callable, start: torch.Tensor, fields: Fields, num_basis: int = 16
    ):
        super().__init__()
        self.basis = nn.Parameter(start.repeat(num_basis, 1))  # (K, D)
        with torch.no_grad():  # they must differ for their weights to have gradients
            self.basis.add_(0.3 * start.std() * torch.randn(self.basis.shape))
        self.coefficients = nn.Sequential(nn.Linear(fields.num_features, 128), nn.ReLU(), nn.Linear(128, num_basis))
        self.fields, self.networks, self.predict = fields, networks, predict

    def sample_parameters(self, table: torch.Tensor, *_) -> torch.Tensor:
        """Parameters for T conditions, shape `(T, D)`."""
        return self.coefficients(self.fields.features(table)).softmax(1) @ self.basis

    def forward(self, table: torch.Tensor, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        return self.networks.stack(self.predict, self.sample_parameters(table), batch)
