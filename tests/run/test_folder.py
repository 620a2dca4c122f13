"""A run's folder, and stages as one table."""

import pytest

from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.context import stage_settings, stages_before
from pdiff_hf.run.folder import RunError, RunFolder, Stage
from pdiff_hf.run.stages import STAGES
from pdiff_hf.utils.files import write_json
from pdiff_hf.utils.seeds import derive_seed, named_seed


def test_checkpoints_are_gone_on_with_only_if_they_have_the_same_settings(tmp_path):
    folder, stage = RunFolder(tmp_path / "run"), STAGES["denoiser"]
    folder.open_checkpoints(stage, {"a": 1}, resume=True)
    write_json(folder.checkpoints(stage) / "checkpoint-3" / "state.json", {})
    folder.open_checkpoints(stage, {"a": 1}, resume=True)
    assert (folder.checkpoints(stage) / "checkpoint-3").is_dir() and folder.checkpoint_settings(stage) == {"a": 1}
    folder.open_checkpoints(stage, {"a": 2}, resume=True)
    assert not (folder.checkpoints(stage) / "checkpoint-3").exists()
    folder.finish(stage, {"a": 2}, {})
    assert not folder.checkpoints(stage).exists() and folder.checkpoint_settings(stage) is None


def test_one_run_at_a_time(tmp_path):
    with (
        RunFolder(tmp_path / "run").lock(),
        pytest.raises(RunError, match="another run is at work in"),
        RunFolder(tmp_path / "run").lock(),
    ):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="output_dir '.*file' is a file"):
        RunFolder(tmp_path / "file")


def test_a_stage_depends_on_its_own_settings_and_on_those_of_the_stages_before_it():
    assert stages_before("evaluate", STAGES) == ["base", "collect", "autoencoder", "denoiser", "tune"]
    assert stages_before("autoencoder", STAGES) == ["base", "collect"] and stages_before("base", STAGES) == []
    of = {name: set(stage_settings(PDiffConfig(), name, STAGES)) for name in STAGES}
    assert of["base"] < of["collect"] < of["autoencoder"] < of["denoiser"] < of["evaluate"]
    # How a run is executed is no part of what comes out.
    assert not {"output_dir", "stages", "report_to", "checkpointing_steps"} & of["evaluate"]


def test_a_new_stage_is_one_entry_and_changes_no_other():
    """Neither settings nor seeds of other stages follow from where a stage stands in the table."""
    before = {name: stage_settings(PDiffConfig(), name, STAGES) for name in STAGES}
    new = Stage("new", "new", ("base",), (), "something else", lambda context, stage: None)
    stages = {"new": new} | dict(reversed(STAGES.items()))
    assert {name: stage_settings(PDiffConfig(), name, stages) for name in before} == before
    assert named_seed(7, "base") == derive_seed(7, *b"base") != named_seed(7, "collect") != named_seed(8, "collect")
