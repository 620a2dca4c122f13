"""Classification by any `nn.Module`, with the data as tensors: a task that needs no class of your own."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from ..utils.seeds import derive_seed
from .task import Batch, ClassificationTask, Split, Tensors, digest

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
        self.splits = {name: Tensors(inputs=data[0], labels=data[1]) for name, data in splits.items() if data}

    def load_base_model(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def load_split(self, split: Split) -> Tensors:
        return self.splits[split]

    def fingerprint(self, split: Split) -> str:
        state = self.model.state_dict().values() if split == "train" else ()
        return f"{type(self.model).__qualname__} {digest(*self.splits[split].parts.values(), *state)}"

    def source_classes(self) -> tuple[type, ...]:
        return (type(self), *(type(module) for module in self.model.modules()))

    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        return call(batch["inputs"])


def _check(name: str, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{name}: labels must be whole numbers of shape (M,), got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if len(inputs) != len(labels) or not len(labels):
        raise ValueError(f"{name}: there are {len(inputs)} inputs and {len(labels)} labels")
