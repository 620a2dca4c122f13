"""Adapters of PEFT: recorded, imported, loaded and written, bit for bit."""

import datasets
import pytest
import torch
from safetensors.torch import load_file
from support.networks import IDS, SIZES, bert, randomize
from support.scripts import run_script
from support.trainer import make_trainer, vit
from transformers import BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from pdiff_hf.networks.adapters import (
    find_base,
    has_adapters,
    load_adapter,
    load_network,
    save_adapter,
    save_network,
    without_wrapper,
)
from pdiff_hf.selection import fit_layout, select_layout
from pdiff_hf.snapshots import (
    SnapshotCallback,
    SnapshotWriter,
    import_snapshots,
    load_snapshots,
    parameter_matrix,
    read_networks,
)
from pdiff_hf.tensor_names import adapter_file_names

peft = pytest.importorskip("peft")
TARGETS = ["query", "value"]


def adapted(config, adapter: str = "default", seed: int = 0):
    """A network with an adapter of random values."""
    return randomize(peft.get_peft_model(bert(), config, adapter_name=adapter), seed)


METHODS = {
    "LoRA": lambda: peft.LoraConfig(r=2, target_modules=TARGETS),
    "LoRA with biases": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, bias="all"),
    "LoRA of embeddings": lambda: peft.LoraConfig(r=2, target_modules=["word_embeddings"]),
    "DoRA": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
    "a head": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, task_type="SEQ_CLS"),
    "modules_to_save": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["pooler.dense"]),
    "tokens": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, trainable_token_indices={"word_embeddings": [1]}),
    "tokens alone": lambda: peft.TrainableTokensConfig(target_modules=["word_embeddings"], token_indices=[1, 2]),
    "IA3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=TARGETS),
    "LoKr": lambda: peft.LoKrConfig(r=2, target_modules=TARGETS),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=2, target_modules=TARGETS, total_step=10),
    "VeRA": lambda: peft.VeraConfig(r=2, target_modules=TARGETS),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS),
    "norms": lambda: peft.LNTuningConfig(target_modules=["LayerNorm"]),
}
PROMPTS = {
    "prompts": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    "prefixes": lambda: peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
}


def select_trained(model):
    return select_layout(model, [name for name, parameter in model.named_parameters() if parameter.requires_grad])


@pytest.mark.parametrize("method", METHODS | PROMPTS)
def test_what_peft_saves_is_read_bit_for_bit(method, tmp_path):
    model = adapted((METHODS | PROMPTS)[method]())
    layout = select_trained(model)
    model.save_pretrained(tmp_path / "checkpoint-1")
    expected = layout.flatten(model.state_dict())
    assert torch.equal(read_networks(tmp_path, layout)[0], expected)
    with SnapshotWriter(tmp_path / "stored", layout) as writer:
        writer.write(expected, step=0, seed=0)
    stored = load_snapshots(tmp_path / "stored")[1]
    assert torch.equal(read_networks(tmp_path / "checkpoint-1", stored)[0], expected)
    assert torch.equal(read_networks(tmp_path / "checkpoint-1" / "adapter_model.safetensors", layout)[0], expected)
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    assert torch.equal(read_networks(tmp_path / "whole.pt", layout)[0], expected)


def test_adapters_with_names(tmp_path):
    model = adapted(METHODS["DoRA"](), "mine")
    model.save_pretrained(tmp_path / "one" / "checkpoint-1")
    layout = select_trained(model)
    expected = layout.flatten(model.state_dict())
    assert torch.equal(read_networks(tmp_path / "one", layout)[0], expected)
    assert torch.equal(read_networks(tmp_path / "one" / "checkpoint-1" / "mine", layout)[0], expected)
    # What an adapter is called is up to who loads it.
    other = select_trained(adapted(METHODS["DoRA"](), seed=1))
    assert torch.equal(read_networks(tmp_path / "one", other)[0], expected)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["key"]))
    model.save_pretrained(tmp_path / "two" / "network-0")
    both = select_layout(model, "*.lora_*")
    assert len({name for name in both.names if ".other." in name}) == 2
    assert torch.equal(read_networks(tmp_path / "two", both)[0], both.flatten(model.state_dict()))


def test_adapters_are_recorded_as_the_trainer_saves_them(tmp_path):
    model = peft.get_peft_model(
        vit(), peft.LoraConfig(r=2, target_modules=r".*\.(q_proj|v_proj|query|value)", use_dora=True)
    )
    callback = SnapshotCallback(tmp_path / "snapshots", "*.lora_*")
    kwargs = {"max_steps": 3, "save_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    make_trainer(tmp_path / "out", callback, model=model, **kwargs).train()
    dataset, layout = load_snapshots(tmp_path / "snapshots")
    assert len(dataset) == 3 and layout.num_parameters == 2 * 2 * (2 * 32 + 16)
    import_snapshots([tmp_path / "out"], layout, tmp_path / "imported")
    imported = load_snapshots(tmp_path / "imported")
    assert imported[0]["step"][:] == [1, 2, 3]
    assert torch.equal(parameter_matrix(*imported), parameter_matrix(dataset, layout))
    inside = fit_layout(layout, without_wrapper(model))  # the same tensors, for the network without PEFT's wrapper
    assert inside.names == tuple(name.removeprefix("base_model.model.") for name in layout.names)


@pytest.mark.parametrize("method", METHODS)
def test_networks_with_adapters_are_loaded_and_written(method, tmp_path):
    model = adapted(METHODS[method]())
    model.save_pretrained(tmp_path / "adapter")
    bert().save_pretrained(tmp_path / "base")
    logits = model(IDS).logits

    def base():
        return BertForSequenceClassification.from_pretrained(tmp_path / "base")

    state = torch.get_rng_state()
    loaded = load_adapter(base(), tmp_path / "adapter")
    assert torch.equal(torch.get_rng_state(), state)
    assert has_adapters(loaded) and not has_adapters(base())
    assert torch.equal(loaded(IDS).logits, logits)
    save_network(loaded, tmp_path / "whole")
    again = load_network(tmp_path / "whole", BertForSequenceClassification)
    assert torch.equal(again(IDS).logits, logits)
    if method != "LoRA with biases":  # which are those of the base model
        plain = BertForSequenceClassification.from_pretrained(tmp_path / "whole")
        assert torch.equal(base()(IDS).logits, plain(IDS).logits)
    save_adapter(again, tmp_path / "written")
    by_peft = peft.PeftModel.from_pretrained(base(), tmp_path / "written")
    assert torch.equal(by_peft(IDS).logits, logits)
    assert load_file(tmp_path / "written/adapter_model.safetensors").keys() == (
        load_file(tmp_path / "adapter/adapter_model.safetensors").keys()
    )
    assert find_base(str(tmp_path / "written")) == str(tmp_path / "base")


def test_tensors_alone_have_the_names_of_peft_too(tmp_path):
    model = without_wrapper(adapted(METHODS["DoRA"]()))
    layout = select_layout(model, "*.lora_*")
    save_adapter(model, tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    names = adapter_file_names(layout)
    assert set(names.values()) == set(written)
    for name, tensor in layout.unflatten(layout.flatten(model.state_dict())).items():
        assert torch.equal(written[names[name]], tensor)


def test_what_is_said_of_adapters_that_cannot_be_loaded(tmp_path):
    adapted(METHODS["LoRA"]()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not say which network it belongs to.*give that network as --model"):
        find_base(str(tmp_path / "adapter"))
    assert find_base("resnet18") is None and find_base(str(tmp_path)) is None
    others = [vit(), bert(num_hidden_layers=2), RobertaForSequenceClassification(RobertaConfig(**SIZES))]
    for network in others:
        with pytest.raises(ValueError, match=f"adapter.*does not fit {type(network).__name__}"):
            load_adapter(network, tmp_path / "adapter")
    adapted(PROMPTS["prompts"]()).save_pretrained(tmp_path / "prompts")
    with pytest.raises(ValueError, match="of the kind PROMPT_TUNING, which works beside the network"):
        load_adapter(bert(), tmp_path / "prompts")
    (tmp_path / "adapter" / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="is not the config of an adapter"):
        find_base(str(tmp_path / "adapter"))


@pytest.fixture
def shell(tmp_path):
    """A network, three adapters for it, and a data set; and the flags that they have in common."""
    bert().save_pretrained(tmp_path / "model")
    rows = {"text": ["x y", "y z"] * 30, "label": ["a", "b"] * 30}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows).to_csv(tmp_path / "data" / f"{split}.csv")
    for step in (1, 2, 3):
        model = adapted(METHODS["DoRA"](), seed=step)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
        model.save_pretrained(tmp_path / "adapters" / f"checkpoint-{step}")
    flags = ["--task=text_classification", "--dataset", tmp_path / "data", "--base_epochs=0", "--select", "*.lora_*"]
    flags += ["--latent_dim=2", "--heldout_snapshots=0", "--autoencoder_steps=2", "--denoiser_steps=2"]
    return [*flags, "--num_models=2", "--baseline_models=0", "--output_dir", tmp_path / "out"]


def test_from_adapters_to_generated_adapters(shell, tmp_path, monkeypatch, capsys):
    flags = (*shell, "--model", tmp_path / "model")
    run_script(monkeypatch, "collect.py", *flags, "--import", tmp_path / "adapters")
    assert "3 snapshots of" in capsys.readouterr().out
    run_script(monkeypatch, "train.py", *flags)
    networks = ("generate.py", tmp_path / "out" / "pipeline", "--num_models=2", "--output_dir")
    run_script(monkeypatch, *networks, tmp_path / "networks")
    made = []
    for folder in sorted((tmp_path / "networks").iterdir()):
        base = BertForSequenceClassification.from_pretrained(tmp_path / "model")
        made.append(peft.PeftModel.from_pretrained(base, folder))
    assert len(made) == 2 and not torch.equal(made[0](IDS).logits, made[1](IDS).logits)
    run_script(monkeypatch, *networks, tmp_path / "tensors", "--only_generated")
    for model, file in zip(made, sorted((tmp_path / "tensors").iterdir()), strict=True):
        for name, tensor in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items():
            assert torch.equal(load_file(file)[name], tensor)
    layout = select_layout(made[0], "*.lora_*")
    expected = torch.stack([layout.flatten(model.state_dict()) for model in made])
    for folder in ("networks", "tensors"):
        assert torch.equal(read_networks(tmp_path / folder, layout), expected)


def test_the_model_may_be_an_adapter(shell, tmp_path, monkeypatch, capsys):
    flags = (*shell, "--model", tmp_path / "adapters" / "checkpoint-2")
    run_script(monkeypatch, "collect.py", *flags, "--import", tmp_path / "adapters")
    assert "3 snapshots of" in capsys.readouterr().out
    loaded = load_network(tmp_path / "out" / "base_model", BertForSequenceClassification)
    assert torch.equal(loaded(IDS).logits, adapted(METHODS["DoRA"](), seed=2)(IDS).logits)
