"""Tasks and families by name: this package's, and those of others as `module:Class` or `path/to/file.py:Class`."""

import difflib
import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from ..utils.errors import first_line, users_line
from .task import Task

if TYPE_CHECKING:
    from .family import Family

T = TypeVar("T", bound=type[Task])
REGISTERED: dict[str, type[Task]] = {}
# Modules are imported when a family is asked for.
FAMILIES = {"transformed": "image_families:TransformedFamily", "grouped": "label_groups:GroupedFamily"}
FAMILIES_OF_TEXTS = {"grouped": "label_groups:GroupedTextFamily"}


def register_task(name: str) -> Callable[[T], T]:
    """Makes a task of a module in this folder known by a name: `@register_task("image_classification")`."""

    def register(task: T) -> T:
        REGISTERED[name] = task
        return task

    return register


@cache
def task_names() -> dict[str, str]:
    """The names of all registered tasks, with their modules. They are read, not imported, which would take seconds."""
    found: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        names = re.findall(r'^@register_task\("(\w+)"\)', path.read_text(encoding="utf-8"), re.MULTILINE)
        found |= dict.fromkeys(names, f"{__package__}.{path.stem}")
    return found


def task_class(name: str) -> type[Task]:
    """
    The class of a task.

    Args:
        name (`str`): A registered name, `module:Class`, or `path/to/file.py:Class`.

    Raises:
        ValueError: if there is none, or it is no task, or lacks methods of one.
    """
    if name in task_names():
        importlib.import_module(task_names()[name])
        return REGISTERED[name]
    if ":" not in name:
        close = difflib.get_close_matches(name, task_names(), n=3) or list(task_names())
        raise ValueError(
            f"task '{name}' is neither one of {', '.join(close)} nor a class of your own, module:Class or "
            "path/to/file.py:Class"
        )
    return _own_class("task", name, Task)


def _own_class(kind: str, name: str, base: type) -> Any:
    """The class `module:Class` or `path/to/file.py:Class`, which must be one of `base` with all of its methods."""
    where, _, class_name = name.rpartition(":")
    try:
        module = _load_file(Path(where).resolve()) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:  # of code that is not ours
        line = users_line(error)
        raise ValueError(f"{kind} '{name}': '{where}' cannot be imported: {first_line(error)}{line}") from None
    found = getattr(module, class_name, None)
    if not (inspect.isclass(found) and issubclass(found, base)):
        own = [key for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base)]
        own = [key for key in own if getattr(module, key).__module__ == module.__name__]
        raise ValueError(f"{kind} '{name}': '{where}' has no such {kind}; it has {', '.join(own) or 'none'}")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise ValueError(f"{kind} '{name}' lacks the methods {', '.join(missing)}")
    return found


@cache
def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}'")
    spec = importlib.util.spec_from_file_location(str(path), path)
    assert spec is not None and spec.loader is not None  # of a file that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def make_task(settings: Mapping[str, Any], task_args: Mapping[str, Any] | None = None) -> Task:
    """
    The task that settings describe.

    Args:
        settings (`Mapping[str, Any]`): `task`, a name for `task_class`, and what goes to the arguments of that class
            with the same names; None leaves an argument at its default, and a mapping may be JSON.
        task_args (`Mapping[str, Any]`, *optional*): More arguments of that class.

    Raises:
        ValueError: for an unknown task or argument, and for what the task itself refuses.
    """
    name, task_args = settings["task"], task_args or {}
    cls = task_class(name)
    parameters = inspect.signature(cls).parameters
    unknown = sorted(set(task_args) - set(parameters))
    if unknown:
        raise ValueError(
            f"task '{name}' does not take the task_args {', '.join(unknown)}; it takes {', '.join(parameters)}"
        )
    args = {key: settings[key] for key in parameters if settings.get(key) is not None} | dict(task_args)
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [key for key, value in parameters.items() if value.default is value.empty and value.kind not in variable]
    missing = [key for key in needed if key not in args]
    if missing:
        raise ValueError(f"task '{name}' needs {', '.join(missing)}")
    if isinstance(args.get("model_args"), str):
        args["model_args"] = json.loads(args["model_args"])
    return cls(**args)


def make_family(name: str, base: Task, family_args: Mapping[str, Any] | None = None) -> "Family":
    """
    A family of tasks.

    Args:
        name (`str`): One of `FAMILIES`, `module:Class`, or `path/to/file.py:Class`.
        base (`Task`): What the family changes; for a class of one's own, only if its first argument is called `base`.
        family_args (`Mapping[str, Any]`, *optional*): More arguments of the class.

    Raises:
        ValueError: for an unknown family or argument, for what the family itself refuses, and for what
            [`Family.check`] finds in a class of one's own.
    """
    from .family import Family
    from .image_families import ImageFamily

    family_args = family_args or {}
    if name in FAMILIES:
        of_texts = hasattr(base, "tokenizer") and name in FAMILIES_OF_TEXTS
        module, _, class_name = (FAMILIES_OF_TEXTS if of_texts else FAMILIES)[name].partition(":")
        cls = getattr(importlib.import_module(f"{__package__}.{module}"), class_name)
    elif ":" not in name:
        raise ValueError(
            f"family '{name}' is neither one of {', '.join(FAMILIES)} nor a class of your own, module:Class or "
            "path/to/file.py:Class"
        )
    else:
        cls = _own_class("family", name, Family)
    if issubclass(cls, ImageFamily) and not hasattr(base, "raw_examples"):
        raise ValueError(f"family '{name}' changes images, and a {type(base).__name__} has none")
    parameters = list(inspect.signature(cls).parameters)
    takes_base = parameters[:1] == ["base"]
    unknown = sorted(set(family_args) - set(parameters[takes_base:]))
    if unknown:
        raise ValueError(
            f"family '{name}' does not take the family_args {', '.join(unknown)}; it takes "
            f"{', '.join(parameters[takes_base:]) or 'none'}"
        )
    family = cls(*[base] * takes_base, **family_args)
    if ":" in name:
        family.check()
    return family
