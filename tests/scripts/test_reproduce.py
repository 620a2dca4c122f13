"""Tables and figures of the paper: their rows as recipes, what runs share, and one small table from end to end."""

import csv
import dataclasses
import importlib.util
import json
import logging
import re
import shutil
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import timm
import torch
from benchmarks.training import _measure, measure_training
from reproduce.cells import compare, statistic_of
from reproduce.listing import list_experiments, list_runs
from reproduce.plan import RECIPES, SCALES, SMALL_DATASET, expand
from reproduce.runner import make_data, reproduce, take_over
from reproduce.tables import ARCHITECTURES, DATASETS, EXPERIMENTS, ExperimentError
from support.recipes import TINY_ROW as TINY
from support.run_server import RECIPE

from pdiff_hf.layout import ParameterLayout
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.run.cli import ConfigParser
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.context import stage_settings
from pdiff_hf.run.folder import RunFolder
from pdiff_hf.run.stages import STAGES
from pdiff_hf.run.trainer import prepare
from pdiff_hf.selection import select_parameters
from pdiff_hf.tasks.task import accuracies
from pdiff_hf.utils.files import replacing

ROOT = Path(__file__).parents[2]
NAMES = list(EXPERIMENTS)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_rows_differ_in_what_is_varied_and_in_nothing_else(name, scale):
    shared, runs = defaultdict(set), defaultdict(set)
    for row, recipes in expand(name, "out", scale=scale, seeds=(0, 1)):
        if EXPERIMENTS[name].measures_memory:
            assert recipes == []
            continue
        assert [recipe.seed for recipe in recipes] == [0, 1]
        settings = stage_settings(recipes[0], "evaluate", STAGES)
        assert {key: settings[key] for key in row.varies} == row.varies
        rest = {key: value for key, value in settings.items() if key not in row.varies}
        shared[row.architecture, row.dataset, tuple(sorted(row.varies))].add(json.dumps(rest))
        runs[row.run].add(recipes[0].output_dir)
        on_canvases = ARCHITECTURES[row.architecture].canvases is not None
        small_dataset = "out/canvases-fashion_mnist-3200-100" if on_canvases else SMALL_DATASET
        assert recipes[0].dataset == (DATASETS[row.dataset].id if scale == "paper" else small_dataset)
    assert all(len(different) == 1 for different in (*shared.values(), *runs.values()))
    assert len({folder for (folder,) in runs.values()}) == len(runs)


def test_the_paper_has_one_number_for_its_default_setting():
    """Which checks the transcription: the default is a row of most tables."""
    for name in ("table3a", "table3b", "table3c", "table3d", "table3e", "table3f", "table8", "table9"):
        experiment = EXPERIMENTS[name]
        titles = [column.title for column in experiment.columns]
        numbers = [dict(zip(titles, row.paper, strict=False)) for row in experiment.rows if row.paper]
        assert any(n["best"] == "77.9" and n["average"] == "77.7" for n in numbers), name
    for experiment in EXPERIMENTS.values():
        for row in experiment.rows:
            assert len(row.paper) <= len(experiment.columns)
            assert all(re.fullmatch(r"\d+(\.\d+)?(~\d\.\d+)?", number) for number in row.paper)


def test_default_rows_of_all_tables_are_one_run():
    folders = set()  # at the small scale, with 200 snapshots
    for name, run in (("table3a", "both"), ("table3b", "default"), ("table3c", "default"), ("table3d", "adamw")):
        folders |= {recipes[0].output_dir for _, recipes in expand(name, "out", patterns=[run])}
    folders |= {recipes[0].output_dir for _, recipes in expand("table3e", "out", patterns=["K200"])}
    folders |= {recipes[0].output_dir for _, recipes in expand("table1", "out", patterns=["resnet18/*"])}
    assert len(folders) == 1


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("table5", {}, "no experiment 'table5'.*table3a"),
        ("table1", {"patterns": ["resnet81*"]}, "no row of table1 is named 'resnet81.*resnet18/cifar100"),
        (
            "table3a",
            {"changes": {"autoencoder_args.latent_noise": 1.0}},
            "table3a sets autoencoder_args.latent_noise itself",
        ),
        ("figure3", {"changes": {"baseline_models": 0}}, "figure3 sets baseline_models itself"),
        ("table3a", {"changes": {"seed": 1}}, "seed is set with --seeds"),
        ("table3a", {"changes": {"denoiser_steps": 0}}, "denoiser_steps must be at least 1, got 0"),
        ("table3a", {"seeds": [1, 1]}, "seeds must be different numbers"),
        ("table3a", {"scale": "huge"}, "scale must be one of small, paper"),
    ],
)
def test_errors(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        expand(name, "out", **arguments)


def test_list():
    rows = [line.split("|") for line in list_experiments().splitlines() if "|" in line]
    lines = {cells[1].strip(): "|".join(cells) for cells in rows[2:]}
    assert list(lines) == list(EXPERIMENTS)
    assert " 4 " in lines["table3a"] and " 48 min " in lines["table3a"] and " minutes " in lines["table13"]
    assert " 4 to 12 h |" in next(line for line in list_experiments(scale="paper").splitlines() if "table3a" in line)


def test_list_of_the_runs_of_one():
    lines = list_runs("figure4", changes=TINY | {"collect_every": 2}).splitlines()
    runs = {line.split("|")[1].strip(): line for line in lines if "|" in line}
    assert list(runs)[2:] == ["0.03", "0.0003", "0.003", "0.3"]
    assert "collect_learning_rate: 0.0003" in runs["0.0003"] and " 12 min " in runs["0.3"]


# Table 6 of the paper, and the length of the vectors of the hyper-representation papers.
COUNTS = {
    "resnet18": 2_048,
    "resnet50": 5_120,
    "vit_tiny": 768,
    "vit_base": 3_072,
    "convnext_tiny": 3_072,
    "convnext_base": 4_096,
    "convnet_mini": 24_262,
    "mlp_mini": 66_970,
    "resnet_mini": 25_138,
    "vit_mini": 80_714,
    "convnext_mini": 74_970,
    "cnn3_mini": 2_464,
}


@pytest.mark.parametrize("name", COUNTS)
def test_recipes_generate_the_numbers_of_table_6(name):
    architecture = ARCHITECTURES[name]
    model = [f"--model={architecture.small['model']}"] if architecture.recipe == "partial" else []
    recipe = ConfigParser().parse_config([str(RECIPES / f"{architecture.recipe}.yaml"), *model])[0]
    with torch.device("meta"):
        network = timm.create_model(recipe.model, num_classes=10)
    names = select_parameters(network, recipe.select, recipe.exclude)
    assert ParameterLayout.from_state_dict(network.state_dict(), names).num_parameters == COUNTS[name]


def report(accuracies, best) -> dict:
    mean = sum(accuracies) / len(accuracies)
    measures = {"score_mean": mean, "score_std": 1.0, "score_best": best, "score_best_on_test": max(accuracies)}
    group = {"name": "generated", "n": len(accuracies), "measures": measures}
    group["memorisation"] = {"iou": [0.25, None, 0.75]}
    return {"metric": {"higher_is_better": True}, "groups": [group]}


def test_cells_over_networks_and_over_seeds():
    one, other = report([90, 92], 90), report([93, 95], 94)
    text, numbers = statistic_of("average", [one], "generated")
    assert text == "91.00 ± 1.00 (n=2)" and numbers == {"": 91, "std over networks": 1, "networks": 2}
    text, numbers = statistic_of("average", [one, other], "generated")
    assert text == "92.50 ± 1.00 (n=2); ± 2.12 over 2 seeds"
    text, numbers = statistic_of("best", [one, other], "generated")
    assert text == "92.00; ± 2.83 over 2 seeds" and numbers["selected on test"] == 93.5
    assert statistic_of("range", [one, other], "generated")[0] == "0.25~0.75"
    text, numbers = statistic_of("similarity", [one], "generated")
    assert text == "0.500 ± 0.354 (n=2)"


def test_a_group_is_better_worse_or_equal_within_the_noise_of_the_seeds():
    def verdict(differences, higher_is_better=True):
        pairs = [report([90, 92], 90)["groups"] + report([90 + d, 92 + d], 90)["groups"] for d in differences]
        metric = {"higher_is_better": higher_is_better}
        reports = [{"groups": [a | {"name": "snapshots"}, b], "metric": metric} for a, b in pairs]
        return compare("average", reports, "generated", "snapshots")

    # Student's t at 95% and 2 degrees of freedom is 4.303: a mean of 1 is beyond it up to a deviation of 0.402.
    text, numbers = verdict([0.61, 1.0, 1.39])
    assert text == "better (+1.00 ± 0.39 over 3 seeds)" and numbers["difference"] == pytest.approx(1)
    assert verdict([0.59, 1.0, 1.41])[1][""] == "equal within noise"
    assert verdict([-0.61, -1.0, -1.39])[1][""] == "worse"
    assert verdict([-0.61, -1.0, -1.39], higher_is_better=False)[1][""] == "better"
    assert verdict([1.0])[0] == "+1.00, one seed"


def test_a_table_that_was_killed_goes_on_and_its_rows_share_their_stages(run_server, tmp_path, caplog, without_figures):
    flags = [f"--{key}={value}" for key, value in TINY.items()]
    command = ["table3a", "--rows", "none", "both", "--dataset=digits", *flags]
    killed = run_server.run(tmp_path, *command, script="reproduce", at="denoiser/part-20")
    assert killed.reached, killed.errors
    (first,) = (tmp_path / "runs").iterdir()
    assert not (tmp_path / "table3a" / "table.md").exists()
    before = {path: path.stat().st_mtime_ns for path in first.glob("stages/*.json")}
    assert {path.stem for path in before} == {"base", "collect", "autoencoder"}

    caplog.set_level(logging.INFO)
    arguments = {"dataset": "digits", "patterns": ["none", "both"], "changes": TINY}
    folder = reproduce("table3a", tmp_path, **arguments)
    assert "denoiser: going on from step" in caplog.text
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    (second,) = (path for path in (tmp_path / "runs").iterdir() if path != first)
    assert {path.name for path in second.iterdir() if path.is_symlink()} == {"base_model", "snapshots", "scores"}
    assert (second / "base_model").resolve() == first / "base_model"

    rows = list(csv.DictReader((folder / "table.csv").open()))
    for row, run in zip(rows, (first, second), strict=True):
        groups = json.loads((run / "evaluation" / "report.json").read_text())["groups"]
        generated = next(group for group in groups if group["name"] == "generated")
        measures = generated["measures"]
        assert float(row["average"]) == measures["score_mean"] and float(row["best"]) == measures["score_best"]
        assert int(row["average networks"]) == 10 and row["seeds"] == "1"
    table = (folder / "table.md").read_text()
    assert f"| parameter and latent noise |        77.9 |      {measures['score_best']:.2f} " in table
    assert table.count("\n| ") == 4 and first.name in table and "test_resnet on digits" in table

    # Nothing is left to do, and figures of the same runs only have to be drawn.
    caplog.clear()
    assert reproduce("table3a", tmp_path, **arguments) == folder
    figure = reproduce("figure5a", tmp_path, **arguments)
    assert (figure / "figure5a.png").read_bytes()[:4] == b"\x89PNG"
    assert "figure5a.png" in (figure / "table.md").read_text()
    assert "taken over" not in caplog.text and len(list((tmp_path / "runs").iterdir())) == 2

    # Table 1 is about one of these runs too; what it adds is the column of all test images.
    name = ["resnet18/*"]
    (row,) = csv.DictReader((reproduce("table1", tmp_path, **arguments | {"patterns": name}) / "table.csv").open())
    assert len(list((tmp_path / "runs").iterdir())) == 2
    ((_, (recipe,)),) = expand("table1", tmp_path, **arguments | {"patterns": name})
    run, everything = prepare(recipe), dataclasses.replace(recipe, max_eval_samples=None).make_task()
    models = NetworkRunner(run.base_model, run.layout)
    best = run.parameters[accuracies(run.task, models, "validation", run.parameters).argmax()]
    expected = accuracies(everything, models, "test", best[None]).item()
    assert float(row["snapshots on all test images"]) == pytest.approx(expected)
    images = json.loads((second / "selected.json").read_text())["images"]
    assert images == len(everything.load_split("test")) > recipe.max_eval_samples


def test_fid_is_measured_on_the_same_features_for_all_seeds():
    ((_, recipes),) = expand("table12", "out", seeds=(0, 1))
    assert recipes[0].task_args["fid_features"] == recipes[1].task_args["fid_features"]
    assert re.fullmatch(r"out/runs/cnn3_mini-fashion_mnist-seed0-\w+/base_model", recipes[0].task_args["fid_features"])
    ((_, recipes),) = expand("table12", "out", scale="paper")
    assert recipes[0].task_args["fid_features"] == "inception"


def test_detectors_get_canvases_of_the_data_set_that_was_asked_for(tmp_path):
    plan = expand("table10", tmp_path, dataset="digits")
    make_data(plan, tmp_path, "digits")
    folders = {recipe.dataset for _, recipes in plan for recipe in recipes}
    assert folders == {str(tmp_path / "canvases-digits-3200-100")}
    assert {path.name for path in Path(*folders).iterdir()} == {"train.parquet", "validation.parquet", "test.parquet"}


@pytest.mark.slow
def test_a_table_of_another_task_with_the_classifier_that_it_needs(tmp_path):
    unet = {"in_channels": 1, "out_channels": 1, "block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4}
    unet |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    changes = TINY | {"model": "unet2d", "model_args": json.dumps(unet), "image_size": 8, "base_epochs": 1}
    changes |= {
        "max_eval_samples": 30,
        "num_models": 3,
        "num_snapshots": 6,
        "latent_dim": 4,
        "autoencoder_batch_size": 4,
    }
    folder = reproduce("table12", tmp_path, dataset="digits", changes=changes | {"denoiser_batch_size": 4})
    text = (folder / "table.md").read_text()
    assert re.search(r"\| DDPM UNet +\| +3.17 \| +[\d.]+ ± [\d.]+ \(n=6\)", text), text
    assert "FID (cnn3_mini) on 30 test images" in text and "unet2d on digits" in text
    assert sorted(path.name.partition("-")[0] for path in (tmp_path / "runs").iterdir()) == ["cnn3_mini", "unet2d"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["table3a", "--denoiser_step", "3"], "unknown argument '--denoiser_step'; did you mean denoiser_steps"),
        (["table3a", "table3b"], "unknown argument 'table3b'"),
        ([], "which table or figure"),
        (["--list", "--rows", "none"], "name it first"),
        (["--denoiser_steps", "3", "table3a"], "comes first"),
    ],
)
def test_the_script_says_what_is_wrong(argv, message, monkeypatch, capsys, tmp_path):
    spec = importlib.util.spec_from_file_location("reproduce", ROOT / "scripts" / "reproduce.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *argv])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        script.main()
    assert message in capsys.readouterr().err + str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_memory_of_training_grows_with_what_is_trained(tmp_path, monkeypatch):
    context = get_context("forkserver")  # one process that imports what all of them need
    context.set_forkserver_preload(["benchmarks.training"])
    monkeypatch.setattr("benchmarks.training.get_context", lambda kind: context)
    with ProcessPoolExecutor(1, mp_context=context) as pool, pytest.raises(MemoryError):
        pool.submit(_measure, "autoencoder", 2_048, 128, "paper", 2, 100, 50_000_000).result()
    folder = reproduce("table13", tmp_path, patterns=["2048"])
    (row,) = csv.DictReader((folder / "table.csv").open())
    assert row["autoencoder (MB) (paper)"] == "658" and 10 < int(row["autoencoder (MB)"]) < 658
    larger = measure_training("denoiser", 2_048, 512, "small")
    assert larger.fits and 10 < int(row["diffusion (MB)"]) < larger.memory / 1e6 < 2000
    assert "![Memory of training" in (folder / "table.md").read_text() and (folder / "table13.png").is_file()
    with pytest.raises(
        ExperimentError, match="table13 takes autoencoder_preset and denoiser_preset, not autoencoder_args.latent_noise"
    ):
        reproduce("table13", tmp_path, changes={"autoencoder_args.latent_noise": 1.0})


def test_stages_are_linked_and_links_to_what_is_gone_are_not_kept(tmp_path):
    runs = tmp_path / "here" / "runs"
    settings = {name: stage_settings(PDiffConfig(**RECIPE), name, STAGES) for name in ("base", "autoencoder")}
    first, second = RunFolder(runs / "a"), RunFolder(runs / "b")
    for name, values in settings.items():
        with first.replacing(STAGES[name]) as folder:
            (folder / "weights").write_text(name)
        first.finish(STAGES[name], values, {})
    (second / "base_model").mkdir(parents=True)  # what a kill has left
    assert take_over(second, STAGES["base"], settings["base"]) == first.path
    assert (second / "base_model").is_symlink() and (second / "base_model" / "weights").read_text() == "base"
    assert second.is_finished(STAGES["base"], settings["base"])
    assert take_over(second, STAGES["base"], settings["base"]) is None  # it has it now
    other = settings["autoencoder"] | {"autoencoder_args.latent_noise": 1.0}
    assert take_over(second, STAGES["autoencoder"], other) is None and not (second / "autoencoder").exists()

    (tmp_path / "here").rename(tmp_path / "there")  # links are relative
    first, second = (RunFolder(tmp_path / "there" / "runs" / name) for name in ("a", "b"))
    assert (second / "base_model" / "weights").is_file()
    with replacing(second / "base_model") as new:
        new.mkdir()
        (new / "weights").write_text("new")
    assert not (second / "base_model").is_symlink()
    assert (first / "base_model" / "weights").read_text() == "base"  # what another run has stays as it is

    (second / "stages" / "base.json").unlink()
    assert take_over(second, STAGES["base"], settings["base"]) == first.path
    shutil.rmtree(first.path)
    assert take_over(second, STAGES["base"], settings["base"]) is None and not (second / "base_model").is_symlink()
