"""What several files of tests look at."""

import pytest
import torch
from support.evaluation import digits, digits_pipeline, digits_snapshots, report_on

from pdiff_hf.evaluation import Group


@pytest.fixture(scope="package")
def whole(tmp_path_factory):
    """The report on a pipeline, with all that a report can have, and its folder."""
    scorer, snapshots, folder = digits(), digits_snapshots(), tmp_path_factory.mktemp("report")
    heldout = torch.arange(12) % 5 == 2
    settings = {"num_models": 5, "baseline_models": 2, "heldout": heldout}
    settings |= {"losses": {"denoiser": [1.0, 0.5]}}
    settings |= {"extra_groups": [Group("vae", snapshots[:2] + 0.1, sweep="VAE")]}
    return report_on(scorer, snapshots, digits_pipeline(scorer, snapshots), folder, **settings), folder
