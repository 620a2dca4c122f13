"""Tasks and families by name: this package's, and those of others as `module:Class` or `path/to/file.py:Class`."""

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from ..utils.errors import first_line, users_line
from .task import Task

if TYPE_CHECKING:
    from .family import Family

T = TypeVar("T", bound=type[Task])
F = TypeVar("F", bound=type["Family"])
# The tasks of this package, each in the module of its name, and the modules with its families. They are imported when
# one is asked for, which takes seconds.
TASKS = (
    "causal_lm",
    "image_classification",
    "image_generation",
    "multiple_choice",
    "neural_field",
    "object_detection",
    "semantic_segmentation",
    "text_classification",
)
FAMILIES = {"transformed": ("image_families",), "grouped": ("label_groups",), "tabled": ("multiple_choice",)}
_tasks: dict[str, type[Task]] = {}
_families: dict[str, list[type["Family"]]] = {}


def register_task(name: str) -> Callable[[T], T]:
    """Makes a class of a task known by a name, such as `@register_task("image_classification")`."""

    def register(task: T) -> T:
        _tasks[name] = task
        return task

    return register


def register_family(name: str) -> Callable[[F], F]:
    """
    Makes a class of a family known by a name, such as `@register_family("transformed")`. Several classes may share one,
    if they take tasks of different kinds: see [`Family`].
    """

    def register(family: F) -> F:
        kinds = _families.setdefault(name, [])
        kinds[:] = [kind for kind in kinds if kind.takes is not family.takes] + [family]
        return family

    return register


def task_names() -> tuple[str, ...]:
    """The names of all tasks that are known."""
    return tuple(dict.fromkeys((*TASKS, *_tasks)))


def task_class(name: str) -> type[Task]:
    """
    The class of a task.

    Args:
        name (`str`): A registered name, `module:Class`, or `path/to/file.py:Class`.

    Raises:
        ValueError: if there is none, or it is no task, or lacks methods of one.
    """
    if name in TASKS and name not in _tasks:
        importlib.import_module(f"{__package__}.{name}")
    if name in _tasks:
        return _tasks[name]
    if ":" not in name:
        close = difflib.get_close_matches(name, task_names(), n=3) or list(task_names())
        raise ValueError(
            f"task '{name}' is neither one of {', '.join(close)} nor a class of your own, module:Class or "
            "path/to/file.py:Class"
        )
    return _own_class("task", name, Task)


def _family_class(name: str, base: Task) -> type["Family"]:
    """The class of a family over a task like `base`."""
    for module in FAMILIES.get(name, ()):
        importlib.import_module(f"{__package__}.{module}")
    if name in _families:
        kinds = _families[name]
    elif ":" in name:
        from .family import Family

        kinds = [_own_class("family", name, Family)]
    else:
        known = ", ".join(dict.fromkeys((*FAMILIES, *_families)))
        raise ValueError(
            f"family '{name}' is neither one of {known} nor a class of your own, module:Class or path/to/file.py:Class"
        )
    for kind in kinds:
        if kind.takes is None or isinstance(base, kind.takes):
            return kind
    takes = " or ".join(kind.takes.__name__ for kind in kinds if kind.takes is not None)
    raise ValueError(f"family '{name}' is over the data of a task of the kind {takes}, got {type(base).__name__}")


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


def _load_file(path: Path) -> ModuleType:
    """The module in a file, which may import what lies beside it; once, as long as the file stays as it is."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}'")
    return _load_source(path, path.read_bytes())


@cache
def _load_source(path: Path, source: bytes) -> ModuleType:
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(str(path), path)
    assert spec is not None and spec.loader is not None  # of a file that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses look for it
    exec(compile(source, path, "exec"), module.__dict__)  # and not bytecode of an earlier second
    return module


def make_task(
    settings: Mapping[str, Any], task_args: Mapping[str, Any] | None = None, must_take: Collection[str] = ()
) -> Task:
    """
    The task that settings describe.

    Args:
        settings (`Mapping[str, Any]`): `task`, a name for `task_class`, and what goes to the arguments of that class
            with the same names; None leaves an argument at its default.
        task_args (`Mapping[str, Any]`, *optional*): More arguments of that class.
        must_take (`Collection[str]`, *optional*): Settings that would have no effect if the class had no such argument.

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
    without_effect = sorted(set(must_take) - set(parameters))
    if without_effect:
        key = without_effect[0]
        raise ValueError(f"{key}={settings[key]} has no effect: task '{name}' does not take it; leave it out")
    args = {key: settings[key] for key in parameters if settings.get(key) is not None} | dict(task_args)
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [key for key, value in parameters.items() if value.default is value.empty and value.kind not in variable]
    missing = [key for key in needed if key not in args]
    if missing:
        raise ValueError(f"task '{name}' needs {', '.join(missing)}")
    return cls(**args)


def make_family(name: str, base: Task, family_args: Mapping[str, Any] | None = None) -> "Family":
    """
    A family of tasks.

    Args:
        name (`str`): A registered name, `module:Class`, or `path/to/file.py:Class`.
        base (`Task`): What the family is over, its first argument if it takes one.
        family_args (`Mapping[str, Any]`, *optional*): More arguments of the class.

    Raises:
        ValueError: for an unknown family or argument, for what the family itself refuses, and for what
            [`Family.check`] finds in a class of one's own.
    """
    family_args, cls = family_args or {}, _family_class(name, base)
    takes_base = cls.takes is not None
    parameters = list(inspect.signature(cls).parameters)[takes_base:]
    unknown = sorted(set(family_args) - set(parameters))
    if unknown:
        raise ValueError(
            f"family '{name}' does not take the family_args {', '.join(unknown)}; it takes "
            f"{', '.join(parameters) or 'none'}"
        )
    family = cls(*[base] * takes_base, **family_args)
    if ":" in name:
        family.check()
    return family
