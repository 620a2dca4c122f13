"""Where snapshots come from and the parameter data set that keeps them."""

from .alignment import AlignmentError, align_snapshots, find_hidden_units
from .canonical import adapter_layout
from .collect import CollectArguments, collect_snapshots, train_base_model
from .dataset import SnapshotError, SnapshotWriter, load_snapshots, parameter_matrix
from .files import import_snapshots, read_networks
from .frozen import FrozenCheck
from .recorder import SnapshotCallback, SnapshotRecorder
