"""U-Nets of diffusers that generate images: fresh ones, and saved ones with the schedule they were trained with."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel

FRESH_MODEL = "unet2d"


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
