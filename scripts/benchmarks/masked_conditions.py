"""What a deterministic answer to partial conditions takes in the place of a condition encoder."""

import torch
from torch import nn

from pdiff_hf.models.condition import Fields
from pdiff_hf.tasks.task import Batch


class Masked(nn.Module):
    """A module that sees only a random part of each condition."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, table: torch.Tensor, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        return self.module(mask_some(table, generator), batch, generator)


def mask_some(table: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A table in which a random part of each row is unknown, from nothing to everything."""
    share = torch.rand(len(table), 1, generator=generator)
    return torch.where(torch.rand(table.shape, generator=generator) < share, torch.nan, table)


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
