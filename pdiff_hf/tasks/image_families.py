"""Families over the images of a task: what a condition does to them."""

import inspect
import math
import traceback
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ..models.condition import Condition, ConditionError, Conditions, Fields
from ..utils.errors import first_line
from ..utils.memory import is_out_of_memory
from .draws import ExampleGenerator
from .family import TaskFamily
from .image_classification import ImageClassificationTask
from .registry import register_family
from .task import SPLITS, Batch, Split, Task

# Pictures with strong noise leave the range from 0 to 1; pictures from 0 to 255 leave this one.
FARTHEST = (-4.0, 5.0)


@dataclass
class ImageFamily(TaskFamily):
    """
    A family over the images of a task.

    Args:
        base (`ImageClassificationTask`): Its data and its network.
    """

    takes: ClassVar[type[Task] | None] = ImageClassificationTask
    base: ImageClassificationTask
    _pixels: dict = field(default_factory=dict, init=False, repr=False)
    _checked: set = field(default_factory=set, init=False, repr=False)

    def pixels(self, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
        """All images of a split, uint8 of shape `(M, C, H, W)`, and their labels."""
        if split not in self._pixels:
            examples = self.base.load_split(split)
            parts = torch.arange(len(examples)).split(1000)
            pixels = torch.cat([examples.pixels(rows.tolist()) for rows in parts])
            self._pixels[split] = pixels, examples.labels
        return self._pixels[split]

    def batch(self, split: Split, table: torch.Tensor, indices: torch.Tensor) -> Batch:
        return self.examples(split, table, indices, table)

    def examples(
        self, split: Split, table: torch.Tensor, indices: torch.Tensor, seeds: torch.Tensor, draw: int = 0
    ) -> Batch:
        pixels, labels = self.pixels(split)
        shape = len(table), indices.shape[-1]  # (T, B)
        images = pixels[indices].to(table.device).float() / 255  # (B, C, H, W) or (T, B, C, H, W)
        # Each task, and this call, have memory of their own: `change` may write in place.
        images = images.expand(*shape, *images.shape[-3:]).contiguous()
        labels = labels[indices].to(table.device).expand(shape).contiguous()
        stream = SPLITS.index(split) + len(SPLITS) * (draw % 2**32)
        generator = ExampleGenerator(seeds, indices, stream)
        images, labels = self._changed(self.fields.named(table.clone()), images, labels, generator)
        if split not in self._checked:  # which takes time
            self._check_values(images, labels)
            self._checked.add(split)
        preparation = self.base.load_split(split).preparation
        mean, std = (torch.tensor(v, device=table.device).view(-1, 1, 1) for v in (preparation.mean, preparation.std))
        return {"pixel_values": (images - mean) / std, "labels": labels}

    @abstractmethod
    def change(
        self, conditions: Conditions, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What conditions do to examples of the data set.

        For random changes it takes a fourth argument `generator`, an [`ExampleGenerator`]: its numbers belong to the
        example and the task, so that all methods see the same data.

        Args:
            conditions (`Conditions`): Of T tasks, columns by name: `conditions["angle"]` or `conditions.angle` has
                shape `(T,)`, and `conditions.over(images).angle` one that broadcasts over images. Categories are
                indices, and can be compared with words; `conditions.one_hot(name)` has a column for each word.
            images (`torch.Tensor`): Between 0 and 1, shape `(T, B, C, H, W)`; may be written to.
            labels (`torch.Tensor`): Shape `(T, B)`; may be written to.

        Returns:
            `tuple`: Images and labels of the same shapes.
        """

    def _changed(
        self, conditions: Conditions, images: torch.Tensor, labels: torch.Tensor, generator: ExampleGenerator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What `change` makes of examples, float32 and int64. Raises a `ValueError` if it fails or returns something else:
        it names the class, the line and what is expected.
        """
        random = {"generator": generator} if "generator" in inspect.signature(self.change).parameters else {}
        try:
            result: Any = self.change(conditions, images, labels, **random)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(f"{self._where(error)}: {first_line(error)}{_hint(error, conditions)}") from error
        # Two images of two tasks without labels would also be a pair.
        if not isinstance(result, tuple | list) or len(result) != 2 or not all(map(torch.is_tensor, result)):
            got = f"a {type(result).__name__}" if not isinstance(result, tuple | list) else f"{len(result)} values"
            raise self._wrong(f"two tensors, `images, labels`, and returns {got}")
        for name, new, old in zip(("images", "labels"), result, (images, labels), strict=True):
            if new.shape != old.shape:
                shapes = f"of shape {tuple(old.shape)}, as it gets them, and returns {tuple(new.shape)}"
                raise self._wrong(f"{name} {shapes}")
            if new.device != old.device:
                made = f"{new.device}; make new tensors with device={name}.device"
                raise self._wrong(f"{name} on {old.device}, where it gets them, and returns them on {made}")
        new_images, new_labels = result
        if not new_images.is_floating_point():
            raise self._wrong(f"images as floats from 0 to 1, and returns {new_images.dtype}")
        if new_labels.is_floating_point() or new_labels.is_complex():
            raise self._wrong(f"labels as whole numbers, and returns {new_labels.dtype}")
        return new_images.float(), new_labels.long()

    def _check_values(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        low, high = (value.item() for value in images.aminmax())
        if not FARTHEST[0] <= low <= high <= FARTHEST[1]:  # also of what is not a number
            raise self._wrong(f"images about 0 to 1, and returns values from {low:g} to {high:g}")
        first, last = (int(value) for value in labels.aminmax())
        # A family with a network of its own can have other outputs than the data set has classes.
        own_network = type(self).load_base_model is not TaskFamily.load_base_model
        num_classes = None if own_network else len(self.base.class_names)
        if first < 0 or (num_classes is not None and last >= num_classes):
            most = "" if num_classes is None else f" to {num_classes - 1}"
            raise self._wrong(f"labels from 0{most}, and returns some from {first} to {last}")

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"{self._where()} must return {what}")

    def _where(self, error: BaseException | None = None) -> str:
        """The class, and the line of its `change`, or of where an error came from."""
        change = inspect.unwrap(type(self).change)
        code = getattr(change, "__code__", None)
        if code is None:
            return f"{type(self).__name__}.change"
        frames = traceback.extract_tb(error.__traceback__) if error else []
        lines = [frame.lineno for frame in frames if frame.filename == code.co_filename] or [code.co_firstlineno]
        return f"{type(self).__name__}.change ({Path(code.co_filename).name}, line {lines[-1]})"


def _hint(error: Exception, conditions: Conditions) -> str:
    words = [name for name, field in conditions.fields.items() if field.choices]
    if words and isinstance(error, IndexError | RuntimeError):
        return (
            f". A category has the index of its word, shape (T,): compare conditions[{words[0]!r}] with a word, or "
            f"take conditions.one_hot({words[0]!r}), shape (T, number of words)"
        )
    return ""


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


@register_family("transformed")
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

    def region(self, condition: Condition) -> str | None:
        combination = condition.get("invert") == "yes" and condition.get("occlude") in ("right", "bottom")
        if "combinations" in self.hold_out and combination:
            return "combinations"
        blur = self.fields.get("blur")
        if "extrapolation" not in self.hold_out or blur is None or blur.bounds is None:
            return None
        low, high = blur.bounds
        return "extrapolation" if condition["blur"] > 0.2 * low + 0.8 * high else None

    def change(
        self, conditions: Conditions, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tasks, _, _, height, width = images.shape
        maps = self._maps(conditions, height, width)
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

    def _maps(self, conditions: Conditions, height: int, width: int) -> "Maps":
        """What conditions do to images of this size; a zoo asks for the same ones at every step."""
        table = conditions.table
        key = height, width, table.device, table.shape
        if self._last_maps is None or self._last_maps[0] != key or not torch.equal(self._last_maps[1], table):
            self._last_maps = key, table.clone(), self._make_maps(conditions, height, width)
        return self._last_maps[2]

    def _make_maps(self, conditions: Conditions, height: int, width: int) -> "Maps":
        num_tasks, device = conditions.num_tasks, conditions.table.device
        grid, blur = None, None
        if "angle" in conditions:
            radians = conditions.angle * (math.pi / 180)
            sin, cos, zero = radians.sin(), radians.cos(), torch.zeros_like(radians)
            maps = torch.stack([cos, -sin * height / width, zero, sin * width / height, cos, zero], dim=1)
            grid = F.affine_grid(maps.view(-1, 2, 3), [num_tasks, 1, height, width], align_corners=False)
        if "blur" in conditions:
            blur = blur_matrix(conditions.blur, height), blur_matrix(conditions.blur, width)
        factor = torch.ones(num_tasks, 1, 1, height, width, device=device)
        offset = torch.zeros_like(factor)
        if "invert" in conditions:
            inverted = (conditions.over(factor).invert == "yes").float()
            factor, offset = factor - 2 * inverted, offset + inverted
        if "occlude" in conditions:
            y = ((torch.arange(height, device=device) + 0.5) / height).view(-1, 1).expand(height, width)
            x = ((torch.arange(width, device=device) + 0.5) / width).expand(height, width)
            visible = {
                "none": y > 0,
                "left": x > OCCLUDED,
                "right": x < 1 - OCCLUDED,
                "top": y > OCCLUDED,
                "bottom": y < 1 - OCCLUDED,
            }
            masks = torch.stack([visible[word] for word in self.fields["occlude"].choices or ()])
            mask = masks[conditions.occlude].view(num_tasks, 1, 1, height, width)
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
