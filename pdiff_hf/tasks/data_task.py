"""Tasks whose networks are data: one network for each datum, which a function of coordinates renders."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch

from ..models.condition import Condition, Fields
from ..networks.runner import NetworkRunner
from .task import Batch, Split, Task, Tensors, digest

STARTS = ("mean", "first", "meta")


class DataTask(Task):
    """
    A task for which each network is one datum: a neural field such as an image, a shape or a signal. A run trains one
    network for each datum of the split `train`, side by side and from one shared start, learns a generator of them, and
    judges the *sets* of data that generated networks make. The data of the split `test` have networks of their own,
    which no generator sees. Nothing is chosen in a run, so that there is no third split: `validation` is `test`.

    Attributes:
        fields (`Fields`): Of what is known of a datum, such as its class; none by default.
        start (`str`): What all networks start from: a network fitted to the `mean` of the data, to the `first` datum,
            or `meta`-learned, such that a few steps reach any datum (functa, arXiv 2201.12204).
    """

    fields: Fields = Fields({})
    start: str = "mean"

    @abstractmethod
    def coordinates(self, resolution: int | None = None) -> torch.Tensor:
        """Where data have values: float32 of shape `(P, d)`; for another resolution than that of the data too."""

    @abstractmethod
    def signals(self, split: Split) -> torch.Tensor:
        """What networks should give at the coordinates, float32 of shape `(N, P, C)`."""

    def conditions(self, split: Split) -> Sequence[Condition]:
        """What is known of each datum."""
        return [{}] * len(self.signals(split))

    def render(self, call: Callable, coordinates: torch.Tensor) -> torch.Tensor:
        """What one network gives at coordinates of shape `(P, d)`: shape `(P, C)`."""
        return call(coordinates)

    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        """`render` at the `coordinates` of a batch."""
        return self.render(call, batch["coordinates"])

    def error(self, outputs: torch.Tensor, signals: torch.Tensor) -> torch.Tensor:
        """The loss of each network, `(N, P, C)` twice to `(N,)`; by default the mean squared error."""
        return (outputs - signals).square().mean((-2, -1))

    def data(self, outputs: torch.Tensor) -> torch.Tensor:
        """Outputs or signals as data in the units that they are compared in: same shape, values about 0 to 1."""
        return outputs

    def images(self, outputs: torch.Tensor) -> torch.Tensor | None:
        """Outputs or signals `(N, P, C)` as images of shape `(N, C, H, W)` from 0 to 1; None if they are no images."""
        return None

    def features(self, outputs: torch.Tensor) -> torch.Tensor | None:
        """
        What sets of data are compared by, `(N, F)`; None for what classifiers have learned, which are trained on the
        first field of words, or else for principal components.
        """
        return None

    def load_split(self, split: Split) -> Tensors:
        return Tensors(signals=self.signals(split))

    def loss(self, call: Callable, batch: Batch) -> torch.Tensor:
        """Of one network for all data of a batch, which is that of their mean."""
        signals = batch["signals"]
        outputs = self.render(call, self.coordinates().to(signals.device))
        return self.error(outputs.expand_as(signals), signals).mean()

    def fingerprint(self, split: Split) -> str:
        """Follows coordinates, signals and conditions."""
        known = self.fields.table(self.conditions(split))
        return digest(self.fields.to_list(), self.start, self.coordinates(), self.signals(split), known)

    @torch.no_grad()
    def render_all(
        self, networks: NetworkRunner, parameters: torch.Tensor, coordinates: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Outputs of N networks, `(N, D)` to `(N, P, C)`, on the CPU; at the data's own coordinates by default."""
        device = next(networks.model.parameters()).device
        coordinates = (self.coordinates() if coordinates is None else coordinates).to(device)
        parts = networks(lambda call: self.render(call, coordinates), parameters.to(device, torch.float32))
        return torch.cat([outputs.cpu() for _, outputs in parts])
