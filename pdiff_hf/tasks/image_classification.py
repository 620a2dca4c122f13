"""Image classification with any timm or transformers network on any image data set."""

import difflib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import timm
import torch
from timm.layers import to_2tuple
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
)
from transformers.models.timm_wrapper import TimmWrapperConfig

from ..utils.errors import first_line
from .images import ImageColumn, ImageSplit, ImageTask, Preparation, load_image_data, make_preparation
from .labels import LabelledTask, bad_labels, find_weights, without_unlabelled_test
from .registry import register_task
from .task import Batch, Split

logger = logging.getLogger(__name__)


@register_task("image_classification")
@dataclass
class ImageClassificationTask(ImageTask, LabelledTask):
    """
    Args beyond those of [`ImageTask`] and [`LabelledTask`]:
        model (`str`, *optional*, defaults to `"resnet18"`): Name of a timm architecture (with fresh weights), or a
            local folder or Hub id of a transformers or timm model (`timm/...`), or of an adapter of PEFT. A local
            folder with a `config.json` and no weights gives that network with fresh weights.
        dataset (`str`, *optional*, defaults to `"digits"`): `digits` (the 1,797 scans that scikit-learn carries), a
            local folder or the Hub id of an image-classification data set.
        model_args (`dict`, *optional*): More arguments of a timm architecture, such as `img_size` for a ViT.

    Raises:
        ValueError: when created, for an unknown model or data set, or one that does not fit image classification.
    """

    auto_model = AutoModelForImageClassification
    model: str = "resnet18"
    dataset: str = "digits"

    def __post_init__(self) -> None:
        super().__post_init__()
        may_choose = self.image_size is None
        self._check_sizes()
        # Looked up now: a mistyped name must not be found out after an hour of work.
        config, has_weights = self._find_model()
        raw = load_image_data(self.dataset, self.image_column)
        features = raw["train"].features
        names = {self._choose_image(features): "image", (label := self._choose_label(features)): "label"}
        raw = without_unlabelled_test(raw, self.dataset, label)
        raw = self._take(raw, names, self._bad_images, bad_labels)
        if may_choose and getattr(config, "architecture", "") == self.model:
            config = self._fit_to_images(config, max(ImageColumn(raw["train"], "image", self.dataset)[0].size))
        self._set_labels(raw, config, has_weights)

    def _find_model(self) -> tuple[Any, bool]:
        """The network's configuration, and whether there are weights to load with it."""
        if not os.path.isdir(self.model) and "/" not in self.model:
            return self._timm_config(), False
        if self.model_args:
            raise ValueError(f"model_args belong to a timm architecture with fresh weights, not to '{self.model}'")
        return find_weights(self.model)

    def _timm_config(self) -> TimmWrapperConfig:
        if not timm.is_model(self.model):
            close = difflib.get_close_matches(self.model, timm.list_models(), n=5)
            raise ValueError(
                f"model '{self.model}' is not a timm architecture, a local folder or a Hub id; "
                f"timm has {', '.join(close) or 'no similar name'}"
            )
        model_args, network = self.model_args, self._on_meta_device(self.model_args)
        cfg: dict[str, Any] = network.pretrained_cfg  # type: ignore
        if cfg.get("fixed_input_size") and self.image_size and "img_size" not in model_args:
            model_args = model_args | {"img_size": self.image_size}  # the network's positions are laid out for it
            network = self._on_meta_device(model_args)
        channels, *size = cfg["input_size"]
        if "img_size" in model_args:
            size = list(to_2tuple(model_args["img_size"]))
        channels = model_args.get("in_chans", channels)
        self._check_takes(network, [channels, *([self.image_size] * 2 if self.image_size else size)])
        # Only what describes the preprocessing: the rest says where pretrained weights are, which these are not.
        return TimmWrapperConfig(
            architecture=self.model,
            model_args=model_args or None,
            pretrained_cfg={
                "input_size": [channels, *size],
                "interpolation": cfg["interpolation"],
                "crop_pct": cfg["crop_pct"] if self.image_size is None else 1.0,
                "mean": [float(np.mean(cfg["mean"]))] * channels if channels != len(cfg["mean"]) else list(cfg["mean"]),
                "std": [float(np.mean(cfg["std"]))] * channels if channels != len(cfg["std"]) else list(cfg["std"]),
            },
        )

    def _fit_to_images(self, config: TimmWrapperConfig, side: int) -> TimmWrapperConfig:
        """The configuration for images of their own size, where they are smaller and the network takes any size."""
        cfg: dict[str, Any] = self._on_meta_device(self.model_args).pretrained_cfg  # type: ignore
        fixed = cfg.get("fixed_input_size")
        if fixed or "img_size" in self.model_args or side >= max(config.pretrained_cfg["input_size"][1:]):
            return config
        self.image_size = side
        try:
            return self._timm_config()
        except ValueError:  # it does not take such small ones
            self.image_size = None
            return config

    def _on_meta_device(self, model_args: dict[str, Any]) -> nn.Module:
        try:
            with torch.device("meta"):
                return timm.create_model(self.model, **model_args)
        except TypeError as error:
            raise ValueError(f"model '{self.model}' does not take the model_args {model_args}: {error}") from error

    def _check_takes(self, network: nn.Module, shape: list[int]) -> None:
        try:
            network.eval()(torch.empty(1, *shape, device="meta"))
        except Exception as error:  # architectures have no common type for it
            size = "×".join(map(str, shape))
            raise ValueError(
                f"model '{self.model}' takes no images of {size} (channels, height, width), set by image_size and "
                f"model_args: {first_line(error)}"
            ) from error

    def load_base_model(self) -> PreTrainedModel:
        """The network with one output a class. Fresh weights depend on torch's global seed."""
        model = super().load_base_model()
        config: Any = model.config
        is_timm = isinstance(config, TimmWrapperConfig)
        if is_timm and self.processor is None and self.image_size is not None:  # which a saved network is to say
            channels = config.pretrained_cfg["input_size"][0]
            config.pretrained_cfg |= {"input_size": [channels, *[self.image_size] * 2], "crop_pct": 1.0}
        if is_timm and not self._has_weights:
            # transformers has drawn every weight anew; timm's own initialization trains better.
            args = config.model_args or {}
            fresh = timm.create_model(config.architecture, num_classes=config.num_labels, **args)
            model.timm_model.load_state_dict(fresh.state_dict())
        return model

    def _prepare(self, split: Split) -> ImageSplit:
        """Images as the network's own preprocessing makes them."""
        images, labels = self.raw_examples(split)
        examples = ImageSplit(images, labels, self._preparation)
        (width, height), shape = images[0].size, tuple(examples.__getitems__([0])["pixel_values"].shape[-2:])
        if split == "train" and shape != (height, width):
            logger.info("images of %d×%d are scaled to %d×%d; image_size chooses another size", height, width, *shape)
        return examples

    def raw_examples(self, split: Split) -> tuple[ImageColumn, torch.Tensor]:
        """The images of a split as they are stored, and their labels."""
        return self._images(split), self._labels(split)

    def fingerprint(self, split: Split) -> str:
        """Follows the examples of the split, the numbering of their classes, and how images are prepared."""
        prepared = self._preparation
        how = f"{prepared.mode} {prepared.mean} {prepared.std} {prepared.description}"
        return self._digest(split, ["image"], [self._labels(split)], how)

    @cached_property
    def _preparation(self) -> Preparation:
        preparation = make_preparation(self._config, self.processor, self.image_size)
        assert preparation is not None  # the configuration or the processor says it
        return preparation

    @cached_property
    def processor(self) -> BaseImageProcessor | None:
        """None for a network of timm whose configuration says how its images are prepared."""
        if getattr(self._config, "pretrained_cfg", None):
            return None
        try:
            processor = AutoImageProcessor.from_pretrained(self.model)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model '{self.model}' has no image processor that says how its images are prepared; save the one that "
                f"it was trained with into its folder, as ViTImageProcessor(...).save_pretrained(folder) does: {error}"
            ) from error
        if self.image_size is not None:
            processor.size = {"height": self.image_size, "width": self.image_size}
        return processor

    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        return call(pixel_values=batch["pixel_values"]).logits
