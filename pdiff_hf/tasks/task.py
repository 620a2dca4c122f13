"""What a base model is for: the interface between a user's problem and everything else."""

import functools
import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import Dataset, default_collate
from transformers import PreTrainedModel

from ..networks.adapters import load_network, save_network, without_wrapper
from ..networks.runner import NetworkRunner
from ..utils.devices import to_device
from ..utils.memory import halve, is_out_of_memory

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Batch = Mapping[str, Any]
EVAL_BATCH_SIZE = 500
STATISTICS_EXAMPLES, STATISTICS_BATCH_SIZE = 2048, 256

logger = logging.getLogger(__name__)


class Examples(Protocol):
    """A map-style data set. Where it has `__getitems__(indices)`, that is how several examples are taken."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class OfNetworks(ABC):
    """What a task and a family of tasks have in common: a network, and data that results depend on."""

    processor: Any = None

    @abstractmethod
    def load_base_model(self) -> nn.Module:
        """
        The network, or that which all tasks of a family share the architecture of; a `PreTrainedModel` of transformers
        or a `ModelMixin` of diffusers if it is to be saved together with a pipeline. Fresh weights depend on torch's
        global seed.
        """

    @abstractmethod
    def fingerprint(self, split: Split) -> str:
        """A string that changes when the examples of a split, or how they are prepared, change."""

    def prepare_run(self) -> None:  # noqa: B027  # most tasks need none
        """Work before the network is loaded that takes long: it comes after all settings of a run have been checked."""

    def source_classes(self) -> tuple[type, ...]:
        """Classes whose source results depend on, so that a run is not taken for one of an edited class."""
        return (type(self),)

    def save_base_model(self, model: nn.Module, folder: str | os.PathLike) -> None:
        """
        Writes the network into the existing folder, one of transformers as `save_pretrained` does and any other as
        safetensors, with its processor if it has one.
        """
        if isinstance(model, PreTrainedModel):
            save_network(model, folder)
        else:
            save_model(model, str(Path(folder) / "model.safetensors"))
        if self.processor is not None:
            self.processor.save_pretrained(folder)

    def load_saved(self, folder: str | os.PathLike) -> nn.Module:
        """What `save_base_model` wrote."""
        model = without_wrapper(self.load_base_model())
        if isinstance(model, PreTrainedModel):
            return load_network(folder, type(model))
        load_model(model, Path(folder) / "model.safetensors")
        return model


class Task(OfNetworks):
    """
    What a subclass says about the base model and its data is all that the rest needs to know. `call` below is the base
    model, or a function that takes its place and runs the same network with other parameters; it must be the only way
    in which a task runs a network. What a task draws by chance while a network trains, it draws from torch's global
    generator, which is seeded anew at every step.

    A task is a `ClassificationTask`, or a `MeasuredTask` for everything else that networks do.

    Attributes:
        new_head (`str`): After `load_base_model`: which tensors of a pretrained network had to be drawn anew, and why.
        processor (*optional*): The image processor or tokenizer of transformers that prepares the network's inputs; it
            goes with a generator.
    """

    new_head: str = ""

    @abstractmethod
    def load_split(self, split: Split) -> Examples:
        """A map-style data set. Validation selects, test reports; no two splits share an example."""

    def collate(self, examples: Any) -> Batch:
        """What a `DataLoader` does with the examples of a batch. By default a batch is taken as it is, if the split
        returns whole ones, and mappings are stacked."""
        return examples if isinstance(examples, Mapping) else default_collate(examples)

    def augment(self, batch: Batch) -> Batch:
        """
        What a network is trained on in place of a batch of `collate`, drawn from torch's global generator; `batch`
        itself where there is no augmentation. Only base training and collection call it.
        """
        return batch

    @abstractmethod
    def loss(self, call: Callable, batch: Batch) -> torch.Tensor:
        """The training loss of one batch, a scalar, whether the network is in training or in evaluation mode."""


class ClassificationTask(Task):
    """A task with one of C classes for each example; the batches of `collate` have the entry `labels`, `(B,)`."""

    @abstractmethod
    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        """Logits of shape `(B, C)`."""

    def loss(self, call: Callable, batch: Batch) -> torch.Tensor:
        """The cross-entropy of `predict`."""
        return F.cross_entropy(self.predict(call, batch), batch["labels"])


class MeasuredTask(Task):
    """
    A task whose networks are judged by one number over a whole split, such as the AP of a detector. There is no
    similarity of wrong predictions then: reports say how good networks are and how near to the snapshots they lie.

    Attributes:
        metric (`str`): Name of the number.
        unit (`str`): Of the number, such as `%`; empty if it has none.
        higher_is_better (`bool`): Whether the best network is the one with the largest number.
    """

    metric: str
    unit: str = ""
    higher_is_better: bool = True

    @abstractmethod
    def measure(self, models: NetworkRunner, split: Split, parameters: torch.Tensor) -> torch.Tensor:
        """
        The metric of N networks on a split, float64 of shape `(N,)`, in as few passes over the data as can be.

        Args:
            models (`NetworkRunner`): Runs the networks, `models(lambda call: ..., parameters)`, and computes what they
                have in common once; `models.model` is the base model, in evaluation mode.
            split (`str`): Networks are selected on `validation` and reported on `test`.
            parameters (`torch.Tensor`): Shape `(N, D)`.
        """


class Tensors(Dataset):
    """
    Examples in memory, or what else can be taken by lists of indices; `__getitems__(indices)` returns a batch.

    Args:
        parts: Of a batch, by name; they are attributes, too.
    """

    def __init__(self, **parts: Any):
        self.parts = parts

    def __getattr__(self, name: str) -> Any:
        if name in (parts := vars(self).get("parts", {})):
            return parts[name]
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, index: Any) -> Batch:
        return {name: part[index] for name, part in self.parts.items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self[list(indices)]


def digest(*parts: Any) -> str:
    """A string that changes when any of some tensors, bytes or other values do."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, torch.Tensor):
            found.update(f"{part.dtype} {tuple(part.shape)}".encode())
            part = part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        found.update(part if isinstance(part, bytes) else repr(part).encode())
    return found.hexdigest()


def load_batch(task: Task, split: Split, indices: Sequence[int], device: torch.device) -> Batch:
    """Some examples of a split as one batch on a device."""
    return to_device(task.collate(take(task.load_split(split), indices)), device)


def batches(task: Task, split: Split, size: int, device: torch.device) -> Iterator[Batch]:
    """All examples of a split in batches of `size`, on a device."""
    for indices in torch.arange(len(task.load_split(split))).split(size):
        yield load_batch(task, split, indices.tolist(), device)


def statistics_batches(task: Task, device: torch.device) -> Iterator[Callable[[Callable], torch.Tensor]]:
    """
    Forward passes over `STATISTICS_EXAMPLES` training examples, evenly spaced over the split and as they are without
    augmentation, from which the statistics of batch norm are recomputed.
    """
    indices = evenly(len(task.load_split("train")), STATISTICS_EXAMPLES)
    for part in indices.tensor_split(-(-len(indices) // STATISTICS_BATCH_SIZE)):
        yield functools.partial(task.loss, batch=load_batch(task, "train", part.tolist(), device))


def evenly(count: int, limit: int | None) -> torch.Tensor:
    """At most `limit` indices below `count`, evenly spaced."""
    return torch.linspace(0, count - 1, min(count, limit or count)).round().long()


def check_head(task: Task, is_trained: bool) -> None:
    """
    Says that a pretrained network has a fresh head. Call it after `load_base_model`.

    Args:
        is_trained (`bool`): Whether the network will be trained.

    Raises:
        ValueError: if it will not be: its predictions would be those of chance.
    """
    if task.new_head and not is_trained:
        raise ValueError(
            f"base_epochs is 0, which takes the model as it is, but {task.new_head}. Train it (base_epochs of 1 or "
            "more), or take a data set of the model's own classes"
        )
    if task.new_head:
        logger.warning("%s", task.new_head)


def take(split: Examples, indices: Sequence[int]) -> Any:
    """The examples at `indices`, in one call where the data set can do that."""
    return split.__getitems__(indices) if hasattr(split, "__getitems__") else [split[i] for i in indices]


def predict_logits(
    task: ClassificationTask,
    models: NetworkRunner,
    split: Split,
    parameters: torch.Tensor,
    max_examples: int | None = None,
) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
    """
    Runs N networks over a split in one pass over the data.

    Args:
        parameters (`torch.Tensor`): Shape `(N, D)`.
        max_examples (`int`, *optional*): No more examples than this, evenly spaced over the split.

    Yields:
        `tuple`: Which networks, which examples, logits of shape `(n, B, C)`, and labels of shape `(B,)`. Where memory
        runs out, a batch of examples begins anew in smaller ones, and what it gave before comes again.
    """
    device = next(models.model.parameters()).device
    parameters = to_device(parameters, device)
    indices, size, start = evenly(len(task.load_split(split)), max_examples).tolist(), EVAL_BATCH_SIZE, 0
    while start < len(indices):
        examples = slice(start, min(start + size, len(indices)))
        try:
            batch = load_batch(task, split, indices[examples], device)
            for rows, logits in models(functools.partial(task.predict, batch=batch), parameters):
                yield rows, examples, logits, batch["labels"]
            start = examples.stop
            continue
        except Exception as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        size = halve(examples.stop - start, "examples")


def accuracies(task: ClassificationTask, models: NetworkRunner, split: Split, parameters: torch.Tensor) -> torch.Tensor:
    """Accuracy of N networks in percent, shape `(N,)`, in one pass over the data."""
    correct = torch.zeros(len(parameters), len(task.load_split(split)), dtype=torch.bool)
    for rows, examples, logits, labels in predict_logits(task, models, split, parameters):
        correct[rows, examples] = (logits.argmax(-1) == labels).cpu()
    return 100 * correct.sum(-1) / correct.shape[1]
