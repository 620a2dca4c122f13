"""Families of tasks: what a condition ranges over, with the data of many tasks in one batch."""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..models.condition import AngleField, CategoryField, Condition, ConditionError, Fields, ScalarField
from ..utils.seeds import derive_seed
from .image_classification import ImageClassificationTask
from .labels import LabelledTask
from .members import MemberTask, MixtureTask
from .task import Batch, Split, load_base, save_base

# So many draws without a new task mean that there are no more.
MAX_DRAWS = 1000


class Family(ABC):
    """
    Tasks that differ by a condition. Their examples come from one data set, so that example i of every task follows
    from example i of that.

    Attributes:
        fields (`Fields`): Of a condition.
        test_sets (`Mapping[str, str]`): Regions of conditions that are kept for tests, by name, with what they are;
            none by default.
    """

    fields: Fields
    test_sets: Mapping[str, str] = {}

    @abstractmethod
    def draw(self, generator: torch.Generator) -> dict[str, Any]:
        """One random condition."""

    @abstractmethod
    def load_base_model(self) -> nn.Module:
        """The network that all tasks share the architecture of; fresh weights depend on torch's global seed."""

    @abstractmethod
    def num_examples(self, split: Split) -> int:
        """Of a split, the same for all tasks."""

    @abstractmethod
    def batch(self, split: Split, table: torch.Tensor, indices: torch.Tensor) -> Batch:
        """
        Examples of many tasks.

        Args:
            table (`torch.Tensor`): The conditions, of `fields.table`, shape `(T, width)`.
            indices (`torch.Tensor`): Of the examples: shape `(B,)`, for all tasks the same, or `(T, B)`.

        Returns:
            `dict`: What `predict` needs, tensors of shape `(T, B, ...)`, and `labels` of shape `(T, B)`.
        """

    @abstractmethod
    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        """Logits of one network on the examples of its task, shape `(B, C)`."""

    @abstractmethod
    def fingerprint(self, split: Split) -> str:
        """A string that changes when the examples of a split, or what conditions do to them, change."""

    def task(self, condition: Condition) -> MemberTask:
        """One task by itself."""
        return MemberTask(self, self.fields.table([condition]))

    def mixture(self, table: torch.Tensor) -> MixtureTask:
        """Many tasks as one: each example belongs to one of the conditions `table`, shape `(T, width)`, by chance."""
        return MixtureTask(self, table)

    def save_base_model(self, model: nn.Module, folder: str | os.PathLike) -> None:
        """Writes the network into the existing folder."""
        save_base(model, folder)

    def load_saved(self, folder: str | os.PathLike) -> nn.Module:
        """What `save_base_model` wrote."""
        return load_base(self.load_base_model(), folder)

    def region(self, condition: Condition) -> str | None:
        """Which of the `test_sets` a condition belongs to; None for the others."""
        return None

    def key(self, condition: Condition) -> Hashable:
        """Equal for conditions of the same task."""
        return tuple(self.fields.table([condition])[0].tolist())

    def conditions(
        self, num: int, seed: int, *, region: str | None = None, without: Collection[Hashable] = ()
    ) -> list[dict[str, Any]]:
        """
        Random conditions of different tasks.

        Args:
            region (`str`, *optional*): One of `test_sets`; by default, what is in none of them.
            without (`Collection`, *optional*): The keys of tasks that must not be among them.

        Raises:
            ValueError: if there are not as many tasks.
        """
        generator = torch.Generator().manual_seed(seed)
        keys: set[Hashable] = set(without)
        conditions: list[dict[str, Any]] = []
        for _ in range(MAX_DRAWS * (num + 1)):
            if len(conditions) == num:
                return conditions
            condition = self.draw(generator)
            key = self.key(condition)
            if self.region(condition) == region and key not in keys:
                keys.add(key)
                conditions.append(condition)
        raise ValueError(
            f"the family has fewer than {num} tasks {f'in {region!r}' if region else 'outside its test sets'} "
            f"besides {len(without)} others: found {len(conditions)}"
        )

    def curve(self, num: int) -> tuple[str, list[dict[str, Any]]]:
        """
        For a figure: the first field that is an angle or a number, and conditions along it; all other fields stay at
        the lowest value or the first word. Without such a field, or with one that has no such value, there are none.
        """
        along, fixed = "", dict[str, Any]()
        for name, spec in self.fields.items():
            if isinstance(spec, AngleField | ScalarField) and not along:
                along = name
            elif isinstance(spec, AngleField | ScalarField):
                fixed[name] = spec.low if isinstance(spec, ScalarField) else 0.0
            elif isinstance(spec, CategoryField):
                fixed[name] = spec.values[0]
            else:
                return "", []
        if not along:
            return "", []
        spec = self.fields[along]
        if isinstance(spec, AngleField):
            values = [spec.period * i / num for i in range(num)]
        else:
            assert isinstance(spec, ScalarField)
            values = torch.linspace(spec.low, spec.high, num).tolist()
        return along, [fixed | {along: value} for value in values]

    def split(
        self, sizes: Mapping[str, int], seed: int, *, without: Collection[Hashable] = ()
    ) -> dict[str, list[dict[str, Any]]]:
        """
        Conditions of tasks for `train`, `validation`, `test` and any of `test_sets`; no task is in two of them.

        Args:
            without (`Collection`, *optional*): The keys of tasks that only `train` may have.

        Raises:
            ValueError: for another name, or if there are not as many tasks.
        """
        names = ("train", "validation", "test", *self.test_sets)
        unknown = [name for name in sizes if name not in names]
        if unknown:
            raise ValueError(f"there is no set of tasks {unknown[0]!r}; there are {', '.join(names)}")
        taken: set[Hashable] = set()
        result = {}
        for i, name in enumerate(names):
            if sizes.get(name):
                region = name if name in self.test_sets else None
                others = taken if name == "train" else taken | set(without)
                result[name] = self.conditions(sizes[name], derive_seed(seed, i), region=region, without=others)
                taken |= {self.key(condition) for condition in result[name]}
        return result


@dataclass
class TaskFamily(Family):
    """
    A family over the data set of a task.

    Args:
        base (`LabelledTask`): Its data and its network.
    """

    base: LabelledTask

    def num_examples(self, split: Split) -> int:
        return len(self.base.load_split(split))  # type: ignore[arg-type]  # a map-style data set

    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        return self.base.predict(call, batch)

    def load_base_model(self) -> nn.Module:
        return self.base.load_base_model()

    def save_base_model(self, model: nn.Module, folder: str | os.PathLike) -> None:
        self.base.save_base_model(model, folder)

    def fingerprint(self, split: Split) -> str:
        return f"{self.base.fingerprint(split)} {type(self).__qualname__} {self.fields.to_dict()}"


@dataclass
class ImageFamily(TaskFamily):
    """
    A family over the images of a task.

    Args:
        base (`ImageClassificationTask`): Its data and its network.
    """

    base: ImageClassificationTask
    _pixels: dict = field(default_factory=dict, init=False, repr=False)

    def pixels(self, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
        """All images of a split, uint8 of shape `(M, C, H, W)`, and their labels."""
        if split not in self._pixels:
            examples = self.base.load_split(split)
            parts = [examples.__getitems__(rows.tolist()) for rows in torch.arange(len(examples)).split(1000)]
            values = torch.cat([(p["pixel_values"] * examples.std + examples.mean).round().byte() for p in parts])
            self._pixels[split] = values, torch.cat([part["labels"] for part in parts])
        return self._pixels[split]

    def batch(self, split: Split, table: torch.Tensor, indices: torch.Tensor) -> Batch:
        pixels, labels = self.pixels(split)
        images = pixels[indices].to(table.device).float() / 255  # (B, C, H, W) or (T, B, C, H, W)
        images = images.expand(len(table), *images.shape[-4:])
        labels = labels[indices].to(table.device).expand(len(table), indices.shape[-1])
        images, labels = self.change(table, images, labels)
        examples = self.base.load_split(split)
        mean, std = (value.to(table.device) / 255 for value in (examples.mean, examples.std))
        return {"pixel_values": (images - mean) / std, "labels": labels}

    @abstractmethod
    def change(
        self, table: torch.Tensor, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What a condition does to examples of the data set.

        Args:
            table (`torch.Tensor`): Shape `(T, width)`.
            images (`torch.Tensor`): Between 0 and 1, shape `(T, B, C, H, W)`.
            labels (`torch.Tensor`): Shape `(T, B)`.
        """


TRANSFORMED_FIELDS: dict[str, dict[str, Any]] = {
    "angle": {"type": "angle", "period": 360.0},
    "blur": {"type": "scalar", "low": 0.0, "high": 1.5},
    "invert": {"type": "category", "values": ["no", "yes"]},
    "occlude": {"type": "category", "values": ["none", "left", "right", "top", "bottom"]},
}
OCCLUDED = 0.4  # of the image
REGIONS = {
    "combinations": "inverted images with a part on the right or at the bottom blackened",
    "extrapolation": "blur in the upper fifth of its range",
}


@dataclass
class TransformedFamily(ImageFamily):
    """
    The images of a task rotated by `angle` degrees, blurred with a Gaussian of `blur` pixels, inverted, and with a part
    of them blackened.

    Args:
        ranges (`dict`, *optional*): Another range of a field: `[low, high]`, or the words that may stand there (two of
            them at least); None for a field that there is not.
    """

    ranges: dict[str, Sequence | None] = field(default_factory=dict)
    hold_out: Sequence[str] = ()
    _last_maps: tuple | None = field(default=None, init=False, repr=False)

    def __post_init__(self):
        unknown = [name for name in self.hold_out if name not in REGIONS]
        if unknown:
            raise ConditionError(f"hold_out can have {', '.join(REGIONS)}, not {unknown[0]!r}")
        self.test_sets = {name: REGIONS[name] for name in self.hold_out}
        specs: dict[str, dict[str, Any]] = {name: dict(spec) for name, spec in TRANSFORMED_FIELDS.items()}
        for name, values in self.ranges.items():
            if name not in specs:
                raise ConditionError(f"a transformed family has no field {name!r}; it has {', '.join(specs)}")
            if values is None:
                del specs[name]
            elif specs[name]["type"] == "category":
                wrong = [value for value in values if value not in specs[name]["values"]]
                if wrong:
                    raise ConditionError(f"'{name}' can be {', '.join(specs[name]['values'])}, not {wrong[0]!r}")
                specs[name]["values"] = list(values)
            elif specs[name]["type"] == "angle":
                specs[name] = {"type": "scalar", "low": values[0], "high": values[1]}
            else:
                specs[name] |= {"low": values[0], "high": values[1]}
        self.fields = Fields(specs)

    def draw(self, generator: torch.Generator) -> dict[str, Any]:
        values: dict[str, Any] = {}
        draws = torch.rand(len(self.fields), generator=generator).tolist()
        for u, (name, spec) in zip(draws, self.fields.items(), strict=True):
            if isinstance(spec, CategoryField):
                values[name] = spec.values[int(u * len(spec.values))]
            elif isinstance(spec, AngleField):
                values[name] = u * spec.period
            elif isinstance(spec, ScalarField):
                values[name] = spec.low + u * (spec.high - spec.low)
        return values

    def _words(self, name: str) -> tuple[str, ...]:
        field = self.fields[name]
        assert isinstance(field, CategoryField)
        return field.values

    def region(self, condition: Condition) -> str | None:
        combination = condition.get("invert") == "yes" and condition.get("occlude") in ("right", "bottom")
        if "combinations" in self.hold_out and combination:
            return "combinations"
        blur = self.fields.get("blur")
        if "extrapolation" not in self.hold_out or not isinstance(blur, ScalarField):
            return None
        return "extrapolation" if condition["blur"] > 0.2 * blur.low + 0.8 * blur.high else None

    def change(
        self, table: torch.Tensor, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tasks, _, _, height, width = images.shape
        maps = self._maps(table, height, width)
        flat = images.reshape(num_tasks, -1, height, width)  # all images of a task are moved alike
        if maps.grid is not None:
            flat = F.grid_sample(flat, maps.grid, align_corners=False)
        if maps.blur is not None:
            # One product a task and direction: all images of a task are blurred alike.
            rows, lines = maps.blur
            flat = flat.reshape(num_tasks, -1, width) @ lines.mT  # (T, B C H, W)
            flat = flat.view(num_tasks, -1, height, width).transpose(1, 2).reshape(num_tasks, height, -1)
            flat = rows @ flat  # (T, H, B C W)
            flat = flat.view(num_tasks, height, -1, width).transpose(1, 2)
        images = flat.reshape(images.shape)
        images = torch.addcmul(maps.offset, images, maps.factor)  # in one pass: most of what a small network costs
        return images, labels

    def _maps(self, table: torch.Tensor, height: int, width: int) -> "Maps":
        """What conditions do to images of this size; a zoo asks for the same ones at every step."""
        key = height, width, table.device, table.shape
        if self._last_maps is None or self._last_maps[0] != key or not torch.equal(self._last_maps[1], table):
            self._last_maps = key, table.clone(), self._make_maps(table, height, width)
        return self._last_maps[2]

    def _make_maps(self, table: torch.Tensor, height: int, width: int) -> "Maps":
        num_tasks = len(table)
        columns = {name: table[:, part].squeeze(1) for name, part in self.fields.columns.items()}  # (T,) each
        grid, blur = None, None
        if "angle" in columns:
            radians = columns["angle"] * (math.pi / 180)
            sin, cos, zero = radians.sin(), radians.cos(), torch.zeros_like(radians)
            maps = torch.stack([cos, -sin * height / width, zero, sin * width / height, cos, zero], dim=1)
            grid = F.affine_grid(maps.view(-1, 2, 3), [num_tasks, 1, height, width], align_corners=False)
        if "blur" in columns:
            blur = blur_matrix(columns["blur"], height), blur_matrix(columns["blur"], width)
        factor = torch.ones(num_tasks, 1, 1, height, width, device=table.device)
        offset = torch.zeros_like(factor)
        if "invert" in columns:
            inverted = torch.tensor([word == "yes" for word in self._words("invert")], device=table.device)
            inverted = inverted[columns["invert"].long()].view(-1, 1, 1, 1, 1).float()
            factor, offset = factor - 2 * inverted, offset + inverted
        if "occlude" in columns:
            y = ((torch.arange(height, device=table.device) + 0.5) / height).view(-1, 1).expand(height, width)
            x = ((torch.arange(width, device=table.device) + 0.5) / width).expand(height, width)
            visible = {
                "none": y > 0,
                "left": x > OCCLUDED,
                "right": x < 1 - OCCLUDED,
                "top": y > OCCLUDED,
                "bottom": y < 1 - OCCLUDED,
            }
            masks = torch.stack([visible[word] for word in self._words("occlude")])
            mask = masks[columns["occlude"].long()].view(num_tasks, 1, 1, height, width)
            factor, offset = factor * mask, offset * mask
        return Maps(grid, blur, factor, offset)


@dataclass(frozen=True)
class Maps:
    """
    What the conditions of T tasks do to images, one after the other.

    Args:
        grid (`torch.Tensor`, *optional*): Where each pixel comes from, shape `(T, H, W, 2)`, as of `F.grid_sample`.
        blur (`tuple`, *optional*): Matrices on columns and on lines, shapes `(T, H, H)` and `(T, W, W)`.
        factor (`torch.Tensor`), offset (`torch.Tensor`): Of each pixel at the end, shape `(T, 1, 1, H, W)`.
    """

    grid: torch.Tensor | None
    blur: tuple[torch.Tensor, torch.Tensor] | None
    factor: torch.Tensor
    offset: torch.Tensor


def blur_matrix(sigma: torch.Tensor, size: int) -> torch.Tensor:
    """Gaussians of width `sigma`, `(T,)`, in pixels, as matrices on a line of pixels: shape `(T, size, size)`."""
    pixels = torch.arange(size, device=sigma.device)
    distance = pixels - pixels.unsqueeze(1)
    weights = torch.exp(-0.5 * (distance / sigma.clamp_min(0.05).view(-1, 1, 1)).square())
    return weights / weights.sum(-1, keepdim=True)


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


@dataclass
class GroupedFamily(LabelGroups, ImageFamily):
    """`LabelGroups` of images."""

    def change(
        self, table: torch.Tensor, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return images, self.is_positive(table, labels)


@dataclass
class GroupedTextFamily(LabelGroups):
    """
    `LabelGroups` of the texts of a [`TextClassificationTask`].

    Networks of transformers look at the values of a mask of padding, which many networks side by side do not allow.
    They get it in the form that attention needs, which is right for networks whose tokens see all others.
    """

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
        mask = mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)  # (B, T) -> (B, 1, T, T)
        return super().predict(call, {**batch, "attention_mask": mask})

    def batch(self, split: Split, table: torch.Tensor, indices: torch.Tensor) -> Batch:
        examples = self.base.load_split(split).__getitems__(indices.flatten().tolist())  # type: ignore[attr-defined]
        shape = len(table), indices.shape[-1]
        batch = {
            name: values.unflatten(0, indices.shape).to(table.device).expand(*shape, *values.shape[1:])
            for name, values in examples.items()
        }
        return batch | {"labels": self.is_positive(table, batch["labels"])}
