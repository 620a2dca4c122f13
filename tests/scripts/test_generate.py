"""scripts/generate.py with a Hub id: what it writes loads with plain transformers and plain timm."""

import re

import pytest
import timm
import torch
from safetensors.torch import load_file
from support.networks import bert
from support.pipelines import make_network, make_pipeline
from support.scripts import generate
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)


@pytest.fixture
def hub_id(hub, request):
    """One for each test, because the server gives the same commits to the same id, and they stay in the cache."""
    return "alice/" + re.sub(r"\W+", "-", request.node.name).strip("-")[-90:]


def expected(pipe) -> list[torch.nn.Module]:
    return pipe(3, 4, torch.Generator().manual_seed(7), output_type="model").parameters


def make_timm_network(architecture, **model_args):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "timm_wrapper",
        architecture=architecture,
        num_labels=4,
        model_args=model_args or None,
        pretrained_cfg={"input_size": [3, 32, 32], "mean": [0.1] * 3, "std": [0.2] * 3},
    )
    return AutoModelForImageClassification.from_config(config).eval()


@pytest.mark.parametrize(("architecture", "model_args"), [("test_resnet", {}), ("test_vit", {"img_size": 32})])
@torch.no_grad()
def test_networks_load_with_plain_transformers_and_plain_timm(hub_id, tmp_path, monkeypatch, architecture, model_args):
    pipe = make_pipeline(make_timm_network(architecture, **model_args))
    pipe.push_to_hub(hub_id)
    generate(monkeypatch, hub_id, "--output_dir", tmp_path / "networks")
    folders = sorted((tmp_path / "networks").iterdir())
    assert [folder.name for folder in folders] == ["network-00000", "network-00001", "network-00002"]
    images = torch.randn(2, 3, 32, 32)
    for folder, model in zip(folders, expected(pipe), strict=True):
        logits = model(images).logits
        loaded, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()) and loaded.config.id2label == model.config.id2label
        assert torch.equal(loaded(images).logits, logits)
        whole = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(whole(images), logits)
        assert timm.data.resolve_model_data_config(whole)["mean"] == [0.1, 0.1, 0.1]
        path = str(folder / "model.safetensors")
        weights = timm.create_model(architecture, num_classes=4, checkpoint_path=path, **model_args).eval()
        assert torch.equal(weights(images), logits)
    assert pipe.base_model.config.model_args == (model_args or None)


@torch.no_grad()
def test_networks_of_transformers(hub_id, tmp_path, monkeypatch):
    pipe = make_pipeline(bert(num_labels=3))
    pipe.push_to_hub(hub_id)
    generate(monkeypatch, hub_id, "--output_dir", tmp_path / "networks")
    tokens = torch.arange(12).view(2, 6)
    for i, model in enumerate(expected(pipe)):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "networks" / f"network-{i:05d}")
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("complete", [True, False])
def test_only_what_was_generated(hub_id, tmp_path, monkeypatch, complete):
    network = make_timm_network("test_resnet")
    make_pipeline(network, **({} if complete else {"base_model": None})).push_to_hub(hub_id)
    generate(monkeypatch, hub_id, "--output_dir", tmp_path, "--only_generated")
    pipe = make_pipeline(network)
    for i, model in enumerate(expected(pipe)):
        tensors = load_file(tmp_path / f"network-{i:05d}.safetensors")
        assert set(tensors) == set(pipe.autoencoder.layout.names)
        result = network.load_state_dict(network.state_dict() | tensors)
        assert not result.missing_keys
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in network.state_dict().items())


def test_five_lines_of_python(hub_id, tmp_path):
    """What a newcomer with nothing but the id does."""
    make_pipeline(make_timm_network("test_resnet")).push_to_hub(hub_id)
    program = f"""
import torch; from pdiff_hf import PDiffPipeline
pipe = PDiffPipeline.from_pretrained("{hub_id}")
for i, network in enumerate(pipe(12, generator=torch.Generator().manual_seed(0), output_type="model").parameters):
    network.save_pretrained(f"{tmp_path}/{{i}}")
"""
    exec(program, {})
    assert len(list(tmp_path.iterdir())) == 12
    AutoModelForImageClassification.from_pretrained(tmp_path / "11")


def test_the_temperature_is_that_of_the_call(tmp_path, monkeypatch):
    make_pipeline(make_network()).save_pretrained(tmp_path / "pipeline")
    generate(
        monkeypatch, tmp_path / "pipeline", "--output_dir", tmp_path / "cold", "--temperature", 0, "--only_generated"
    )
    first, second = (load_file(path) for path in sorted((tmp_path / "cold").glob("*.safetensors"))[:2])
    assert all(torch.equal(first[name], second[name]) for name in first)
