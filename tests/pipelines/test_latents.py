"""Work in the space of latents: from networks and back, directions, edits, inversion; adapters without a base model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import load_file
from support.docs import run_page
from support.networks import IDS, bert
from transformers import BertForSequenceClassification

from pdiff_hf import ConditionEncoder, LatentDenoiser, ParameterAutoencoder, PDiffPipeline
from pdiff_hf.models import DENOISER_PRESETS
from pdiff_hf.models.condition import Fields
from pdiff_hf.networks.adapters import without_wrapper
from pdiff_hf.selection import select_layout
from pdiff_hf.snapshots import adapter_layout, read_networks

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of adapters of other scalings, of a model on the Hub."""
    folder = tmp_path_factory.mktemp("adapters")
    for i in range(8):
        model = peft.get_peft_model(bert(), peft.LoraConfig(r=2, lora_alpha=2 + i, target_modules=["query", "value"]))
        torch.manual_seed(i)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.3)
        model.peft_config["default"].base_model_name_or_path = "someone/tiny-bert"
        model.save_pretrained(folder / f"task{i}")
    return folder


def make_pipeline(layout, rows, base_model=None, fields=None, table=None):
    autoencoder = ParameterAutoencoder(layout.to_dict(), latent_dim=7, block_out_channels=(), adapter_products=True)
    autoencoder.eval().fit_parameter_statistics(rows)
    autoencoder.fit_latent_statistics(autoencoder.tokenize(rows))
    torch.manual_seed(0)
    encoder = None
    if fields is not None:
        encoder = ConditionEncoder(fields, embedding_dim=4)
        encoder.remember(table)
    denoiser = LatentDenoiser(7, condition_dim=None if encoder is None else 4, **DENOISER_PRESETS["mlp"]).eval()
    pipe = PDiffPipeline(autoencoder, denoiser, DPMSolverMultistepScheduler(), base_model, encoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(adapters):
    layout = adapter_layout(sorted(adapters.iterdir()))
    return make_pipeline(layout, read_networks(adapters, layout))


def test_adapters_to_latents_and_back_without_a_base_model(pipe, adapters, tmp_path):
    assert pipe.base_model is None
    layout = pipe.autoencoder.layout
    rows = read_networks(adapters, layout)
    latents = pipe.encode(adapters)
    assert latents.shape == (8, 7)
    assert torch.equal(pipe.encode(rows), latents)
    some = pipe.encode([adapters / "task3", str(adapters / "task4")])
    torch.testing.assert_close(some, latents[3:5], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pipe.encode(layout.unflatten(rows[2])), latents[2:3], rtol=1e-5, atol=1e-5)
    decoded = pipe.decode(latents, "pt")
    products = pipe.autoencoder.products
    torch.testing.assert_close(products.expand(decoded), products.expand(rows), rtol=1e-4, atol=1e-5)
    for rank in (None, 1, 2, 5):
        for i, adapter in enumerate(pipe.decode(latents[:2], "adapter", rank=rank)):
            adapter.save_pretrained(tmp_path / str(rank) / str(i))
            config = json.loads((tmp_path / str(rank) / str(i) / "adapter_config.json").read_text())
            assert config["r"] == config["lora_alpha"] == (rank or 2)
            assert "base_model: someone/tiny-bert" in (tmp_path / str(rank) / str(i) / "README.md").read_text()
            loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / str(rank) / str(i)).eval()
            given = peft.PeftModel.from_pretrained(bert(), adapters / f"task{i}").eval()
            same = torch.allclose(loaded(IDS).logits, given(IDS).logits, rtol=1e-4, atol=1e-5)
            assert same == (rank != 1)
    (first,) = pipe(1, generator=torch.Generator().manual_seed(0), output_type="adapter").parameters
    assert set(first.adapters["default"][1]) == set(load_file(adapters / "task0" / "adapter_model.safetensors"))
    with pytest.raises(ValueError, match="rank must be a whole number"):
        pipe.decode(latents, rank=0)
    with pytest.raises(ValueError, match="parameters must have shape"):
        pipe.encode(rows[:, 1:])
    with pytest.raises(ValueError, match="output_type='model' needs a base model"):
        pipe(1, output_type="model")


def test_directions_and_edits(adapters):
    layout = adapter_layout(sorted(adapters.iterdir()))
    rows = read_networks(adapters, layout)
    fields = {"angle": {"type": "scalar", "low": 0, "high": 7}}
    pipe = make_pipeline(layout, rows, fields=fields, table=torch.arange(8.0).view(8, 1))
    generator, true = torch.Generator().manual_seed(0), torch.arange(7.0)
    labels = torch.randn(200, generator=generator)
    latents = labels[:, None] * true + torch.randn(200, 7, generator=generator)
    direction = pipe.direction(labels, latents)
    assert direction.shape == (7,) and (direction - true).abs().max() < 0.3
    edited = pipe.edit(latents[:2], direction, torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(edited - latents[:2], torch.stack([direction, -2 * direction]))
    half = pipe.edit(latents[:1], latents[1] - latents[0], 0.5)
    torch.testing.assert_close(half[0], (latents[0] + latents[1]) / 2)
    of_field = pipe.direction("angle", num_samples=16, generator=torch.Generator().manual_seed(0))
    assert of_field.shape == (7,) and of_field.isfinite().all()
    for wrong, message in (
        (("mood",), "is not one of the generator's fields, which are angle"),
        ((labels[:3], latents), "labels must be 200 numbers"),
        (("angle", latents), "need labels of your own"),
        ((torch.ones(200), latents), "not all the same"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.direction(*wrong)
    with pytest.raises(ValueError, match="must have length 7"):
        pipe.edit(latents[:, :3], direction)


def test_inversion_finds_latents_that_are_right_and_likely(pipe):
    wanted = pipe.autoencoder.products.expand(pipe.decode(torch.full((1, 7), 0.5), "pt"))

    def loss(parameters):
        return 100 * (pipe.autoencoder.products.expand(parameters) - wanted).square().sum(1)

    start = torch.zeros(2, 7)
    found = pipe.invert(loss, start, num_steps=150, prior_weight=1e-3)
    assert loss(pipe.decode(found, "pt")).max() < 0.05 * loss(pipe.decode(start, "pt")).min()
    assert pipe.invert(loss, start, num_steps=20, prior_weight=1e7).norm() < 0.2


def from_hub(**kwargs):
    return BertForSequenceClassification.from_pretrained("alice/tiny-bert", **kwargs)


def test_a_base_model_on_the_hub_is_named_and_not_copied(hub, adapters, tmp_path):
    revision = bert().push_to_hub("alice/tiny-bert").oid
    model = without_wrapper(peft.PeftModel.from_pretrained(from_hub(), adapters / "task0"))
    layout = select_layout(model, "*.lora_*")
    pipe = make_pipeline(layout, read_networks(adapters, layout), base_model=model)
    pipe.save_pretrained(tmp_path / "pipeline")
    assert not (tmp_path / "pipeline" / "base_model").exists()
    assert pipe.base_model is model
    again = PDiffPipeline.from_pretrained(tmp_path / "pipeline")
    again.set_progress_bar_config(disable=True)
    assert again.base_model is None
    reference = again.config.base_model_reference
    assert reference["id"] == "alice/tiny-bert" and reference["revision"] == revision
    latents = pipe.encode(adapters / "task1")
    adapter, network = again.decode(latents, "adapter")[0], again.decode(latents, "model")[0]
    assert again.base_model is not None
    adapter.save_pretrained(tmp_path / "adapter")
    by_peft = peft.PeftModel.from_pretrained(from_hub(), tmp_path / "adapter").eval()
    torch.testing.assert_close(network(IDS).logits, by_peft(IDS).logits, rtol=1e-5, atol=1e-6)
    other = PDiffPipeline.from_pretrained(tmp_path / "pipeline")
    assert other.load_base_model(dtype=torch.bfloat16).bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    # With other weights than the Hub has, it is copied.
    model.classifier.bias.data += 1
    pipe.save_pretrained(tmp_path / "changed")
    assert (tmp_path / "changed" / "base_model" / "model.safetensors").is_file()
    loaded = PDiffPipeline.from_pretrained(tmp_path / "changed").base_model
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_the_page_on_adapters(adapters, hub, tmp_path, monkeypatch):
    """Its blocks run as they stand, in a folder with adapters and a run for the mood that they are for."""
    bert().push_to_hub("alice/tiny-bert")
    shutil.copytree(adapters, tmp_path / "adapters")
    for config in (tmp_path / "adapters").rglob("adapter_config.json"):
        config.write_text(config.read_text().replace("someone/tiny-bert", "alice/tiny-bert"))
    monkeypatch.chdir(tmp_path)
    folders = sorted(Path("adapters").iterdir())
    layout, fields = adapter_layout(folders), Fields({"mood": {"type": "category", "values": ["kind", "curt"]}})
    moods = fields.table([{"mood": "kind"}, {"mood": "curt"}] * 4)
    base = BertForSequenceClassification.from_pretrained("alice/tiny-bert").eval()
    pipe = make_pipeline(layout, read_networks("adapters", layout), base, fields.to_dict(), moods)
    pipe.save_pretrained("outputs/adapters")
    examples = {"input_ids": IDS.expand(4, -1), "labels": torch.tensor([0, 1, 0, 1])}
    given = {"PDiffPipeline": PDiffPipeline, "folders": folders, "examples": examples, "latents": pipe.encode(folders)}
    found = run_page("guide/adapters", given)
    assert (
        load_file("new_adapter/adapter_model.safetensors").keys()
        == load_file("adapters/task0/adapter_model.safetensors").keys()
    )
    assert found["network"](IDS).logits.shape == (1, 2)
    assert found["kinder"].shape == found["likely"].shape == (2, 7)
