"""From what a caller says of tasks to what a denoiser takes."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from pdiff_hf.models import ConditionEncoder
from pdiff_hf.models.fields import Condition, ConditionError, shown
from pdiff_hf.utils.memory import InParts, in_blocks

logger = logging.getLogger(__name__)


def prepare_conditions(
    encoder: ConditionEncoder | None,
    condition: Condition | Sequence[Condition | None] | torch.Tensor | None,
    num_models: int,
) -> torch.Tensor | None:
    """
    What a caller says of the tasks of networks, for each network.

    Args:
        encoder (`ConditionEncoder`, *optional*): None for a generator without conditions.
        condition (`Mapping`, list of them or `torch.Tensor`, *optional*): One for all networks, several,
            or embeddings of shape `(M, E)`; nothing is known by default, and of None in a list. A Series of pandas is
            one, and a DataFrame several; what is missing there is unknown.
        num_models (`int`): Networks for each condition.

    Returns:
        `torch.Tensor` or `None`: A table of shape `(N, width)`, NaN where a field is unknown; embeddings as they were
        given, shape `(N, E)`; None for a generator without conditions.

    Raises:
        ConditionError: for a condition where there is no encoder, an empty list, embeddings of another length, and what
            [`Fields.table`] refuses.
    """
    if encoder is None:
        if condition is not None:
            raise ConditionError("this generator was trained without conditions; call it without condition")
        return None
    if isinstance(condition, torch.Tensor):
        length = encoder.config.embedding_dim
        if condition.ndim != 2 or condition.shape[1] != length or len(condition) == 0:
            raise ConditionError(f"embeddings must have shape (M, {length}), got {tuple(condition.shape)}")
        if not condition.isfinite().all():
            raise ConditionError("embeddings must be finite")
        return condition.repeat_interleave(num_models, 0)
    conditions = list_conditions(condition, encoder)
    if not conditions:
        raise ConditionError("condition is an empty list; give at least one condition, or none at all")
    table = encoder.fields.table(conditions)
    encoder.warn_of_unlike_texts(table)
    known = encoder.fields.known(table)
    drawn = tuple(name for name, column in zip(encoder.fields, known.T, strict=True) if not column.all())
    if drawn and drawn not in encoder.said_to_be_drawn:
        encoder.said_to_be_drawn.add(drawn)
        level = logging.WARNING if known.any() else logging.INFO  # nothing is known: nobody has forgotten a field
        logger.log(level, "drawn from the conditions seen in training: %s", ", ".join(drawn))
    return table.repeat_interleave(num_models, 0)


def list_conditions(given: Any, encoder: ConditionEncoder | None) -> list[Condition]:
    """One condition or several as a list. Raises a `ConditionError` for what is neither."""
    if hasattr(given, "iterrows"):  # a DataFrame; pandas itself is not needed here
        given = [row for _, row in given.iterrows()]
    if given is None or isinstance(given, Mapping) or hasattr(given, "dropna"):
        given = [given]
    if isinstance(given, str) or not isinstance(given, Iterable):
        there_is = f"; there is {encoder.fields}" if encoder else ""
        raise ConditionError(f"condition is a mapping of fields, got {shown(given)}{there_is}")
    # What is missing in a Series of pandas is unknown.
    return [{} if c is None else c.dropna().to_dict() if hasattr(c, "dropna") else c for c in given]


def embed_conditions(
    encoder: ConditionEncoder, table: torch.Tensor, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """
    Embeddings of shape `(N, E)` of the conditions in a table of shape `(N, width)`, on its device. Fields that are not
    known are drawn from the seen conditions, for each network with its own generator.
    """
    draws = torch.stack([torch.rand((1,), generator=one, device=one.device) for one in generators])
    rows = torch.cat([table, draws.to(table.device)], dim=1)  # (N, width + 1)

    def embed(rows: torch.Tensor) -> torch.Tensor:
        return encoder(encoder.complete(rows[:, :-1], rows[:, -1]))

    return torch.cat(list(in_blocks(embed, rows, encoder.config.embedding_dim, InParts("networks"))))
