"""Small objects on large canvases: scenes for detection and segmentation out of an image-classification data set."""

import datasets
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import pil_to_tensor

from ..utils.seeds import derive_seed
from .image_classification import load_images
from .splits import make_splits
from .task import Split

PREFIX = "canvas:"
SPLITS = ("train", "validation", "test")
# Pixels of an image that are brighter than this, of 255, belong to its object.
THRESHOLD = 32
# The texture of a canvas is no brighter than this, and is covered by noise of this standard deviation.
TEXTURE, NOISE = 48, 8
MAX_OBJECTS = 3
# Masks have one byte for a pixel, of which two values stand for the background and for what does not count.
MAX_CLASSES = 254
# Sides of the images that are placed on a canvas, as shares of its own.
SCALES = (0.35, 0.6)
# Of the smaller of two objects' boxes, no more than this share may be covered by the other.
MAX_OVERLAP = 0.2


def find_sources(
    dataset: str, holdout_fraction: float, max_train_samples: int | None, max_eval_samples: int | None
) -> dict[str, datasets.Dataset]:
    """
    The images that the canvases of each split are made of; no image serves two splits.

    Args:
        dataset (`str`): `canvas:` and the name of an image-classification data set.
        max_train_samples, max_eval_samples (`int`, *optional*): No more than this many canvases.

    Raises:
        ValueError: for a data set that does not fit image classification, or with a split too small for a canvas, or
            with more classes than a mask can tell apart.
    """
    name = dataset.removeprefix(PREFIX)
    limits = [None if limit is None else MAX_OBJECTS * limit for limit in (max_train_samples, max_eval_samples)]
    sources = make_splits(load_images(name, needs_labels=True), name, holdout_fraction, *limits)
    classes = sources["train"].features["label"].num_classes
    if classes > MAX_CLASSES:
        raise ValueError(f"dataset '{name}' has {classes} classes; canvases can have {MAX_CLASSES}")
    for split, images in sources.items():
        if len(images) < MAX_OBJECTS:
            raise ValueError(
                f"the {split} split of dataset '{name}' has {len(images)} images; a canvas needs {MAX_OBJECTS}"
            )
    return sources


class Canvases:
    """
    Square canvases, dark, textured and noisy, with one to three objects each that hardly overlap. They follow from the
    images, the split and the size alone. Every image is used at most once.

    Args:
        sources (`datasets.Dataset`): Images and their classes, columns `image` and `label`: three for each canvas.
        split (`str`): `train`, `validation` or `test`.
        size (`int`): Side of a canvas in pixels.

    Attributes:
        images (`torch.Tensor`): uint8 of shape `(N, 3, size, size)`.
        masks (`torch.Tensor`): The class of every pixel, uint8 of shape `(N, size, size)`: 0 for the background, and 1
            more than the label of an object.
        boxes (`list[torch.Tensor]`): For each canvas, left, top, right and bottom of its objects, float32 of shape
            `(n, 4)`; right and bottom are just beyond the last pixel.
        labels (`list[torch.Tensor]`): And their classes, as in the mask, int64 of shape `(n,)`.

    Raises:
        ValueError: if an image has no pixel bright enough to be seen.
    """

    def __init__(self, sources: datasets.Dataset, split: Split, size: int):
        seed = SPLITS.index(split)
        order = torch.randperm(len(sources), generator=_generator(seed)).tolist()
        count = len(sources) // MAX_OBJECTS
        self.images = torch.empty(count, 3, size, size, dtype=torch.uint8)
        self.masks = torch.zeros(count, size, size, dtype=torch.uint8)
        self.boxes: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []
        for i in range(count):
            generator = _generator(seed, i)
            chosen = order[MAX_OBJECTS * i :][: int(_uniform(generator, 1, MAX_OBJECTS + 1))]
            canvas, boxes, labels = _background(size, generator), [], []
            for j in chosen:
                row = sources[j]
                image = pil_to_tensor(row["image"].convert("RGB")).float()
                side = round(size * _uniform(generator, *SCALES))
                image = F.interpolate(image[None], (side, side), mode="bilinear", antialias=True)[0]  # (3, side, side)
                visible = image.amax(0) > THRESHOLD
                if not visible.any():
                    raise ValueError(
                        f"image {j} of the {split} images cannot be placed on a canvas: none of its pixels is brighter "
                        f"than {THRESHOLD} of 255"
                    )
                ys, xs = (visible.any(dim).nonzero().squeeze(1) for dim in (1, 0))
                crop = (slice(int(ys[0]), int(ys[-1]) + 1), slice(int(xs[0]), int(xs[-1]) + 1))
                visible, image = visible[crop], image[:, *crop]
                box = _place(visible.shape, size, boxes, generator)
                if box is None:  # no room is left
                    continue
                boxes.append(box)
                labels.append(row["label"] + 1)
                left, top, right, bottom = box
                canvas[:, top:bottom, left:right][:, visible] = image[:, visible]
                self.masks[i, top:bottom, left:right][visible] = labels[-1]
            self.images[i] = canvas.round().clamp(0, 255)
            self.boxes.append(torch.tensor(boxes, dtype=torch.float32))
            self.labels.append(torch.tensor(labels))


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*numbers))


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _background(size: int, generator: torch.Generator) -> torch.Tensor:
    """Coloured clouds under noise, float32 of shape `(3, size, size)`."""
    clouds = TEXTURE * torch.rand(1, 3, 6, 6, generator=generator)
    canvas = F.interpolate(clouds, (size, size), mode="bilinear")[0]
    return (canvas + NOISE * torch.randn(canvas.shape, generator=generator)).clamp(0, 255)


def _place(
    shape: tuple[int, int], size: int, boxes: list[tuple[int, ...]], generator: torch.Generator
) -> tuple[int, int, int, int] | None:
    """A box of this height and width that hardly overlaps `boxes`, or None if chance finds none."""
    height, width = shape
    for _ in range(20):
        left = int(_uniform(generator, 0, size - width + 1))
        top = int(_uniform(generator, 0, size - height + 1))
        box = (left, top, left + width, top + height)
        if all(_overlap(box, other) <= MAX_OVERLAP for other in boxes):
            return box
    return None


def _overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Of the smaller box, the share that both have in common."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0, width) * max(0, height) / smaller
