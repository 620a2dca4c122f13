"""Inception-v3 with weights of chance, because those that FID is defined with are to be downloaded."""

from pathlib import Path

import pytest
import torch


def put_inception(torch_home: Path) -> None:
    """Into the folder of `TORCH_HOME`, under the name that a download would have."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="needs the extra `fid`")

    class Fresh(extractor.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    cached = torch_home / "hub" / "checkpoints" / extractor.URL_INCEPTION_V3.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save({}, cached)
    torch.save(Fresh("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(cached)).state_dict(), cached)
