"""Whether imported networks are what they are scored as: what is not selected comes from the base model."""

import copy
import logging
import math
from pathlib import Path

import torch
from torch import nn

from ..layout import ParameterLayout
from ..networks.runner import NetworkRunner
from ..selection import STATISTICS
from ..tasks import ClassificationTask, Task, accuracies
from ..tensor_names import adapter_configs, adapter_names, tied_names
from ..utils.files import without_nan
from .adapters import AdapterReader, Notes
from .dataset import SnapshotError
from .readers import NetworkTensors, adapter_reader, open_network, read_vector

logger = logging.getLogger(__name__)

# Below this, a difference is rounding.
MAX_DIFFERENCE = 1e-6
# So many networks, those that differ most, are scored with their own tensors too.
NUM_SCORED = 3


class FrozenCheck:
    """
    Compares what imported networks hold beside the selected tensors with the base model, which will stand in for it.

    Args:
        model (`nn.Module`): The base model.
        layout (`ParameterLayout`): The selected tensors.
        require_same (`bool`, *optional*, defaults to `False`): Whether a difference is an error.
    """

    def __init__(self, model: nn.Module, layout: ParameterLayout, require_same: bool = False):
        self.model, self.layout, self.require_same = model, layout, require_same
        shared = {name for name, first in tied_names(model).items() if first in layout.names}
        self._frozen = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if tensor.is_floating_point() and name not in layout.names and name not in shared
        }
        self._differences: dict[Path, tuple[float, str]] = {}
        aliases = adapter_names(model)
        shapes = [tuple(tensor.shape) for tensor in self._frozen.values()]
        self._reader = AdapterReader(
            list(self._frozen), shapes, [aliases.get(name, ()) for name in self._frozen], adapter_configs(model)
        )

    def compare(self, path: Path, tensors: NetworkTensors, notes: Notes) -> None:
        """
        Notes the largest difference between a network and the base model. Tensors that a file lacks do not count, but
        for the factors of a module that its adapter leaves as it is.

        Raises:
            SnapshotError: for a difference, if there must be none; names the tensor.
        """
        read = self._reader.read(tensors, tensors.files, str(path), Notes())
        found = {name: _difference(self._frozen[name], tensor) for name, tensor in read.items()}
        for unused in self._reader.unused(tensors, adapter_reader(self.layout)):
            if self.require_same:
                raise SnapshotError(
                    f"tensor '{unused}' of the adapter has no place in the base model; without it, it may be another "
                    "network. Import without require_same_frozen to leave it out"
                )
            notes.left_out[unused].add(str(path))
        name = max(found, key=lambda name: found[name], default=None)
        if name is None or found[name] <= MAX_DIFFERENCE:
            return
        if self.require_same:
            raise SnapshotError(
                f"tensor '{name}', which is not selected, differs from the base model's by {found[name]:.3g} of its "
                "norm; select it too, or import without require_same_frozen"
            )
        self._differences[path] = found[name], name

    def report(self, task: Task) -> dict | None:
        """
        Warns of the differences that were found, and measures what they mean for the accuracy of a few networks where
        `task` classifies.

        Returns:
            `dict` or `None`: The number of `networks` that differ, the largest `difference` relative to the norm of
            its `tensor`, its `file`, and `scores`: for a few files, validation accuracy in percent with their own
            tensors (`own`) and with the base model's (`hybrid`). None if nothing differs.
        """
        if not self._differences:
            return None
        paths = sorted(self._differences, key=lambda path: -self._differences[path][0])
        difference, name = self._differences[paths[0]]
        scores = []
        if isinstance(task, ClassificationTask):
            scores = [self._score(task, path) for path in paths[:NUM_SCORED]]
        measured = "".join(
            f". With the base model's, '{score['file']}' has an accuracy of {score['hybrid']:.1f}%, with its own of "
            f"{score['own']:.1f}%"
            for score in scores
        )
        only_statistics = all(name.rpartition(".")[2] in STATISTICS for _, name in self._differences.values())
        advice = "use batch_norm_statistics=generated" if only_statistics else "select those tensors too"
        logger.warning(
            f"{len(paths)} imported networks differ from the base model in tensors that are not selected, and are used "
            f"with the base model's: by up to {difference:.3g} of the norm of '{name}', in '{paths[0]}'{measured}. If "
            f"that matters, {advice}, take one of these networks as the base model, or refuse such networks with "
            "require_same_frozen"
        )
        report = {"networks": len(paths), "difference": difference, "tensor": name, "file": str(paths[0])}
        return without_nan(report | {"scores": scores})

    def _score(self, task: ClassificationTask, path: Path) -> dict:
        with open_network(path, self.layout) as tensors:
            reader = adapter_reader(self.layout)
            parameters = read_vector(tensors, self.layout, reader, str(path), Notes())[None]  # (1, D)
            read = self._reader.read(tensors, tensors.files, str(path), Notes())
            own = {name: tensor for name, tensor in read.items() if tensor.shape == self._frozen[name].shape}
        network = copy.deepcopy(self.model)
        network.load_state_dict(own, strict=False)
        models = {"own": network, "hybrid": self.model}
        scores = {
            key: accuracies(task, NetworkRunner(model, self.layout), "validation", parameters).item()
            for key, model in models.items()
        }
        return {"file": str(path)} | scores


def _difference(frozen: torch.Tensor, tensor: torch.Tensor) -> float:
    """The norm of the difference relative to the larger of the two norms, after the rounding of the file's type."""
    if tensor.shape != frozen.shape:
        return math.inf
    a, b = tensor.double(), frozen.to("cpu", tensor.dtype).double()
    size = max(a.norm().item(), b.norm().item())
    difference = (a - b).norm().item() / size if size else 0.0
    return difference if math.isfinite(difference) else math.inf
