"""Where snapshots come from and the parameter data set that keeps them."""

from .alignment import align_snapshots
from .canonical import adapter_layout
from .collect import CollectArguments, collect_snapshots, train_base_model
from .dataset import SnapshotError, SnapshotWriter, load_snapshots, parameter_matrix
from .files import import_snapshots, read_networks
from .frozen import FrozenCheck
from .hidden_units import AlignmentError, find_hidden_units
from .recorder import SnapshotCallback, SnapshotRecorder
