from .image_classification import ImageClassificationTask
from .task import ClassificationTask, MeasuredTask, Task, accuracy, predict_logits, take
from .text_classification import TextClassificationTask

__all__ = [
    "ClassificationTask",
    "ImageClassificationTask",
    "MeasuredTask",
    "Task",
    "TextClassificationTask",
    "accuracy",
    "predict_logits",
    "take",
]
