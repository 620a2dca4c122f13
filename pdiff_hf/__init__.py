"""Neural Network Diffusion (p-diff) for the Hugging Face ecosystem."""

import importlib
from typing import TYPE_CHECKING

from .utils.imports import lazy_attributes, register_components, when_imported

__version__ = "0.3.0.dev0"

# What this package is for: all of it is imported when it is asked for.
_PUBLIC = {
    ".evaluation": ("Report", "evaluate"),
    ".layout": ("LayoutError", "ParameterLayout"),
    ".models": ("ConditionEncoder", "ConditionError", "Fields", "LatentDenoiser", "ParameterAutoencoder"),
    ".networks.ensemble": ("EnsembleModel",),
    ".networks.neural_field": ("NeuralField",),
    ".pipelines": ("PDiffPipeline", "PDiffPipelineOutput"),
    ".run.config": ("PDiffConfig",),
    ".run.trainer": ("PDiffTrainer",),
    ".selection": ("select_layout", "select_parameters"),
    ".snapshots": ("SnapshotCallback", "SnapshotRecorder", "SnapshotWriter", "import_snapshots", "load_snapshots"),
    ".tasks.data_task": ("DataTask",),
    ".tasks.family": ("Family", "TaskFamily"),
    ".tasks.image_classification": ("ImageClassificationTask",),
    ".tasks.image_families": ("ImageFamily", "TransformedFamily"),
    ".tasks.image_generation": ("ImageGenerationTask",),
    ".tasks.label_groups": ("GroupedFamily",),
    ".tasks.module": ("ModuleTask",),
    ".tasks.neural_field": ("NeuralFieldTask",),
    ".tasks.object_detection": ("ObjectDetectionTask",),
    ".tasks.registry": ("register_family", "register_task"),
    ".tasks.semantic_segmentation": ("SemanticSegmentationTask",),
    ".tasks.task": ("ClassificationTask", "MeasuredTask", "Task"),
    ".tasks.text_classification": ("TextClassificationTask",),
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}

if TYPE_CHECKING:
    from .evaluation import Report, evaluate
    from .layout import LayoutError, ParameterLayout
    from .models import ConditionEncoder, ConditionError, Fields, LatentDenoiser, ParameterAutoencoder
    from .networks.ensemble import EnsembleModel
    from .networks.neural_field import NeuralField
    from .pipelines import PDiffPipeline, PDiffPipelineOutput
    from .run.config import PDiffConfig
    from .run.trainer import PDiffTrainer
    from .selection import select_layout, select_parameters
    from .snapshots import SnapshotCallback, SnapshotRecorder, SnapshotWriter, import_snapshots, load_snapshots
    from .tasks.data_task import DataTask
    from .tasks.family import Family, TaskFamily
    from .tasks.image_classification import ImageClassificationTask
    from .tasks.image_families import ImageFamily, TransformedFamily
    from .tasks.image_generation import ImageGenerationTask
    from .tasks.label_groups import GroupedFamily
    from .tasks.module import ModuleTask
    from .tasks.neural_field import NeuralFieldTask
    from .tasks.object_detection import ObjectDetectionTask
    from .tasks.registry import register_family, register_task
    from .tasks.semantic_segmentation import SemanticSegmentationTask
    from .tasks.task import ClassificationTask, MeasuredTask, Task
    from .tasks.text_classification import TextClassificationTask

__all__ = [
    "ClassificationTask",
    "ConditionEncoder",
    "ConditionError",
    "DataTask",
    "EnsembleModel",
    "Family",
    "Fields",
    "GroupedFamily",
    "ImageClassificationTask",
    "ImageFamily",
    "ImageGenerationTask",
    "LatentDenoiser",
    "LayoutError",
    "MeasuredTask",
    "ModuleTask",
    "NeuralField",
    "NeuralFieldTask",
    "ObjectDetectionTask",
    "PDiffConfig",
    "PDiffPipeline",
    "PDiffPipelineOutput",
    "PDiffTrainer",
    "ParameterAutoencoder",
    "ParameterLayout",
    "Report",
    "SemanticSegmentationTask",
    "SnapshotCallback",
    "SnapshotRecorder",
    "SnapshotWriter",
    "Task",
    "TaskFamily",
    "TextClassificationTask",
    "TransformedFamily",
    "evaluate",
    "import_snapshots",
    "load_snapshots",
    "register_family",
    "register_task",
    "select_layout",
    "select_parameters",
]

# diffusers looks for the base class of the components that this package can load, which is no part of it.
__getattr__ = lazy_attributes(__name__, _MODULES | {"ModelMixin": "diffusers"})


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


when_imported("diffusers.pipelines.pipeline_loading_utils", register_components)
# The mini networks are architectures of timm like any other.
when_imported("timm", lambda module: importlib.import_module("pdiff_hf.networks.mini"))
