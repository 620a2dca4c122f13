"""The command line: flags for every setting, after an optional recipe file. Errors are one line that names the key."""

import argparse
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..utils.files import expand_path
from ..utils.terminal import shorten
from .config import GROUPS, KEYS, PDiffConfig, flat
from .options import (
    RecipeLoader,
    check_mapping,
    check_value,
    default_of,
    did_you_mean,
    group_of,
    is_list,
    is_mapping,
    kind_of,
)
from .settings import SECTIONS

# Those of `scripts/recipes`, in a clone or an installed package; a name alone is enough for them.
_SCRIPTS = importlib.util.find_spec("pdiff_hf.scripts")
PACKAGED = Path(*(_SCRIPTS.submodule_search_locations or ())[:1] if _SCRIPTS else "") / "recipes"


NESTED = [f"{group}.{key.name}" for group, section in GROUPS.items() for key in dataclasses.fields(section)]


class ConfigParser(argparse.ArgumentParser):
    """
    Flags for every setting of [`PDiffConfig`], after an optional recipe file; flags take precedence. `--help` shows
    what people set, `--help-all` the rest.

    Args:
        default_recipe (`str`, *optional*): The recipe where neither a recipe nor `--model` or `--task` is given.
        defaults (`Mapping[str, Any]`, *optional*): Values of settings that neither a recipe nor a flag gives.
    """

    def __init__(self, default_recipe: str | None = None, defaults: Mapping[str, Any] | None = None, **kwargs: Any):
        super().__init__(allow_abbrev=False, add_help=False, formatter_class=argparse.HelpFormatter, **kwargs)
        self.default_recipe, self.defaults = default_recipe, dict(defaults or {})
        everything = "--help-all" in sys.argv
        default = f" Without one, and without --model and --task, {default_recipe}." if default_recipe else ""
        self.add_argument(
            "recipe", nargs="?", metavar="RECIPE.yaml", help=f"A recipe file; flags take precedence.{default}"
        )
        self.add_argument("-h", "--help", action="help", help="Show the most common settings and exit.")
        self.add_argument("--help-all", action="help", help="Show all settings and exit.")
        for title, section in SECTIONS.items():
            group = self.add_argument_group(title, section.__doc__)
            for key in dataclasses.fields(section):
                shown = everything or key.metadata["common"]
                group.add_argument(f"--{key.name}", **_argument(key), help=_help(key) if shown else argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {shorten(message)} (--help-all lists every key)", file=sys.stderr)
        sys.exit(2)

    def parse_config(self, argv: Sequence[str] | None = None) -> tuple[PDiffConfig, argparse.Namespace]:
        """The config that the file and the flags give, and the values of all other arguments."""
        argv = sys.argv[1:] if argv is None else list(argv)
        namespace, flags = self._flags(argv)
        recipe = namespace.recipe
        if recipe is None and not flags.keys() & {"model", "task"}:
            recipe = self.default_recipe
        try:
            found = self.defaults | ({} if recipe is None else read_recipe(recipe))
            few = flags.get("num_snapshots", 0)
            if 0 < few < found.get("num_tasks", 0):  # fewer than the recipe has tasks: each is for one of its own
                flags = {"num_tasks": few} | flags
            config = _config(found).changed(**flags)
        except ValueError as error:
            self.error(str(error))
        return config, namespace

    def parse_changes(self, argv: Sequence[str]) -> dict[str, Any]:
        """The settings that `argv` has flags for, and no others; those in groups with names such as `tune_args.map`."""
        namespace, flags = self._flags(argv)
        if namespace.recipe is not None:
            self._refuse(namespace.recipe)
        return flat(flags)

    def _flags(self, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
        namespace, unknown = self.parse_known_args(argv)
        if unknown:  # before the value that follows an unknown flag is taken for the recipe file
            self._refuse(unknown[0])
        try:
            given = {name: value for name, value in vars(namespace).items() if name in KEYS and value is not None}
            return namespace, {
                name: _mapping(name, value) if is_mapping(KEYS[name]) else check_value(KEYS[name], value)
                for name, value in given.items()
            }
        except ValueError as error:
            self.error(str(error))

    def _refuse(self, argument: str) -> NoReturn:
        self.error(f"unknown argument '{argument}'{_suggest(argument.lstrip('-').partition('=')[0])}")


def read_recipe(path: str | os.PathLike) -> dict[str, Any]:
    """
    The values in a recipe file, with text where YAML has none for a number, such as `1e-2`.

    Raises:
        ValueError: if it cannot be read, has an unknown key, or one without effect.
    """
    try:
        file = Path(expand_path(os.fspath(path)))
        if not file.exists() and (PACKAGED / file.name).is_file():
            file = PACKAGED / file.name
        values = yaml.load(file.read_text(encoding="utf-8"), RecipeLoader)
    except FileNotFoundError as error:
        known = sorted(file.name for file in PACKAGED.glob("*.yaml"))
        raise ValueError(f"there is no recipe '{path}'{did_you_mean(Path(path).name, known)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe '{path}' cannot be read: {error}") from error
    except Exception as error:  # what odd values make the parts of yaml raise has no common type
        raise ValueError(f"recipe '{path}' is not YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"recipe '{path}' must be a mapping of keys to values, got a {type(values).__name__}")
    if unknown := [key for key in values if key not in KEYS]:
        raise ValueError(f"recipe '{path}' has the unknown key '{unknown[0]}'{_suggest(str(unknown[0]))}")
    try:
        PDiffConfig(**values).check()
    except ValueError as error:
        raise ValueError(f"recipe '{path}': {error}") from error
    return values


def load_config(path: str | os.PathLike, **changes: Any) -> PDiffConfig:
    """
    The config in a recipe file, with some settings changed.

    Raises:
        ValueError: if the file cannot be read, or its values cannot be used.
    """
    return _config(read_recipe(path)).changed(**changes)


def _config(found: Mapping[str, Any]) -> PDiffConfig:
    """The config of values that have no effect where a flag says otherwise."""
    config = PDiffConfig(**found)
    config.soft = frozenset(flat(found))
    return config


def _suggest(key: str) -> str:
    if found := [name for name in NESTED if key in (name.partition(".")[2], name.replace("_args.", "_"))]:
        return did_you_mean(key, found)
    return did_you_mean(key, KEYS) if did_you_mean(key, KEYS).startswith("; did") else ""


def _help(key: dataclasses.Field) -> str:
    choices = key.metadata.get("choices")
    text = key.metadata["help"] + (f" One of {', '.join(choices)}." if choices else "")
    if (group := group_of(key)) is not None:
        inner = (
            f"{k.name} ({k.metadata['help'].rstrip('.')}; default: {_shown(k)})" for k in dataclasses.fields(group)
        )
        return f"{text.rstrip('.')}, as KEY=VALUE ...: {'; '.join(inner)}.".replace("%", "%%")
    return f"{text} (default: {_shown(key)})".replace("%", "%%")


def _shown(key: dataclasses.Field) -> Any:
    value = default_of(key)
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else "none" if value in (None, {}) else value


def _argument(key: dataclasses.Field) -> dict[str, Any]:
    """How argparse reads a setting: as text, of which `check_value` makes its value."""
    if is_mapping(key):
        return {"nargs": "+", "metavar": "KEY=VALUE"}
    if kind_of(key) is bool:
        return {"nargs": "?", "const": "true", "metavar": "BOOL"}
    return {"nargs": "*" if is_list(key) else None, "metavar": {int: "N", float: "X"}.get(kind_of(key), "TEXT")}


def _mapping(name: str, given: Sequence[str]) -> dict[str, Any]:
    """What KEY=VALUE ... says, or a mapping as JSON."""
    if len(given) == 1 and given[0].lstrip().startswith(("{", "[")):
        return check_mapping(name, given[0])
    if wrong := [part for part in given if "=" not in part]:
        raise ValueError(f"--{name} takes KEY=VALUE or a mapping as JSON, got {wrong[0]!r}")
    try:
        return {key: yaml.load(text, RecipeLoader) for key, _, text in (part.partition("=") for part in given)}
    except yaml.YAMLError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
