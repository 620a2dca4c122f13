"""From a config to its task, and its family of tasks."""

import dataclasses
import inspect

from .. import tasks
from ..tasks.family import Family, as_family
from .config import PDiffConfig
from .options import default_of
from .settings import TaskSection


def make_task(config: PDiffConfig, adapter: str | None = None) -> tasks.Task:
    """
    The task that a config describes. A class from elsewhere gets only the settings that differ from their defaults,
    which are those of this package's tasks. The task's model gets `adapter`, the folder or Hub id of one of PEFT, if
    given.

    Raises:
        ValueError: for a setting that the task's class does not take, and for what the class itself refuses.
    """
    keys = [key for key in dataclasses.fields(TaskSection) if key.name not in ("task", "task_args")]
    changed = {key.name for key in keys if getattr(config, key.name) != default_of(key)}
    taken = inspect.signature(tasks.task_class(config.task)).parameters
    for name in sorted(changed - config.soft - {"dataset"} - set(taken)):
        raise ValueError(
            f"{name}={getattr(config, name)} has no effect: task '{config.task}' does not take it; leave it out"
        )
    given = {name: getattr(config, name) for name in (changed if ":" in config.task else {key.name for key in keys})}
    args = {name: value for name, value in given.items() if name in taken and value is not None} | config.task_args
    return tasks.make_task(config.task, args | ({} if adapter is None else {"adapter": adapter}))


def make_family(config: PDiffConfig, base: tasks.Task) -> Family:
    """The family that a config describes, over its task `base`; without one, that whose only member is `base`."""
    return as_family(base) if config.family is None else tasks.make_family(config.family, base, config.family_args)
