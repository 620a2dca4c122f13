"""Runs from beginning to end, in this process."""

import pytest
import torch

from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.context import RunContext
from pdiff_hf.run.trainer import execute, prepare
from pdiff_hf.scripts.opponents import wanted_opponents

DRAW = "pdiff_hf.evaluation.plots.draw_figures"


def finish(config: PDiffConfig, figures: bool = False, **options) -> RunContext:
    """The run of a config, finished as `scripts/train.py` does it; figures take longer than everything else."""
    run = prepare(config, **{"extra_groups": wanted_opponents(config)} | options)
    with pytest.MonkeyPatch.context() as patch:
        if not figures:
            patch.setattr(DRAW, lambda *args, **kwargs: None)
        execute(run)
    return run


def whole_job(folder, **settings) -> tuple[RunContext, torch.Tensor]:
    """
    A run as far as the denoiser, all of it read from its folder, and the parameters of its 6 snapshots and of 2
    generated networks.
    """
    few = {"base_epochs": 1, "num_snapshots": 6, "autoencoder_steps": 3, "denoiser_steps": 3, "latent_dim": 4}
    stages = {"stages": ["base", "collect", "autoencoder", "denoiser"], "max_eval_samples": 4, "image_size": 32}
    config = PDiffConfig(**stages | few | settings, num_models=2, output_dir=str(folder))
    execute(prepare(config))
    run = prepare(config)
    generated = run.pipeline(num_models=2, num_inference_steps=2, output_type="pt").parameters
    assert run.parameters.shape == (6, run.layout.num_parameters) and len(run.parameters.unique(dim=0)) == 6
    return run, torch.cat([run.parameters, generated.cpu().float()])


def finish_in(folder, settings: dict, **changes) -> RunContext:
    """The run of some settings in a folder, with its figures."""
    return finish(PDiffConfig(**settings | changes, output_dir=str(folder)), figures=True)
