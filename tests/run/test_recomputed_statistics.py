"""Batch-norm statistics that are recomputed for each network: scores, models, ensembles and files agree in all bits."""

import dataclasses
import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from support.runs import finish
from support.scripts import generate
from transformers import AutoModelForImageClassification

from pdiff_hf import PDiffPipeline
from pdiff_hf.evaluation.score import Scorer
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.context import RunContext
from pdiff_hf.run.folder import RunError
from pdiff_hf.run.trainer import prepare
from pdiff_hf.tasks import take

TINY = PDiffConfig(
    model="test_resnet",
    dataset="digits",
    image_size=16,
    max_train_samples=300,
    max_eval_samples=60,
    select=["conv[1]", "norm[1]"],
    batch_norm_statistics="recomputed",
    base_epochs=2,
    base_batch_size=32,
    num_snapshots=6,
    collect_batch_size=16,
    autoencoder_preset="pca",
    latent_dim=4,
    denoiser_steps=10,
    denoiser_batch_size=4,
    num_models=3,
    num_inference_steps=4,
    baseline_models=0,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunContext:
    return finish(TINY.changed(output_dir=str(tmp_path_factory.mktemp("recomputed") / "out")))


@pytest.fixture(scope="module")
def pipe(run) -> PDiffPipeline:
    return PDiffPipeline.from_pretrained(run.folder / "pipeline")


@pytest.fixture(scope="module")
def data(run) -> list[dict]:
    """All 300 training images in two batches, as scoring takes them."""
    split = run.task.load_split("train")
    return [run.task.collate(take(split, part.tolist())) for part in torch.arange(len(split)).tensor_split(2)]


def images(data) -> list[dict]:
    return [{"pixel_values": batch["pixel_values"]} for batch in data]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@torch.no_grad()
def test_scores_models_ensembles_and_files_agree(run, pipe, data, tmp_path, monkeypatch):
    models = pipe(3, 4, seeded(), output_type="model", batch_norm_data=images(data)).parameters
    ensemble = pipe.ensemble(3, 4, seeded(), batch_norm_data=images(data))
    flags = [f"--batch_norm_data={run.folder / 'recipe.yaml'}", f"--output_dir={tmp_path}"]
    generate(monkeypatch, run.folder / "pipeline", *flags)
    scorer = Scorer(run.task, run.base_model, run.layout, recompute_statistics=True)
    whole = scorer.complete(pipe(3, 4, seeded(), output_type="pt").parameters)
    assert torch.equal(ensemble.parameters_of_networks, whole)
    base = run.base_model.state_dict()
    for i, model in enumerate(models):
        tensors = scorer.models.layout.unflatten(whole[i])
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / f"network-{i:05d}").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
        changed = {name for name in base if not torch.equal(base[name], state[name])}
        assert changed == set(scorer.models.layout.names)
    added = set(scorer.models.layout.names) - set(run.layout.names)
    total = sum("running_" in name for name in base)
    assert 0 < len(added) < total  # what comes before the generated tensors keeps the base model's


@torch.no_grad()
def test_the_report_is_about_such_networks(run, data):
    """Each snapshot by itself, with statistics as torch averages them; they are not the base model's."""
    report = json.loads((run.folder / "evaluation" / "report.json").read_text())
    split = run.task.load_split("test")
    batch = run.task.collate(take(split, list(range(len(split)))))
    scorer = Scorer(run.task, run.base_model, run.layout, recompute_statistics=True)
    accuracies, with_base = [], []
    for row, whole in zip(run.parameters, scorer.complete(run.parameters), strict=True):
        for layout, values, found in (
            (scorer.models.layout, whole, accuracies),
            (run.layout, row, with_base),
        ):
            model = PDiffPipeline.from_pretrained(run.folder / "pipeline").make_model(layout.unflatten(values))
            predicted = model(batch["pixel_values"]).logits.argmax(-1)
            found.append(100 * (predicted == batch["labels"]).double().mean().item())
    snapshots = next(group for group in report["groups"] if group["name"] == "snapshots")
    assert snapshots["measures"]["score_mean"] == pytest.approx(sum(accuracies) / 6, abs=1e-4)
    assert accuracies != with_base
    plain = Scorer(run.task, run.base_model, run.layout, run.folder / "scores")
    assert plain.score("test", run.parameters).values.mean().item() == pytest.approx(sum(with_base) / 6, abs=1e-4)


def test_networks_without_them_come_with_a_warning(pipe, data, caplog):
    with caplog.at_level(logging.WARNING):
        pipe(1, 4, output_type="model")
    assert "pass batch_norm_data" in caplog.text
    caplog.clear()
    pipe(1, 4, output_type="model", batch_norm_data=images(data))
    pipe(1, 4, output_type="pt")
    assert "batch_norm_data" not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_type": "pt", "batch_norm_data": [{}]}, "is for output_type='model'"),
        ({"output_type": "model", "batch_norm_data": []}, "no batches of data"),
        ({"output_type": "model", "batch_norm_data": iter([])}, "gone through twice"),
    ],
)
def test_wrong_data(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(1, 4, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "mlp_mini", "image_size": 64, "select": ["norm"]}, "no batch norm behind the tensors"),
        ({"select": ["head"]}, "no batch norm behind the tensors"),
        ({"tune_steps": 5}, "not for networks that are trained side by side"),
    ],
)
def test_what_is_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises((RunError, ValueError), match=message):
        prepare(dataclasses.replace(TINY, output_dir=str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


def test_files_of_generated_tensors_have_no_statistics(run, tmp_path, monkeypatch):
    generate(monkeypatch, run.folder / "pipeline", "--only_generated", f"--output_dir={tmp_path}")
    assert set(load_file(tmp_path / "network-00000.safetensors")) == set(run.layout.names)
    with pytest.raises(SystemExit):
        flags = ["--only_generated", f"--batch_norm_data={run.folder / 'recipe.yaml'}"]
        generate(monkeypatch, run.folder / "pipeline", *flags, f"--output_dir={tmp_path / 'other'}")
