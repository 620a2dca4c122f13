"""Semantic segmentation with torchvision's networks on any data set of images and masks (paper, Table 11)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import tv_tensors
from torchvision.models import segmentation
from torchvision.transforms.functional import pil_to_tensor

from ..networks.runner import NetworkRunner
from ..networks.torchvision import Architecture
from .dataset import BadRows
from .images import ImageColumn, ImageTask, load_image_data, prepared
from .registry import register_task
from .task import Batch, MeasuredTask, Split, Tensors, batches

# Pixels of this class are neither trained on nor counted.
IGNORED = 255
# The size that torchvision's pretrained networks were trained at.
DEFAULT_SIZE = 520
# What torchvision's networks expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The share of the auxiliary head in the loss, as torchvision trains its networks.
AUXILIARY_WEIGHT = 0.5
MEASURE_BATCH_SIZE = 50


@register_task("semantic_segmentation")
@dataclass
class SemanticSegmentationTask(ImageTask, MeasuredTask):
    """
    Networks are judged by their mIoU in percent: for each class that the split has pixels of, the pixels that are
    rightly given to it over those that are given to it or belong to it; then the mean over the classes.

    Args beyond those of [`ImageTask`]:
        model (`str`, *optional*, defaults to `"fcn_resnet50"`): A builder of `torchvision.models.segmentation`, with
            fresh weights; `builder:WEIGHTS` for pretrained ones, such as `fcn_resnet50:COCO_WITH_VOC_LABELS_V1`. The
            network keeps its last layers if the data set's masks have no classes beyond the weights' own, which they
            are then taken for; else the layers whose shape follows from the number of classes are fresh.
        dataset (`str`): A local folder or the Hub id of a data set with a column `image` and one other column of
            images, the masks: class ids from 0, where 255 stands for pixels that do not count, or the colours of Pascal
            VOC (`nateraw/pascal-voc-2012`).
        image_size (`int`, *optional*, defaults to 520): Side of the square that images and masks are scaled to fit
            into; what is left of it does not count.
        model_args (`dict`, *optional*): More arguments of the builder, such as `aux_loss`.

    Raises:
        ValueError: when created, for an unknown model or data set, or one that does not fit semantic segmentation.
    """

    model: str = "fcn_resnet50"
    dataset: str = "nateraw/pascal-voc-2012"

    metric, unit = "mIoU", "%"

    def __post_init__(self) -> None:
        self._check_sizes()
        self._size = self.image_size or DEFAULT_SIZE
        self._architecture = Architecture.find(self.model, segmentation, self.model_args)
        if self._architecture.weights is not None and "aux_loss" in self._architecture.known_args:
            self._architecture = Architecture.find(self.model, segmentation, {"aux_loss": True} | self.model_args)
        raw = load_image_data(self.dataset, self.image_column)
        highest: list[int] = []

        def bad_masks(rows: datasets.Dataset) -> BadRows:
            masks, ids = ImageColumn(rows, "mask", self.dataset, read_mask), {-1}
            bad = masks.bad(lambda mask: ids.update(np.unique(mask[mask != IGNORED]).tolist()))
            highest.append(max(ids))
            return bad

        self._set_splits(self._take(raw, self._choose_columns(raw["train"].features), self._bad_images, bad_masks))
        if min(highest) < 0:
            name = list(raw)[highest.index(-1)]
            raise ValueError(f"no pixel of the split {name} of dataset '{self.dataset}' has a class")
        classes = max(highest) + 1
        own = len(self._architecture.categories)
        self._num_classes = own if classes <= own else classes

    def _choose_columns(self, features: datasets.Features) -> dict[str, str]:
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        image = self.image_column or "image"
        masks = [name for name in images if name != image]
        if image not in images or len(masks) != 1:
            raise ValueError(
                f"dataset '{self.dataset}' does not fit semantic segmentation: it needs a column {image} and one other "
                f"column of images, the masks; its columns of images are {', '.join(images) or 'none'}"
            )
        return {image: "image", masks[0]: "mask"}

    def load_base_model(self) -> nn.Module:
        """The network. Fresh weights depend on torch's global seed."""
        network, self.new_head = self._architecture.load(self._num_classes)
        return network

    def _prepare(self, split: Split) -> "SegmentationSplit":
        """Images and masks of one size."""
        masks = ImageColumn(self._raw[split], "mask", self.dataset, read_mask)
        return SegmentationSplit(images=self._scaled(self._images(split)), masks=self._scaled(masks))

    def _scaled(self, column: ImageColumn) -> Any:
        """Images or masks in squares, of which the rest is grey or ignored: uint8."""
        is_mask, side = column.column == "mask", self._size

        def scale(item: Any) -> torch.Tensor:
            image = Image.fromarray(item) if is_mask else item.convert("RGB")
            shape = [max(1, round(side / max(image.size) * length)) for length in image.size]
            how = Image.Resampling.NEAREST if is_mask else Image.Resampling.BILINEAR
            empty = IGNORED if is_mask else tuple(round(255 * value) for value in MEAN)
            square = Image.new("L" if is_mask else "RGB", (side, side), empty)
            square.paste(image.resize(shape, how))
            return pil_to_tensor(square)[0] if is_mask else pil_to_tensor(square)

        return prepared(lambda rows: torch.stack([scale(item) for item in column.read(rows)]), len(column))

    def fingerprint(self, split: Split) -> str:
        """Follows the examples of the split and their size."""
        return self._digest(split, ["image", "mask"], [], str(self._size))

    def _augment(self, batch: Batch) -> Batch:
        """Masks follow their images."""
        transform = self._random_transform(batch["pixel_values"].shape[-2:])
        images, masks = [], []
        for image, mask in zip(batch["pixel_values"], batch["masks"], strict=True):
            image, mask = transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
            images.append(image.as_subclass(torch.Tensor))
            masks.append(mask.as_subclass(torch.Tensor))
        return {"pixel_values": torch.stack(images), "masks": torch.stack(masks)}

    def loss(self, call: Callable, batch: Batch) -> torch.Tensor:
        """The mean cross-entropy of the pixels that count, with that of the auxiliary head if there is one."""
        logits = call(batch["pixel_values"])
        loss = F.cross_entropy(logits["out"], batch["masks"], ignore_index=IGNORED)
        if "aux" in logits:
            loss = loss + AUXILIARY_WEIGHT * F.cross_entropy(logits["aux"], batch["masks"], ignore_index=IGNORED)
        return loss

    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        """The class of every pixel, shape `(B, H, W)`."""
        return call(batch["pixel_values"])["out"].argmax(1)

    def measure(self, models: NetworkRunner, split: Split, parameters: torch.Tensor) -> torch.Tensor:
        """The mIoU of N networks on a split; see [`MeasuredTask`]."""
        device = next(models.model.parameters()).device
        classes = self._num_classes
        # For each network, how many pixels of class i it gave to class j.
        confusion = torch.zeros(len(parameters), classes, classes, dtype=torch.int64, device=device)
        for batch in batches(self, split, MEASURE_BATCH_SIZE, device):
            counts = batch["masks"] != IGNORED
            truth = classes * batch["masks"][counts]
            for rows, predicted in models(partial(self.predict, batch=batch), parameters.to(device)):
                for network, one in zip(range(rows.start, rows.stop), predicted, strict=True):
                    cells = torch.bincount(truth + one[counts], minlength=classes**2)
                    confusion[network] += cells.view(classes, classes)
        return 100 * mean_iou(confusion)


def mean_iou(confusion: torch.Tensor) -> torch.Tensor:
    """Shape `(N, C, C)`, pixels of class i that were given to class j, to `(N,)`: over the classes that have pixels."""
    rightly = confusion.diagonal(dim1=1, dim2=2).double()  # (N, C)
    belong, given = confusion.sum(2), confusion.sum(1)
    present = belong > 0
    iou = rightly / (belong + given - rightly).clamp(min=1)
    return (iou * present).sum(1) / present.sum(1)


class SegmentationSplit(Tensors):
    """
    Images and masks, uint8 of shapes `(N, 3, S, S)` and `(N, S, S)`.

    `__getitems__(indices)` returns a batch: `pixel_values`, float32 of shape `(B, 3, S, S)`, and `masks`, int64 of
    shape `(B, S, S)`.
    """

    def __getitem__(self, index: Any) -> Batch:
        mean, std = (255 * torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))  # (3, 1, 1)
        return {"pixel_values": (self.images[index].float() - mean) / std, "masks": self.masks[index].long()}


def read_mask(mask: Image.Image) -> np.ndarray:
    """
    The class ids of a mask, uint8 of shape `(H, W)`, from an image of ids or one in the colours of Pascal VOC.

    Raises:
        ValueError: for other colours, for ids beyond 255, and for floats.
    """
    values = np.asarray(mask)
    if mask.mode == "F":
        raise ValueError("class ids are whole numbers, but it holds floats")
    if values.ndim == 2:
        if values.min(initial=0) < 0 or values.max(initial=0) > 255:
            raise ValueError(f"class ids lie between 0 and 255, got {values.min()} to {values.max()}")
        return values.astype(np.uint8)
    colours, indices = np.unique(values[..., :3].reshape(-1, 3), axis=0, return_inverse=True)
    known = voc_colours()
    unknown = [colour for colour in map(tuple, colours.tolist()) if colour not in known]
    if unknown:
        raise ValueError(f"a mask has class ids in one channel, or the colours of Pascal VOC, but not {unknown[0]}")
    ids = np.array([known[colour] for colour in map(tuple, colours.tolist())], dtype=np.uint8)
    return ids[indices].reshape(values.shape[:2])


def voc_colours() -> dict[tuple[int, int, int], int]:
    """
    The class of each colour. The bits of a class, from the lowest, are the highest bits of red, green and blue, then
    their second highest ones, and so on.
    """

    def colour(i: int) -> tuple[int, int, int]:
        red, green, blue = (sum((i >> (3 * bit + c) & 1) << (7 - bit) for bit in range(3)) for c in range(3))
        return red, green, blue

    return {colour(i): i for i in (*range(21), IGNORED)}
