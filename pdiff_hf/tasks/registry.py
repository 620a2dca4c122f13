"""Tasks and families by name: this package's, and those of others as `module:Class` or `path/to/file.py:Class`."""

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from ..utils.errors import first_line, users_line
from .task import Task

if TYPE_CHECKING:
    from .family import Family

T = TypeVar("T", bound=type)
# Classes of this package by kind and name: the modules that have them are imported when one is asked for, which takes
# seconds. The tasks are each in the module of their name.
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
MODULES: dict[str, dict[str, tuple[str, ...]]] = {
    "task": {name: (name,) for name in TASKS},
    "family": {"transformed": ("image_families",), "grouped": ("label_groups",), "tabled": ("multiple_choice",)},
}
_registered: dict[str, dict[str, list[Any]]] = {"task": {}, "family": {}}


def register_task(name: str) -> Callable[[T], T]:
    """Makes a class of a task known by a name, such as `@register_task("image_classification")`."""
    return partial(_register, "task", name)


def register_family(name: str) -> Callable[[T], T]:
    """
    Makes a class of a family known by a name, such as `@register_family("transformed")`. Several classes may share one,
    if they take tasks of different kinds: see [`Family`].
    """
    return partial(_register, "family", name)


def _register(kind: str, name: str, cls: T) -> T:
    _import(kind, name)  # first, so that a class of yours takes the place of one of this package
    classes = _registered[kind].setdefault(name, [])
    classes[:] = [old for old in classes if getattr(old, "takes", None) is not getattr(cls, "takes", None)] + [cls]
    return cls


def _import(kind: str, name: str) -> None:
    """Imports what this package has of that name."""
    for module in MODULES[kind].get(name, ()):
        importlib.import_module(f"{__package__}.{module}")


def task_names() -> tuple[str, ...]:
    """The names of all tasks that are known."""
    return tuple(dict.fromkeys((*TASKS, *_registered["task"])))


def task_class(name: str) -> type[Task]:
    """
    The class of a task.

    Args:
        name (`str`): A registered name, `module:Class`, or `path/to/file.py:Class`.

    Raises:
        ValueError: if there is none, or it is not a task, or lacks methods of one.
    """
    return _find("task", name, Task)[-1]


def _find(kind: str, name: str, base: type) -> list[Any]:
    """The classes of that name."""
    _import(kind, name)
    if name in _registered[kind]:
        return _registered[kind][name]
    if ":" in name:
        return [_own_class(kind, name, base)]
    known = list(dict.fromkeys((*MODULES[kind], *_registered[kind])))
    raise ValueError(
        f"{kind} '{name}' is neither one of {', '.join(difflib.get_close_matches(name, known, n=3) or known)} nor a "
        "class of your own, module:Class or path/to/file.py:Class"
    )


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


def make_task(name: str, args: Mapping[str, Any]) -> Task:
    """
    A task.

    Args:
        name (`str`): See [`task_class`].
        args (`Mapping[str, Any]`): Arguments of the class.

    Raises:
        ValueError: for an unknown task or argument, and for what the task itself refuses.
    """
    cls = task_class(name)
    _check_arguments("task", name, inspect.signature(cls).parameters, args)
    return cls(**args)


def make_family(name: str, base: Task, args: Mapping[str, Any] | None = None) -> "Family":
    """
    A family of tasks.

    Args:
        name (`str`): A registered name, `module:Class`, or `path/to/file.py:Class`.
        base (`Task`): What the family is over, its first argument if it takes one.
        args (`Mapping[str, Any]`, *optional*): More arguments of the class.

    Raises:
        ValueError: for an unknown family or argument, for what the family itself refuses, and for what
            [`Family.check`] finds in your own class.
    """
    from .family import Family  # takes seconds

    kinds, args = _find("family", name, Family), args or {}
    cls = next((kind for kind in kinds if kind.takes is None or isinstance(base, kind.takes)), None)
    if cls is None:
        takes = " or ".join(kind.takes.__name__ for kind in kinds)
        raise ValueError(f"family '{name}' is over the data of a task of the kind {takes}, got {type(base).__name__}")
    takes_base = cls.takes is not None
    parameters = list(inspect.signature(cls).parameters.items())[takes_base:]
    _check_arguments("family", name, dict(parameters), args)
    family = cls(*[base] * takes_base, **args)
    if ":" in name:
        family.check()
    return family


def _check_arguments(
    kind: str, name: str, parameters: Mapping[str, inspect.Parameter], args: Mapping[str, Any]
) -> None:
    if unknown := sorted(set(args) - set(parameters)):
        raise ValueError(
            f"{kind} '{name}' does not take the {kind}_args {', '.join(unknown)}; it takes "
            f"{', '.join(parameters) or 'none'}"
        )
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [key for key, value in parameters.items() if value.default is value.empty and value.kind not in variable]
    if missing := [key for key in needed if key not in args]:
        raise ValueError(f"{kind} '{name}' needs {', '.join(missing)}")
