"""`PDiffTrainer`: from Python alone, on tensors in memory and without a folder of its own."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from support.families import make_family
from torch import nn
from transformers import TrainerCallback

from pdiff_hf import ModuleTask, PDiffConfig, PDiffPipeline, PDiffTrainer, load_snapshots
from pdiff_hf.run.folder import RunError

SETTINGS = {
    "select": ["all"],
    "base_epochs": 10,
    "num_snapshots": 20,
    "collect_learning_rate": 0.01,
    "autoencoder_preset": "pca",
    "latent_dim": 6,
    "denoiser_steps": 60,
    "num_models": 4,
    "baseline_models": 2,
}


def make_task() -> ModuleTask:
    torch.manual_seed(0)
    inputs = torch.randn(400, 4)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    return ModuleTask(net, (inputs, (inputs.sum(1) > 0).long()))


@pytest.fixture(scope="module")
def trained() -> PDiffTrainer:
    trainer = PDiffTrainer(make_task(), args=PDiffConfig(**SETTINGS))
    trainer.train()
    return trainer


def test_ten_lines_train_sample_and_evaluate_a_generator_of_a_module(trained):
    assert isinstance(trained.pipeline, PDiffPipeline)
    networks = trained.pipeline(8, generator=torch.Generator().manual_seed(0), output_type="model").parameters
    test = trained.task.load_split("test")
    scores = [(network(test.inputs).argmax(1) == test.labels).float().mean() for network in networks]
    assert len(test) == 80 and sum(scores) / 8 > 0.8
    report = trained.evaluate()
    assert report.generated.n == 4 and len(report.verdict) == 3
    folder = trained.context.folder
    assert folder.is_dir()
    again = PDiffTrainer(make_task(), args=PDiffConfig(**SETTINGS, output_dir=str(folder)))
    assert all(map(again.context.is_finished, ("base", "collect", "denoiser", "evaluate")))


@pytest.mark.parametrize("kind", ["tensor", "state dicts", "data set", "folder"])
def test_snapshots_of_every_kind(trained, kind, tmp_path):
    folder = trained.context.folder / "snapshots"
    dataset, layout = load_snapshots(folder)
    rows = trained.context.parameters
    args = PDiffConfig(**SETTINGS | {"output_dir": str(tmp_path)})
    arguments = {}
    if kind == "tensor":
        snapshots = rows
    elif kind == "state dicts":
        snapshots = [layout.unflatten(row) for row in rows]
    elif kind == "data set":
        snapshots, arguments = dataset, {"layout": layout}
    else:
        snapshots, args = folder, args.changed(select=PDiffConfig().select)
    args = args.changed(num_snapshots=PDiffConfig().num_snapshots, collect_learning_rate=0.03)
    trainer = PDiffTrainer(make_task(), snapshots, args, **arguments)
    assert torch.equal(trainer.context.parameters, rows) and trainer.context.layout == layout
    if kind == "tensor":
        pipe = trainer.train()
        assert pipe(2, output_type="pt").parameters.shape == (2, layout.num_parameters)
        with pytest.raises(RunError, match="snapshots: '.*' there, '.*' asked for"):
            PDiffTrainer(make_task(), rows + 1, args)


def test_snapshots_with_conditions_of_a_family():
    family = make_family(ranges={"blur": None, "invert": None, "occlude": None})
    rows = torch.randn(12, sum(p.numel() for p in family.load_base_model().parameters())) / 10
    conditions = [{"angle": 30.0 * i} for i in range(12)]
    tasks = {"num_tasks": 2, "num_validation_tasks": 1, "num_test_tasks": 2, "tune_steps": 0}
    few = {name: SETTINGS[name] for name in ("select", "autoencoder_preset")} | {"base_epochs": 1, "denoiser_steps": 5}
    trainer = PDiffTrainer(family, rows, PDiffConfig(**tasks, **few, latent_dim=4), conditions=conditions)
    assert trainer.context.fields == family.fields
    assert trainer.context.snapshot_conditions.tolist() == [[30.0 * i] for i in range(12)]
    pipe = trainer.train()
    assert pipe(2, condition={"angle": 45.0}, output_type="pt").parameters.shape == (2, rows.shape[1])


@pytest.mark.parametrize(
    ("snapshots", "arguments", "message"),
    [
        (torch.zeros(5, 7), {}, r"snapshots must have shape \(K, 58\), as is selected, got \(5, 7\)"),
        (torch.randn(5, 58), {"conditions": [{}]}, "there are 5 snapshots and 1 conditions"),
        (None, {"conditions": [{}]}, "layout and conditions are those of snapshots in memory"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(snapshots, arguments, message, tmp_path):
    args = PDiffConfig(select=["all"], latent_dim=2, output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=message):
        PDiffTrainer(make_task(), snapshots, args, **arguments)
    assert not Path(tmp_path, "out").exists()


def test_settings_without_effect_are_refused():
    with pytest.raises(ValueError, match="tune_learning_rate=0.1 has no effect: tune_steps is 0"):
        PDiffTrainer(make_task(), args=PDiffConfig(**SETTINGS, tune_learning_rate=0.1))
    with pytest.raises(ValueError, match="model=resnet50 has no effect: the task is given"):
        PDiffTrainer(make_task(), args=PDiffConfig(**SETTINGS, model="resnet50"))


def test_data_of_a_module_that_do_not_belong_together():
    inputs, labels = torch.randn(10, 4), torch.zeros(10, dtype=torch.long)
    for data, message in (
        ((inputs, labels[:9]), "train: there are 10 inputs and 9 labels"),
        ((inputs, labels.float()), r"train: labels must be whole numbers of shape \(M,\), got torch.float32"),
        ((inputs[:3], labels[:3]), "3 training examples leave none for validation and test"),
    ):
        with pytest.raises(ValueError, match=message):
            ModuleTask(nn.Linear(4, 2), data)
    task = ModuleTask(nn.Linear(4, 2), (inputs, labels))
    assert {split: len(task.load_split(split)) for split in ("train", "validation", "test")} == {
        "train": 6,
        "validation": 2,
        "test": 2,
    }
    rows = torch.cat([task.load_split(split).inputs for split in ("train", "validation", "test")])
    assert torch.equal(rows.sort(0).values, inputs.sort(0).values)
    other = ModuleTask(nn.Linear(4, 2), (inputs, labels))
    assert task.fingerprint("test") == other.fingerprint("test") and task.fingerprint("train") != other.fingerprint(
        "train"
    )


class Counting(TrainerCallback):
    """Counts events of each stage, and ends the autoencoder's training early."""

    def __init__(self):
        self.events = Counter()

    def on_train_begin(self, args, state, control, stage, **kwargs):
        self.events[stage, "begin"] += 1

    def on_step_end(self, args, state, control, stage, **kwargs):
        self.events[stage, "step"] += 1
        control.should_training_stop = stage == "autoencoder" and state.global_step == 3

    def on_log(self, args, state, control, stage, logs, **kwargs):
        assert logs["loss"] > 0 and state.log_history[-1]["step"] == state.global_step <= state.max_steps
        self.events[stage, "log"] += 1

    def on_save(self, args, state, control, stage, checkpoint, **kwargs):
        assert checkpoint.is_dir()
        self.events[stage, "save"] += 1

    def on_train_end(self, args, state, control, stage, **kwargs):
        self.events[stage, "end"] += 1


def test_callbacks_of_transformers_are_told_and_may_stop_a_training():
    counting = Counting()
    settings = SETTINGS | {"autoencoder_preset": "tokens", "autoencoder_batch_size": 5, "checkpointing_steps": 25}
    PDiffTrainer(make_task(), args=PDiffConfig(**settings), callbacks=[counting]).train()
    assert counting.events["autoencoder", "step"] == 3 and counting.events["autoencoder", "save"] == 0
    assert counting.events["denoiser", "step"] == 60 and counting.events["denoiser", "save"] == 2
    for stage in ("base", "autoencoder", "denoiser"):
        assert counting.events[stage, "begin"] == counting.events[stage, "end"] == 1 <= counting.events[stage, "log"]
