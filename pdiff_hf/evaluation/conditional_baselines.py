"""What a conditional generator must beat: closed-form answers to a condition, and networks that are trained for it."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..models.condition import Fields
from ..networks.stacked import StackedNetworks
from ..tasks.task import Batch

LENGTH_SCALES = (0.5, 1.0, 2.0, 4.0)
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
FIELD_SCALES = (0.5, 2.0)


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


class KernelRidge:
    """
    Kernel ridge regression from conditions to parameters: a Gaussian kernel with a scale for each field.

    Args:
        fields (`Fields`): Of the conditions.
        table (`torch.Tensor`): The seen conditions, shape `(S, width)`.
        parameters (`torch.Tensor`): Shape `(S, D)`.
        ridge (`float`): λ.
        scales (`list[float]`): What the features of each field are multiplied by, in the order of `fields`.
    """

    def __init__(
        self, fields: Fields, table: torch.Tensor, parameters: torch.Tensor, ridge: float, scales: list[float]
    ):
        self.fields, self.ridge, self.scales = fields, ridge, scales
        self.seen = self._scaled(table)
        self.mean = parameters.mean(0)
        kernel = self._kernel(self.seen) + ridge * torch.eye(len(table), dtype=torch.float64)
        self.inverse = torch.linalg.inv(kernel)
        self.weights = self.inverse @ (parameters - self.mean).double()  # (S, D)

    def _scaled(self, table: torch.Tensor) -> torch.Tensor:
        scales = torch.tensor(self.scales, dtype=torch.float64)[self.fields.feature_fields()]
        return self.fields.features(table).double() * scales

    def _kernel(self, features: torch.Tensor) -> torch.Tensor:
        return torch.exp(-0.5 * torch.cdist(features, self.seen).square())

    def __call__(self, table: torch.Tensor) -> torch.Tensor:
        """Conditions, shape `(T, width)`, to parameters, shape `(T, D)`."""
        return (self._kernel(self._scaled(table)) @ self.weights).float() + self.mean

    def sample(self, table: torch.Tensor, num_networks: int, generator: torch.Generator) -> torch.Tensor:
        """Samples around the prediction with the covariance of its leave-one-out residuals: shape `(T, n, D)`."""
        residuals = (self.weights / self.inverse.diagonal().unsqueeze(1)).float()  # (S, D), exact for a linear smoother
        draws = torch.randn(len(table), num_networks, len(residuals), generator=generator)
        return self(table).unsqueeze(1) + draws @ residuals / math.sqrt(len(residuals))

    @classmethod
    def tuned(
        cls,
        fields: Fields,
        table: torch.Tensor,
        parameters: torch.Tensor,
        validate: Callable[[Callable[[torch.Tensor], torch.Tensor]], float],
    ) -> "KernelRidge":
        """
        With λ, the width of the kernel and then the scale of each field chosen on validation tasks.

        Args:
            validate (`Callable`): The loss on validation tasks of the networks that a function gives for conditions.
        """
        tried: dict[tuple, tuple[float, KernelRidge]] = {}

        def loss(ridge: float, scales: list[float]) -> float:
            key = (ridge, *scales)
            if key not in tried:
                model = cls(fields, table, parameters, ridge, scales)
                tried[key] = validate(model), model
            return tried[key][0]

        _, ridge, scale = min((loss(r, [1 / s] * len(fields)), r, 1 / s) for r in RIDGES for s in LENGTH_SCALES)
        scales = [scale] * len(fields)
        for i in list(range(len(fields))) * 2:
            options = [scales[:i] + [scales[i] * factor] + scales[i + 1 :] for factor in (1.0, *FIELD_SCALES)]
            scales = min(options, key=lambda option: loss(ridge, option))
        ridge = min(RIDGES, key=lambda r: loss(r, scales))
        return tried[ridge, *scales][1]


class GenericNetwork(nn.Module):
    """One network for all tasks; with `fields`, the condition is a further input: a learned image of it is added."""

    def __init__(
        self,
        networks: StackedNetworks,
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
        return self.networks(self.predict, self.values.expand(len(table), -1), batch)


class BasisNetworks(nn.Module):
    """
    Subspace-configurable networks (arXiv 2305.13536): a small network gives the weights with which a few learned basis
    networks are added.
    """

    def __init__(
        self, networks: StackedNetworks, predict: Callable, start: torch.Tensor, fields: Fields, num_basis: int = 16
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
        return self.networks(self.predict, self.sample_parameters(table), batch)


class MaskedConditions(nn.Module):
    """
    Conditions of which parts may be unknown, as one embedding: what a deterministic answer to partial conditions takes
    in the place of a `ConditionEncoder`. What is unknown is NaN in a table; its features become 0, beside flags of what
    is known.
    """

    def __init__(self, fields: Fields, embedding_dim: int = 128):
        super().__init__()
        self.fields = fields
        # The columns of a table that each feature needs; a vector may be known in parts.
        self.needs = torch.zeros(fields.num_features, fields.width)
        start = 0
        for name, field in fields.items():
            shape = (field.num_features, field.width)
            rows = slice(start, start + field.num_features)
            self.needs[rows, fields.columns[name]] = torch.eye(*shape) if shape[0] == shape[1] else torch.ones(shape)
            start += field.num_features
        self.proj = nn.Linear(fields.num_features + fields.width, embedding_dim)

    def forward(self, table: torch.Tensor) -> torch.Tensor:
        """A table of shape `(N, width)` to embeddings of shape `(N, E)`."""
        unknown = table.isnan().float()
        features = self.fields.features(table.nan_to_num()) * (unknown @ self.needs.T == 0)
        return self.proj(torch.cat([features, 1 - unknown], dim=1))
