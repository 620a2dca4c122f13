"""`scripts/evaluate.py`: real networks on few digits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.evaluation import digits, digits_pipeline, digits_snapshots
from support.scripts import run_script
from transformers import AutoModelForImageClassification

from pdiff_hf import PDiffPipeline
from pdiff_hf.layout import ParameterLayout
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.scripts.saved import evaluate_saved
from pdiff_hf.selection import select_parameters
from pdiff_hf.snapshots import SnapshotWriter, read_networks
from pdiff_hf.tasks import ImageClassificationTask


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with a base model, snapshots around it, a pipeline, and networks as files."""
    folder = tmp_path_factory.mktemp("saved")
    scorer, snapshots = digits(), digits_snapshots()
    model, layout = scorer.models.model, scorer.layout
    model.save_pretrained(folder / "base")
    with SnapshotWriter(folder / "snapshots", layout) as writer:
        for step, row in enumerate(snapshots):
            writer.write(row, step=step, seed=0)
    digits_pipeline(scorer, snapshots, model).save_pretrained(folder / "pipeline")
    (folder / "networks").mkdir()
    (folder / "empty").mkdir()
    for i, row in enumerate(snapshots[[0, 0, 1]] + 0.1):  # two are equal, which a generator may do
        tensors = {name: tensor.clone() for name, tensor in layout.unflatten(row).items()}
        if i == 1:
            torch.save({"state_dict": tensors}, folder / "networks" / "1.pt")
        else:
            save_file(tensors, folder / "networks" / f"{i}.safetensors")
    return folder


def recipe(saved: Path, output_dir: Path, **changes) -> PDiffConfig:
    values = {
        "snapshots": str(saved / "snapshots"),
        "dataset": "digits",
        "model": None,
        "image_size": 0,
        "max_train_samples": 100,
        "max_eval_samples": 50,
        "num_models": 4,
        "num_inference_steps": 3,
        "baseline_models": 1,
        "output_dir": str(output_dir),
    }
    return PDiffConfig(**values | changes)


def test_a_pipeline_and_a_second_call_that_scores_only_what_is_new(saved, tmp_path):
    report = evaluate_saved(str(saved / "pipeline"), recipe(saved, tmp_path))
    groups = {row.name: row for row in report.groups}
    assert {"snapshots", "mean of the snapshots", "reconstructed", "generated", "latent KDE Scott"} <= set(groups)
    assert groups["snapshots"].n == groups["reconstructed"].n == 12 and groups["generated"].n == 4
    text = (tmp_path / "report.json").read_text()

    files = set((tmp_path / "scores").rglob("*.safetensors"))
    assert evaluate_saved(str(saved / "pipeline"), recipe(saved, tmp_path)).to_dict() == report.to_dict()
    assert (tmp_path / "report.json").read_text() == text
    assert set((tmp_path / "scores").rglob("*.safetensors")) == files

    evaluate_saved(str(saved / "pipeline"), recipe(saved, tmp_path, num_models=5))
    new = set((tmp_path / "scores").rglob("*.safetensors")) - files
    assert len(new) == 2  # validation and test, the fifth network alone
    assert all(path.stat().st_size < min(old.stat().st_size for old in files) for path in new)


def test_networks_from_any_generator(saved, tmp_path):
    report = evaluate_saved(str(saved / "networks"), recipe(saved, tmp_path, model=str(saved / "base")))
    groups = {row.name: row for row in report.groups}
    assert groups["generated"].n == 3 and "reconstructed" not in groups and report.reconstruction is None
    assert groups["generated"].scores()[0] == groups["generated"].scores()[1]
    assert groups["generated"].memorisation["nearest_in_weights"] == [0, 0, 1]


def test_networks_that_were_generated_and_saved_are_those_of_the_pipeline(saved, tmp_path):
    pipeline = PDiffPipeline.from_pretrained(saved / "pipeline")
    sampled = pipeline(2, generator=torch.Generator().manual_seed(0), output_type="pt").parameters
    for i, row in enumerate(sampled):
        pipeline.make_model(pipeline.autoencoder.layout.unflatten(row)).save_pretrained(
            tmp_path / "out" / f"network-{i}"
        )
    assert torch.equal(read_networks(tmp_path / "out", pipeline.autoencoder.layout), sampled)


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("pipeline", {"snapshots": None}, "--snapshots is needed"),
        ("pipeline", {"dataset": None}, "--dataset is needed"),
        ("networks", {}, "--model is needed"),
        ("networks", {"model": "mlp_mini"}, "with the weights of the base model, because '.*' and"),
        ("empty", {"model": "BASE"}, "has no checkpoint-N folders and no"),
        ("pipeline", {"num_inference_steps": 1001}, "num_inference_steps must be at most"),
        ("pipeline", {"snapshots": "nowhere/nothing"}, "neither a folder nor a Hub id"),
        ("pipeline", {"max_eval_samples": 0}, "max_eval_samples"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(saved, tmp_path, source, changes, message, hub):
    changes = {key: str(saved / "base") if value == "BASE" else value for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        evaluate_saved(str(saved / source), recipe(saved, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_snapshots_of_other_tensors_and_data_of_other_classes_are_refused(saved, tmp_path):
    model = ImageClassificationTask("mlp_mini", max_train_samples=100).load_base_model()
    layout = ParameterLayout.from_state_dict(model.state_dict(), select_parameters(model, "norm[-1:]"))
    with SnapshotWriter(tmp_path / "other", layout) as writer:
        for step in range(2):
            writer.write(torch.randn(layout.num_parameters), step=step, seed=0)
    with pytest.raises(ValueError, match="generates other tensors than the snapshots hold"):
        evaluate_saved(str(saved / "pipeline"), recipe(saved, tmp_path / "out", snapshots=str(tmp_path / "other")))
    seven = AutoModelForImageClassification.from_pretrained(saved / "base", num_labels=7, ignore_mismatched_sizes=True)
    seven.save_pretrained(tmp_path / "seven")
    with pytest.raises(ValueError, match="the data have 10 classes .* the network has 7 outputs"):
        evaluate_saved(str(saved / "networks"), recipe(saved, tmp_path / "out", model=str(tmp_path / "seven")))
    assert not (tmp_path / "out").exists()


def test_the_script_ends_with_one_line_for_an_error(saved, monkeypatch, capsys):
    arguments = [saved / "networks", "--snapshots", saved / "snapshots", "--dataset=digits"]
    with pytest.raises(SystemExit, match="^error: --model is needed: .* does not carry the network"):
        run_script(monkeypatch, "evaluate.py", *arguments)
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "evaluate.py", *arguments, "--baseline_model=3")
    assert "did you mean baseline_models" in capsys.readouterr().err


def test_the_script(saved, tmp_path, monkeypatch, capsys, without_figures):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset=digits", "--num_models=3", "--baseline_models=1", "--max_eval_samples=50"]
    run_script(monkeypatch, "evaluate.py", saved / "pipeline", "--snapshots", saved / "snapshots", *flags)
    output = capsys.readouterr().out
    assert output.startswith("Against the snapshots: ") and "\ngenerated " in output
    assert (tmp_path / "outputs/evaluation/report.md").is_file()
