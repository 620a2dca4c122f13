"""Adapters of other scalings, ranks, modules, files and folders: the same effects in one data set, or an error."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import networks
from support.networks import IDS, randomize, unet

from pdiff_hf.layout import LayoutError, ParameterLayout
from pdiff_hf.networks.adapters import load_adapter
from pdiff_hf.networks.replacement import Replacement
from pdiff_hf.selection import fit_layout, select_layout
from pdiff_hf.snapshots import import_snapshots, load_snapshots, parameter_matrix, read_networks
from pdiff_hf.snapshots.dataset import SnapshotError
from pdiff_hf.snapshots.files import find_adapter
from pdiff_hf.snapshots.frozen import FrozenCheck

peft = pytest.importorskip("peft")


def bert():
    return networks.bert(num_hidden_layers=2)


def save(folder, seed, config=None, change=None, **settings):
    """An adapter of random values; returns its logits."""
    config = config or peft.LoraConfig(**({"r": 2, "target_modules": ["query", "value"]} | settings))
    model = randomize(peft.get_peft_model(bert(), config), seed, 0.3)
    if change:
        change(model)
    model.save_pretrained(folder, save_embedding_layers=change is not None)
    with torch.no_grad():
        return model(IDS).logits


def imported(folder, select="*.lora_*", require_same=False):
    """A base model with an adapter that has room for all, the layout, the snapshots, and the report."""
    adapter = find_adapter([folder], folder.with_name("canonical"))
    model = load_adapter(bert(), adapter)
    layout = select_layout(model, select)
    check = FrozenCheck(model, layout, require_same=require_same)
    target = folder.with_name("snapshots")
    report = import_snapshots([folder], layout, target, check=check)
    dataset, stored = load_snapshots(target)
    return model, fit_layout(stored, model), parameter_matrix(dataset, stored, 1), report


@torch.no_grad()
def logits_of(model, layout, row):
    tensors = layout.unflatten(row)
    return Replacement(model, tensors).network(model, tensors)(IDS).logits


MIXED = {
    "lora_alpha": [{"lora_alpha": 8}, {"lora_alpha": 64}],
    "rsLoRA": [{"r": 4}, {"r": 4, "use_rslora": True}],
    "alpha_pattern": [{}, {"alpha_pattern": {r"layer\.\d\.attention\.self\.query": 64, "value": 3}}],
    "rank_pattern": [{"r": 4}, {"rank_pattern": {"layer.1.attention.self.value": 6}}],
    "ranks": [{"r": 2}, {"r": 8}, {"r": 4, "lora_alpha": 3}],
    "modules": [{}, {"target_modules": ["key", "query"]}, {"target_modules": r".*layer\.1.*\.dense"}],
    "layers": [{}, {"layers_to_transform": [1]}],
    "embeddings": [{"target_modules": ["word_embeddings"]}, {"target_modules": ["query"], "r": 3}],
}


@pytest.mark.parametrize("kind", MIXED)
def test_mixed_adapters_do_what_peft_makes_of_them(kind, tmp_path):
    wanted = [save(tmp_path / "a" / f"task{i}", i, **settings) for i, settings in enumerate(MIXED[kind])]
    model, layout, rows, report = imported(tmp_path / "a")
    assert layout.adapters["default"]["r"] == layout.adapters["default"]["lora_alpha"]
    assert load_snapshots(tmp_path / "snapshots")[1].adapters == layout.adapters
    for row, logits in zip(rows, wanted, strict=True):
        torch.testing.assert_close(logits_of(model, layout, row), logits, rtol=1e-5, atol=1e-6)
    assert report and set(report) <= {"scaled", "padded", "modules_absent"}


def test_a_layout_that_is_scaled_otherwise_does_not_fit(tmp_path):
    save(tmp_path / "a" / "0", 0)
    save(tmp_path / "a" / "1", 1)
    _, layout, *_ = imported(tmp_path / "a")
    with pytest.raises(LayoutError, match="another .*query than the adapters of the layout"):
        fit_layout(layout, peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=["query", "value"])))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_have_changed_their_base_model_are_refused(start, tmp_path):
    save(tmp_path / "a" / "0", 0, init_lora_weights=start)
    for read in (lambda: find_adapter([tmp_path / "a"], tmp_path), lambda: load_adapter(bert(), tmp_path / "a/0")):
        with pytest.raises(ValueError, match=f"init_lora_weights={start} has changed.*path_initial_model"):
            read()
    layout = select_layout(peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=["query"])), "*.lora_*")
    with pytest.raises(SnapshotError, match=f"init_lora_weights={start}"):
        read_networks(tmp_path / "a", layout)


def test_other_methods_and_settings_are_not_mixed(tmp_path):
    save(tmp_path / "a" / "0", 0)
    save(tmp_path / "a" / "1", 1, use_dora=True)
    with pytest.raises(ValueError, match="1' has use_dora=True, and .*0' use_dora=False"):
        find_adapter([tmp_path / "a"], tmp_path / "c")
    shutil.rmtree(tmp_path / "a" / "0")
    save(tmp_path / "a" / "2", 1, config=peft.LoHaConfig(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match="has peft_type='LOHA', and .*'LORA'"):
        find_adapter([tmp_path / "a"], tmp_path / "c")


def shifted(model):
    model.base_model.model.bert.embeddings.word_embeddings.weight.data += torch.randn(1)


OWN = {
    "classifier": {"task_type": "SEQ_CLS"},
    "bias": {"bias": "all"},
    "word_embeddings": {"change": shifted},
}


@pytest.mark.parametrize("part", OWN)
def test_own_parts_are_named_or_refused(part, tmp_path, caplog):
    for i in range(2):
        save(tmp_path / "a" / f"task{i}", i, **OWN[part])
    with pytest.raises(SnapshotError, match=f"task1': tensor '.*{part}.*', which is not selected, differs"):
        imported(tmp_path / "a", require_same=True)
    model = load_adapter(bert(), find_adapter([tmp_path / "a"], tmp_path / "c"))
    layout = select_layout(model, "*.lora_*")
    check = FrozenCheck(model, layout)
    import_snapshots([tmp_path / "a"], layout, tmp_path / "s", check=check)
    assert part in check.report(None)["tensor"] and caplog.text.count("differ from the base model") == 1


def test_heads_are_kept_where_they_are_selected(tmp_path):
    wanted = [save(tmp_path / "a" / f"task{i}", i, task_type="SEQ_CLS") for i in range(2)]
    model, layout, rows, _ = imported(tmp_path / "a", ["*.lora_*", "*.modules_to_save.*"])
    for row, logits in zip(rows, wanted, strict=True):
        torch.testing.assert_close(logits_of(model, layout, row), logits, rtol=1e-5, atol=1e-6)
    with pytest.raises(LayoutError, match="classifier.original_module.weight.*select .*modules_to_save"):
        read_networks(tmp_path / "a", select_layout(model, ["*.lora_*", "*classifier*"]))


def test_what_has_no_place_is_named(tmp_path, caplog):
    for i in range(2):
        save(tmp_path / "a" / f"task{i}", i, target_modules=["query", "key"] if i else ["query"])
    model = load_adapter(bert(), tmp_path / "a" / "task0")
    layout = select_layout(model, "*.lora_*")
    report = import_snapshots([tmp_path / "a"], layout, tmp_path / "s", check=FrozenCheck(model, layout))
    assert len(report["left_out"]) == 4 and "key.lora_A.weight' of 1 adapters" in caplog.text
    with pytest.raises(SnapshotError, match="task1': tensor '.*key.lora_A.weight' of the adapter has no place"):
        import_snapshots([tmp_path / "a"], layout, tmp_path / "t", check=FrozenCheck(model, layout, require_same=True))


def test_copies_and_other_base_models_are_named(tmp_path, caplog):
    for i in range(2):
        save(tmp_path / "a" / f"task{i}", i)
    shutil.copytree(tmp_path / "a" / "task1", tmp_path / "a" / "task1-final")
    file = tmp_path / "a" / "task0" / "adapter_config.json"
    for path, name in ((file, "someone/other"), (tmp_path / "a" / "task1" / file.name, "someone/base")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    *_, rows, report = imported(tmp_path / "a")
    assert len(rows) == 2
    assert report["copies"] == {str(tmp_path / "a/task1-final"): str(tmp_path / "a/task1")}
    assert report["base_models"] == {"someone/other": 1, "someone/base": 1}
    assert "trained for different base models" in caplog.text and "task1-final' is left out" in caplog.text


def test_folders_as_training_and_the_cache_leave_them(tmp_path):
    for task in "AB":
        for step in (100, 200):
            save(tmp_path / "runs" / task / f"checkpoint-{step}", step + ord(task))
    shutil.copytree(tmp_path / "runs/A/checkpoint-200", tmp_path / "runs/A", dirs_exist_ok=True)  # a final save
    torch.save({"a": 1}, tmp_path / "runs" / "A" / "training_args.bin")
    torch.save({"a": 1}, tmp_path / "runs" / "optimizer.pt")
    _, _, rows, report = imported(tmp_path / "runs")
    assert len(rows) == 4 and set(report["copies"]) == {str(tmp_path / "runs/A")}
    stored = load_snapshots(tmp_path / "snapshots")[0]
    assert stored["step"][:] == [100, 200, 100, 200] and stored["seed"][:] == [0, 0, 1, 1]
    for commit in "ab":
        save(tmp_path / "models--someone--lora" / "snapshots" / (commit * 40), ord(commit))
    (tmp_path / "models--someone--lora" / "refs").mkdir()
    (tmp_path / "models--someone--lora" / "refs" / "main").write_text("a" * 40)
    assert len(read_networks(tmp_path / "models--someone--lora", load_snapshots(tmp_path / "snapshots")[1])) == 2


def test_files_without_the_base_model(tmp_path):
    for i, alpha in enumerate((8, 8, 16)):
        save(tmp_path / "a" / f"task{i}", i, lora_alpha=alpha)
    first = load_file(tmp_path / "a" / "task0" / "adapter_model.safetensors")
    layout = ParameterLayout.from_state_dict(first)
    rows = read_networks(tmp_path / "a", layout)
    assert torch.equal(rows[0], layout.flatten(first))
    third = load_file(tmp_path / "a" / "task2" / "adapter_model.safetensors")
    doubled = {name: tensor * (2 if "lora_B" in name else 1) for name, tensor in third.items()}
    assert torch.equal(rows[2], layout.flatten(doubled))
    (tmp_path / "files").mkdir()
    shutil.copy(tmp_path / "a/task0/adapter_model.safetensors", tmp_path / "files/style.safetensors")
    with pytest.raises(SnapshotError, match="style.safetensors' is an adapter without its adapter_config.json"):
        find_adapter([tmp_path / "files"], tmp_path / "c")
    assert find_adapter([tmp_path / "files"], tmp_path / "c", str(tmp_path / "a/task0")) is None
    assert torch.equal(read_networks(tmp_path / "files", layout)[0], rows[0])


def test_files_of_diffusers_and_kohya(tmp_path, caplog):
    from diffusers import StableDiffusionPipeline

    net = unet()
    layout = select_layout(net, "*.lora_*")
    expected = torch.randn(1, layout.num_parameters)
    factors = {n.replace(".default", ""): t for n, t in layout.unflatten(expected[0]).items()}
    factors = {name: tensor.clone() for name, tensor in factors.items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path / "styles" / "style0", unet_lora_layers=factors)
    assert torch.equal(read_networks(tmp_path / "styles", layout), expected)
    assert "which says how their factors are scaled" in caplog.text
    metadata = {"r": 2, "lora_alpha": 8, "target_modules": ["to_q", "to_v"]}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "said", unet_lora_layers=factors, unet_lora_adapter_metadata=metadata
    )
    twice = layout.unflatten(expected[0].clone())
    for name in twice:
        twice[name] *= 2 if ".lora_B." in name else 1
    assert torch.equal(read_networks(tmp_path / "said", layout)[0], layout.flatten(twice))
    kohya = {}
    for name, tensor in factors.items():
        module, letter = name.removesuffix(".weight").rsplit(".lora_", 1)
        module = "lora_unet_" + module.replace(".", "_")
        kohya[f"{module}.lora_{'down' if letter == 'A' else 'up'}.weight"] = tensor
        kohya[f"{module}.alpha"] = torch.tensor(8)
    save_file({name: tensor.clone() for name, tensor in kohya.items()}, tmp_path / "kohya.safetensors")
    assert torch.equal(read_networks(tmp_path / "kohya.safetensors", layout)[0], layout.flatten(twice))


def test_embeddings_of_another_size_are_named(tmp_path):
    model = bert()
    model.resize_token_embeddings(53)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"])).save_pretrained(
        tmp_path / "a", save_embedding_layers=True
    )
    with pytest.raises(ValueError, match="word_embeddings.*53, 16.*50, 16"):
        load_adapter(bert(), tmp_path / "a")
