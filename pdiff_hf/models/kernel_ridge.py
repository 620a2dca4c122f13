"""Kernel ridge regression from conditions to parameters, with its scales chosen on validation tasks."""

import math
from collections.abc import Callable

import torch

from .condition import Fields

LENGTH_SCALES = (0.5, 1.0, 2.0, 4.0)
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
FIELD_SCALES = (0.5, 2.0)


class KernelRidge:
    """
    Kernel ridge regression from conditions to parameters: a Gaussian kernel with a scale for each field.

    Args:
        fields (`Fields`): Of the conditions.
        table (`torch.Tensor`): The seen conditions, shape `(S, width)`, or `(S, K, width)` with K ways to say each.
        parameters (`torch.Tensor`): Shape `(S, D)`.
        ridge (`float`): λ.
        scales (`list[float]`): What the features of each field are multiplied by, in the order of `fields`.
    """

    def __init__(
        self, fields: Fields, table: torch.Tensor, parameters: torch.Tensor, ridge: float, scales: list[float]
    ):
        self.fields, self.ridge, self.scales = fields, ridge, scales
        self.seen = self._scaled(table.flatten(0, -2))  # (S K, F)
        self.mean = parameters.mean(0)
        self.moves = (parameters - self.mean).double()
        kernel = self._kernel(self.seen) + ridge * torch.eye(len(self.seen), dtype=torch.float64)
        self.inverse = torch.linalg.inv(kernel)
        self.weights = self.inverse.unflatten(1, (len(table), -1)).sum(2)  # (S K, S)

    def _scaled(self, table: torch.Tensor) -> torch.Tensor:
        scales = torch.tensor(self.scales, dtype=torch.float64)[self.fields.feature_fields()]
        return self.fields.features(table).double() * scales

    def _kernel(self, features: torch.Tensor) -> torch.Tensor:
        return torch.exp(-0.5 * torch.cdist(features, self.seen).square())

    def __call__(self, table: torch.Tensor) -> torch.Tensor:
        """Conditions, shape `(T, width)`, to parameters, shape `(T, D)`."""
        return (self._kernel(self._scaled(table)) @ self.weights @ self.moves).float() + self.mean

    def sample(self, table: torch.Tensor, num_networks: int, generator: torch.Generator) -> torch.Tensor:
        """Samples around the prediction with the covariance of its leave-one-out residuals: shape `(T, n, D)`."""
        count = len(self.moves)
        blocks = self.inverse.unflatten(0, (count, -1)).unflatten(2, (count, -1)).diagonal(dim1=0, dim2=2)  # (K, K, S)
        # Exact for a linear smoother: of each network without all ways to say what it is for.
        left_out = torch.linalg.solve(blocks.permute(2, 0, 1), self.weights.unflatten(0, (count, -1))).mean(1)  # (S, S)
        residuals = (left_out @ self.moves).float()  # (S, D)
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
        return tried[(ridge, *scales)][1]
