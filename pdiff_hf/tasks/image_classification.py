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
from sklearn.model_selection import train_test_split
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.models.timm_wrapper import TimmWrapperConfig

from .task import Batch, Split

# Preprocessed images are kept in memory (as uint8) up to this size, and made anew for each batch beyond it.
MEMORY_BUDGET = 2 * 2**30
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
# Fixed, and not the run's seed: models of different runs must be comparable.
SPLIT_SEED = 0


@dataclass
class ImageClassificationTask:
    """
    Args:
        model (`str`, *optional*, defaults to `"resnet18"`): Name of a timm architecture (with fresh weights), or a
            local folder or Hub id of a transformers or timm model (`timm/...`). A local folder with a `config.json` and
            no weights gives that network with fresh weights.
        dataset (`str`, *optional*, defaults to `"digits"`): `digits` (the 1,797 scans that scikit-learn carries), a
            local folder or the Hub id of an image-classification data set; `id:config` for one of several configs.
        image_size (`int`, *optional*): Side of the square that images are scaled to; the model's own by default.
        model_args (`dict`, *optional*): More arguments of a timm architecture, such as `img_size` for a ViT.
        holdout_fraction (`float`, *optional*, defaults to 0.2): Share of the training data that becomes the validation
            split, and the test split, where the data set has none.
        max_train_samples, max_eval_samples (`int`, *optional*): Use no more than this many examples of a split.

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

    def __post_init__(self):
        if not 0 < self.holdout_fraction < 0.5:
            raise ValueError(f"holdout_fraction must lie between 0 and 0.5, got {self.holdout_fraction}")
        for name in ("image_size", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
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
        raw = {name: self._name_columns(split) for name, split in self._load_raw().items()}
        if "train" not in raw:
            raise ValueError(f"dataset '{self.dataset}' needs a split named train, got {sorted(raw)}")
        train, test = raw["train"], raw.get("test")
        validation = next((raw[name] for name in VALIDATION_NAMES if name in raw), None)
        if test is not None and min(test["label"][:], default=-1) < 0:
            test = None  # its labels are withheld, as those of ImageNet are
        if test is None:  # what is reported must not be what was selected on
            test, validation = validation, None
        if test is None:
            train, test = self._hold_out(train)
        if validation is None:
            train, validation = self._hold_out(train)
        splits = {"train": train, "validation": validation, "test": test}
        for name, split in splits.items():
            limit = self.max_train_samples if name == "train" else self.max_eval_samples
            if limit is not None and limit < len(split):
                chosen = np.random.default_rng(SPLIT_SEED).permutation(len(split))[:limit]
                splits[name] = split.select(np.sort(chosen))
            if len(split) == 0:
                raise ValueError(f"the {name} split of dataset '{self.dataset}' is empty")
        return splits

    def _load_raw(self) -> dict[str, datasets.Dataset]:
        if self.dataset == "digits":
            scans = load_digits()
            images = [Image.fromarray(scan) for scan in (scans.images * (255 / 16)).round().astype(np.uint8)]
            classes = datasets.ClassLabel(names=[str(name) for name in scans.target_names])
            features = datasets.Features(image=datasets.Image(), label=classes)
            return {"train": datasets.Dataset.from_dict({"image": images, "label": scans.target}, features=features)}
        path, config = self.dataset, None
        if not os.path.exists(path):
            path, _, config = path.partition(":")
        try:
            return datasets.load_dataset(path, config or None)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"dataset '{self.dataset}' is neither 'digits', a local data set folder nor a Hub id that can be "
                f"reached: {error}"
            ) from error

    def _name_columns(self, split: datasets.Dataset) -> datasets.Dataset:
        images = [name for name, feature in split.features.items() if isinstance(feature, datasets.Image)]
        labels = [name for name, feature in split.features.items() if isinstance(feature, datasets.ClassLabel)]
        labels = labels or [name for name in ("label", "labels", "class") if name in split.features]
        # Where there are several (CIFAR-100 has coarse labels too), the most detailed ones are the task.
        labels.sort(key=lambda name: -getattr(split.features[name], "num_classes", 0))
        if len(images) != 1 or not labels:
            raise ValueError(
                f"dataset '{self.dataset}' needs one image column and a label column for image classification, "
                f"got {split.features}"
            )
        split = split.select_columns([images[0], labels[0]]).rename_columns({images[0]: "image", labels[0]: "label"})
        if not isinstance(split.features["label"], datasets.ClassLabel):
            split = split.class_encode_column("label")
        return split

    def _hold_out(self, split: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
        labels = np.asarray(split["label"][:])
        try:
            rest, held_out = train_test_split(
                np.arange(len(labels)), test_size=self.holdout_fraction, stratify=labels, random_state=SPLIT_SEED
            )
        except ValueError as error:
            raise ValueError(
                f"dataset '{self.dataset}' is too small to hold out {self.holdout_fraction:.0%} of its {len(labels)} "
                f"training examples from every class: {error}"
            ) from error
        return split.select(np.sort(rest)), split.select(np.sort(held_out))

    def load_base_model(self) -> PreTrainedModel:
        """The network with one output a class. Fresh weights depend on torch's global seed."""
        labels = {
            "num_labels": len(self.class_names),
            "id2label": dict(enumerate(self.class_names)),
            "label2id": {name: i for i, name in enumerate(self.class_names)},
        }
        if self._has_weights:
            return AutoModelForImageClassification.from_pretrained(
                self.model, **labels, dtype=torch.float32, ignore_mismatched_sizes=True
            )
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
        processor = AutoImageProcessor.from_pretrained(self.model)
        size = {} if self.image_size is None else {"size": {"height": self.image_size, "width": self.image_size}}

        def transform(image: Image.Image) -> torch.Tensor:
            values = processor(pil_to_tensor(image), do_rescale=False, do_normalize=False, return_tensors="pt", **size)
            return values["pixel_values"][0]

        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
        return transform, mean, std, "RGB"

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
