"""A run whose networks are data: collected side by side, learned, and judged by the sets that they make."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from support.recipes import TINY_DATA
from support.scripts import run_script
from support.waves import Waves
from torch import nn

from pdiff_hf import (
    Fields,
    ModuleTask,
    NeuralField,
    NeuralFieldTask,
    PDiffConfig,
    PDiffPipeline,
    PDiffTrainer,
    evaluate,
    load_snapshots,
    select_layout,
)
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.run.folder import RunError
from pdiff_hf.run.learning import clustered
from pdiff_hf.run.trainer import execute, prepare
from pdiff_hf.scripts.opponents import opponents
from pdiff_hf.snapshots import align_snapshots, of_data, parameter_matrix
from pdiff_hf.snapshots.files import _natural_order
from pdiff_hf.snapshots.of_data import check_starts, fit_networks
from pdiff_hf.training import Loop, LoopArguments

SNIPPETS = Path(__file__).parents[2] / "docs" / "snippets"


@pytest.fixture
def context(data_run):
    return data_run


def test_each_datum_has_a_network_and_held_out_ones_are_never_seen(context):
    dataset, layout = load_snapshots(context.folder / "snapshots")
    assert len(dataset) == 160 and context.num_snapshots == 140
    assert dataset["heldout"][:] == [0.0] * 140 + [1.0] * 20
    assert context.seen.tolist() == list(range(140))
    assert context.describe(context.stages["collect"]) == "140 snapshots"
    errors = torch.tensor(dataset["error"][:])
    task = context.task
    alone = task.error(task.render(context.base_model, task.coordinates()), task.signals("train"))
    assert errors[:140].mean() < 0.9 * alone.mean()
    assert dataset["label"][:140] == [condition["label"] for condition in task.conditions("train")]


def test_a_stopped_collection_goes_on_and_ends_with_the_same_bits(context, monkeypatch, tmp_path):
    def stop():
        raise KeyboardInterrupt

    config = context.config.changed(output_dir=str(tmp_path / "run"), stages=["base", "collect"])
    with monkeypatch.context() as patch:
        patch.setattr(of_data, "MOST_AT_ONCE", 64)
        patch.setattr(
            of_data, "save_file", lambda *args: stop() if args[1].name.startswith(".block-1") else save_file(*args)
        )
        with pytest.raises(KeyboardInterrupt):
            execute(prepare(config))
    monkeypatch.setattr(of_data, "MOST_AT_ONCE", 64)
    again = prepare(config.changed(resume_from_checkpoint="latest"))
    kept = again.files.checkpoints(again.stages["collect"]) / "block-0.safetensors"
    loaded: list = []
    monkeypatch.setattr(of_data, "load_file", lambda path: loaded.append(path) or load_file(path))
    execute(again)
    assert loaded == [kept]
    whole = prepare(config.changed(output_dir=str(tmp_path / "whole")))
    execute(whole)
    both = [parameter_matrix(*load_snapshots(c.folder / "snapshots")) for c in (whole, again)]
    assert torch.equal(*both)


def test_the_report_is_on_sets(context):
    report = json.loads((context.folder / "evaluation" / "report.json").read_text())
    groups = {group["name"]: group for group in report["groups"]}
    assert {"generated", "guidance 1.5", "denoiser on the data"} <= groups.keys()
    assert {"Gaussian, weights", "KDE 0.3, latents", "interpolation of neighbours, data"} <= groups.keys()
    assert groups["training data"]["measures"]["nearness"] == 0
    assert groups["training data"]["measures"]["score_mean"] < groups["mean, data"]["measures"]["score_mean"]
    assert groups["held-out networks"]["measures"]["decibels"] > 0
    assert groups["mean, weights"]["comparisons"]["test"]["verdict"] in ("better", "too close to call")
    assert all(len(line.split()) <= 40 for line in report["verdict"])
    for name in ("contact_sheet.png", "report.md", "report.html", "losses.png", "frontier.png"):
        assert (context.folder / "evaluation" / name).is_file()
    assert "nearness" in (context.folder / "evaluation" / "report.md").read_text()


def test_the_generator_is_complete_and_renders_a_class(context):
    pipe = PDiffPipeline.from_pretrained(context.folder)
    networks = pipe(2, condition={"label": "3"}, guidance_scale=1.5, output_type="model").parameters
    assert networks[0](context.task.coordinates(20)).shape == (400, 1)


def test_clusters_are_of_latents_that_are_near_each_other():
    apart = torch.tensor([0.0, 9.0, 0.1, 9.1, 0.2]).unsqueeze(1)
    first, second = (clustered(apart, 2, 0) for _ in range(2))
    assert torch.equal(first, second) and len(set(first[[0, 2, 4]].tolist())) == len(set(first[[1, 3]].tolist())) == 1
    with pytest.raises(ValueError, match="clusters=3 has no effect: it is for networks that are data, and have no"):
        prepare(PDiffConfig(**TINY_DATA | {"denoiser_args": {"clusters": 3}}))


def test_settings_of_snapshots_of_one_run_are_refused():
    for name, value in {
        "num_snapshots": 50,
        "collect_every": 2,
        "baseline_models": 5,
    }.items():
        with pytest.raises(ValueError, match=f"{name}={value} has no effect: .*there is one network for each datum"):
            PDiffConfig(**TINY_DATA, **{name: value}).check()
    with pytest.raises(ValueError, match="heldout_snapshots=0.2 has no effect"):
        PDiffConfig(**TINY_DATA | {"heldout_snapshots": 0.2}).check()


def test_latents_longer_than_the_components_are_refused_before_any_work(tmp_path):
    with pytest.raises(RunError, match="latent_dim is 25, more than the 19 components .* of 20 snapshots"):
        prepare(PDiffConfig(**TINY_DATA | {"max_train_samples": 20, "latent_dim": 25}, output_dir=str(tmp_path)))


@pytest.mark.parametrize("start", ["first", "meta"])
def test_other_starts(start, tmp_path):
    settings = TINY_DATA | {"task_args": {"start": start}, "stages": ["base", "collect"], "select": ["*bias"]}
    settings |= {"base_batch_size": 4, "base_epochs": 6, "max_train_samples": 60}
    context = prepare(PDiffConfig(**settings, output_dir=str(tmp_path / "run")))
    execute(context)
    results = json.loads((context.folder / "stages" / "collect.json").read_text())["results"]
    assert context.layout.num_parameters == 9 and all(error < 1 for error in results["errors"])


class Unnamed(Waves):
    """Nothing is known of data."""

    fields = Fields({})

    def signals(self, split):
        pitch = torch.linspace(1, 3, 100 if split == "train" else 12)
        return (pitch[:, None, None] * self.coordinates()).sin()

    def conditions(self, split):
        return [{}] * len(self.signals(split))


def test_a_task_of_your_own_without_words_or_images(without_figures):
    settings = {name: TINY_DATA[name] for name in TINY_DATA if name.startswith(("auto", "denoiser", "collect", "num_"))}
    settings |= {"base_epochs": 20, "base_batch_size": 10, "select": ["all"], "baselines": "few"}
    trainer = PDiffTrainer(Unnamed(), args=PDiffConfig(**settings | {"latent_dim": 4}))
    trainer.train()
    report = trainer.evaluate()
    assert "class_accuracy" not in report.generated.measures and report.generated.n == 40
    assert {"generated", "guidance 1.5"} <= {row.name for row in report.groups}  # by clusters
    assert "denoiser on the data" not in [row.name for row in report.groups]
    encoder = PDiffPipeline.from_pretrained(trainer.context.folder).condition_encoder
    assert encoder.fields["cluster"].choices == ("0", "1")  # 50 in each
    assert len(encoder.seen) == 100 and set(encoder.seen.flatten().tolist()) == {0.0, 1.0}  # as often as they come


class Repeated(Waves):
    """Some data come twice."""

    def conditions(self, split):
        found = super().conditions(split)
        return found + found[3:6] if split == "train" else found


def test_equal_data_have_one_network_and_keep_their_conditions(without_figures):
    settings = {name: TINY_DATA[name] for name in TINY_DATA if name.startswith(("auto", "denoiser", "collect", "num_"))}
    settings |= {"base_epochs": 2, "base_batch_size": 10, "select": ["all"], "denoiser_args": {}, "latent_dim": 4}
    trainer = PDiffTrainer(Repeated(), args=PDiffConfig(**settings), extra_groups=opponents)
    trainer.train()
    report = trainer.evaluate()
    assert len(trainer.context.seen) == 30 and report.splits["train"] == 33
    assert "denoiser on the data" in [row.name for row in report.groups]


def test_too_few_data_for_a_report_are_refused_before_any_work(tmp_path):
    with pytest.raises(RunError, match="needs more than 5 training data, as many held-out ones.*there are 4;"):
        prepare(PDiffConfig(**TINY_DATA | {"max_eval_samples": 4}, output_dir=str(tmp_path)))


def test_coordinates_that_cannot_be_cut_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    settings = TINY_DATA | {f"{name}_batch_size": 30 for name in ("base", "autoencoder", "denoiser")}
    with pytest.raises(RunError, match="with 64 coordinates collect_batch_size=64 cannot be cut into 3 equal parts"):
        prepare(PDiffConfig(**settings, output_dir=str(tmp_path)))


def test_networks_with_conditions_that_data_do_not_have_are_refused(context, tmp_path):
    settings = {
        "snapshots": str(context.folder / "snapshots"),
        "output_dir": str(tmp_path / "run"),
        "select": ["norm[-2:]"],
    }
    settings |= {"task_args": {"condition_columns": []}, "collect_args": {}}
    kept = {key: value for key, value in TINY_DATA.items() if not key.startswith("collect")}
    with pytest.raises(RunError, match="conditions with the fields 'label' .*, and the data none: give both"):
        prepare(PDiffConfig(**kept | settings))


def test_networks_of_several_starts_are_a_warning_and_may_be_aligned(caplog):
    task = NeuralFieldTask(model_args={"width": 8, "num_layers": 1}, max_train_samples=40, max_eval_samples=10)
    args, rows = LoopArguments(100, 64, 0.01, optimizer="adam"), []
    for seed in range(4):
        torch.manual_seed(seed)
        networks = NetworkRunner(task.load_base_model(), select_layout(task.load_base_model(), ["all"]))
        signals = task.signals("train")[10 * seed : 10 * seed + 10]
        rows.append(fit_networks(Loop(Accelerator(cpu=True), 0), task, networks, signals, args))
    assert check_starts(task, networks, rows[0]) < 1 and not caplog.records
    several = check_starts(task, networks, torch.cat(rows))
    assert several > 1 and "trained from different starts?" in caplog.text
    aligned = align_snapshots(task, networks.model, networks.layout, torch.cat(rows))
    torch.testing.assert_close(task.render_all(networks, aligned), task.render_all(networks, torch.cat(rows)))
    assert check_starts(task, networks, aligned) < several


def test_snapshots_of_some_tensors_keep_the_network_around_them():
    torch.manual_seed(0)
    x = torch.randn(60, 4)
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    task = ModuleTask(net, (x, (x.sum(1) > 0).long()))
    with pytest.raises(RunError, match=r"not '0.weight'.*, and base_epochs=3 would train another network around them"):
        PDiffTrainer(task, torch.randn(20, 16), args=PDiffConfig(base_epochs=3, latent_dim=2))
    PDiffTrainer(task, torch.randn(20, 16), args=PDiffConfig(base_epochs=0, latent_dim=2))


def test_evaluate_takes_pipelines_and_networks_that_are_data(context, tmp_path, monkeypatch):
    settings = {"snapshots": context.parameters, "heldout": context.heldout, "num_models": 20}
    pipe = PDiffPipeline.from_pretrained(context.folder)
    report = evaluate(pipe, context.task, conditions=context.snapshot_conditions, **settings)
    assert report.generated.n == 20 and "class_accuracy" in report.generated.measures
    networks = {"base_model": context.base_model, "layout": context.layout}
    report = evaluate(context.parameters[:30], context.task, folder=tmp_path / "report", **settings, **networks)
    assert report.generated.n == 30 and (tmp_path / "report" / "contact_sheet.png").is_file()


def test_scripts_take_generators_of_data(without_figures, context, tmp_path, monkeypatch):
    folder, out = str(context.folder), str(tmp_path / "networks")
    run_script(monkeypatch, "generate.py", folder, "--num_models=2", f"--output_dir={out}", '--condition={"label": 3}')
    assert NeuralField.from_pretrained(tmp_path / "networks" / "network-00001")(torch.zeros(5, 2)).shape == (5, 1)
    task = ["--task=neural_field", "--model=siren", "--model_args", "width=8", "num_layers=1", "--dataset=all_digits"]
    task += [
        *("--max_train_samples=140", "--max_eval_samples=20", "--num_models=20"),
        f"--output_dir={tmp_path / 'report'}",
    ]
    run_script(monkeypatch, "evaluate.py", folder, f"--snapshots={context.folder / 'snapshots'}", *task)
    assert "Fréchet" in (tmp_path / "report" / "report.md").read_text()


def test_a_public_zoo_of_neural_fields(without_figures, context, tmp_path, monkeypatch, caplog):
    """Class and number in the path, other names of tensors, several formats, other values and positions."""
    dataset, layout = load_snapshots(context.folder / "snapshots")
    zoo, rows = tmp_path / "zoo", parameter_matrix(dataset, layout)[:140]
    for i, (row, label) in enumerate(zip(rows, dataset["label"], strict=False)):
        folder = zoo / f"mnist_png_training_{label}_{i}" / "checkpoints"
        folder.mkdir(parents=True)
        tensors = {name.replace("layers", "seq"): t.clone() for name, t in layout.unflatten(row).items()}
        if i % 2:
            torch.save(tensors, folder / "model_final.pth")
        else:
            np.savez(folder / "model_final.npz", **{name: t.numpy() for name, t in tensors.items()})
    recipe = tmp_path / "recipe.json"
    kept = {name: value for name, value in TINY_DATA.items() if not name.startswith(("collect", "base"))}
    recipe.write_text(json.dumps(kept | {"task": f"{SNIPPETS / 'inrs.py'}:Inrs", "base_epochs": 0}))
    flags = [str(recipe), f"--output_dir={tmp_path / 'run'}"]
    run_script(monkeypatch, "collect.py", *flags, f"--import={zoo}", "--path_fields", "training_(?P<label>[0-9])_")
    assert "140 networks" in caplog.text and "in the order of their layers" in caplog.text
    imported, _ = load_snapshots(tmp_path / "run" / "snapshots")
    order = [int(path.name.rpartition("_")[2]) for path in sorted(zoo.iterdir(), key=_natural_order)]
    assert torch.equal(parameter_matrix(imported, layout), rows[order])
    assert imported["label"][:] == [dataset["label"][i] for i in order]
    run_script(monkeypatch, "train.py", *flags)
    groups = {
        group["name"]: group for group in json.loads((tmp_path / "run/evaluation/report.json").read_text())["groups"]
    }
    assert groups["generated"]["measures"]["class_accuracy"] >= 0 and groups["held-out networks"]["n"] == 14
    with pytest.raises(SystemExit, match="does not contain 'testing_"):
        run_script(monkeypatch, "collect.py", *flags, f"--import={zoo}", "--path_fields", "testing_(?P<label>[0-9])_")
