"""The network that turns conditions into embeddings."""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .condition import Fields
from .fields import ConditionError, shown
from .saved import FORMAT_VERSION, SavedModel, check_format_version

# From fewer texts there is no telling how alike they are.
FEWEST_TEXTS = 3

logger = logging.getLogger(__name__)


class ConditionEncoder(SavedModel, ConfigMixin):
    r"""
    Turns conditions into embeddings for a [`LatentDenoiser`], and knows which conditions were seen in training.

    Angles enter as sine and cosine, numbers standardised, categories through an embedding each, vectors and the
    embeddings of texts through a linear map. There is no embedding for an unknown field: [`complete`] draws its value
    from the seen conditions.

    Args:
        fields (`dict` or `list`): See [`Fields`].
        embedding_dim (`int`, *optional*, defaults to 128): E, the length of an embedding.
        num_seen (`int`, *optional*, defaults to 0), seen_texts (`dict`, *optional*): See [`remember`].
        format_version (`int`, *optional*): Of the saved files, which carry it so that an older release can refuse them.
    """

    _keep_in_fp32_modules = ["seen", "feature_mean", "feature_std"]

    @register_to_config
    def __init__(
        self,
        fields: dict | list,
        embedding_dim: int = 128,
        num_seen: int = 0,
        seen_texts: dict | None = None,
        format_version: int = FORMAT_VERSION,
    ):
        super().__init__()
        check_format_version(format_version)
        self.fields = Fields(fields)
        if not self.fields:
            raise ConditionError("a condition encoder needs at least one field")
        self.register_to_config(fields=self.fields.to_list())
        self.said_to_be_drawn: set[tuple[str, ...]] = set()  # fields that a warning has named
        # Of a one-hot vector, a linear map is an embedding.
        self.proj = nn.Linear(self.fields.num_features, embedding_dim)
        self.out = nn.Linear(embedding_dim, embedding_dim)
        self.register_buffer("seen", torch.zeros(num_seen, self.fields.width))
        self.register_buffer("seen_known", torch.zeros(num_seen, len(self.fields), dtype=torch.bool))
        self.register_buffer("feature_mean", torch.zeros(self.fields.num_features))
        self.register_buffer("feature_std", torch.ones(self.fields.num_features))

    def remember(
        self, table: torch.Tensor, texts: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]] | None = None
    ) -> None:
        """
        Keeps the seen conditions, and standardises features by them.

        Args:
            table (`torch.Tensor`): Shape `(num_seen, width)`; what comes twice is drawn twice as often.
            texts (`Mapping`, *optional*): For each field of texts, what describes each network, as
                [`TextField.store`] has it. All of it must be in the table.
        """
        self.seen_known = self.fields.known(table)
        self.seen = table.nan_to_num()
        complete = self.seen[self.seen_known.all(1)].unique(dim=0)
        if len(complete) > 1:
            std, mean = torch.std_mean(self.fields.features(complete), dim=0)
            self.feature_mean, self.feature_std = mean, torch.where(std > 0, std, 1.0)
        said = {name: self._describe(name, networks) for name, networks in (texts or {}).items()}
        self.register_to_config(num_seen=len(table), seen_texts=said or None)

    def _describe(self, name: str, networks: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """The text of each row of `seen`, and how alike a text is at least to those of other networks."""
        embeddings: dict[str, torch.Tensor] = {}
        owners: dict[str, set[int]] = defaultdict(set)
        for i, said in enumerate(networks):
            for part in said or ():
                if part["text"]:  # and not an embedding, or a picture without a file
                    embeddings[part["text"]] = torch.tensor(part["embedding"], dtype=torch.float32)
                    owners[part["text"]].add(i)
        texts = {embedding.numpy().tobytes(): text for text, embedding in embeddings.items()}
        rows, alike = self.seen[:, self.fields.columns[name]].cpu().numpy(), None
        if len(embeddings) >= FEWEST_TEXTS:
            stacked = F.normalize(torch.stack([*embeddings.values()]), dim=1)
            others = torch.tensor([[not own & other for other in owners.values()] for own in owners.values()])
            alike = torch.where(others, stacked @ stacked.T, -1.0).amax(1).min().item()
        return {"texts": [texts.get(row.tobytes(), "") for row in rows], "alike": alike}

    def warn_of_unlike_texts(self, table: torch.Tensor) -> None:
        """Says which texts of a table, shape `(N, width)`, are less like seen ones than those are like each other."""
        for name, said in (self.config.seen_texts or {}).items():
            known = [i for i, text in enumerate(said["texts"]) if text]
            given = table[:, self.fields.columns[name]]
            given = F.normalize(given[~given.isnan().any(1)].unique(dim=0), dim=1)
            if said["alike"] is None or not len(given):
                continue
            seen = F.normalize(self.seen[known][:, self.fields.columns[name]].to(given), dim=1)
            for best, index in zip(*(given @ seen.T).max(1), strict=True):
                if best < said["alike"]:
                    logger.warning(
                        "the '%s' is unlike all %d that were seen, so that its networks may be no better than others; "
                        "the nearest is %s (similarity %.2f, seen ones have at least %.2f)",
                        name,
                        len(known),
                        shown(said["texts"][known[int(index)]]),
                        best,
                        said["alike"],
                    )

    @apply_forward_hook  # that moves an offloaded model to its device
    def complete(self, table: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """
        Draws the unknown fields from the seen conditions.

        Args:
            table (`torch.Tensor`): Shape `(N, width)`, NaN where a field is unknown.
            draws (`torch.Tensor`): Shape `(N,)`, uniform in [0, 1): which of the seen conditions, in the order of
                their distance in the known fields, each row takes all of its unknown fields from.

        Raises:
            ConditionError: if there are unknown fields, and no seen condition to draw them from.
        """
        known = self.fields.known(table)  # (N, K)
        if known.all():
            return table
        if not self.seen_known.all(1).any():
            raise ConditionError(
                f"unknown fields cannot be drawn, because no seen conditions are kept; give {self.fields}"
            )
        seen = self.seen[self.seen_known.all(1)]  # (S, width)
        features = (self.fields.features(torch.cat([seen, table.nan_to_num()])) - self.feature_mean) / self.feature_std
        of_seen, of_rows = features[: len(seen)], features[len(seen) :]
        weights = known[:, self.fields.feature_fields().to(known.device)].to(features.dtype)  # (N, F)
        distances = ((of_rows.unsqueeze(1) - of_seen).square() * weights.unsqueeze(1)).sum(-1)  # (N, S)
        chosen = (draws * len(seen)).long().clamp(max=len(seen) - 1)  # (N,)
        chosen = distances.argsort(dim=1, stable=True).gather(1, chosen.unsqueeze(1)).squeeze(1)
        return torch.where(table.isnan(), seen[chosen], table)

    def forward(self, table: torch.Tensor) -> torch.Tensor:
        """A table without unknown fields, shape `(N, width)`, to embeddings, shape `(N, E)`."""
        features = (self.fields.features(table.float()) - self.feature_mean) / self.feature_std
        return self.out(F.silu(self.proj(features.to(self.dtype))))
