"""Generators of adapters as others load them: by id, with custom_pipeline, in another type, for diffusers' networks."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DConditionModel
from huggingface_hub import HfApi
from safetensors.torch import load_file
from support.networks import IDS, add_lora, bert, randomize, unet as make_unet
from transformers import BertForSequenceClassification

from pdiff_hf import LatentDenoiser, ParameterAutoencoder, PDiffPipeline
from pdiff_hf.hub.card import make_model_card
from pdiff_hf.models import DENOISER_PRESETS
from pdiff_hf.networks.adapters import load_adapter, without_wrapper
from pdiff_hf.selection import select_layout

peft = pytest.importorskip("peft")


def make_pipeline(network):
    layout = select_layout(network, "*.lora_*")
    rows = torch.randn(6, layout.num_parameters, generator=torch.Generator().manual_seed(0))
    autoencoder = ParameterAutoencoder(layout.to_dict(), latent_dim=3, block_out_channels=()).eval()
    autoencoder.fit_parameter_statistics(rows)
    autoencoder.fit_latent_statistics(autoencoder.tokenize(rows))
    torch.manual_seed(0)
    denoiser = LatentDenoiser(3, **DENOISER_PRESETS["mlp"]).eval()
    pipe = PDiffPipeline(autoencoder, denoiser, DPMSolverMultistepScheduler(), base_model=network)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """A network in a folder here; its adapter has trained a head, which is not generated, and names another base."""
    folder = tmp_path_factory.mktemp("model")
    bert().save_pretrained(folder)
    network = BertForSequenceClassification.from_pretrained(folder)
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    return make_pipeline(without_wrapper(randomize(peft.get_peft_model(network, config))))


def check(loaded, pipe):
    loaded.set_progress_bar_config(disable=True)
    given = {"generator": torch.Generator().manual_seed(0), "output_type": "model"}
    expected = pipe(1, **given | {"generator": torch.Generator().manual_seed(0)}).parameters[0](IDS).logits
    assert torch.equal(loaded(1, **given).parameters[0](IDS).logits, expected)


@torch.no_grad()
def test_by_folder_by_id_and_with_custom_pipeline(pipe, hub, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    check(PDiffPipeline.from_pretrained(tmp_path / "pipeline"), pipe)
    custom = {"custom_pipeline": str(tmp_path / "pipeline"), "trust_remote_code": True}
    check(DiffusionPipeline.from_pretrained(str(tmp_path / "pipeline"), **custom), pipe)
    pipe.push_to_hub("alice/adapters")
    check(PDiffPipeline.from_pretrained("alice/adapters"), pipe)
    half = PDiffPipeline.from_pretrained("alice/adapters", dtype=torch.bfloat16)
    assert {p.dtype for n, p in half.base_model.named_parameters() if "lora" not in n and "modules_to" not in n} == {
        torch.bfloat16
    }


@torch.no_grad()
def test_no_folder_of_this_computer_is_published(pipe, hub, tmp_path):
    pipe.push_to_hub("alice/adapters")
    folder = PDiffPipeline.download("alice/adapters", cache_dir=str(tmp_path))
    for file in Path(folder).rglob("*.json"):
        assert pipe.base_model.name_or_path not in file.read_text()
    for adapter in pipe(1, output_type="adapter").parameters:
        adapter.save_pretrained(tmp_path / "one")
        assert "base_model:" not in (tmp_path / "one" / "README.md").read_text()
        loaded = load_adapter(
            BertForSequenceClassification.from_pretrained(pipe.base_model.name_or_path), tmp_path / "one"
        )
        assert torch.equal(loaded.classifier.modules_to_save["default"].weight, _head(pipe.base_model))
    pipe.save_pretrained(tmp_path / "pipeline")
    assert not make_model_card(tmp_path / "pipeline", "alice/adapters").data.base_model
    config = json.loads((tmp_path / "pipeline" / "autoencoder" / "config.json").read_text())
    config["layout"]["adapters"]["default"]["base_model_name_or_path"] = "someone/bert"
    (tmp_path / "pipeline" / "autoencoder" / "config.json").write_text(json.dumps(config))
    assert make_model_card(tmp_path / "pipeline", "alice/adapters").data.base_model == "someone/bert"


def _head(network):
    return network.classifier.modules_to_save["default"].weight


def test_networks_of_diffusers(tmp_path):
    diffusers.utils.logging.set_verbosity_error()
    unet = make_unet()
    pipe = make_pipeline(unet)
    pipe.save_pretrained(tmp_path / "pipeline")
    again = PDiffPipeline.from_pretrained(tmp_path / "pipeline")
    own, read = unet.state_dict(), again.base_model.state_dict()
    assert own.keys() == read.keys() and all(torch.equal(own[name], read[name]) for name in own)
    assert UNet2DConditionModel.from_pretrained(tmp_path / "pipeline" / "base_model") is not None
    (adapter,) = again(1, output_type="adapter").parameters
    adapter.save_pretrained(tmp_path / "adapter")
    file = load_file(tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
    assert len(file) == len(again.autoencoder.layout.names) and all(name.startswith("unet.") for name in file)
    # What is read back is what was generated, scaled as the network scales it.
    torch.testing.assert_close(again.encode(tmp_path / "adapter"), again.encode(adapter_row(again, adapter)))


def test_a_network_of_diffusers_that_the_hub_has_is_named_and_not_copied(hub, tmp_path):
    make_unet(adapter=False).save_pretrained(tmp_path / "repo" / "unet")
    HfApi().create_repo("alice/pictures")
    HfApi().upload_folder(repo_id="alice/pictures", folder_path=tmp_path / "repo")
    unet = add_lora(UNet2DConditionModel.from_pretrained("alice/pictures", subfolder="unet"))
    pipe = make_pipeline(unet)
    pipe.save_pretrained(tmp_path / "pipeline")
    assert not (tmp_path / "pipeline" / "base_model").exists()
    again = PDiffPipeline.from_pretrained(tmp_path / "pipeline")
    assert again.config.base_model_reference["subfolder"] == "unet" and again.base_model is None
    own, read = unet.state_dict(), again.load_base_model().state_dict()
    assert own.keys() == read.keys()
    assert all(torch.equal(own[name], read[name]) for name in own if ".lora_" not in name)
    unet.conv_in.weight.data += 1  # its weights are no longer there
    make_pipeline(unet).save_pretrained(tmp_path / "changed")
    assert (tmp_path / "changed" / "base_model").exists()


def adapter_row(pipe, adapter):
    layout, tensors = pipe.autoencoder.layout, adapter.adapters["default"][1]
    named = {n: tensors["base_model.model." + n.replace(".default", "")] for n in layout.names}
    return layout.flatten(named)[None]
