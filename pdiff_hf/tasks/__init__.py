"""What networks are for: data, loss and metric."""

from .image_classification import ImageClassificationTask
from .image_generation import ImageGenerationTask
from .object_detection import ObjectDetectionTask
from .semantic_segmentation import SemanticSegmentationTask
from .task import ClassificationTask, MeasuredTask, Task, accuracy, predict_logits, take
from .text_classification import TextClassificationTask

__all__ = [
    "ClassificationTask",
    "ImageClassificationTask",
    "ImageGenerationTask",
    "MeasuredTask",
    "ObjectDetectionTask",
    "SemanticSegmentationTask",
    "Task",
    "TextClassificationTask",
    "accuracy",
    "predict_logits",
    "take",
]
