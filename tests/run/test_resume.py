"""A run of a family that was stopped in any of its trainings and goes on: every file is as if nothing had happened."""

import pytest
from support.families import make_family
from support.run_server import files
from transformers import TrainerCallback

from pdiff_hf import PDiffConfig, PDiffTrainer

STAGES = ("base", "collect", "autoencoder", "denoiser", "tune")
SETTINGS = {
    "select": ["all"],
    "base_epochs": 2,
    "base_batch_size": 32,
    "collect_steps": 9,
    "collect_every": 2,
    "num_snapshots": 16,
    "num_tasks": 8,
    "num_validation_tasks": 2,
    "num_test_tasks": 2,
    "autoencoder_preset": "tokens",
    "autoencoder_steps": 9,
    "autoencoder_batch_size": 8,
    "latent_dim": 6,
    "denoiser_steps": 9,
    "denoiser_batch_size": 8,
    "denoiser_preset": "mlp",
    "tune_steps": 9,
    "tune_models": 4,
    "tune_batch_size": 8,
    "checkpointing_steps": 2,
}


class Stopped(Exception):
    pass


class Stop(TrainerCallback):
    """Ends a training in the middle, as a kill would: between two checkpoints."""

    def __init__(self, stage: str):
        self.stage = stage

    def on_step_end(self, args, state, control, stage, **kwargs):
        if stage == self.stage and state.global_step == 5:
            raise Stopped


def make_trainer(folder, *callbacks: TrainerCallback) -> PDiffTrainer:
    args = PDiffConfig(**SETTINGS, output_dir=str(folder))
    return PDiffTrainer(
        make_family(ranges={"blur": None, "invert": None, "occlude": None}), args=args, callbacks=callbacks
    )


def test_stopped_in_every_stage_it_ends_with_the_same_files(tmp_path):
    make_trainer(tmp_path / "whole").train()
    for stage in STAGES:
        with pytest.raises(Stopped):
            make_trainer(tmp_path / "parts", Stop(stage)).train(resume_from_checkpoint=True)
        assert (tmp_path / "parts" / "checkpoints" / stage / "checkpoint-4").is_dir()
    make_trainer(tmp_path / "parts").train(resume_from_checkpoint=True)
    expected = files(tmp_path / "whole")
    assert set(expected) >= {f"stages/{stage}.json" for stage in STAGES}
    assert files(tmp_path / "parts") == expected
