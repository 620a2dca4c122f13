"""From a recipe to its task."""

import json

from ..tasks import (
    ImageClassificationTask,
    ImageGenerationTask,
    ObjectDetectionTask,
    SemanticSegmentationTask,
    Task,
    TextClassificationTask,
)
from .recipe import Recipe


def make_task(recipe: Recipe) -> Task:
    """The task that a recipe describes."""
    shared = {
        "model": recipe.model,
        "dataset": recipe.dataset,
        "holdout_fraction": recipe.validation_fraction,
        "max_train_samples": recipe.max_train_samples,
        "max_eval_samples": recipe.max_eval_samples,
    }
    if recipe.task == "text_classification":
        return TextClassificationTask(**shared, max_length=recipe.max_length)
    shared |= {"image_size": recipe.image_size or None, "model_args": json.loads(recipe.model_args)}
    if recipe.task == "image_generation":
        return ImageGenerationTask(**shared, fid_features=recipe.fid_features)
    vision_tasks = {
        "image_classification": ImageClassificationTask,
        "object_detection": ObjectDetectionTask,
        "semantic_segmentation": SemanticSegmentationTask,
    }
    return vision_tasks[recipe.task](**shared)
