"""What a base model is for: the interface between a user's problem and everything else."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel

from ..batched import BatchedModels

Split = Literal["train", "validation", "test"]
Batch = Mapping[str, Any]
EVAL_BATCH_SIZE = 500


class Task(ABC):
    """
    What a subclass says about the base model and its data is all that the rest needs to know. `call` below is the base
    model, or a function that takes its place and runs the same network with other parameters; it must be the only way
    in which a task runs a network.
    """

    @abstractmethod
    def load_base_model(self) -> nn.Module:
        """The network; a `PreTrainedModel` of transformers if it is to be saved together with a pipeline."""

    @abstractmethod
    def load_split(self, split: Split) -> Dataset:
        """A map-style data set. Validation selects, test reports; no two splits share an example."""

    @abstractmethod
    def fingerprint(self, split: Split) -> str:
        """A string that changes when the examples of a split, or how they are prepared, change."""

    @abstractmethod
    def collate(self, examples: Any) -> Batch:
        """What a `DataLoader` does with the examples of a batch; the batch has the entry `labels`, shape `(B,)`."""

    @abstractmethod
    def loss(self, call: Callable, batch: Batch) -> torch.Tensor:
        """The training loss of one batch, a scalar."""

    @abstractmethod
    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        """Logits of shape `(B, C)`."""

    def save_base_model(self, model: nn.Module, folder: str | os.PathLike) -> None:
        """Writes the network into the existing folder; a task may add what it prepares its inputs with."""
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder)
        else:
            save_model(model, str(Path(folder) / "model.safetensors"))

    def load_saved(self, folder: str | os.PathLike) -> nn.Module:
        """What `save_base_model` wrote."""
        model = self.load_base_model()
        if isinstance(model, PreTrainedModel):
            return type(model).from_pretrained(folder)
        load_model(model, Path(folder) / "model.safetensors")
        return model


def take(split: Dataset, indices: Sequence[int]) -> Any:
    """The examples at `indices`, in one call where the data set can do that."""
    return split.__getitems__(indices) if hasattr(split, "__getitems__") else [split[i] for i in indices]


def predict_logits(
    task: Task, models: BatchedModels, split: Split, parameters: torch.Tensor, max_examples: int | None = None
) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
    """
    Runs N networks over a split in one pass over the data.

    Args:
        parameters (`torch.Tensor`): Shape `(N, D)`.
        max_examples (`int`, *optional*): No more examples than this, evenly spaced over the split.

    Yields:
        `tuple`: Which networks, which examples, logits of shape `(n, B, C)`, and labels of shape `(B,)`.
    """
    device = next(models.model.parameters()).device
    parameters = parameters.to(device)
    examples = task.load_split(split)
    if max_examples is not None and max_examples < len(examples):
        examples = Subset(examples, torch.linspace(0, len(examples) - 1, max_examples).round().long().tolist())
    start = 0
    for batch in DataLoader(examples, EVAL_BATCH_SIZE, collate_fn=task.collate):
        batch = send_to_device(batch, device)
        columns = slice(start, start + len(batch["labels"]))
        for rows, logits in models(lambda call, batch=batch: task.predict(call, batch), parameters):
            yield rows, columns, logits, batch["labels"]
        start = columns.stop


def accuracy(task: Task, models: BatchedModels, split: Split, parameters: torch.Tensor) -> torch.Tensor:
    """Accuracy of N networks in percent, shape `(N,)`, in one pass over the data."""
    correct = torch.zeros(len(parameters), dtype=torch.long)
    for rows, _, logits, labels in predict_logits(task, models, split, parameters):
        correct[rows] += (logits.argmax(-1) == labels).sum(-1).cpu()
    return 100 * correct / len(task.load_split(split))
