from .image_classification import ImageClassificationTask
from .task import Task, accuracy, predict_logits, take
from .text_classification import TextClassificationTask

__all__ = ["ImageClassificationTask", "Task", "TextClassificationTask", "accuracy", "predict_logits", "take"]
