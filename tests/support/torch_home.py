"""Weights of chance in the folder of `TORCH_HOME`, under the names that downloads would have."""

from pathlib import Path

import pytest
import torch
import torchvision


def put_weights(torch_home: Path, model: str) -> Path:
    """Those of a network of torchvision, `BUILDER:WEIGHTS`; returns their file."""
    builder, _, weights = model.partition(":")
    entry = torchvision.models.get_model_weights(builder)[weights]
    settings = {"weights": None, "weights_backbone": None, "num_classes": len(entry.meta["categories"])}
    if builder.startswith("fcn"):
        settings["aux_loss"] = True
    cached = torch_home / "hub" / "checkpoints" / entry.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(torchvision.models.get_model(builder, **settings).state_dict(), cached)
    return cached


def put_inception(torch_home: Path) -> None:
    """The Inception-v3 that FID is defined with."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="needs the extra `fid`")

    class Fresh(extractor.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    cached = torch_home / "hub" / "checkpoints" / extractor.URL_INCEPTION_V3.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save({}, cached)
    torch.save(Fresh("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(cached)).state_dict(), cached)
