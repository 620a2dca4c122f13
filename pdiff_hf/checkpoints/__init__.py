from .callback import SnapshotCallback, SnapshotRecorder
from .dataset import SnapshotError, SnapshotWriter, load_snapshots, parameter_matrix
from .finetune import CollectArguments, collect_snapshots, train_base_model
from .importer import import_snapshots, read_networks

__all__ = [
    "CollectArguments",
    "SnapshotCallback",
    "SnapshotError",
    "SnapshotRecorder",
    "SnapshotWriter",
    "collect_snapshots",
    "import_snapshots",
    "load_snapshots",
    "parameter_matrix",
    "read_networks",
    "train_base_model",
]
