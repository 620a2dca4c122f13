"""What networks are for: data, loss and metric."""

from typing import Any

from .registry import make_family, make_task, register_family, register_task, task_class, task_names
from .task import (
    Batch,
    ClassificationTask,
    MeasuredTask,
    Split,
    Task,
    accuracies,
    check_head,
    predict_logits,
    take,
)


def __getattr__(name: str) -> Any:
    """`ImageClassificationTask` is the task `image_classification`, and so on; imported when it is asked for."""
    for task in task_names():
        if name == "".join(part.capitalize() for part in task.split("_")) + "Task":
            return task_class(task)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
