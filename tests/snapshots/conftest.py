from pathlib import Path

import pytest
from support.trainer import make_trainer

from pdiff_hf.snapshots import SnapshotCallback


@pytest.fixture(scope="session")
def recorded(tmp_path_factory) -> Path:
    """`snapshots`, recorded during a Trainer run, and `out` with its checkpoints."""
    folder = tmp_path_factory.mktemp("recorded")
    callback = SnapshotCallback(folder / "snapshots", select="norm[-2:]")
    make_trainer(folder / "out", callback, eval_strategy="steps", eval_steps=4).train()
    return folder
