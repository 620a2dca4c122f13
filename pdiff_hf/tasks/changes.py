"""Calls the `change` of a family of images, and says in one line what is wrong with it or with what it returns."""

import inspect
import traceback
from pathlib import Path
from typing import Any

import torch

from ..models.condition import Conditions
from ..utils.errors import first_line
from ..utils.memory import is_out_of_memory
from .draws import ExampleGenerator
from .family import TaskFamily

# Pictures with strong noise leave the range from 0 to 1; pictures from 0 to 255 leave this one.
FARTHEST = (-4.0, 5.0)


def apply_change(
    family: Any,
    conditions: Conditions,
    images: torch.Tensor,
    labels: torch.Tensor,
    generator: ExampleGenerator,
    *,
    check_values: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `family.change(conditions, images, labels)`, with a generator if it takes one.

    Args:
        family (`ImageFamily`): Which imports this module.
        check_values (`bool`): Looks also at the values, which takes time.

    Returns:
        `tuple`: Images, float32 of shape `(T, B, C, H, W)`, and labels, int64 of shape `(T, B)`.

    Raises:
        ValueError: if it fails, or returns something else; names the class, the line and what is expected.
    """
    random = {"generator": generator} if "generator" in inspect.signature(family.change).parameters else {}
    try:
        result: Any = family.change(conditions, images, labels, **random)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{_where(family, error)}: {first_line(error)}{_hint(error, conditions)}") from error
    # Two images of two tasks without labels would also be a pair.
    if not isinstance(result, tuple | list) or len(result) != 2 or not all(map(torch.is_tensor, result)):
        got = f"a {type(result).__name__}" if not isinstance(result, tuple | list) else f"{len(result)} values"
        raise ValueError(f"{_where(family)} must return two tensors, `images, labels`, and returns {got}")
    for name, new, old in zip(("images", "labels"), result, (images, labels), strict=True):
        if new.shape != old.shape:
            shapes = f"of shape {tuple(old.shape)}, as it gets them, and returns {tuple(new.shape)}"
            raise ValueError(f"{_where(family)} must return {name} {shapes}")
        if new.device != old.device:
            raise ValueError(
                f"{_where(family)} must return {name} on {old.device}, where it gets them, and returns them on "
                f"{new.device}; make new tensors with device={name}.device"
            )
    new_images, new_labels = result
    if not new_images.is_floating_point():
        raise ValueError(f"{_where(family)} must return images as floats from 0 to 1, and returns {new_images.dtype}")
    if new_labels.is_floating_point() or new_labels.is_complex():
        raise ValueError(f"{_where(family)} must return labels as whole numbers, and returns {new_labels.dtype}")
    new_images, new_labels = new_images.float(), new_labels.long()
    if check_values:
        _check_values(family, new_images, new_labels)
    return new_images, new_labels


def _check_values(family: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
    low, high = (value.item() for value in images.aminmax())
    if not FARTHEST[0] <= low <= high <= FARTHEST[1]:  # also of what is not a number
        raise ValueError(
            f"{_where(family)} must return images about 0 to 1, and returns values from {low:g} to {high:g}"
        )
    first, last = (int(value) for value in labels.aminmax())
    # A family with a network of its own can have other outputs than the data set has classes.
    own_network = type(family).load_base_model is not TaskFamily.load_base_model
    num_classes = None if own_network else len(family.base.class_names)
    if first < 0 or (num_classes is not None and last >= num_classes):
        most = "" if num_classes is None else f" to {num_classes - 1}"
        raise ValueError(f"{_where(family)} must return labels from 0{most}, and returns some from {first} to {last}")


def _where(family: Any, error: BaseException | None = None) -> str:
    """The class, and the line of its `change`, or of where an error came from."""
    change = inspect.unwrap(type(family).change)
    code = getattr(change, "__code__", None)
    if code is None:
        return f"{type(family).__name__}.change"
    frames = traceback.extract_tb(error.__traceback__) if error else []
    lines = [frame.lineno for frame in frames if frame.filename == code.co_filename] or [code.co_firstlineno]
    return f"{type(family).__name__}.change ({Path(code.co_filename).name}, line {lines[-1]})"


def _hint(error: Exception, conditions: Conditions) -> str:
    words = [name for name, field in conditions.fields.items() if field.choices]
    if words and isinstance(error, IndexError | RuntimeError):
        return (
            f". A category has the index of its word, shape (T,): compare conditions[{words[0]!r}] with a word, or "
            f"take conditions.one_hot({words[0]!r}), shape (T, number of words)"
        )
    return ""
