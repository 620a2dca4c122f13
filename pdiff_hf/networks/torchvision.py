"""Networks of torchvision by name, as `builder` with fresh weights or `builder:WEIGHTS`."""

import difflib
import inspect
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torchvision.models import WeightsEnum, get_model_builder, get_model_weights, list_models
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, RetinaNet_ResNet50_FPN_Weights
from torchvision.models.detection.transform import GeneralizedRCNNTransform

# They need masks and key points beside boxes.
NOT_SUPPORTED = ("maskrcnn", "keypointrcnn")
# What a task decides, or the name of the model, and not `model_args`.
TAKEN = {"self", "weights", "progress", "num_classes", "kwargs"}
# These were trained with batch norms that have no ε, which torchvision sets to 0; batch norms that train need one.
WITHOUT_EPSILON = (FasterRCNN_ResNet50_FPN_Weights.COCO_V1, RetinaNet_ResNet50_FPN_Weights.COCO_V1)
EPSILON = 1e-12


@dataclass(frozen=True)
class Architecture:
    """
    A network of torchvision that can be built for any number of classes. Its batch norms are ordinary ones, with
    parameters and statistics that training changes, whether its weights are fresh or pretrained.

    Args:
        name (`str`): Of a builder of torchvision.
        weights (`WeightsEnum`, *optional*): Pretrained weights.
        model_args (`dict`): More arguments of the builder.
    """

    name: str
    weights: WeightsEnum | None
    model_args: dict[str, Any]

    @classmethod
    def find(cls, model: str, family: ModuleType, model_args: dict[str, Any]) -> "Architecture":
        """
        Args:
            model (`str`): `builder`, or `builder:WEIGHTS`.
            family (`ModuleType`): `torchvision.models.detection` or `torchvision.models.segmentation`.
            model_args (`dict`): More arguments of the builder.

        Raises:
            ValueError: for a builder, weights or an argument that torchvision does not have.
        """
        name, _, weights = model.partition(":")
        family_name = family.__name__.rpartition(".")[2]
        names = [known for known in list_models(module=family) if not known.startswith(NOT_SUPPORTED)]
        if name not in names:
            close = difflib.get_close_matches(name, names, n=3)
            raise ValueError(
                f"model '{model}' is not one of torchvision's for {family_name}; "
                f"{'did you mean ' + ' or '.join(close) if close else 'it has ' + ', '.join(names)}?"
            )
        members = get_model_weights(name).__members__
        if weights and weights not in members:
            raise ValueError(f"torchvision has no weights '{weights}' of {name}; it has {', '.join(members)}")
        architecture = cls(name, members[weights] if weights else None, model_args)
        unknown = set(model_args) - architecture.known_args
        if unknown:  # torchvision would not mind
            raise ValueError(
                f"{name} does not take the model_args {', '.join(sorted(unknown))}; it takes "
                f"{', '.join(sorted(architecture.known_args))}"
            )
        try:
            with torch.device("meta"):
                architecture.build(2)
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{name} cannot be built with the model_args {model_args}: {error!r}") from error
        return architecture

    @cached_property
    def known_args(self) -> set[str]:
        """The names of all arguments that the builder hands on to something."""
        builder = get_model_builder(self.name)
        functions = [builder]
        with torch.device("meta"):
            network = builder(weights=None, weights_backbone=None, num_classes=2)
        if hasattr(network, "transform"):  # a detector, to which the builder hands on what it does not know
            functions += [type(network).__init__, GeneralizedRCNNTransform.__init__]
        return {name for function in functions for name in inspect.signature(function).parameters} - TAKEN

    @property
    def categories(self) -> list[str]:
        """The names of the classes of the pretrained weights, the background first; none for fresh weights."""
        return [] if self.weights is None else list(self.weights.meta["categories"])

    def build(self, num_classes: int) -> nn.Module:
        """The network with fresh weights, which depend on torch's global seed."""
        args = {"weights_backbone": None} | self.model_args
        network = get_model_builder(self.name)(weights=None, num_classes=num_classes, **args)
        if self.weights in WITHOUT_EPSILON:
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eps = EPSILON
        return network

    def load(self, num_classes: int) -> tuple[nn.Module, str]:
        """
        A network of `build` with the pretrained weights, if there are any. Tensors of another shape, as the last layers
        have them for another number of classes, are fresh.

        Returns:
            `tuple`: The network, and which of a pretrained one's tensors are fresh and why, or nothing.

        Raises:
            ValueError: if the weights cannot be downloaded, or belong to a network with other layers.
        """
        network = self.build(num_classes)
        if self.weights is None:
            return network, ""
        try:
            pretrained = self.weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except OSError as error:
            raise ValueError(f"the weights {self.weights} cannot be downloaded: {error}") from error
        state_dict = network.state_dict()
        other = {name for name, tensor in pretrained.items() if tensor.shape != state_dict.get(name, tensor).shape}
        kept = {name: tensor for name, tensor in pretrained.items() if name not in other}
        missing, unexpected = network.load_state_dict(kept, strict=False)
        missing = set(missing) - other
        if missing or unexpected:
            raise ValueError(
                f"the weights {self.weights} do not fit {self.name} with the model_args {self.model_args}: "
                f"{len(missing)} tensors are missing and {len(unexpected)} have no place, such as "
                f"{', '.join([*sorted(missing), *unexpected][:3])}"
            )
        if not other:
            return network, ""
        return network, (
            f"{', '.join(sorted(other))} of {self.weights} must be drawn anew: the data have {num_classes} classes, "
            f"the background among them, and these are not the {len(self.categories)} of the weights"
        )
