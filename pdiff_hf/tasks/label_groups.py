"""Families of binary tasks: which classes of a data set, of images or of texts, are positive."""

import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils import compare_versions
from torch import nn

from ..models.condition import Condition, Conditions, Fields
from .family import TaskFamily
from .image_families import ImageFamily
from .registry import register_family
from .task import Batch, Split, Task
from .text_classification import TextClassificationTask


@dataclass
class LabelGroups(TaskFamily):
    """
    Binary tasks over a data set of C classes: which of them are positive. A task and its complement, which is the same
    with the two answers swapped, are one task to `conditions` and `split`; 2^(C-1) - 1 tasks are left.
    """

    def __post_init__(self):
        self.num_classes = len(self.base.class_names)
        self.fields = Fields({"positive": {"type": "vector", "length": self.num_classes}})

    def draw(self, generator: torch.Generator) -> dict[str, Any]:
        while True:
            bits = torch.randint(2, (self.num_classes,), generator=generator)
            if 0 < bits.sum() < self.num_classes:
                return {"positive": bits.float().tolist()}

    def key(self, condition: Condition) -> Hashable:
        bits = tuple(bit > 0.5 for bit in condition["positive"])
        return min(bits, tuple(not bit for bit in bits))

    def is_positive(self, table: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The labels of tasks, from those of the data set: both of shape `(T, B)`."""
        return (table > 0.5).long().gather(1, labels)

    def load_base_model(self) -> nn.Module:
        """With two outputs."""
        names = self.base.class_names
        self.base.class_names = ["negative", "positive"]
        try:
            return self.base.load_base_model()
        finally:
            self.base.class_names = names


@register_family("grouped")
@dataclass
class GroupedFamily(LabelGroups, ImageFamily):
    """`LabelGroups` of images."""

    takes: ClassVar[type[Task] | None] = ImageFamily.takes

    def change(
        self, conditions: Conditions, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return images, self.is_positive(conditions.table, labels)


@register_family("grouped")
@dataclass
class GroupedTextFamily(LabelGroups):
    """
    `LabelGroups` of the texts of a [`TextClassificationTask`].

    Networks of transformers look at the values of a mask of padding, which many networks side by side do not allow.
    They get it in the form that attention needs, which is right for networks whose tokens see all others.
    """

    takes: ClassVar[type[Task] | None] = TextClassificationTask

    def load_base_model(self) -> nn.Module:
        """
        With two outputs.

        Raises:
            ValueError: for a network that answers differently where its mask has another form.
        """
        return self._checked(super().load_base_model())

    def load_saved(self, folder: str | os.PathLike) -> nn.Module:
        return self._checked(self.base.load_saved(folder))

    @torch.no_grad()
    def _checked(self, model: nn.Module) -> nn.Module:
        examples = self.base.load_split("validation").__getitems__(range(min(8, self.num_examples("validation"))))  # type: ignore[attr-defined]
        training = model.training
        plain, masked = (predict(model.eval(), examples) for predict in (self.base.predict, self.predict))
        model.train(training)
        if not torch.allclose(plain, masked, rtol=1e-3, atol=1e-4):
            raise ValueError(
                f"the networks of a family of texts must let every token see all others, and {type(model).__name__} "
                "does not: its answers depend on the form of its attention mask"
            )
        return model

    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        mask = batch["attention_mask"].bool()
        mask = mask[:, None, :].expand(-1, mask.shape[1], -1)  # (B, T) -> (B, T, T)
        if compare_versions("transformers", ">=", "5.0"):
            mask = mask[:, None]  # (B, 1, T, T)
        return super().predict(call, {**batch, "attention_mask": mask})

    def batch(self, split: Split, table: torch.Tensor, indices: torch.Tensor) -> Batch:
        batch = super().batch(split, table, indices)
        return {**batch, "labels": self.is_positive(table, batch["labels"])}
