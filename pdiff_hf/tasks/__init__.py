from .image_classification import ImageClassificationTask
from .image_generation import ImageGenerationTask
from .task import ClassificationTask, MeasuredTask, Task, accuracy, predict_logits, take
from .text_classification import TextClassificationTask

__all__ = [
    "ClassificationTask",
    "ImageClassificationTask",
    "ImageGenerationTask",
    "MeasuredTask",
    "Task",
    "TextClassificationTask",
    "accuracy",
    "predict_logits",
    "take",
]
