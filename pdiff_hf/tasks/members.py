"""Tasks of a family: one of them by itself, and many as one."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from .task import Batch, ClassificationTask, Split

if TYPE_CHECKING:
    import os

    from .families import Family


class FamilyTask(ClassificationTask):
    """What tasks have from their family."""

    def __init__(self, family: "Family", table: torch.Tensor):
        self.family, self.table = family, table

    @property
    def new_head(self) -> str:  # type: ignore[override]  # follows what the family has loaded
        return getattr(getattr(self.family, "base", None), "new_head", "")

    def load_base_model(self) -> nn.Module:
        return self.family.load_base_model()

    def save_base_model(self, model: nn.Module, folder: "str | os.PathLike") -> None:
        self.family.save_base_model(model, folder)

    def load_saved(self, folder: "str | os.PathLike") -> nn.Module:
        return self.family.load_saved(folder)

    def fingerprint(self, split: Split) -> str:
        return f"{self.family.fingerprint(split)} {self.table.tolist()}"

    def loss(self, call: Callable, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(self.predict(call, batch), batch["labels"])

    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        return self.family.predict(call, batch)

    def collate(self, examples: Batch) -> Batch:
        """The splits return whole batches."""
        return examples


class MemberTask(FamilyTask):
    """One task of a family; what [`Family.task`] returns. `table` has its condition, shape `(1, width)`."""

    def load_split(self, split: Split) -> "FamilySplit":
        return FamilySplit(self, split, lambda indices: torch.zeros(1, dtype=torch.long))


class MixtureTask(FamilyTask):
    """
    Many tasks of a family as one, for one network that is to know them all; what [`Family.mixture`] returns. An example
    belongs to one of the conditions of `table`, shape `(T, width)`: in training by chance, drawn from torch's global
    generator, else always to the same one.
    """

    def load_split(self, split: Split) -> "FamilySplit":
        def conditions(indices: torch.Tensor) -> torch.Tensor:
            if split == "train":
                return torch.randint(len(self.table), indices.shape)
            return indices % len(self.table)

        return FamilySplit(self, split, conditions)


class FamilySplit(Dataset):
    """
    The examples of a task; `__getitems__(indices)` returns a batch.

    Args:
        rows_of (`Callable`): From indices of examples, shape `(B,)`, to the conditions that they belong to, rows of the
            task's table: one for all, shape `(1,)`, or one for each, shape `(B,)`.
    """

    def __init__(self, task: FamilyTask, split: Split, rows_of: Callable[[torch.Tensor], torch.Tensor]):
        self.task, self.split, self.rows_of = task, split, rows_of

    def __len__(self) -> int:
        return self.task.family.num_examples(self.split)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        examples = torch.as_tensor(indices)
        rows = self.rows_of(examples)
        batch = self.task.family.batch(self.split, self.task.table[rows], examples.view(len(rows), -1))
        return {name: values.flatten(0, 1) for name, values in batch.items()}  # (B, ...)
