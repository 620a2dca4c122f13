from .image_classification import ImageClassificationTask
from .object_detection import ObjectDetectionTask
from .semantic_segmentation import SemanticSegmentationTask
from .task import ClassificationTask, MeasuredTask, Task, accuracy, predict_logits, take
from .text_classification import TextClassificationTask

__all__ = [
    "ClassificationTask",
    "ImageClassificationTask",
    "MeasuredTask",
    "ObjectDetectionTask",
    "SemanticSegmentationTask",
    "Task",
    "TextClassificationTask",
    "accuracy",
    "predict_logits",
    "take",
]
