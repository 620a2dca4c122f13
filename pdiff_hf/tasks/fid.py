"""The Fréchet distance between sets of images (FID), on the features of Inception-v3 or of another classifier."""

import warnings
from collections.abc import Iterable

import timm
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.models.timm_wrapper import TimmWrapperConfig

from ..utils.imports import require_modules
from .task import digest

INCEPTION = "inception"


def load_features(name: str) -> nn.Module:
    """
    The network on whose features images are compared. It takes uint8 images of shape `(B, C, H, W)` of any size, grey
    or in colour, and returns float64 of shape `(B, F)`.

    Args:
        name (`str`): `inception` for Inception-v3 with the weights that FID is defined with, or the local folder or Hub
            id of an image classifier of transformers or timm, whose penultimate features are taken.

    Raises:
        ImportError: if the packages of the extra `fid` are not installed.
        ValueError: if there is no such network, or it cannot be used.
    """
    require_modules("FID", "fid", "torchmetrics", *(["torch_fidelity"] if name == INCEPTION else []))
    return InceptionFeatures() if name == INCEPTION else ClassifierFeatures(name)


def frechet_distance(
    features: nn.Module, real: Iterable[torch.Tensor], groups: Iterable[Iterable[torch.Tensor]]
) -> torch.Tensor:
    """
    The distance of each of some groups of images to real ones, float64 of shape `(len(groups),)`.

    Args:
        features (`nn.Module`): Of `load_features`, on the device of the images.
        real (`Iterable[torch.Tensor]`): Batches of uint8 images `(B, C, H, W)`, two images at least.
        groups (`Iterable[Iterable[torch.Tensor]]`): The batches of each group. Distances of groups can be compared if
            they have the same number of images: with fewer of them the distance is larger.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes seconds, and nothing else needs it

    with warnings.catch_warnings():
        # It warns that it keeps all features; it keeps sums.
        warnings.filterwarnings("ignore", message="Metric `FrechetInceptionDistance`", category=UserWarning)
        metric = FrechetInceptionDistance(feature=features, reset_real_features=False)
    distances = []
    for batch in real:
        metric.to(batch.device).update(batch, real=True)
    for group in groups:
        for batch in group:
            metric.update(batch, real=False)
        distances.append(metric.compute().cpu())
        metric.reset()
    return torch.stack(distances)


class InceptionFeatures(nn.Module):
    """The 2048 features of the Inception-v3 of torchmetrics' `FrechetInceptionDistance`, the usual ones of FID."""

    num_features = 2048
    title = "Inception-v3"
    fingerprint = "inception-v3-compat 2048"

    def __init__(self):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            # Read here first, because torch-fidelity unpickles the file.
            torch.hub.load_state_dict_from_url(
                URL_INCEPTION_V3, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
        except Exception as error:  # of the connection, of the disk, and of a file that is not what it should be
            raise ValueError(
                f"the weights of fid_features=inception are not available from {URL_INCEPTION_V3}; put the file into "
                f"'{torch.hub.get_dir()}/checkpoints', or name a classifier of your own: {error}"
            ) from error
        self.network = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images.expand(-1, 3, -1, -1)).double()


class ClassifierFeatures(nn.Module):
    """
    What the last linear layer of an image classifier gets. Images are scaled to the size that the classifier takes,
    without cropping if it is one of timm.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, name: str):
        super().__init__()
        try:
            config = AutoConfig.from_pretrained(name)
            self.network = AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32).eval()
            is_timm = isinstance(config, TimmWrapperConfig)
            self.processor = None if is_timm else AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"fid_features '{name}' is neither '{INCEPTION}' nor the folder or Hub id of an image classifier of "
                f"transformers or timm, with its image processor: {error}"
            ) from error
        heads = [
            (path, module)
            for path, module in self.network.named_modules()
            if isinstance(module, nn.Linear) and module.out_features == config.num_labels
        ]
        if not heads:
            raise ValueError(
                f"fid_features '{name}' has no linear layer with {config.num_labels} outputs, one for each of its "
                "classes, in front of which features could be taken"
            )
        weights = digest(*self.network.state_dict().values())
        path, head = heads[-1]
        self.network.set_submodule(path, nn.Identity())
        self.num_features = head.in_features
        self.title = config.architecture if is_timm else config.model_type
        self.fingerprint = f"{self.title} {weights}"
        if is_timm:
            data = timm.data.resolve_data_config(pretrained_cfg=config.pretrained_cfg, verbose=False)
            self.channels, *self.size = data["input_size"]
            self.register_buffer("mean", 255 * torch.tensor(data["mean"]).view(-1, 1, 1))  # (C, 1, 1)
            self.register_buffer("std", 255 * torch.tensor(data["std"]).view(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.processor is not None:
            pixels = self.processor(images.expand(-1, 3, -1, -1), return_tensors="pt")["pixel_values"]
            return self.network(pixels.to(images.device)).logits.double()
        pixels = images.float()
        if self.channels == 1:
            pixels = pixels.mean(1, keepdim=True)
        pixels = F.interpolate(pixels, self.size, mode="bilinear", align_corners=False, antialias=True)
        return self.network(pixel_values=(pixels - self.mean) / self.std).logits.double()
