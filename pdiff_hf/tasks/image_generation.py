"""Unconditional image generation: any U-Net of diffusers' DDPM on any image data set, judged by FID."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import nn
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from ..networks.runner import NetworkRunner
from ..utils.memory import InParts
from .fid import INCEPTION, frechet_distance, load_features
from .images import ImageColumn, ImageSplit, ImageTask, Preparation, load_image_data
from .labels import bad_labels, label_candidates, number_labels
from .registry import register_task
from .task import Batch, MeasuredTask, Split

# A U-Net with fresh weights.
FRESH_MODEL = "unet2d"
# Images that a network generates at once.
BATCH_SIZE = 128
# Images, as uint8, that wait to be compared with those of a split.
IMAGE_BUDGET = 2**29
# All networks begin with the same noise, and with other noise where they are reported than where they are selected.
NOISE_SEEDS = {"train": 0, "validation": 1, "test": 2}


@register_task("image_generation")
@dataclass
class ImageGenerationTask(ImageTask, MeasuredTask):
    """
    Networks are trained to predict noise (DDPM) and judged by the Fréchet distance of what they generate to the images
    of a split, which must be computed from as many images for all that is compared. So every network generates as many
    images as the split has, from the same noise, in the same few steps of DDIM, which adds none: what differs between
    two networks is not chance.

    Args beyond those of [`ImageTask`]:
        model (`str`, *optional*, defaults to `"unet2d"`): `unet2d` for a `UNet2DModel` with fresh weights, or a local
            folder or Hub id of a saved one, at the top or in the subfolder `unet` beside its scheduler, such as
            `google/ddpm-cifar10-32`. A local folder without a scheduler means DDPM's own schedule.
        dataset (`str`, *optional*, defaults to `"digits"`): `digits`, a local folder or the Hub id of a data set of
            images. Where it has labels, splits are stratified by them, and the same as those of image classification.
        image_size (`int`, *optional*): Side of the square that images are scaled to, and cropped to in the middle if
            they are not square; by default the model's own, or that of the images for a fresh one.
        model_args (`dict`, *optional*): The configuration of a fresh `UNet2DModel`. With `in_channels` of 1, images are
            grey.
        fid_features (`str`, *optional*, defaults to `"inception"`): `inception` for FID as it is usually reported, or
            the local folder or Hub id of an image classifier of transformers or timm, whose penultimate features take
            the place of Inception-v3's.
        num_steps (`int`, *optional*, defaults to 10): Steps of DDIM.

    Raises:
        ValueError: when created, for an unknown model, data set or classifier, or one that does not fit.
    """

    model: str = FRESH_MODEL
    dataset: str = "digits"
    fid_features: str = INCEPTION
    num_steps: int = 10

    higher_is_better = False

    def __post_init__(self) -> None:
        may_choose = self.image_size is None and self.model == FRESH_MODEL and "sample_size" not in self.model_args
        self._check_sizes("num_steps")
        rows = self._load_rows()
        if may_choose:
            self.image_size = max(ImageColumn(rows["train"], "image", self.dataset)[0].size)
        self._load, self.scheduler, self._shape = find_unet(self.model, self.model_args, self.image_size)
        self.image_size = self._shape[-1]
        if self.num_steps > self.scheduler.config.num_train_timesteps:
            raise ValueError(
                f"num_steps must be at most the {self.scheduler.config.num_train_timesteps} steps of the model's "
                f"schedule, got {self.num_steps}"
            )
        self._set_splits(rows)
        for name in ("validation", "test"):
            if len(self._raw[name]) < 2:
                raise ValueError(f"the {name} split of dataset '{self.dataset}' has one image; a distance needs two")
        self._features = load_features(self.fid_features)
        self.metric = "FID" if self.fid_features == INCEPTION else f"FID ({self._features.title})"

    def _load_rows(self) -> dict[str, datasets.Dataset]:
        """Images, with their classes if there are any, by which splits are stratified."""
        raw = load_image_data(self.dataset, self.image_column)
        features = raw["train"].features
        names = {self._choose_image(features): "image"}
        labels = label_candidates(features)
        names |= {labels[0]: "label"} if len(labels) == 1 else {}
        raw = self._take(raw, names, self._bad_images)
        if len(labels) != 1 or any(bad_labels(rows) for rows in raw.values()):  # one class is as good as none
            return {
                name: rows.select_columns(["image", "row"]).add_column("label", np.zeros(len(rows), dtype=np.int64))
                for name, rows in raw.items()
            }
        return number_labels(raw, self.dataset)[1]

    def load_base_model(self) -> nn.Module:
        """The network. Fresh weights depend on torch's global seed."""
        return self._load()

    def save_base_model(self, model: nn.Module, folder: str | os.PathLike) -> None:
        """A `DDPMPipeline`, which generates images as it is: the network with its scheduler."""
        DDPMPipeline(without_path(model), self.scheduler).save_pretrained(folder)

    def load_saved(self, folder: str | os.PathLike) -> nn.Module:
        """What `save_base_model` wrote."""
        return load_weights(folder, "unet")

    def _prepare(self, split: Split) -> ImageSplit:
        """Images with values from -1 to 1, and labels, which nothing uses."""
        half = [0.5] * self._shape[0]
        transform = Compose([Resize(self.image_size), CenterCrop(self.image_size), PILToTensor()])
        preparation = Preparation(transform, half, half, "L" if self._shape[0] == 1 else "RGB", "")
        return ImageSplit(self._images(split), torch.as_tensor(self._raw[split]["label"][:]), preparation)

    def fingerprint(self, split: Split) -> str:
        """Follows the images, how they are prepared, and all that the metric depends on."""
        prepared = "x".join(map(str, self._shape))
        schedule = sorted((key, value) for key, value in self.scheduler.config.items() if not key.startswith("_"))
        metric = f"{self._features.fingerprint} {self.num_steps} {schedule}"
        return self._digest(split, ["image"], [], f"{prepared} {metric}")

    def collate(self, examples: Any) -> Batch:
        """
        Adds the entries `noise` and `timesteps`, drawn from torch's global generator. `ImageSplit` returns whole
        batches.
        """
        images = examples["pixel_values"]
        timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (len(images),))
        return {"pixel_values": images, "noise": torch.randn(images.shape), "timesteps": timesteps}

    def loss(self, call: Callable, batch: Batch) -> torch.Tensor:
        """The mean squared error of the predicted noise."""
        noisy = self.scheduler.add_noise(batch["pixel_values"], batch["noise"], batch["timesteps"])
        return F.mse_loss(call(noisy, batch["timesteps"], return_dict=False)[0], batch["noise"])

    @cached_property
    def _sampler(self) -> DDIMScheduler:
        # Few steps must still begin where there is nothing but noise.
        scheduler = DDIMScheduler.from_config(self.scheduler.config, timestep_spacing="trailing")
        scheduler.set_timesteps(self.num_steps)
        return scheduler

    def generate(self, call: Callable, noise: torch.Tensor) -> torch.Tensor:
        """Images with values from -1 to 1 from noise, both of shape `(B, C, H, W)`."""
        images = noise
        for timestep in self._sampler.timesteps.tolist():
            prediction = call(images, timestep, return_dict=False)[0]
            images = self._sampler.step(prediction, timestep, images).prev_sample
        return images

    def measure(self, models: NetworkRunner, split: Split, parameters: torch.Tensor) -> torch.Tensor:
        """The Fréchet distance of as many generated images as the split has to those of the split."""
        device = next(models.model.parameters()).device
        parameters, features = parameters.to(device), self._features.to(device)
        num_images = len(self.load_split(split))
        noise = torch.randn(num_images, *self._shape, generator=torch.Generator().manual_seed(NOISE_SEEDS[split]))
        in_parts = InParts("images")
        distances = []
        for rows in parameters.split(max(1, IMAGE_BUDGET // noise.numel())):

            def generate(noise: torch.Tensor, rows: torch.Tensor = rows) -> torch.Tensor:
                """`(B, C, H, W)` to `(B, N, C, H, W)`"""
                outputs = models(lambda call: self.generate(call, noise.to(device)), rows)
                return torch.cat([to_uint8(images).cpu() for _, images in outputs]).transpose(0, 1)

            images = torch.cat([in_parts(generate, part) for part in noise.split(BATCH_SIZE)]).transpose(0, 1)
            groups = ((part.to(device) for part in group.split(BATCH_SIZE)) for group in images)
            distances.append(frechet_distance(features, self._real_images(split, device), groups))
        return torch.cat(distances)

    def _real_images(self, split: Split, device: torch.device) -> Iterator[torch.Tensor]:
        images = self.load_split(split)
        for indices in torch.arange(len(images)).split(BATCH_SIZE):
            yield to_uint8(images[indices.tolist()]["pixel_values"]).to(device)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """From -1 to 1 to whole numbers from 0 to 255."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


# -------------------------------------------------------------------------------------------------- U-Nets of diffusers


def load_weights(folder: str | os.PathLike, subfolder: str | None) -> UNet2DModel:
    """A saved network, in float32."""
    return without_path(UNet2DModel.from_pretrained(folder, subfolder=subfolder, torch_dtype=torch.float32))


def without_path(model: UNet2DModel) -> UNet2DModel:
    """The network itself, which no longer says where it was read from: that would be saved with it."""
    model.register_to_config(_name_or_path="")
    return model


def find_unet(
    model: str, model_args: Mapping[str, Any], image_size: int | None
) -> tuple[Callable[[], UNet2DModel], DDPMScheduler, tuple[int, int, int]]:
    """
    Returns:
        `tuple`: What loads the network, whose fresh weights depend on torch's global seed; the scheduler of its
        training; and the channels, height and width of its images.

    Args:
        model (`str`): Local folder or Hub id of a saved `UNet2DModel`, or `FRESH_MODEL`.
        model_args (`Mapping`): The configuration of a fresh one.
        image_size (`int`, *optional*): Side of its images; its own by default.

    Raises:
        ValueError: if there is no such network, or it does not predict the noise of grey or coloured images of the
            size.
    """
    subfolder, scheduler, config = None, DDPMScheduler(), dict(model_args)
    if model != FRESH_MODEL:
        if model_args:
            raise ValueError(f"model_args belong to a fresh model ({FRESH_MODEL}), not to '{model}'")
        subfolder, config = _find_config(model)
        scheduler = _find_scheduler(model, None if subfolder is None else "scheduler")
    name = config.get("_class_name", UNet2DModel.__name__)
    if name != UNet2DModel.__name__:
        raise ValueError(f"model '{model}' is a {name}, not a UNet2DModel")
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    size = image_size or config.get("sample_size")
    if not isinstance(size, int):
        raise ValueError(f"model '{model}' has no size of its own; set image_size, got {size!r}")
    config = {"sample_size": size} | config
    try:
        with torch.device("meta"):  # the network is tried without memory
            network = UNet2DModel(**config)
            images = torch.empty(1, network.config.in_channels, size, size)
            output = network(images, torch.tensor([0]))[0]
    except Exception as error:  # what a wrong configuration makes torch raise has no common type
        raise ValueError(
            f"model '{model}' with the configuration {config} does not work on images of {size}x{size}: {error}"
        ) from error
    channels, made = images.shape[1], output.shape[1]
    if output.shape != images.shape or channels not in (1, 3):
        raise ValueError(
            f"model '{model}' must predict the noise of images with 1 or 3 channels, got in_channels={channels} and "
            f"out_channels={made}"
        )
    load = partial(UNet2DModel, **config) if model == FRESH_MODEL else partial(load_weights, model, subfolder)
    return load, scheduler, (channels, size, size)


def _find_config(model: str) -> tuple[str | None, dict[str, Any]]:
    errors = []
    for subfolder in (None, "unet"):
        try:
            return subfolder, UNet2DModel.load_config(model, subfolder=subfolder)
        except (OSError, ValueError) as error:
            errors.append(error)
    raise ValueError(
        f"model '{model}' is neither '{FRESH_MODEL}' nor a folder or Hub id with the config.json of a UNet2DModel, at "
        f"its top or in a subfolder unet: {errors[-1]}"
    ) from errors[-1]


def _find_scheduler(model: str, subfolder: str | None) -> DDPMScheduler:
    if os.path.isdir(model) and not os.path.isfile(os.path.join(model, subfolder or "", DDPMScheduler.config_name)):
        return DDPMScheduler()
    try:
        scheduler = DDPMScheduler.from_pretrained(model, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise ValueError(f"the scheduler_config.json beside the U-Net of '{model}' is needed: {error}") from error
    if (predicted := scheduler.config.prediction_type) != "epsilon":
        raise ValueError(
            f"model '{model}' predicts {predicted}; DDPM's loss is for networks that predict the noise "
            "(prediction_type epsilon)"
        )
    return scheduler
