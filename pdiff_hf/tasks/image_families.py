"""Families over the images of a task: what a condition does to them."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ..models.condition import CategoryField, Condition, ConditionError, Fields, ScalarField
from .family import TaskFamily
from .image_classification import ImageClassificationTask
from .task import Batch, Split


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
