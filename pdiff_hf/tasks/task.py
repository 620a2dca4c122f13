"""What a base model is for: the interface between a user's problem and everything else."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..batched import BatchedModels

Split = Literal["train", "validation", "test"]
Batch = Mapping[str, Any]
EVAL_BATCH_SIZE = 500


class Task(Protocol):
    """
    Anything with these methods is a task. `call` below is the base model, or a function that takes its place and runs
    the same network with other parameters; it must be the only way in which a task runs a network.
    """

    def load_base_model(self) -> nn.Module:
        """The network; a `PreTrainedModel` of transformers if it is to be saved together with a pipeline."""

    def load_split(self, split: Split) -> Dataset:
        """A map-style data set. Validation selects, test reports; no two splits share an example."""

    def fingerprint(self, split: Split) -> str:
        """A string that changes when the examples of a split, or how they are prepared, change."""

    def collate(self, examples: Any) -> Batch:
        """What a `DataLoader` does with the examples of a batch; the batch has the entry `labels`, shape `(B,)`."""

    def loss(self, call: Callable, batch: Batch) -> torch.Tensor:
        """The training loss of one batch, a scalar."""

    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        """Logits of shape `(B, C)`."""


def take(split: Dataset, indices: Sequence[int]) -> Any:
    """The examples at `indices`, in one call where the data set can do that."""
    return split.__getitems__(indices) if hasattr(split, "__getitems__") else [split[i] for i in indices]


def predict_logits(
    task: Task, models: BatchedModels, split: Split, parameters: torch.Tensor
) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
    """
    Runs N networks over a split in one pass over the data.

    Args:
        parameters (`torch.Tensor`): Shape `(N, D)`.

    Yields:
        `tuple`: Which networks, which examples, logits of shape `(n, B, C)`, and labels of shape `(B,)`.
    """
    device = next(models.model.parameters()).device
    parameters = parameters.to(device)
    start = 0
    for batch in DataLoader(task.load_split(split), EVAL_BATCH_SIZE, collate_fn=task.collate):
        batch = send_to_device(batch, device)
        examples = slice(start, start + len(batch["labels"]))
        for rows, logits in models(lambda call, batch=batch: task.predict(call, batch), parameters):
            yield rows, examples, logits, batch["labels"]
        start = examples.stop


def accuracy(task: Task, models: BatchedModels, split: Split, parameters: torch.Tensor) -> torch.Tensor:
    """Accuracy of N networks in percent, shape `(N,)`, in one pass over the data."""
    correct = torch.zeros(len(parameters), dtype=torch.long)
    for rows, _, logits, labels in predict_logits(task, models, split, parameters):
        correct[rows] += (logits.argmax(-1) == labels).sum(-1).cpu()
    return 100 * correct / len(task.load_split(split))
