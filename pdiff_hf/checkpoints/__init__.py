from .alignment import AlignmentError, align_snapshots, find_hidden_units
from .callback import SnapshotCallback, SnapshotRecorder
from .dataset import SnapshotError, SnapshotWriter, load_snapshots, parameter_matrix
from .finetune import CollectArguments, collect_snapshots, train_base_model
from .importer import import_snapshots, read_networks

__all__ = [
    "AlignmentError",
    "CollectArguments",
    "SnapshotCallback",
    "SnapshotError",
    "SnapshotRecorder",
    "SnapshotWriter",
    "align_snapshots",
    "collect_snapshots",
    "find_hidden_units",
    "import_snapshots",
    "load_snapshots",
    "parameter_matrix",
    "read_networks",
    "train_base_model",
]
