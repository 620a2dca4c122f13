"""Settings: fields of a dataclass with their bounds in the metadata, and the one validator of their values."""

import copy
import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import field
from typing import Any

import yaml

from ..utils.paths import expand_path


def option(
    default: Any,
    help: str,
    *,
    read_when: Callable[[Any], bool] = lambda config: True,
    why: str = "",
    common: bool = False,
    **bounds: Any,
) -> Any:
    """
    A setting.

    Args:
        default: A value; or a dataclass of settings, which this is a group of.
        read_when (`Callable`, *optional*): `read_when(config)` says whether a run reads it at all; `why` says why not.
        common (`bool`, *optional*): Whether `--help` shows it.
        bounds: What `check_value` looks at: `min` and `max`, `above` and `below` (which exclude the number itself),
            `choices`, and `path` (`~` and environment variables are expanded).
    """
    metadata = {"help": help, "read_when": read_when, "why": why, "common": common, **bounds}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata | {"group": default})
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def group_of(key: dataclasses.Field) -> type | None:
    """The dataclass of a setting that is a group of them."""
    return key.metadata.get("group")


def is_list(key: dataclasses.Field) -> bool:
    """Whether the key takes a list of values."""
    return typing.get_origin(key.type) is list


def is_nullable(key: dataclasses.Field) -> bool:
    """Whether the key may be None."""
    return type(None) in typing.get_args(key.type)


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with names such as `tune_args.penalty` as mappings in mappings."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        group, _, inner = name.rpartition(".")
        if group:
            result[group] = {**result.get(group, {}), inner: value}
        else:
            result[name] = {**result.get(name, {}), **value} if isinstance(value, dict) else value
    return result


def check_value(key: dataclasses.Field, value: Any, prefix: str = "") -> Any:
    """`value` as it is to be used; a `ValueError` that begins with the key unless it is possible."""
    name, group = prefix + key.name, group_of(key)
    if group is not None:
        return _check_group(name, group, value)
    if value is None and is_nullable(key):
        return None
    if is_list(key) and isinstance(value, str):
        value = [value]
    if is_list(key) != isinstance(value, list):
        raise ValueError(f"{name} must {'' if is_list(key) else 'not '}be a list, got {value!r}")
    if key.type is dict:
        return _check_mapping(name, value)
    kind = next((t for t in typing.get_args(key.type) if t is not type(None)), key.type)
    checked = [_check_one(name, kind, key.metadata, item) for item in (value if is_list(key) else [value])]
    return checked if is_list(key) else checked[0]


def _check_group(name: str, group: type, value: Any) -> Any:
    if not isinstance(value, group):
        value, known = _check_mapping(name, value), {key.name for key in dataclasses.fields(group)}
        unknown = [key for key in value if key not in known]
        if unknown:
            raise ValueError(f"{name} has no setting {unknown[0]!r}{did_you_mean(unknown[0], known)}")
        value = group(**value)
    checked = {key.name: check_value(key, getattr(value, key.name), f"{name}.") for key in dataclasses.fields(group)}
    return group(**checked)


def _check_mapping(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{name} must be JSON, got {value!r}: {error}") from error
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping, got {value!r}")
    try:
        return json.loads(json.dumps(dict(value)))  # a run that goes on compares what JSON has kept
    except TypeError as error:
        raise ValueError(f"{name} must hold what JSON can, got {value!r:.200}: {error}") from error


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of an error about an unknown name."""
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else f"; there is {', '.join(sorted(known))}"


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
