"""From what people have, images, arrays and texts with their labels, to what a base model takes."""

import inspect
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pdiff_hf.tasks.images import Preparation, make_preparation, to_8_bits
from pdiff_hf.tasks.text_classification import tokenize
from pdiff_hf.utils.devices import to_device

logger = logging.getLogger(__name__)

# Names that people give to images, texts and labels; of images and labels, the first is the network's.
IMAGES, TEXTS, LABELS = ("pixel_values", "images", "image"), ("text", "texts"), ("labels", "label")
# Values may lie so far outside of what training images can have, as a share of its range: families add noise.
TOLERANCE = 0.25


def prepare_inputs(examples: Mapping[str, Any], base_model: nn.Module, processor: Any = None) -> dict[str, Any]:
    """
    A batch as the network takes it, on its device.

    Args:
        examples (`Mapping`): `pixel_values` or `images`: a list of images of Pillow or of arrays, or one array or
            tensor of all; whole numbers from 0 to 255 are prepared as training images were, floats are taken as
            prepared. `text`: a list of texts. `labels`: whole numbers, or names of classes. The rest is left as it is,
            but arrays become tensors.
        processor (*optional*): The image processor or tokenizer of the network; those of timm do not need one.

    Raises:
        ValueError: for images and texts of which nothing says how they are prepared, and for what are neither.
    """
    if not isinstance(examples, Mapping):
        raise ValueError(
            'examples are a mapping, such as {"images": [...], "labels": [...]} or {"text": [...], "labels": [...]}, '
            f"got a {type(examples).__name__}"
        )
    config = getattr(base_model, "config", None)
    is_known = isinstance(base_model, PreTrainedModel)  # what other networks take, they know themselves
    for names in (IMAGES, TEXTS, LABELS) if is_known else ():
        if len(given := [name for name in names if name in examples]) > 1:
            raise ValueError(f"examples have {' and '.join(given)}, which say the same; leave all but one out")
    batch: dict[str, Any] = {}
    for name, values in examples.items():
        if is_known and name in IMAGES:
            batch[IMAGES[0]] = _images(values, make_preparation(config, processor))
        elif is_known and name in TEXTS:
            batch["input_ids"], batch["attention_mask"] = _texts(values, processor)
        elif name == LABELS[0] or (is_known and name in LABELS):
            batch[LABELS[0]] = _labels(values, config)
        else:
            batch[name] = torch.as_tensor(values) if isinstance(values, np.ndarray) else values
    taken = [p.name for p in inspect.signature(base_model.forward).parameters.values() if p.kind != p.VAR_KEYWORD]
    if is_known and len(batch) > 1 and not set(taken) & (batch.keys() - {LABELS[0]}):
        raise ValueError(f"examples need {taken[0]}, or what that is made of, and have {', '.join(examples)}")
    return to_device(batch, next(base_model.parameters()).device)


def _is_float(values: Any) -> bool:
    if isinstance(values, torch.Tensor):
        return values.is_floating_point()
    if isinstance(values, list | tuple):
        return all(map(_is_float, values))
    return not isinstance(values, Image.Image) and np.asarray(values).dtype.kind == "f"


def _images(given: Any, preparation: Preparation | None) -> torch.Tensor:
    """Float32 of shape `(B, C, H, W)`."""
    values = given
    if isinstance(given, torch.Tensor | np.ndarray):
        # The rows of one image would be read as grey images.
        is_one = given.ndim == 3 and (given.shape[-1] in (1, 3, 4) or given.shape[0] == 3)
    else:
        is_one = isinstance(given, str | bytes | Image.Image) or not isinstance(given, Iterable)
        values = [] if is_one else list(given)
    # No example at all is one more number of examples, where its shape is given.
    if is_one or (len(values) == 0 and not (isinstance(values, torch.Tensor) and _is_float(values))):
        got = f"one of shape {tuple(given.shape)}" if hasattr(given, "shape") else f"{given!r:.80}"
        raise ValueError(f"images are a list of them, or an array of all with the batch first, got {got}")
    if _is_float(values):
        if isinstance(values, list) and len({np.shape(value) for value in values}) > 1:
            raise ValueError("images as floats are taken as prepared, and must all have one size")
        images = values if isinstance(values, torch.Tensor) else torch.stack([torch.as_tensor(v) for v in values])
        if preparation is not None:
            _check_floats(images, preparation)
        return images.to(torch.float32)
    if preparation is None:
        raise ValueError(
            "images that are not prepared need an image processor that says how, which this pipeline does not have: "
            "load it with processor=AutoImageProcessor.from_pretrained(...), or give floats as its networks take them"
        )
    return preparation.normalize(torch.stack([preparation(to_8_bits(_picture(value))) for value in values]))


def _picture(value: Any) -> Image.Image:
    """An image of Pillow, or an array or tensor of shape `(H, W)`, `(H, W, C)` or `(C, H, W)` from 0 to 255."""
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, str | bytes | Path | Mapping):
        raise ValueError(f"an image is one of Pillow, or an array; open a file with Image.open: got {value!r:.80}")
    array = value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    comes_first = isinstance(value, torch.Tensor) or array.shape[-1:] not in ((1,), (3,), (4,))
    if array.ndim == 3 and comes_first and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
    if not is_image or array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
        found = f" from {array.min()} to {array.max()}" if array.size and array.dtype.kind in "biuf" else ""
        raise ValueError(
            "an image has shape (height, width), (height, width, channels) or (channels, height, width) and whole "
            f"numbers from 0 to 255, got {array.dtype} of shape {array.shape}{found}"
        )
    return Image.fromarray(array.astype(np.uint8))


def _check_floats(images: torch.Tensor, preparation: Preparation) -> None:
    """
    Warns of floats that are no images as training had them.

    Raises:
        ValueError: for another shape, and for what is not finite.
    """
    channels = 1 if preparation.mode == "L" else 3
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(
            f"images as floats are taken as prepared, and have shape (B, {channels}, height, width), got "
            f"{tuple(images.shape)}; images that are not prepared belong here as 8-bit integers or images of Pillow"
        )
    if not images.isfinite().all():
        raise ValueError("the images hold values that are not finite")
    if len(images) == 0:
        return
    mean, std = torch.tensor(preparation.mean), torch.tensor(preparation.std)
    low, high = (-mean / std).min().item(), ((1 - mean) / std).max().item()
    least, most = images.min().item(), images.max().item()
    room = TOLERANCE * (high - low)
    raw = least >= 0 and most <= 1 and low < -0.1
    if least < low - room or most > high + room or raw:
        logger.warning(
            "the images have values from %.3g to %.3g, and those of training lie between %.3g and %.3g: floats are "
            "taken as they are. Images that are not prepared belong here as 8-bit integers or images of Pillow",
            least,
            most,
            low,
            high,
        )


def _texts(values: Any, processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(values, str) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"texts are a list of strings, got {values!r:.80}")
    if not isinstance(processor, PreTrainedTokenizerBase):
        raise ValueError(
            "texts need a tokenizer, which this pipeline does not have: load it with "
            "processor=AutoTokenizer.from_pretrained(...)"
        )
    return tokenize(values, processor)


def _labels(values: Any, config: Any) -> Any:
    """Int64 where they are whole numbers, truth values, or names of classes; anything else as it is."""
    if not isinstance(values, torch.Tensor):
        found = list(values) if isinstance(values, Iterable) else [values]
        if found and all(isinstance(value, str) for value in found):
            known = getattr(config, "label2id", None) or {}
            if unknown := [value for value in found if value not in known]:
                raise ValueError(f"the label '{unknown[0]:.80}' is none of the network's classes, {', '.join(known)}")
            found = [known[value] for value in found]
        try:
            values = torch.as_tensor(np.asarray(found))
        except (TypeError, ValueError):
            return values
    return values if values.is_floating_point() else values.to(torch.int64)
