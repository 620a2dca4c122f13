"""Classification by any `nn.Module`, with the data as tensors: a task that needs no class of your own."""

import copy
import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from ..utils.seeds import derive_seed
from .task import Batch, ClassificationTask, Split

Data = tuple[torch.Tensor, torch.Tensor]
HELD_OUT = 0.2  # of the training data, for each split that there is not


class ModuleTask(ClassificationTask):
    """
    A network that turns inputs into logits, and its data.

    Args:
        model (`nn.Module`): `model(inputs)` gives logits of shape `(B, C)`. It is copied. A run trains it further, or
            takes it as it is with `base_epochs=0`.
        train (`tuple`): Inputs, a tensor of shape `(M, ...)`, and labels, whole numbers of shape `(M,)`.
        validation (`tuple`, *optional*), test (`tuple`, *optional*): The same of the other splits; by default a fifth
            of the training data each, drawn at random, always the same.

    Raises:
        ValueError: where inputs and labels do not belong together.
    """

    def __init__(self, model: nn.Module, train: Data, validation: Data | None = None, test: Data | None = None):
        self.model = model
        splits: dict[str, Data | None] = {"train": train, "validation": validation, "test": test}
        for name, data in splits.items():
            if data is not None:
                _check(name, *data)
        missing = [name for name, data in splits.items() if data is None]
        inputs, labels = train
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive_seed(0, 0)))
        size = int(HELD_OUT * len(labels))
        if missing and size < 1:
            raise ValueError(f"{len(labels)} training examples leave none for {' and '.join(missing)}")
        for name in missing:
            splits[name], order = (inputs[order[:size]], labels[order[:size]]), order[size:]
        if missing:
            splits["train"] = inputs[order.sort().values], labels[order.sort().values]
        self.splits = {name: Tensors(*data) for name, data in splits.items() if data is not None}

    def load_base_model(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def load_split(self, split: Split) -> "Tensors":
        return self.splits[split]

    def fingerprint(self, split: Split) -> str:
        digest = hashlib.blake2b(digest_size=16)
        state = self.model.state_dict().values() if split == "train" else ()
        for tensor in (self.splits[split].inputs, self.splits[split].labels, *state):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return f"{type(self.model).__qualname__} {digest.hexdigest()}"

    def source_classes(self) -> tuple[type, ...]:
        return (type(self), *(type(module) for module in self.model.modules()))

    def collate(self, examples: Batch) -> Batch:
        """The splits return whole batches."""
        return examples

    def loss(self, call: Callable, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(self.predict(call, batch), batch["labels"])

    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        return call(batch["inputs"])


class Tensors(Dataset):
    """Examples in memory; `__getitems__(indices)` returns a batch."""

    def __init__(self, inputs: torch.Tensor, labels: torch.Tensor):
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return {"inputs": self.inputs[index], "labels": self.labels[index]}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = torch.as_tensor(indices)
        return {"inputs": self.inputs[rows], "labels": self.labels[rows]}


def _check(name: str, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{name}: labels must be whole numbers of shape (M,), got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if len(inputs) != len(labels) or not len(labels):
        raise ValueError(f"{name}: there are {len(inputs)} inputs and {len(labels)} labels")
