"""From a user's own task, run of the Trainer or files to generated networks."""

import json
from pathlib import Path

import pytest
import timm
import torch
from support.blobs import Blobs
from support.scripts import run_script
from support.trainer import resnet
from transformers import (
    AutoModelForImageClassification,
    ViTImageProcessor,
)

from pdiff_hf.layout import LayoutError
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.trainer import prepare
from pdiff_hf.selection import select_layout
from pdiff_hf.snapshots import (
    SnapshotError,
    load_snapshots,
)
from pdiff_hf.tasks import Task

ROOT = Path(__file__).parents[2]
TINY = {
    "latent_dim": 8,
    "autoencoder_steps": 20,
    "autoencoder_batch_size": 10,
    "denoiser_steps": 20,
    "denoiser_batch_size": 10,
    "num_models": 4,
    "baseline_models": 0,
    "num_inference_steps": 4,
}


def test_a_task_says_how_networks_are_judged(tmp_path):
    class Neither(Task):
        load_base_model, load_split, fingerprint = Blobs.load_base_model, Blobs.load_split, Blobs.fingerprint
        collate, loss = Blobs.collate, Blobs.loss

    with pytest.raises(ValueError, match="Neither must be a ClassificationTask or a MeasuredTask"):
        prepare(PDiffConfig(**TINY, output_dir=str(tmp_path / "out"), select=["all"]), task=Neither())
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------- from a Trainer run to networks, as a user does


def test_from_a_trainer_run_to_generated_networks(recorded, tmp_path, monkeypatch):
    """README: the run has one more callback; the rest are two commands."""
    model = AutoModelForImageClassification.from_pretrained(recorded / "out" / "checkpoint-12")
    model.save_pretrained(tmp_path / "model")
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0] * 3, image_std=[1] * 3)
    processor.save_pretrained(tmp_path / "model")
    flags = [f"--{key}={value}" for key, value in TINY.items()]
    flags += ["--model", tmp_path / "model", "--dataset=digits", "--base_epochs=0", "--image_size=0"]
    run_script(monkeypatch, "train.py", *flags, "--snapshots", recorded / "snapshots", "--output_dir", tmp_path / "out")
    run_script(
        monkeypatch, "generate.py", tmp_path / "out/pipeline", "--num_models=20", "--output_dir", tmp_path / "networks"
    )
    folders = sorted((tmp_path / "networks").glob("network-*"))
    assert len(folders) == 20
    dataset, layout = load_snapshots(recorded / "snapshots")
    made = [AutoModelForImageClassification.from_pretrained(folder).state_dict() for folder in folders]
    for state_dict in made:
        for name, tensor in model.state_dict().items():  # all that was not recorded is the user's own network
            assert name in layout.names or torch.equal(state_dict[name], tensor)
    assert len({layout.flatten(state_dict).numpy().tobytes() for state_dict in made}) == 20
    assert not (tmp_path / "out" / "snapshots").exists()  # they stay where they are
    report = json.loads((tmp_path / "out" / "evaluation" / "report.json").read_text())
    assert next(group["n"] for group in report["groups"] if group["name"] == "snapshots") == 12


def test_snapshots_of_another_network_are_refused(recorded, tmp_path):
    with pytest.raises(LayoutError, match="does not fit the base model: it has no tensor 'resnet"):
        prepare(
            PDiffConfig(**TINY, model="test_resnet", snapshots=str(recorded / "snapshots"), output_dir=str(tmp_path))
        )
    with pytest.raises(SnapshotError, match="not a parameter data set"):
        prepare(PDiffConfig(**TINY, model="test_resnet", snapshots=str(tmp_path), output_dir=str(tmp_path)))


def test_collect_lists_what_would_be_generated(tmp_path, monkeypatch, capsys):
    flags = ["--model=test_resnet", "--select", "norm[-2:]", "head", "--exclude", "bias", "--latent_dim=16"]
    run_script(monkeypatch, "collect.py", "--list", *flags, f"--output_dir={tmp_path / 'out'}")
    text = capsys.readouterr().out
    model = timm.create_model("test_resnet", num_classes=10)
    layout = select_layout(model, ["norm[-2:]", "head"], "bias")
    rows = {line[2:].split()[0]: line for line in text.splitlines() if "timm_model." in line}
    assert set(rows) == {f"timm_model.{name}" for name, _ in model.named_parameters()}
    marked = [name for name, line in rows.items() if line.startswith("* ")]
    assert marked == [f"timm_model.{name}" for name in layout.names]
    assert f"* selected: {layout.num_parameters:,} of" in text and "TFLOP, about" in text
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="error: 'nrm' selects no parameter"):
        run_script(monkeypatch, "collect.py", "--list", "--model=test_resnet", "--select=nrm")


def test_networks_from_files_take_the_place_of_a_stage(recorded, tmp_path, monkeypatch, capsys):
    resnet().save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    flags = (
        *(f"--{key}={value}" for key, value in TINY.items()),
        *("--model", tmp_path / "model", "--dataset=digits", "--image_size=0", "--base_epochs=0"),
        *("--max_train_samples=64", "--max_eval_samples=20", "--output_dir", tmp_path / "out"),
        *("--import", recorded / "out"),
    )
    with pytest.raises(SystemExit, match="checkpoint-4': tensor 'resnet.*', which is not selected, differs"):
        run_script(monkeypatch, "collect.py", *flags, "--require_same_frozen")
    run_script(monkeypatch, "collect.py", *flags)
    assert "3 snapshots of 32 parameters" in capsys.readouterr().out
    assert load_snapshots(tmp_path / "out" / "snapshots")[0]["step"][:] == [4, 8, 12]
    with pytest.raises(SystemExit, match="has snapshots already"):
        run_script(monkeypatch, "collect.py", *flags)
    results = json.loads((tmp_path / "out" / "stages" / "collect.json").read_text())["results"]
    assert results["imported_from"] == [str(recorded / "out")]
    # The run trained all of the network, which was drawn anew here.
    assert results["frozen"]["networks"] == 3 and len(results["frozen"]["scores"]) == 3
