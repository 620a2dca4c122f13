"""Settings: fields of a dataclass with their bounds in the metadata, and the one reader of their values."""

import contextlib
import copy
import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..utils.files import expand_path


@dataclass(frozen=True)
class When:
    """
    The runs in which a setting has an effect.

    Args:
        holds (`Callable`): `holds(config)` says whether a run is one of them.
        why_not (`str`): Why the setting has none in the others.
    """

    holds: Callable[[Any], bool]
    why_not: str = ""

    def __and__(self, other: "When") -> "When":
        return When(lambda config: self.holds(config) and other.holds(config), f"{self.why_not} or {other.why_not}")


ALWAYS = When(lambda config: True)


def option(default: Any, help: str, when: When = ALWAYS, *, common: bool = False, **bounds: Any) -> Any:
    """
    A setting.

    Args:
        default: A value; or a dataclass of settings, which this is a group of.
        when (`When`, *optional*): The runs that read it.
        common (`bool`, *optional*): Whether `--help` shows it.
        bounds: What `check_value` looks at: `min` and `max`, `above` and `below` (which exclude the number itself),
            `choices`, and `path` (`~` and environment variables are expanded).
    """
    metadata = {"help": help, "when": when, "common": common, **bounds}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata | {"group": default})
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def group_of(key: dataclasses.Field) -> type | None:
    """The dataclass of a setting that is a group of them."""
    return key.metadata.get("group")


def is_mapping(key: dataclasses.Field) -> bool:
    """Whether the key takes a mapping of names to values."""
    return key.type is dict or group_of(key) is not None


def is_list(key: dataclasses.Field) -> bool:
    """Whether the key takes a list of values."""
    return typing.get_origin(key.type) is list


def kind_of(key: dataclasses.Field) -> Any:
    """The type of a value, or of those in a list."""
    return next((t for t in typing.get_args(key.type) if t is not type(None)), key.type)


def default_of(key: dataclasses.Field) -> Any:
    """The default value of a setting."""
    return key.default if key.default is not dataclasses.MISSING else key.default_factory()  # type: ignore[misc, operator]


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
    """
    `value` as it is to be used, also of text, as flags are, and as YAML has `1e-2`.

    Raises:
        ValueError: that begins with the key unless it is possible.
    """
    name, group, kind = prefix + key.name, group_of(key), kind_of(key)
    if is_mapping(key):
        if group is None or not isinstance(value, group):
            value = check_mapping(name, value)
        if group is None:
            return value
        known = {inner.name: inner for inner in dataclasses.fields(group)}
        values = value if isinstance(value, dict) else vars(value)
        if unknown := [inner for inner in values if inner not in known]:
            raise ValueError(f"{name} has no setting {unknown[0]!r}{did_you_mean(str(unknown[0]), known)}")
        return group(**{inner: check_value(known[inner], values[inner], f"{name}.") for inner in values})
    if type(None) in typing.get_args(key.type) and (
        value is None or kind is not str and str(value).lower() in ("none", "null")
    ):
        return None
    if is_list(key):
        return [_check_one(name, kind, key.metadata, item) for item in (value if isinstance(value, list) else [value])]
    return _check_one(name, kind, key.metadata, value)


def check_mapping(name: str, value: Any) -> dict[str, Any]:
    """A mapping, or the text of one as JSON."""
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


BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "min": ("at least {}", lambda value, bound: value >= bound),
    "above": ("above {}", lambda value, bound: value > bound),
    "max": ("at most {}", lambda value, bound: value <= bound),
    "below": ("below {}", lambda value, bound: value < bound),
}
WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _check_one(name: str, kind: Any, bounds: Mapping[str, Any], given: Any) -> Any:
    def require(condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(f"{name} must be {what}, got {value!r}")

    value = given
    if kind is bool and isinstance(given, str):
        value = WORDS.get(given.lower(), given)
    elif kind is str and isinstance(given, int | float) or kind is float and type(given) is int:
        value = kind(given)
    elif kind in (int, float) and isinstance(given, str):
        with contextlib.suppress(ValueError):  # which is said below
            value = kind(given)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    require(type(value) is kind, words[kind])
    require(kind is not float or math.isfinite(value), "finite")
    limits = {limit: bounds[limit] for limit in BOUNDS if limit in bounds}
    holds = all(BOUNDS[limit][1](value, bound) for limit, bound in limits.items())
    require(holds, " and ".join(BOUNDS[limit][0].format(bound) for limit, bound in limits.items()))
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
