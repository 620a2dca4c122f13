"""Scores networks for members of a family: some for each of them."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks.runner import NetworkRunner
from ..tasks.family import Family
from ..tasks.task import Split
from .report_data import Metric

MEMBERS_AT_ONCE = 16
EXAMPLES_AT_ONCE = 500


@dataclass
class MemberScores:
    """
    How n networks for each of M members of a family do.

    Args:
        values (`torch.Tensor`): Accuracies in percent, float64 of shape `(M, n)`.
        losses (`torch.Tensor`): Cross-entropies in nats, of the same shape.
    """

    values: Tensor
    losses: Tensor


class MemberScorer:
    """
    Scores networks, or one that answers by itself, for each of some members of a family.

    Args:
        family (`Family`): Of classification tasks.
        networks (`NetworkRunner`): Runs the networks.
        table (`torch.Tensor`): The conditions of the members, shape `(M, width)`.
        num_examples (`int`, *optional*, defaults to 2000): No more examples of a split, evenly spaced over it.
    """

    metric = Metric("accuracy", "%")

    def __init__(self, family: Family, networks: NetworkRunner, table: Tensor, num_examples: int = 2000):
        self.family, self.networks, self.table, self.num_examples = family, networks, table, num_examples

    @torch.no_grad()
    def score(self, split: Split, networks: Tensor | nn.Module, vote: bool = False) -> MemberScores:
        """
        Args:
            networks (`torch.Tensor` or `nn.Module`): Shape `(M, D)` or `(M, n, D)`; or `module(table, batch,
                generator)`, which gives logits of shape `(M, B, C)` and always gets the same noise.
            vote (`bool`, *optional*, defaults to `False`): The n networks of a member answer together: n becomes 1.
        """
        total = self.family.num_examples(split)
        indices = torch.linspace(0, total - 1, min(self.num_examples, total)).round().long()
        noise, values, losses = torch.Generator(self.table.device).manual_seed(0), [], []
        if isinstance(networks, Tensor) and networks.ndim == 2:
            networks = networks.unsqueeze(1)
        for rows in torch.arange(len(self.table)).split(MEMBERS_AT_ONCE):
            correct: Any = 0.0
            loss: Any = 0.0
            for part in indices.split(EXAMPLES_AT_ONCE):
                batch = self.family.batch(split, self.table[rows.to(self.table.device)], part)
                if isinstance(networks, nn.Module):
                    logits = networks(self.table[rows.to(self.table.device)], batch, noise).unsqueeze(1)
                else:
                    answers = [self.networks.stack(self.family.predict, n, batch) for n in networks[rows].unbind(1)]
                    logits = torch.stack(answers, dim=1)  # (m, n, B, C)
                if vote:
                    logits = logits.log_softmax(-1).logsumexp(1, keepdim=True)
                labels = batch["labels"].unsqueeze(1).expand(logits.shape[:-1])
                correct += (logits.argmax(-1) == labels).sum(-1)
                loss += F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none").sum(-1)
            values.append(100 * correct.double().cpu() / len(indices))
            losses.append(loss.double().cpu() / len(indices))
        return MemberScores(torch.cat(values), torch.cat(losses))

    def loss(self, networks: Tensor | nn.Module, vote: bool = False) -> float:
        """The mean loss on validation data; arguments as of [`score`]."""
        return self.score("validation", networks, vote).losses.mean().item()
