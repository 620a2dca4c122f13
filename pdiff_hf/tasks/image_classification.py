"""Image classification with any timm or transformers network on any image data set."""

import copy
import difflib
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms.functional import pil_to_tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
)
from transformers.models.timm_wrapper import TimmWrapperConfig

from ..networks.adapters import find_base, load_adapter, load_network, save_network
from .splits import check_sizes, label_settings, load_raw, make_splits
from .task import Batch, ClassificationTask, Split

# Preprocessed images are kept in memory (as uint8) up to this size, and made anew for each batch beyond it.
MEMORY_BUDGET = 2 * 2**30


@dataclass
class ImageClassificationTask(ClassificationTask):
    """
    Args:
        model (`str`, *optional*, defaults to `"resnet18"`): Name of a timm architecture (with fresh weights), or a
            local folder or Hub id of a transformers or timm model (`timm/...`), or of an adapter of PEFT. A local
            folder with a `config.json` and no weights gives that network with fresh weights.
        dataset (`str`, *optional*, defaults to `"digits"`): `digits` (the 1,797 scans that scikit-learn carries), a
            local folder or the Hub id of an image-classification data set; `id:config` for one of several configs.
        image_size (`int`, *optional*): Side of the square that images are scaled to; the model's own by default.
        model_args (`dict`, *optional*): More arguments of a timm architecture, such as `img_size` for a ViT.
        holdout_fraction (`float`, *optional*, defaults to 0.2): Share of the training data that becomes the validation
            split, and the test split, where the data set has none.
        max_train_samples, max_eval_samples (`int`, *optional*): Use no more than this many examples of a split.
        adapter (`str`, *optional*): Folder or Hub id of an adapter of PEFT that the model gets.

    Validation examples are drawn stratified with a fixed seed, so that they are the same in every run. Where a data set
    has a validation split but no labelled test split, its validation split is the one reported, as test, and validation
    comes out of the training data.

    Raises:
        ValueError: when created, for an unknown model or data set, or one that does not fit image classification.
    """

    model: str = "resnet18"
    dataset: str = "digits"
    image_size: int | None = None
    model_args: dict = field(default_factory=dict)
    holdout_fraction: float = 0.2
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    adapter: str | None = None

    def __post_init__(self):
        if base := find_base(self.model):
            self.model, self.adapter = base, self.model
        check_sizes(self, "image_size", "max_train_samples", "max_eval_samples")
        # Looked up now: a mistyped name must not be found out after an hour of work.
        self._config, self._has_weights = self._find_model()
        self._raw = self._find_dataset()
        self.class_names: list[str] = self._raw["train"].features["label"].names

    def _find_model(self) -> tuple[Any, bool]:
        """The network's configuration, and whether there are weights to load with it."""
        if not os.path.isdir(self.model) and "/" not in self.model:
            return self._timm_config(), False
        if self.model_args:
            raise ValueError(f"model_args belong to a timm architecture with fresh weights, not to '{self.model}'")
        try:
            config = AutoConfig.from_pretrained(self.model)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model '{self.model}' is neither a folder with a transformers config.json nor a Hub id that can be "
                f"reached: {error}"
            ) from error
        files = os.listdir(self.model) if os.path.isdir(self.model) else ["model.safetensors"]
        return config, any(name.startswith("model") and ".safetensors" in name for name in files)

    def _timm_config(self) -> TimmWrapperConfig:
        if not timm.is_model(self.model):
            close = difflib.get_close_matches(self.model, timm.list_models(), n=5)
            raise ValueError(
                f"model '{self.model}' is not a timm architecture, a local folder or a Hub id; "
                f"timm has {', '.join(close) or 'no similar name'}"
            )
        try:
            with torch.device("meta"):
                cfg = timm.create_model(self.model, **self.model_args).pretrained_cfg
        except TypeError as error:
            raise ValueError(f"model '{self.model}' does not take the model_args {self.model_args}: {error}") from error
        channels, *size = cfg["input_size"]
        if "img_size" in self.model_args:  # the network's positions are laid out for it
            size = [self.model_args["img_size"]] * 2
        channels = self.model_args.get("in_chans", channels)
        # Only what describes the preprocessing: the rest says where pretrained weights are, which these are not.
        return TimmWrapperConfig(
            architecture=self.model,
            model_args=self.model_args or None,
            pretrained_cfg={
                "input_size": [channels, *size],
                "interpolation": cfg["interpolation"],
                "crop_pct": cfg["crop_pct"] if self.image_size is None else 1.0,
                "mean": [float(np.mean(cfg["mean"]))] * channels if channels != len(cfg["mean"]) else list(cfg["mean"]),
                "std": [float(np.mean(cfg["std"]))] * channels if channels != len(cfg["std"]) else list(cfg["std"]),
            },
        )

    def _find_dataset(self) -> dict[str, datasets.Dataset]:
        """The raw train, validation and test splits, with the columns `image` and `label`."""
        raw = load_images(self.dataset, needs_labels=True)
        return make_splits(raw, self.dataset, self.holdout_fraction, self.max_train_samples, self.max_eval_samples)

    def load_base_model(self) -> PreTrainedModel:
        """The network with one output a class. Fresh weights depend on torch's global seed."""
        labels = label_settings(self.class_names)
        if self._has_weights:
            model = AutoModelForImageClassification.from_pretrained(
                self.model, **labels, dtype=torch.float32, ignore_mismatched_sizes=True
            )
            return load_adapter(model, self.adapter) if self.adapter else model
        config = copy.deepcopy(self._config)
        for name, value in labels.items():
            setattr(config, name, value)
        if self.image_size is not None and isinstance(config, TimmWrapperConfig):
            config.pretrained_cfg["input_size"] = [config.pretrained_cfg["input_size"][0], *[self.image_size] * 2]
        model = AutoModelForImageClassification.from_config(config)
        if isinstance(config, TimmWrapperConfig):
            # transformers has drawn every weight anew; timm's own initialization trains better.
            fresh = timm.create_model(self.model, num_classes=config.num_labels, **self.model_args)
            model.timm_model.load_state_dict(fresh.state_dict())
        return model

    def save_base_model(self, model: PreTrainedModel, folder: str | os.PathLike) -> None:
        """The network, and its image processor; timm's preprocessing is a part of the network's configuration."""
        save_network(model, folder)
        if not isinstance(self._config, TimmWrapperConfig):
            self._load_processor().save_pretrained(folder)

    def load_saved(self, folder: str | os.PathLike) -> PreTrainedModel:
        """What `save_base_model` wrote."""
        return load_network(folder, AutoModelForImageClassification)

    def load_split(self, split: Split) -> "ImageSplit":
        """Images as the network's own preprocessing makes them."""
        if split not in self._splits:
            self._splits[split] = ImageSplit(self._raw[split], *self._preprocessing)
        return self._splits[split]

    def fingerprint(self, split: Split) -> str:
        """Follows the data set's own fingerprint, the choice of examples and the preprocessing."""
        transform, mean, std, mode = self._preprocessing
        first = transform(self._raw[split][0]["image"].convert(mode))
        digest = hashlib.blake2b(np.asarray(first).tobytes(), digest_size=8).hexdigest()
        return f"{self._raw[split]._fingerprint} {len(self._raw[split])} {digest} {mean} {std}"

    @cached_property
    def _splits(self) -> dict[str, "ImageSplit"]:
        return {}

    @cached_property
    def _preprocessing(self) -> tuple[Callable, Sequence[float], Sequence[float], str]:
        """From a PIL image to uint8 of shape (C, H, W), then mean and standard deviation, and the mode of the image."""
        if isinstance(self._config, TimmWrapperConfig):
            cfg = timm.data.resolve_data_config(pretrained_cfg=self._config.pretrained_cfg, verbose=False)
            if self.image_size is not None:
                cfg |= {"input_size": (cfg["input_size"][0], self.image_size, self.image_size), "crop_pct": 1.0}
            transform = timm.data.create_transform(**cfg, is_training=False, normalize=False)
            return transform, cfg["mean"], cfg["std"], "L" if cfg["input_size"][0] == 1 else "RGB"
        processor = self._load_processor()
        size = {} if self.image_size is None else {"size": {"height": self.image_size, "width": self.image_size}}

        def transform(image: Image.Image) -> torch.Tensor:
            values = processor(pil_to_tensor(image), do_rescale=False, do_normalize=False, return_tensors="pt", **size)
            return values["pixel_values"][0]

        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
        return transform, mean, std, "RGB"

    def _load_processor(self) -> BaseImageProcessor:
        try:
            return AutoImageProcessor.from_pretrained(self.model)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model '{self.model}' has no image processor that says how its images are prepared; save the one that "
                f"it was trained with into its folder, as ViTImageProcessor(...).save_pretrained(folder) does: {error}"
            ) from error

    @staticmethod
    def collate(examples: Batch) -> Batch:
        """`ImageSplit` returns whole batches."""
        return examples

    @staticmethod
    def loss(call: Callable, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(call(pixel_values=batch["pixel_values"]).logits, batch["labels"])

    @staticmethod
    def predict(call: Callable, batch: Batch) -> torch.Tensor:
        return call(pixel_values=batch["pixel_values"]).logits


def load_images(dataset: str, needs_labels: bool = False) -> dict[str, datasets.Dataset]:
    """
    The splits of an image data set, with the columns `image` and, where there are labels, `label`. Of several kinds of
    labels (CIFAR-100 has coarse ones too) it is the most detailed one.

    Args:
        dataset (`str`): `digits`, a local folder, or a Hub id, `id:config` for one of several configs.
        needs_labels (`bool`, *optional*, defaults to `False`): Whether images without labels are refused.

    Raises:
        ValueError: if there is no such data set, or it does not have one image column, and labels where needed.
    """
    if dataset == "digits":
        scans = load_digits()
        images = [Image.fromarray(scan) for scan in (scans.images * (255 / 16)).round().astype(np.uint8)]
        classes = datasets.ClassLabel(names=[str(name) for name in scans.target_names])
        features = datasets.Features(image=datasets.Image(), label=classes)
        rows = datasets.Dataset.from_dict({"image": images, "label": scans.target}, features=features)
        # In the order of the file, that is, by writer: the second half is by people whom training has not seen.
        half = len(rows) // 2
        return {"train": rows.select(range(half)), "test": rows.select(range(half, len(rows)))}
    raw = load_raw(dataset, "'digits', ")
    return {name: _name_columns(split, dataset, needs_labels) for name, split in raw.items()}


def _name_columns(split: datasets.Dataset, dataset: str, needs_labels: bool) -> datasets.Dataset:
    images = [name for name, feature in split.features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in split.features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = labels or [name for name in ("label", "labels", "class") if name in split.features]
    labels.sort(key=lambda name: -getattr(split.features[name], "num_classes", 0))
    if len(images) != 1 or (needs_labels and not labels):
        what = "one image column and a label column" if needs_labels else "one image column"
        raise ValueError(f"dataset '{dataset}' needs {what}, got {split.features}")
    names = {images[0]: "image"} | dict.fromkeys(labels[:1], "label")
    split = split.select_columns(list(names)).rename_columns(names)
    if labels and not isinstance(split.features["label"], datasets.ClassLabel):
        split = split.class_encode_column("label")
    return split


class ImageSplit(torch.utils.data.Dataset):
    """
    Preprocessed images. Small data sets are preprocessed once and kept as uint8; others are made for each batch.

    `__getitems__(indices)` returns a batch: `pixel_values`, float32 of shape `(B, C, H, W)`, and `labels` of shape
    `(B,)`.
    """

    def __init__(
        self, raw: datasets.Dataset, transform: Callable, mean: Sequence[float], std: Sequence[float], mode: str
    ):
        self.raw, self.transform, self.mode = raw, transform, mode
        # The images are still 0 to 255 when mean and standard deviation are applied.
        self.mean = 255 * torch.tensor(mean).view(-1, 1, 1)  # (C, 1, 1)
        self.std = 255 * torch.tensor(std).view(-1, 1, 1)
        self.labels = torch.as_tensor(raw["label"][:])
        self._images = None
        if len(raw) * self._transform(raw[0]["image"]).numel() <= MEMORY_BUDGET:
            self._images = torch.stack([self._transform(image) for image in raw["image"]])

    def _transform(self, image: Image.Image) -> torch.Tensor:
        return torch.as_tensor(self.transform(image.convert(self.mode)))

    def __len__(self) -> int:
        return len(self.raw)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        if self._images is None:
            images = torch.stack([self._transform(image) for image in self.raw[indices]["image"]])
        else:
            images = self._images[indices]
        return {"pixel_values": (images.float() - self.mean) / self.std, "labels": self.labels[indices]}
