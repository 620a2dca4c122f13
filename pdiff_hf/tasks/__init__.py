from .image_classification import ImageClassificationTask
from .task import Task, accuracy, predict_logits, take

__all__ = ["ImageClassificationTask", "Task", "accuracy", "predict_logits", "take"]
