"""Images as neural fields: one network for each image of a data set, at any resolution."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import torch
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from ..models.condition import Condition, Fields
from ..networks.neural_field import KINDS, NeuralField
from .data_task import STARTS, DataTask
from .dataset import hold_out
from .fid import load_features
from .images import ImageColumn, ImageTask, load_image_data
from .labels import NUMBER, label_candidates
from .registry import register_task
from .task import Split, Tensors

LOOKED_AT = 100  # images, of which one in colour makes all fields those of colours


@register_task("neural_field")
@dataclass
class NeuralFieldTask(ImageTask, DataTask):
    """
    Each network is an image: from a position, both coordinates from -1 to 1, to grey or colour.

    Args beyond those of [`ImageTask`]:
        model (`str`, *optional*, defaults to `"siren"`): Or `fourier`; see [`NeuralField`].
        model_args (`dict`, *optional*): More arguments of [`NeuralField`].
        dataset (`str`, *optional*, defaults to `"all_digits"`): Those of a split `test`, or else `validation`, are held
            out; without one, the share `validation_fraction` is.
        image_size (`int`, *optional*): By default that of the first image.
        condition_columns (`list[str]`, *optional*): What generators are told of an image: columns of classes, words or
            numbers. By default the class, if there is one; none for `[]`.
        start (`str`, *optional*, defaults to `"mean"`): See [`DataTask`].
        fid_features (`str`, *optional*): `inception`, or an image classifier of transformers or timm, whose features
            sets of images are compared by. By default three small classifiers are trained on the data set.
    """

    model: str = "siren"
    dataset: str = "all_digits"
    condition_columns: list[str] | None = None
    start: str = "mean"
    fid_features: str | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        if self.model not in KINDS:
            raise ValueError(f"model must be one of {', '.join(KINDS)} for the task neural_field, got '{self.model}'")
        if self.start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}, got '{self.start}'")
        if self.augmentation != "none":
            raise ValueError("augmentation has no effect: a network is one image as it is; leave it out")
        raw = load_image_data(self.dataset, self.image_column)
        features = raw["train"].features
        labels = label_candidates(features)
        columns = self.condition_columns if self.condition_columns is not None else labels if len(labels) == 1 else []
        if missing := [name for name in columns if name not in features]:
            raise ValueError(
                f"dataset '{self.dataset}' has no column {missing[0]}; its columns are {', '.join(features)}"
            )
        names = {self._choose_image(features): "image"} | {name: name for name in columns}
        rows = self._take(raw, names, self._bad_images)
        train, test = rows["train"], next((rows[name] for name in reversed(rows) if name != "train"), None)
        if test is None:
            train, test = hold_out(train, self.dataset, self.validation_fraction)
        self._set_splits({"train": train, "validation": test, "test": test})
        images = list(ImageColumn(train, "image", self.dataset).read(range(min(len(train), LOOKED_AT))))
        self.image_size = self.image_size or max(images[0].size)
        self._mode = "L" if all(image.mode in ("L", "1", "LA") for image in images) else "RGB"
        if self.condition_columns is None:  # images in no folders of classes have an empty column
            columns = [name for name in columns if len({*self._values(name, "train"), None}) > 2]
        self.fields = Fields({name: self._field(name) for name in columns})
        self.model_args = {"out_features": len(self._mode)} | self.model_args
        self.load_base_model()  # an error comes before the images are read

    def _values(self, column: str, split: Split) -> list[Any]:
        """Words, or numbers of a column that is not the label."""
        rows = self._raw[split]
        feature, values = rows.features[column], rows[column][:]
        if isinstance(feature, datasets.ClassLabel):
            return [None if value is None or value < 0 else feature.int2str(value) for value in values]
        is_label = column in label_candidates(rows.features)
        return [value if value is None or not is_label else str(value) for value in values]

    def _field(self, column: str) -> dict[str, Any]:
        feature = self._raw["train"].features[column]
        if isinstance(feature, datasets.ClassLabel):
            return {"type": "category", "values": feature.names}
        known = [v for split in ("train", "test") for v in self._values(column, split) if v is not None]
        if all(isinstance(value, str) for value in known):
            words = sorted(set(known))
            return {
                "type": "category",
                "values": sorted(words, key=float) if all(map(NUMBER.fullmatch, words)) else words,
            }
        if all(isinstance(value, int | float) for value in known):
            numbers = [float(value) for value in known if math.isfinite(value)]
            return {"type": "scalar", "low": min(numbers), "high": max(numbers)}
        raise ValueError(f"dataset '{self.dataset}': column {column} holds {feature}, neither words nor numbers")

    def conditions(self, split: Split) -> Sequence[Condition]:
        columns = {name: self._values(name, split) for name in self.fields}
        return [{name: values[i] for name, values in columns.items()} for i in range(len(self._raw[split]))]

    def load_base_model(self) -> NeuralField:
        """Fresh weights depend on torch's global seed."""
        try:
            return NeuralField(kind=self.model, **self.model_args)
        except TypeError as error:
            raise ValueError(f"model_args: {error}") from None

    def coordinates(self, resolution: int | None = None) -> torch.Tensor:
        """The centres of pixels, row by row, of a square from -1 to 1: shape `(resolution², 2)`."""
        size = resolution or self.image_size or 1
        centres = (2 * torch.arange(size) + 1) / size - 1
        return torch.stack(torch.meshgrid(centres, centres, indexing="ij"), -1).view(-1, 2)

    def _prepare(self, split: Split) -> Tensors:
        """Values of pixels from -1 to 1."""
        prepare = Compose([Resize(self.image_size), CenterCrop(self.image_size), PILToTensor()])
        images = self._images(split)
        pixels = torch.stack([prepare(image.convert(self._mode)) for image in images.read(range(len(images)))])
        return Tensors(signals=pixels.flatten(2).mT / 127.5 - 1)

    def signals(self, split: Split) -> torch.Tensor:
        return self.load_split(split).signals

    def fingerprint(self, split: Split) -> str:
        return f"{DataTask.fingerprint(self, split)} {self.fid_features}"

    def data(self, outputs: torch.Tensor) -> torch.Tensor:
        return ((outputs + 1) / 2).clamp(0, 1)

    def images(self, outputs: torch.Tensor) -> torch.Tensor:
        size = round(outputs.shape[-2] ** 0.5)
        return self.data(outputs).mT.unflatten(-1, (size, size))

    @cached_property
    def _network(self) -> torch.nn.Module:
        assert self.fid_features is not None
        return load_features(self.fid_features)

    @torch.no_grad()
    def features(self, outputs: torch.Tensor) -> torch.Tensor | None:
        if self.fid_features is None:
            return None
        pixels = (255 * self.images(outputs)).round().to(torch.uint8)
        return torch.cat([self._network(part) for part in pixels.split(100)])
