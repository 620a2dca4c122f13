"""Snapshots of a run of the Trainer and of a plain loop."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.blobs import Net
from support.trainer import make_trainer, resnet
from torch import nn
from transformers import TrainerCallback

from pdiff_hf.layout import LayoutError
from pdiff_hf.selection import select_layout
from pdiff_hf.snapshots import SnapshotCallback, SnapshotError, SnapshotRecorder, load_snapshots, parameter_matrix


def test_the_callback_records_what_the_trainer_saves(recorded):
    dataset, layout = load_snapshots(recorded / "snapshots")
    assert layout == select_layout(resnet(), "norm[-2:]")
    assert dataset["step"][:] == list(range(1, 13)) and set(dataset["seed"][:]) == {7}
    parameters = parameter_matrix(dataset, layout)
    for step in (4, 8, 12):
        saved = load_file(recorded / "out" / f"checkpoint-{step}" / "model.safetensors")
        assert torch.equal(parameters[step - 1], layout.flatten(saved))
    history = json.loads((recorded / "out" / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    expected = {entry["step"]: entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry}
    assert set(dataset.column_names) == {"parameters", "step", "seed", "eval_loss", "eval_accuracy"}
    found = {row["step"]: row["eval_accuracy"] for row in dataset if row["eval_accuracy"] is not None}
    assert found == pytest.approx(expected) and set(found) == {4, 8, 12}
    assert [path.name for path in recorded.iterdir() if path.name.startswith(".")] == []


def test_every_n_steps_from_a_first_step(tmp_path):
    callback = SnapshotCallback(tmp_path / "snapshots", "head", every_n_steps=3, first_step=5)
    make_trainer(tmp_path / "out", callback, save_strategy="no").train()
    dataset, layout = load_snapshots(tmp_path / "snapshots")
    assert dataset["step"][:] == [6, 9, 12] and layout.names == ("classifier.1.weight", "classifier.1.bias")


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 10:
            raise KeyboardInterrupt


def test_a_run_that_was_interrupted_goes_on_recording(recorded, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "out", SnapshotCallback(tmp_path / "snapshots"), Interrupt()).train()
    assert not (tmp_path / "snapshots").exists()
    trainer = make_trainer(tmp_path / "out", SnapshotCallback(tmp_path / "snapshots"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    dataset, layout = load_snapshots(tmp_path / "snapshots")
    assert dataset["step"][:] == list(range(1, 13))
    uninterrupted = parameter_matrix(*load_snapshots(recorded / "snapshots"))
    torch.testing.assert_close(parameter_matrix(dataset, layout), uninterrupted)


def test_an_interrupted_run_is_not_mixed_with_another(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "out", SnapshotCallback(tmp_path / "snapshots"), Interrupt()).train()
    trainer = make_trainer(tmp_path / "out", SnapshotCallback(tmp_path / "snapshots", "head"))
    with pytest.raises(SnapshotError, match="the interrupted run recorded other tensors"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    make_trainer(tmp_path / "out", SnapshotCallback(tmp_path / "snapshots", "head"), max_steps=3).train()
    assert load_snapshots(tmp_path / "snapshots")[0]["step"][:] == [1, 2, 3]  # a fresh start drops the old recording


# --------------------------------------------------------------------------------------------------------- a plain loop


def train_net(model: nn.Module, steps: range, recorder: SnapshotRecorder, learning_rate: float = 0.1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), learning_rate)
    for step in steps:
        torch.manual_seed(step)
        F.cross_entropy(model(torch.randn(8, 4)), torch.randint(2, (8,))).backward()
        optimizer.step()
        optimizer.zero_grad()
        recorder.snapshot(step, **({"accuracy": step / 10} if step % 2 else {}))


def test_recorder_in_a_plain_loop(tmp_path):
    model = Net()
    with SnapshotRecorder(model, tmp_path / "snapshots", ["norm", "head"], exclude="bias", seed=5) as recorder:
        train_net(model, range(1, 6), recorder)
    dataset, layout = load_snapshots(tmp_path / "snapshots")
    assert layout.names == ("norm.weight", "head.weight") and dataset["seed"][:] == [5] * 5
    assert dataset["accuracy"][:] == [pytest.approx(0.1), None, pytest.approx(0.3), None, pytest.approx(0.5)]
    assert torch.equal(parameter_matrix(dataset, layout)[-1], layout.flatten(model.state_dict()))
    with pytest.raises(SnapshotError, match="exists already"):
        SnapshotRecorder(model, tmp_path / "snapshots")


def test_a_plain_loop_goes_on(tmp_path):
    model = Net()
    with pytest.raises(KeyError), SnapshotRecorder(model, tmp_path / "snapshots", "head") as recorder:
        train_net(model, range(1, 6), recorder)
        raise KeyError
    with SnapshotRecorder(model, tmp_path / "snapshots", "head", resume_step=3) as recorder:
        train_net(model, range(4, 8), recorder)
    assert load_snapshots(tmp_path / "snapshots")[0]["step"][:] == list(range(1, 8))


def test_what_a_recorder_refuses(tmp_path, caplog):
    model = Net()
    recorder = SnapshotRecorder(model, tmp_path / "part", "head")
    train_net(model, range(1, 4), recorder)
    recorder.finish()  # the rest of the network belongs to no snapshot but the last
    assert "tensors that are not selected changed between the first snapshot and the last ('body" in caplog.text
    recorder = SnapshotRecorder(model, tmp_path / "still", "head")
    train_net(model, range(1, 4), recorder, learning_rate=0.0)
    with pytest.raises(SnapshotError, match="only 1 snapshots.*a step that changed"):
        recorder.finish()
    assert "step 2 changed none of the recorded tensors" in caplog.text
    with pytest.raises(SnapshotError, match="cannot be named seed"):
        recorder.add_metrics(1, {"seed": 3})
    with torch.no_grad():
        model.head.bias[1] = torch.nan
    with pytest.raises(SnapshotError, match="step 4.*'head.bias' holds nan"):
        recorder.snapshot(4)
    model.requires_grad_(False)
    with pytest.raises(SnapshotError, match="none of the selected tensors is trained.*'head.weight'"):
        SnapshotRecorder(model, tmp_path / "frozen", "head")
    with pytest.raises(LayoutError, match="'haed.\\*' selects no parameter of Net"):
        SnapshotRecorder(model, tmp_path / "nothing", "haed.*")


TWO_PROCESSES = """
import sys
sys.path.insert(0, sys.argv[1])
from support.trainer import make_trainer
from pdiff_hf.snapshots import SnapshotCallback
callback = SnapshotCallback(sys.argv[2] + "/snapshots")
make_trainer(sys.argv[2] + "/out", callback, max_steps=2, save_strategy="no").train()
"""


@pytest.mark.slow
def test_two_processes_record_once(tmp_path):
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*command, tmp_path / "run.py", Path(__file__).parents[1], tmp_path], check=True)
    assert load_snapshots(tmp_path / "snapshots")[0]["step"][:] == [1, 2]
