"""Keys of a recipe: a field of a dataclass with its bounds in the metadata, and the one validator of their values."""

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any

import yaml

from ..utils.paths import expand_path


def option(default: Any, help: str, **bounds: Any) -> Any:
    """
    A key of a recipe. `bounds` are what `check_value` looks at: `min` and `max`, `above` and `below` (which exclude
    the number itself), `choices`, `path` (`~` and environment variables are expanded) and `json` (a mapping).
    """
    metadata = {"help": help, **bounds}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def is_list(key: dataclasses.Field) -> bool:
    """Whether the key takes a list of values."""
    return typing.get_origin(key.type) is list


def is_nullable(key: dataclasses.Field) -> bool:
    """Whether the key may be None."""
    return type(None) in typing.get_args(key.type)


def check_value(key: dataclasses.Field, value: Any) -> Any:
    """`value` as it is to be used; a `ValueError` that begins with the key unless it is possible."""
    if value is None and is_nullable(key):
        return None
    if is_list(key) != isinstance(value, list):
        raise ValueError(f"{key.name} must {'' if is_list(key) else 'not '}be a list, got {value!r}")
    kind = next((t for t in typing.get_args(key.type) if t is not type(None)), key.type)
    checked = [_check_one(key.name, kind, key.metadata, item) for item in (value if is_list(key) else [value])]
    return checked if is_list(key) else checked[0]


def _check_one(name: str, kind: Any, bounds: Mapping[str, Any], value: Any) -> Any:
    def require(condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(f"{name} must be {what}, got {value!r}")

    if kind is float and type(value) is int:
        value = float(value)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    require(type(value) is kind, words[kind])
    if kind is float:
        require(math.isfinite(value), "finite")
    tests = {
        "min": ("at least {}", lambda bound: value >= bound),
        "above": ("above {}", lambda bound: value > bound),
        "max": ("at most {}", lambda bound: value <= bound),
        "below": ("below {}", lambda bound: value < bound),
    }
    given = [(text.format(bounds[name]), test(bounds[name])) for name, (text, test) in tests.items() if name in bounds]
    require(all(holds for _, holds in given), " and ".join(text for text, _ in given))
    if "choices" in bounds:
        require(value in bounds["choices"], f"one of {', '.join(bounds['choices'])}")
    if bounds.get("json"):
        try:
            mapping = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{name} must be JSON, got {value!r}: {error}") from error
        require(isinstance(mapping, dict), "a mapping, as JSON")
        value = json.dumps(mapping)  # a run that goes on compares the text
    if bounds.get("path"):
        try:
            value = expand_path(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return value


class RecipeLoader(yaml.SafeLoader):
    """YAML without references: a few lines of them can stand for more text than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"references such as *{self.peek_event().anchor} cannot be used")
        return super().compose_node(parent, index)
