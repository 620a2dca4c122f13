"""What this package is for: `pdiff_hf` imports a name when it is asked for, and type checkers read them all here."""

from .evaluation import Report as Report, evaluate as evaluate
from .layout import LayoutError as LayoutError, ParameterLayout as ParameterLayout
from .models import (
    ConditionEncoder as ConditionEncoder,
    ConditionError as ConditionError,
    Fields as Fields,
    LatentDenoiser as LatentDenoiser,
    ParameterAutoencoder as ParameterAutoencoder,
)
from .networks.ensemble import EnsembleModel as EnsembleModel
from .networks.neural_field import NeuralField as NeuralField
from .pipelines import PDiffPipeline as PDiffPipeline, PDiffPipelineOutput as PDiffPipelineOutput
from .run.config import PDiffConfig as PDiffConfig
from .run.trainer import PDiffTrainer as PDiffTrainer
from .selection import select_layout as select_layout, select_parameters as select_parameters
from .snapshots import (
    SnapshotCallback as SnapshotCallback,
    SnapshotRecorder as SnapshotRecorder,
    SnapshotWriter as SnapshotWriter,
    import_snapshots as import_snapshots,
    load_snapshots as load_snapshots,
)
from .tasks.data_task import DataTask as DataTask
from .tasks.family import Family as Family, TaskFamily as TaskFamily
from .tasks.image_classification import ImageClassificationTask as ImageClassificationTask
from .tasks.image_families import ImageFamily as ImageFamily, TransformedFamily as TransformedFamily
from .tasks.image_generation import ImageGenerationTask as ImageGenerationTask
from .tasks.label_groups import GroupedFamily as GroupedFamily
from .tasks.module import ModuleTask as ModuleTask
from .tasks.neural_field import NeuralFieldTask as NeuralFieldTask
from .tasks.object_detection import ObjectDetectionTask as ObjectDetectionTask
from .tasks.registry import register_family as register_family, register_task as register_task
from .tasks.semantic_segmentation import SemanticSegmentationTask as SemanticSegmentationTask
from .tasks.task import ClassificationTask as ClassificationTask, MeasuredTask as MeasuredTask, Task as Task
from .tasks.text_classification import TextClassificationTask as TextClassificationTask

__version__: str
