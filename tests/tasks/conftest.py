"""Canvases of digits, for detection and segmentation."""

import pytest
from reproduce.canvases import write_canvases


@pytest.fixture(scope="session")
def canvases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canvases") / "digits"
    write_canvases("digits", folder, size=32, max_train_samples=16, max_eval_samples=6)
    return str(folder)
