from .dataset import SnapshotError, SnapshotWriter, load_snapshots, parameter_matrix
from .finetune import CollectArguments, collect_snapshots, train_base_model

__all__ = [
    "CollectArguments",
    "SnapshotError",
    "SnapshotWriter",
    "collect_snapshots",
    "load_snapshots",
    "parameter_matrix",
    "train_base_model",
]
