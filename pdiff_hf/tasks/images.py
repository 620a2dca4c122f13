"""Images of data sets: their columns, modes and files, what is kept in memory, and augmentation."""

import base64
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import timm
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor
from transformers import BaseImageProcessor

from ..utils.errors import first_line
from ..utils.memory import is_out_of_memory
from .dataset import BadRows, DatasetTask, choose_column, describe_row
from .digits import EMBEDDED
from .sources import load_raw
from .task import Batch, Split, Tensors, digest

# Prepared images are kept in memory (as uint8) up to this size, and made anew for each batch beyond it.
MEMORY_BUDGET = 2 * 2**30
# Images that are decoded at once, and those of a split that its fingerprint looks at.
DECODE_BATCH, FINGERPRINTED = 100, 1000
AUGMENTATIONS = ("none", "flip", "crop_flip")


@dataclass
class ImageTask(DatasetTask):
    """
    What tasks on images have in common.

    Args:
        image_size (`int`, *optional*): Side of the square that images are scaled to; 0 for the model's own. By default
            also its own if it has weights, and else that of the images, if it takes them and is made for larger ones.
        model_args (`dict`, *optional*): More arguments of a model with fresh weights.
        image_column (`str`, *optional*): By default `image`, or else the only column of images.
        augmentation (`str`, *optional*, defaults to `"none"`): What training, and nothing else, does to each image of a
            batch by chance: `flip` mirrors half of them from left to right; `crop_flip` also cuts out a part of 8 to
            100% of the area and scales it to the size of the whole (paper, Table 5: RandomResizedCrop).
    """

    image_size: int | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    image_column: str | None = None
    augmentation: str = "none"

    def _check_sizes(self, *names: str) -> None:
        self.image_size = self.image_size or None
        super()._check_sizes("image_size", *names)
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got '{self.augmentation}'")

    def _choose_image(self, features: Mapping[str, Any]) -> str:
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        candidates = ["image"] if "image" in images else images
        name = choose_column(self.dataset, features, candidates, self.image_column, "image_column")
        if name not in images:
            raise ValueError(f"dataset '{self.dataset}': column {name} holds {features[name]}, not images")
        return name

    def _images(self, split: Split) -> "ImageColumn":
        """The images of a split as they are stored."""
        return ImageColumn(self._raw[split], "image", self.dataset)

    def _bad_images(self, rows: datasets.Dataset) -> BadRows:
        """The rows without an image; with `skip_bad_examples`, also those whose image cannot be read."""
        if self.skip_bad_examples:
            return ImageColumn(rows, "image", "").bad()
        stored = rows.data.column("image")
        empty = pc.and_(*(pc.is_null(pc.struct_field(stored, part)) for part in ("bytes", "path")))
        return dict.fromkeys(np.flatnonzero(empty.to_numpy()).tolist(), ("image", "it is empty"))

    def augment(self, batch: Batch) -> Batch:
        """Draws from torch's global generator, for each image on its own; the batch itself with `none`."""
        return batch if self.augmentation == "none" else self._augment(batch)

    def _augment(self, batch: Batch) -> Batch:
        images = batch["pixel_values"]
        transform = self._random_transform(images.shape[-2:])
        return {**batch, "pixel_values": torch.stack([transform(image) for image in images])}

    def _random_transform(self, size: Sequence[int]) -> Callable[..., Any]:
        """For images of this height and width, float of shape `(C, H, W)`, with boxes and masks if there are any."""
        flip = v2.RandomHorizontalFlip()
        return flip if self.augmentation == "flip" else v2.Compose([v2.RandomResizedCrop(tuple(size)), flip])

    def _digest(self, split: Split, columns: Sequence[str], tensors: Sequence[torch.Tensor], how: str) -> str:
        """
        Follows the number of examples, the stored images of up to a thousand of them, evenly spaced, `tensors`, and
        how images are prepared; not where the files lie.
        """
        rows = self._raw[split]
        indices = np.unique(np.linspace(0, len(rows) - 1, min(FINGERPRINTED, len(rows))).round().astype(int)).tolist()
        files = (file for column in columns for file in ImageColumn(rows, column, self.dataset).stored(indices))
        return digest(len(rows), how, *tensors, *files)


def load_image_data(dataset: str, column: str | None = None) -> dict[str, datasets.Dataset]:
    """
    The splits of an image data set.

    Args:
        dataset (`str`): `digits`, `all_digits` or `moving_digits`, which need no download (see `digits.py`), or what
            `load_raw` takes.
        column (`str`, *optional*): Of the images; `image` by default. A column of paths (relative to the data set or
            the current folder), of whole files as bytes, or of files in base64 becomes one of images.

    Raises:
        ValueError: if there is no such data set, and for a column of addresses in the web, or of texts that are neither
            paths nor base64.
    """
    if dataset in EMBEDDED:
        return dict(EMBEDDED[dataset]())
    names, column = ", ".join(f"'{name}'" for name in EMBEDDED), column or "image"
    splits = load_raw(dataset, f"{names}, ")
    feature = splits["train"].features.get(column)
    if isinstance(feature, dict) and "bytes" in feature:
        return {name: rows.cast_column(column, datasets.Image()) for name, rows in splits.items()}
    if not isinstance(feature, datasets.Value):
        return splits
    first = next((row[column] for row in splits["train"].select_columns(column) if row[column] is not None), None)
    convert = _reader(dataset, column, first)
    if convert is None:
        return splits
    stored = {column: {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}

    def read(batch: dict[str, list]) -> dict[str, list]:
        return {column: [None if value is None else convert(value) for value in batch[column]]}

    for name, rows in splits.items():
        features = datasets.Features({**rows.features, **stored})
        rows = rows.map(read, batched=True, batch_size=DECODE_BATCH, features=features)
        splits[name] = rows.cast_column(column, datasets.Image())
    return splits


def _reader(dataset: str, column: str, first: Any) -> Callable[[Any], dict[str, Any]] | None:
    """From what a column of images holds, of which `first` is an example, to what datasets stores of an image."""
    if isinstance(first, bytes):
        return lambda value: {"bytes": value, "path": None}
    if not isinstance(first, str):
        return None
    where = f"dataset '{dataset}', column {column}"
    if re.match(r"\w+://", first):
        raise ValueError(
            f"{where}, holds addresses such as '{first:.100}'. Nothing is downloaded from them, because they change "
            "and fail in the middle of a run: download the images into a folder, and name their paths instead"
        )
    base = Path(dataset) if os.path.isdir(dataset) else Path(dataset).parent
    folder = next((folder for folder in (base, Path()) if (folder / first).is_file()), None)
    if folder is not None:
        return lambda value: {"bytes": None, "path": str((folder / value).absolute())}
    try:
        decode_image({"bytes": _from_base64(first), "path": None})
    except ValueError:
        raise ValueError(
            f"{where}, holds '{first:.100}', which is neither a file in '{base}' or the current folder nor an image in "
            "base64"
        ) from None
    return lambda value: {"bytes": _from_base64(value), "path": None}


def _from_base64(text: str) -> bytes:
    """The file; empty, and so not an image, if the text is not base64."""
    try:
        return base64.b64decode(text.partition("base64,")[2] or text, validate=True)
    except ValueError:
        return b""


class ImageColumn(Sequence[Any]):
    """
    The images of a split, decoded when they are asked for.

    Args:
        rows (`datasets.Dataset`): With the columns `column` and `row`.
        column (`str`): A column of images.
        dataset (`str`): What the data set is called in messages.
        convert (`Callable`, *optional*, defaults to `to_8_bits`): From an image to what is given out.

    Raises:
        ValueError: by what asks for an image that cannot be read; it names data set, split, column and row.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        column: str,
        dataset: str,
        convert: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        # What a column says about the mode of its images is not heeded: it would clip those of more than 8 bits.
        self.rows = rows.select_columns([column, "row"]).cast_column(column, datasets.Image(decode=False))
        self.column, self.dataset, self.convert = column, dataset, convert or to_8_bits

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        return next(self.read([i]))

    def read(self, indices: Sequence[int]) -> Iterator[Any]:
        """Several images, in turn."""
        batch = self.rows[list(indices)]
        for stored, row in zip(batch[self.column], batch["row"], strict=True):
            try:
                yield self.convert(decode_image(stored))
            except ValueError as error:
                where = describe_row(self.dataset, str(self.rows.split or "train"), self.column, row)
                file = f" (file '{stored['path']}')" if stored and stored["path"] else ""
                raise ValueError(f"{where}{file}: {error}; fix it, or leave it out with skip_bad_examples") from error

    def stored(self, indices: Sequence[int]) -> Iterator[bytes]:
        """The files of several images."""
        for i in indices:
            stored = self.rows[i][self.column]
            yield Path(stored["path"]).read_bytes() if stored["bytes"] is None else stored["bytes"]

    def bad(self, look: Callable[[Any], None] = lambda image: None) -> dict[int, tuple[str, str]]:
        """The rows whose image cannot be read, or is refused by `look`."""
        found = {}
        for i in range(len(self)):
            try:
                look(self.convert(decode_image(self.rows[i][self.column])))
            except ValueError as error:
                found[i] = (self.column, str(error))
        return found


def decode_image(stored: Mapping[str, Any] | None) -> Image.Image:
    """
    The image of a file, turned as its Exif data say.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """
    if stored is None or all(value is None for value in stored.values()):
        raise ValueError("it is empty")
    try:
        return datasets.Image().decode_example(dict(stored))
    except Exception as error:  # what a broken file makes the parts of Pillow raise has no common type
        if is_out_of_memory(error):
            raise
        raise ValueError(f"it cannot be read ({first_line(error)})") from error


def to_8_bits(image: Image.Image) -> Image.Image:
    """
    The same image with values from 0 to 255. 16 bits are scaled; 32 bits are taken as they are.

    Raises:
        ValueError: for integers of 32 bits beyond 0 to 255, and for floats: nothing says what their range is.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if image.mode == "F" or low < 0 or high > 255:
            kind = "floats" if image.mode == "F" else "32-bit integers"
            raise ValueError(f"it holds {kind} from {low:g} to {high:g}, of unknown range; save it with 8 or 16 bits")
        return Image.fromarray(values.astype(np.uint8))
    return image


class ImageSplit(Tensors):
    """
    Prepared images, uint8, with their labels.

    `__getitems__(indices)` returns a batch: `pixel_values`, float32 of shape `(B, C, H, W)`, and `labels` of shape
    `(B,)`.
    """

    def __init__(self, images: ImageColumn, labels: torch.Tensor, preparation: "Preparation"):
        def prepare(indices: Sequence[int]) -> torch.Tensor:
            return torch.stack([preparation(image) for image in images.read(indices)])

        super().__init__(images=prepared(prepare, len(images)), labels=labels)
        self.preparation = preparation

    def __getitem__(self, index: Any) -> Batch:
        return {"pixel_values": self.preparation.normalize(self.pixels(index)), "labels": self.labels[index]}

    def pixels(self, indices: Sequence[int]) -> torch.Tensor:
        """Prepared images, uint8 of shape `(B, C, H, W)`."""
        return self.images[indices]


def prepared(prepare: Callable[[Sequence[int]], torch.Tensor], count: int) -> Any:
    """
    The rows that `prepare(indices)` makes, to be taken by lists of indices: made once where all of them fit into
    `MEMORY_BUDGET`, and else when they are asked for.
    """
    if count * prepare([0]).numel() > MEMORY_BUDGET:
        return _Unprepared(prepare, count)
    return torch.cat([prepare(part.tolist()) for part in torch.arange(count).split(DECODE_BATCH)])


class _Unprepared:
    def __init__(self, prepare: Callable[[Sequence[int]], torch.Tensor], count: int):
        self.prepare, self.count = prepare, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: Sequence[int]) -> torch.Tensor:
        return self.prepare(indices)


@dataclass(frozen=True)
class Preparation:
    """
    How a network takes its images.

    Args:
        transform (`Callable`): From an image of PIL to uint8 of shape `(C, H, W)`.
        mean, std (`Sequence[float]`): Of each channel, between 0 and 1.
        mode (`str`): `L` for grey images, `RGB` for coloured ones.
        description (`str`): Of the transform; two that say the same do the same.
    """

    transform: Callable[[Image.Image], Any]
    mean: Sequence[float]
    std: Sequence[float]
    mode: str
    description: str

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.as_tensor(self.transform(image.convert(self.mode)))

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Prepared images, uint8 of shape `(B, C, H, W)`, as float32 with the network's mean and deviation."""
        mean, std = (255 * torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images.float() - mean) / std


def make_preparation(config: Any, processor: Any, image_size: int | None = None) -> Preparation | None:
    """
    How a network takes its images; None if neither says it.

    Args:
        config (`PreTrainedConfig`): Of the network; that of timm says it itself.
        processor (`BaseImageProcessor`, *optional*): Of any other network.
        image_size (`int`, *optional*): Another size than they say.
    """
    if cfg := getattr(config, "pretrained_cfg", None):
        cfg = timm.data.resolve_data_config(pretrained_cfg=cfg, verbose=False)
        if image_size is not None:
            cfg |= {"input_size": (cfg["input_size"][0], image_size, image_size), "crop_pct": 1.0}
        mode = "L" if cfg["input_size"][0] == 1 else "RGB"
        to_tensor = timm.data.create_transform(**cfg, is_training=False, normalize=False)
        return Preparation(to_tensor, cfg["mean"], cfg["std"], mode, str(sorted(cfg.items())))
    if not isinstance(processor, BaseImageProcessor):
        return None
    size = {} if image_size is None else {"size": {"height": image_size, "width": image_size}}

    def process(image: Image.Image) -> torch.Tensor:
        values = processor(pil_to_tensor(image), do_rescale=False, do_normalize=False, return_tensors="pt", **size)
        return values["pixel_values"][0]

    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    return Preparation(process, mean, std, "RGB", f"{processor.to_json_string()} {size}")
