"""LoRA adapters on demand: a family of text classifiers, whose adapters are learned as products."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.networks import bert
from support.runs import finish
from support.scripts import generate
from transformers import AutoModelForSequenceClassification

from pdiff_hf import PDiffPipeline
from pdiff_hf.evaluation import Report
from pdiff_hf.models.products import AdapterProducts
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.context import RunContext
from pdiff_hf.run.trainer import execute, prepare
from pdiff_hf.snapshots import load_snapshots, parameter_matrix

TOPICS = {"sea": ["wave", "salt"], "wood": ["tree", "leaf"], "town": ["street", "bus"], "sky": ["cloud", "wind"]}
SETTINGS = {
    "task": "text_classification",
    "task_args": {"adapter_rank": 4},
    "family": "grouped",
    "base_epochs": 0,
    "select": ["*lora_*", "*classifier*"],
    "num_tasks": 4,
    "num_validation_tasks": 1,
    "num_test_tasks": 2,
    "num_snapshots": 8,
    "collect_steps": 30,
    "collect_every": 10,
    "collect_learning_rate": 0.02,
    "collect_batch_size": 16,
    "autoencoder_preset": "pca",
    "adapter_products": True,
    "latent_dim": 5,
    "heldout_snapshots": 0.0,
    "denoiser_preset": "mlp",
    "denoiser_steps": 20,
    "denoiser_batch_size": 8,
    "tune_steps": 4,
    "tune_models": 4,
    "tune_batch_size": 8,
    "num_models": 2,
    "num_inference_steps": 4,
    "baselines": "few",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts with four topics, a tiny network with two outputs, and an adapter of it that changes nothing."""
    path = tmp_path_factory.mktemp("adapters")
    (path / "texts").mkdir()
    generator = torch.Generator().manual_seed(0)
    for name, size in (("train", 160), ("test", 40)):
        lines = ["text,label"]
        for i in range(size):
            topic = list(TOPICS)[i % 4]
            words = [TOPICS[topic][int(j)] for j in torch.randint(2, (3,), generator=generator)]
            lines.append(f"the {' and '.join(words)},{topic}")
        (path / "texts" / f"{name}.csv").write_text("\n".join(lines) + "\n")
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    bert(**names, hidden_size=8, intermediate_size=8).save_pretrained(path / "network")
    network = AutoModelForSequenceClassification.from_pretrained(path / "network")
    config = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    get_peft_model(network, config).save_pretrained(path / "adapter")
    return path


def recipe(folder, **changes) -> PDiffConfig:
    paths = {"model": str(folder / "adapter"), "dataset": str(folder / "texts"), "output_dir": str(folder / "run")}
    return PDiffConfig(**SETTINGS | paths | changes)


@pytest.fixture(scope="module")
def finished(folder) -> RunContext:
    return finish(recipe(folder))


def test_adapters_are_learned_as_products(finished):
    pipeline = PDiffPipeline.from_pretrained(finished.folder / "tuned")
    products = AdapterProducts(finished.layout)
    assert len(products.pairs) == 2 and pipeline.autoencoder.products.layout == products.layout
    snapshots = parameter_matrix(*load_snapshots(finished.folder / "snapshots"))
    mean = products.expand(snapshots).mean(0)
    torch.testing.assert_close(pipeline.autoencoder.parameter_mean, mean, rtol=1e-5, atol=1e-6)
    assert pipeline.autoencoder.config.adapter_rank in (2, 4)
    report = Report.load(finished.folder / "evaluation")
    names = {row.name for row in report.groups}
    assert {"generated", "kernel ridge", "trained on the task", "mean of all snapshots"} <= names
    assert len(report.conditions["test"]) == 2


def test_generated_adapters_load_with_plain_peft(finished, folder, tmp_path, monkeypatch):
    condition = {"positive": [1, 0, 1, 0]}
    generate(
        monkeypatch,
        finished.folder / "tuned",
        f"--condition={json.dumps(condition)}",
        f"--output_dir={tmp_path / 'out'}",
    )
    pipeline = PDiffPipeline.from_pretrained(finished.folder / "tuned")
    seven = torch.Generator().manual_seed(7)
    expected = pipeline(3, 4, seven, condition=condition, output_type="model").parameters
    batch = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    folders = sorted((tmp_path / "out").glob("*/adapter_config.json"))
    assert len(folders) == 3
    for path, network in zip(folders, expected, strict=True):
        base = AutoModelForSequenceClassification.from_pretrained(folder / "network")
        loaded = PeftModel.from_pretrained(base, path.parent).eval()
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, network.eval()(**batch).logits)


def test_what_products_do_not_go_with_is_refused_before_any_work(folder):
    with pytest.raises(ValueError, match="lora_A and lora_B .* leave adapter_products out"):
        prepare(recipe(folder, select=["*classifier*"]))
    with pytest.raises(ValueError, match="adapter_rank=2 is for adapters of a lower rank, and .* has the rank 2"):
        prepare(recipe(folder, task_args={"adapter_rank": 2}))
    with pytest.raises(ValueError, match="adapter_rank=4 is for adapters of a family that are tuned"):
        prepare(recipe(folder, tune_steps=0))


def test_the_autoencoder_of_adapters_is_trained_on_what_they_predict(folder, finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    changes = {"autoencoder_preset": "linear", "autoencoder_args": {"loss": "outputs"}, "overwrite_output_dir": True}
    run = prepare(recipe(folder, output_dir=str(tmp_path / "run"), autoencoder_steps=20, **changes))
    execute(run, ["autoencoder"])
    results = run.files.record(run.stages["autoencoder"])["results"]
    assert results["losses"][-1] >= 0 and 50 < results["outputs"]["agreement"] <= 100
