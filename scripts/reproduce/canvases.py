"""
Small objects on large canvases: a data set for detection and segmentation out of one for image classification.

    python scripts/reproduce/canvases.py zalando-datasets/fashion_mnist outputs/canvases --size 64 \\
        --max_train_samples 3200 --max_eval_samples 100

The folder holds a train, a validation and a test split with the columns `image`, `mask` (0 for the background, and 1
more than the class of an object) and `objects` (`bbox`: left, top, right, bottom in pixels; `category`).
"""

import argparse
import os
from collections.abc import Iterator
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from pdiff_hf.tasks.image_classification import ImageClassificationTask
from pdiff_hf.tasks.images import ImageColumn
from pdiff_hf.tasks.task import SPLITS, Split
from pdiff_hf.utils.files import replacing
from pdiff_hf.utils.seeds import derive_seed

Box = tuple[int, int, int, int]  # left, top, right and bottom
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


def write_canvases(
    source_dataset: str,
    folder: str | os.PathLike,
    size: int = 64,
    validation_fraction: float = 0.1,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> None:
    """
    Writes square canvases, dark, textured and noisy, with one to three objects each that hardly overlap. They follow
    from the images, the split and the size alone. No image serves two canvases.

    Args:
        source_dataset (`str`): `digits`, a local folder or the Hub id of an image-classification data set.
        folder (`str` or `os.PathLike`): Receives the data set, in place of what was there.
        size (`int`, *optional*, defaults to 64): Side of a canvas in pixels.
        validation_fraction (`float`, *optional*, defaults to 0.1): Of the source's training images, where it has no
            validation split.
        max_train_samples, max_eval_samples (`int`, *optional*): No more than this many canvases in a split.

    Raises:
        ValueError: for a data set that does not fit image classification, or has more classes than a mask can tell
            apart, or too few images, or an image with no pixel bright enough to be seen.
    """
    if size < 8:
        raise ValueError(f"a canvas needs a side of at least 8 pixels, got {size}")
    limits = [None if limit is None else MAX_OBJECTS * limit for limit in (max_train_samples, max_eval_samples)]
    source = ImageClassificationTask(
        dataset=source_dataset,
        validation_fraction=validation_fraction,
        max_train_samples=limits[0],
        max_eval_samples=limits[1],
    )
    if len(source.class_names) > MAX_CLASSES:
        raise ValueError(
            f"dataset '{source_dataset}' has {len(source.class_names)} classes; canvases can have {MAX_CLASSES}"
        )
    features = datasets.Features(
        image=datasets.Image(),
        mask=datasets.Image(),
        objects={
            "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
            "category": datasets.List(datasets.ClassLabel(names=source.class_names)),
        },
    )
    with replacing(folder) as part:
        part.mkdir()
        for split in SPLITS:
            images, labels = source.raw_examples(split)
            if len(images) < MAX_OBJECTS:
                raise ValueError(
                    f"the {split} split of dataset '{source_dataset}' has {len(images)} images; a canvas needs "
                    f"{MAX_OBJECTS}"
                )
            canvases = datasets.Dataset.from_list(list(_canvases(images, labels, split, size)), features=features)
            canvases.to_parquet(part / f"{split}.parquet")


def _canvases(images: ImageColumn, classes: torch.Tensor, split: Split, size: int) -> Iterator[dict[str, Any]]:
    """The rows of a split."""
    seed = SPLITS.index(split)
    order = torch.randperm(len(images), generator=_generator(seed)).tolist()
    for i in range(len(images) // MAX_OBJECTS):
        generator = _generator(seed, i)
        chosen = order[MAX_OBJECTS * i :][: int(_uniform(generator, 1, MAX_OBJECTS + 1))]
        canvas = _background(size, generator)
        boxes: list[Box] = []
        labels: list[int] = []
        mask = torch.zeros(size, size, dtype=torch.uint8)
        for j in chosen:
            image = pil_to_tensor(images[j].convert("RGB")).float()
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
            visible, image = visible[crop], image[(slice(None), *crop)]
            box = _place(visible.shape[0], visible.shape[1], size, boxes, generator)
            if box is None:  # no room is left
                continue
            boxes.append(box)
            labels.append(int(classes[j]))
            left, top, right, bottom = box
            canvas[:, top:bottom, left:right][:, visible] = image[:, visible]
            mask[top:bottom, left:right][visible] = labels[-1] + 1
        pixels = canvas.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
        yield {
            "image": Image.fromarray(pixels.numpy()),
            "mask": Image.fromarray(mask.numpy()),
            "objects": {"bbox": boxes, "category": labels},
        }


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*numbers))


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _background(size: int, generator: torch.Generator) -> torch.Tensor:
    """Coloured clouds under noise, float32 of shape `(3, size, size)`."""
    clouds = TEXTURE * torch.rand(1, 3, 6, 6, generator=generator)
    canvas = F.interpolate(clouds, (size, size), mode="bilinear")[0]
    return (canvas + NOISE * torch.randn(canvas.shape, generator=generator)).clamp(0, 255)


def _place(height: int, width: int, size: int, boxes: list[Box], generator: torch.Generator) -> Box | None:
    """A box of this height and width that hardly overlaps `boxes`, or None if chance finds none."""
    for _ in range(20):
        left = int(_uniform(generator, 0, size - width + 1))
        top = int(_uniform(generator, 0, size - height + 1))
        box = (left, top, left + width, top + height)
        if all(_overlap(box, other) <= MAX_OVERLAP for other in boxes):
            return box
    return None


def _overlap(a: Box, b: Box) -> float:
    """Of the smaller box, the share that both have in common."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0, width) * max(0, height) / smaller


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source_dataset", help="`digits`, or folder or Hub id of an image-classification data set.")
    parser.add_argument("folder", help="Receives the data set, in place of what was there.")
    parser.add_argument("--size", type=int, default=64, help="Side of a canvas in pixels.")
    parser.add_argument("--validation_fraction", type=float, default=0.1, help="Of the source's training images.")
    parser.add_argument("--max_train_samples", type=int, help="No more canvases for training than this.")
    parser.add_argument("--max_eval_samples", type=int, help="No more canvases for validation and test than this.")
    args = parser.parse_args()
    try:
        write_canvases(**vars(args))
    except ValueError as error:
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")


if __name__ == "__main__":
    main()
