"""Semantic segmentation with torchvision's networks on any data set of images and masks (paper, Table 11)."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision.models import segmentation

from ..networks.batched import BatchedModels
from ..networks.torchvision import Architecture
from .canvases import PREFIX, Canvases, find_sources
from .splits import check_sizes, load_raw, make_splits
from .task import Batch, MeasuredTask, Split, take

# Pixels of this class are neither trained on nor counted.
IGNORED = 255
# The size that torchvision's pretrained networks were trained at.
DEFAULT_SIZE = 520
# What torchvision's networks expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The share of the auxiliary head in the loss, as torchvision trains its networks.
AUXILIARY_WEIGHT = 0.5
# Scaled images are kept in memory (as uint8) up to this size, and made anew for each batch beyond it.
MEMORY_BUDGET = 2 * 2**30
MEASURE_BATCH_SIZE = 50


@dataclass
class SemanticSegmentationTask(MeasuredTask):
    """
    Networks are judged by their mIoU in percent: for each class that the split has pixels of, the pixels that are
    rightly given to it over those that are given to it or belong to it; then the mean over the classes.

    Args:
        model (`str`, *optional*, defaults to `"fcn_resnet50"`): A builder of `torchvision.models.segmentation`, with
            fresh weights; `builder:WEIGHTS` for pretrained ones, such as `fcn_resnet50:COCO_WITH_VOC_LABELS_V1`. The
            network keeps its last layers if the data set's masks have no classes beyond the weights' own, which they
            are then taken for; else, and for canvases, the layers whose shape follows from the number of classes are
            fresh.
        dataset (`str`): A local folder or the Hub id of a data set, `id:config` for one of several configs, with a
            column `image` and one other column of images, the masks: class ids from 0, where 255 stands for pixels that
            do not count, or the colours of Pascal VOC (`nateraw/pascal-voc-2012`). Or `canvas:ID_OR_FOLDER`: see
            [`~pdiff_hf.tasks.canvases.Canvases`].
        image_size (`int`, *optional*, defaults to 520): Side of the square that images and masks are scaled to fit
            into; what is left of it does not count. Side of the canvases, which need it.
        model_args (`dict`, *optional*): More arguments of the builder, such as `aux_loss`.
        holdout_fraction (`float`, *optional*, defaults to 0.2): Share of the training data that becomes the validation
            split, and the test split, where the data set has none; see [`~pdiff_hf.tasks.splits.make_splits`].
        max_train_samples, max_eval_samples (`int`, *optional*): Use no more than this many images of a split.

    Raises:
        ValueError: when created, for an unknown model or data set, or one that does not fit semantic segmentation.
    """

    model: str = "fcn_resnet50"
    dataset: str = "nateraw/pascal-voc-2012"
    image_size: int | None = None
    model_args: dict = field(default_factory=dict)
    holdout_fraction: float = 0.2
    max_train_samples: int | None = None
    max_eval_samples: int | None = None

    metric, unit = "mIoU", "%"

    def __post_init__(self):
        check_sizes(self, "image_size", "max_train_samples", "max_eval_samples")
        self._architecture = Architecture.find(self.model, segmentation, self.model_args)
        if self._architecture.weights is not None and "aux_loss" in self._architecture.known_args:
            self._architecture = Architecture.find(self.model, segmentation, {"aux_loss": True} | self.model_args)
        limits = (self.holdout_fraction, self.max_train_samples, self.max_eval_samples)
        if self.dataset.startswith(PREFIX):
            if self.image_size is None:
                raise ValueError(f"dataset '{self.dataset}' needs image_size, the side of its canvases in pixels")
            self._raw = find_sources(self.dataset, *limits)
            self._num_classes = 1 + self._raw["train"].features["label"].num_classes
        else:
            raw = {name: self._name_columns(split) for name, split in load_raw(self.dataset, f"{PREFIX}..., ").items()}
            self._raw = make_splits(raw, self.dataset, *limits)
            self._num_classes = max(self._count_classes(name) for name in self._raw)
            if self._num_classes <= len(self._architecture.categories):
                self._num_classes = len(self._architecture.categories)

    def _name_columns(self, split: datasets.Dataset) -> datasets.Dataset:
        images = [name for name, feature in split.features.items() if isinstance(feature, datasets.Image)]
        masks = [name for name in images if name != "image"]
        if len(images) != 2 or len(masks) != 1:
            raise ValueError(
                f"dataset '{self.dataset}' needs a column image and one other column of images, the masks, for "
                f"semantic segmentation, got {split.features}"
            )
        return split.select_columns(["image", masks[0]]).rename_columns({masks[0]: "mask"})

    def _count_classes(self, name: Split) -> int:
        """One more than the largest class id; all masks are read for it, and must be readable."""
        found: set[int] = set()
        for i, mask in enumerate(self._raw[name]["mask"]):
            try:
                ids = read_mask(mask)
            except ValueError as error:
                raise ValueError(f"mask {i} of the split {name} of dataset '{self.dataset}': {error}") from error
            found |= set(np.unique(ids).tolist())
        if not found - {IGNORED}:
            raise ValueError(f"no pixel of the split {name} of dataset '{self.dataset}' has a class")
        return max(found - {IGNORED}) + 1

    def load_base_model(self) -> nn.Module:
        """The network. Fresh weights depend on torch's global seed."""
        network = self._architecture.build(self._num_classes)
        if self._architecture.weights is not None:
            self._architecture.load_pretrained(network)
        return network

    def load_split(self, split: Split) -> "SegmentationSplit":
        """Images and masks of one size."""
        if split not in self._splits:
            raw = self._raw[split]
            if self.dataset.startswith(PREFIX):
                canvases = Canvases(raw, split, self.image_size)
                self._splits[split] = SegmentationSplit(canvases.images, canvases.masks)
            else:
                self._splits[split] = SegmentationSplit.scaled(raw, self.image_size or DEFAULT_SIZE)
        return self._splits[split]

    def fingerprint(self, split: Split) -> str:
        """Follows the data set's own fingerprint, the choice of examples, the size, and the first image and mask."""
        examples = self.load_split(split)
        digest = hashlib.blake2b(digest_size=16)
        for tensor in take(examples, [0]).values():
            digest.update(tensor.numpy().tobytes())
        return f"{self._raw[split]._fingerprint} {len(examples)} {self.image_size} {digest.hexdigest()}"

    @cached_property
    def _splits(self) -> dict[str, "SegmentationSplit"]:
        return {}

    @staticmethod
    def collate(examples: Batch) -> Batch:
        """`SegmentationSplit` returns whole batches."""
        return examples

    @staticmethod
    def loss(call: Callable, batch: Batch) -> torch.Tensor:
        """The mean cross-entropy of the pixels that count, with that of the auxiliary head if there is one."""
        logits = call(batch["pixel_values"])
        loss = F.cross_entropy(logits["out"], batch["masks"], ignore_index=IGNORED)
        if "aux" in logits:
            loss = loss + AUXILIARY_WEIGHT * F.cross_entropy(logits["aux"], batch["masks"], ignore_index=IGNORED)
        return loss

    @staticmethod
    def predict(call: Callable, batch: Batch) -> torch.Tensor:
        """The class of every pixel, shape `(B, H, W)`."""
        return call(batch["pixel_values"])["out"].argmax(1)

    def measure(self, models: BatchedModels, split: Split, parameters: torch.Tensor) -> torch.Tensor:
        """The mIoU of N networks on a split; see [`MeasuredTask`]."""
        examples = self.load_split(split)
        device = next(models.model.parameters()).device
        parameters = parameters.to(device)
        classes = self._num_classes
        # For each network, how many pixels of class i it gave to class j.
        confusion = torch.zeros(len(parameters), classes, classes, dtype=torch.int64, device=device)
        for start in range(0, len(examples), MEASURE_BATCH_SIZE):
            indices = list(range(start, min(start + MEASURE_BATCH_SIZE, len(examples))))
            batch = send_to_device(self.collate(take(examples, indices)), device)
            counts = batch["masks"] != IGNORED
            truth = classes * batch["masks"][counts]
            for rows, predicted in models(lambda call, batch=batch: self.predict(call, batch), parameters):
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


class SegmentationSplit(Dataset):
    """
    Images and masks, uint8 of shapes `(N, 3, S, S)` and `(N, S, S)`.

    `__getitems__(indices)` returns a batch: `pixel_values`, float32 of shape `(B, 3, S, S)`, and `masks`, int64 of
    shape `(B, S, S)`.
    """

    def __init__(self, images: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]):
        self.images, self.masks = images, masks
        self.mean = 255 * torch.tensor(MEAN).view(-1, 1, 1)  # (3, 1, 1)
        self.std = 255 * torch.tensor(STD).view(-1, 1, 1)

    @classmethod
    def scaled(cls, raw: datasets.Dataset, size: int) -> "SegmentationSplit":
        """Images and masks of a data set, scaled to fit into a square of side `size`."""
        images, masks = _Scaled(raw, "image", size), _Scaled(raw, "mask", size)
        if 4 * len(raw) * size**2 <= MEMORY_BUDGET:
            return cls(torch.stack(list(images)), torch.stack(list(masks)))
        return cls(images, masks)

    def __len__(self) -> int:
        return len(self.masks)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        images = torch.stack([self.images[i] for i in indices])
        masks = torch.stack([self.masks[i] for i in indices])
        return {"pixel_values": (images.float() - self.mean) / self.std, "masks": masks.long()}


class _Scaled(Sequence):
    """The images or masks of a data set, scaled when they are asked for; the rest of the square is grey or ignored."""

    def __init__(self, raw: datasets.Dataset, column: str, size: int):
        self.column, self.is_mask, self.size = raw[column], column == "mask", size

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, i: int) -> torch.Tensor:
        image = self.column[i]
        image = Image.fromarray(read_mask(image)) if self.is_mask else image.convert("RGB")
        scale = self.size / max(image.size)
        width, height = (max(1, round(scale * side)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.NEAREST if self.is_mask else Image.Resampling.BILINEAR)
        square = np.full((self.size, self.size, *np.shape(image)[2:]), IGNORED if self.is_mask else 0, dtype=np.uint8)
        if not self.is_mask:
            square[:] = np.round(255 * np.array(MEAN))
        square[:height, :width] = image
        square = torch.from_numpy(square)
        return square if self.is_mask else square.permute(2, 0, 1)


def read_mask(mask: Image.Image) -> np.ndarray:
    """
    The class ids of a mask, uint8 of shape `(H, W)`, from an image of ids or one in the colours of Pascal VOC.

    Raises:
        ValueError: for other colours, and for ids that are none.
    """
    values = np.asarray(mask)
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
        return tuple(sum((i >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3))

    return {colour(i): i for i in (*range(21), IGNORED)}
