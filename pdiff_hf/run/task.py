"""From a recipe to its task, and its family of tasks."""

import dataclasses
import json

from .. import tasks
from ..tasks.family import Family
from .recipe import Recipe, TaskSection


def make_task(recipe: Recipe, adapter: str | None = None) -> tasks.Task:
    """
    The task that a recipe describes. A class from elsewhere gets only the keys that differ from their defaults, which
    are those of this package's tasks. The task's model gets `adapter`, the folder or Hub id of one of PEFT, if given.
    """
    settings = vars(recipe)
    if ":" in recipe.task:
        defaults = {f.name: f.default for f in dataclasses.fields(TaskSection)}
        settings = {key: value for key, value in settings.items() if key == "task" or value != defaults.get(key)}
    task_args = json.loads(recipe.task_args) | ({} if adapter is None else {"adapter": adapter})
    return tasks.make_task(settings, task_args)


def make_family(recipe: Recipe, base: tasks.Task) -> Family | None:
    """The family that a recipe describes, over its task `base`; None for one task."""
    if recipe.family is None:
        return None
    return tasks.make_family(recipe.family, base, json.loads(recipe.family_args))
