"""Snapshots from files: formats, names, folders, the Hub, and what is refused."""

import copy
import json
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.utils import compare_versions
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load_file, save_file, save_model
from support.blobs import Blobs, Net
from support.trainer import vit
from torch import nn

from pdiff_hf.layout import LayoutError, ParameterLayout
from pdiff_hf.selection import select_layout
from pdiff_hf.snapshots import (
    FrozenCheck,
    SnapshotError,
    import_snapshots,
    load_snapshots,
    parameter_matrix,
    read_networks,
)


@pytest.fixture
def networks() -> list[nn.Module]:
    made = []
    for seed in range(12):
        torch.manual_seed(seed)
        made.append(Net())
    return made


LAYOUT = select_layout(Net(), ["norm", "head"])


def vectors(networks) -> torch.Tensor:
    return torch.stack([LAYOUT.flatten(network.state_dict()) for network in networks])


def imported(paths, folder, layout=LAYOUT) -> tuple[datasets.Dataset, torch.Tensor]:
    import_snapshots(paths, layout, folder)
    dataset, layout = load_snapshots(folder)
    return dataset, parameter_matrix(dataset, layout)


def test_folders_of_state_dicts_in_natural_order(networks, tmp_path):
    for name in ("safe", "torch"):
        (tmp_path / name).mkdir()
    for i, network in enumerate(networks):
        save_file(network.state_dict(), tmp_path / "safe" / f"step_{i}.safetensors")
    # Ways in which people keep them.
    torch.save(networks[0].state_dict(), tmp_path / "torch" / "epoch-1.pt")
    torch.save({"state_dict": networks[1].state_dict(), "epoch": 2}, tmp_path / "torch" / "epoch-2.pth")
    torch.save({f"module.{k}": v for k, v in networks[2].state_dict().items()}, tmp_path / "torch" / "epoch-10.pt")
    compiled = {f"module._orig_mod.{k}": v for k, v in networks[3].state_dict().items()}
    torch.save({"model": compiled, "optimizer": {"state": {}}}, tmp_path / "torch" / "epoch-11.bin")
    torch.save(networks[4].state_dict(), tmp_path / "torch" / "epoch-12.pt", _use_new_zipfile_serialization=False)
    dataset, parameters = imported([tmp_path / "safe"], tmp_path / "a")
    assert torch.equal(parameters, vectors(networks)) and dataset["step"][:] == list(range(12))
    dataset, parameters = imported([tmp_path / "torch"], tmp_path / "b")
    assert torch.equal(parameters, vectors(networks[:5])) and dataset["step"][:] == [1, 2, 10, 11, 12]
    paths = [tmp_path / "torch" / "epoch-2.pth", tmp_path / "safe" / "step_5.safetensors"]
    dataset, parameters = imported(paths, tmp_path / "c")
    assert torch.equal(parameters, vectors([networks[1], networks[5]])) and dataset["seed"][:] == [0, 1]


def test_checkpoints_of_the_trainer(recorded, tmp_path):
    dataset, layout = load_snapshots(recorded / "snapshots")
    steps, parameters = imported([recorded / "out"], tmp_path / "all", layout)
    assert steps["step"][:] == [4, 8, 12]
    assert torch.equal(parameters, parameter_matrix(dataset, layout)[[3, 7, 11]])
    paths = [recorded / "out" / f"checkpoint-{step}" for step in (12, 4)]
    assert torch.equal(imported(paths, tmp_path / "two", layout)[1], parameters[[2, 0]])


@pytest.mark.skipif(compare_versions("transformers", "<", "5.0"), reason="saves all tensors under their own names")
def test_networks_that_transformers_saves_under_other_names(tmp_path):
    models = []
    for step in (1, 2):
        model = vit()
        nn.init.constant_(model.vit.layernorm.weight, step)
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
        models.append(model.state_dict())
    layout = select_layout(vit(), "attention[-1]", exclude="*.q_proj.*")
    layout = ParameterLayout.from_state_dict(models[0], (*layout.names, "vit.layernorm.weight"))
    assert not set(layout.names) <= set(load_file(tmp_path / "checkpoint-1" / "model.safetensors"))
    _, parameters = imported([tmp_path], tmp_path / "snapshots", layout)
    assert torch.equal(parameters, torch.stack([layout.flatten(state_dict) for state_dict in models]))
    vit().base_model.save_pretrained(tmp_path / "headless" / "checkpoint-1")
    with pytest.raises((LayoutError, SnapshotError), match="checkpoint-1"):
        import_snapshots([tmp_path / "headless"], select_layout(vit(), "head"), tmp_path / "none")


def test_sharded_networks_and_networks_of_timm(networks, tmp_path):
    for i, network in enumerate(networks[:2]):
        folder = tmp_path / "shards" / f"checkpoint-{i}"
        folder.mkdir(parents=True)
        index = {}
        for part, names in enumerate((["norm.weight", "norm.bias"], ["head.weight", "head.bias", "body.weight"])):
            file = f"model-{part}.safetensors"
            save_file({name: network.state_dict()[name] for name in names}, folder / file)
            index |= dict.fromkeys(names, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert torch.equal(imported([tmp_path / "shards"], tmp_path / "a")[1], vectors(networks[:2]))
    # transformers puts a prefix before the names of a timm network, which timm's own files do not have
    wrapped = ParameterLayout(tuple(f"timm_model.{name}" for name in LAYOUT.names), LAYOUT.shapes, LAYOUT.dtypes)
    for i, network in enumerate(networks[:2]):
        save_file(network.state_dict(), tmp_path / f"timm-{i}.safetensors")
    paths = [tmp_path / f"timm-{i}.safetensors" for i in range(2)]
    assert torch.equal(imported(paths, tmp_path / "b", wrapped)[1], vectors(networks[:2]))


def test_half_precision_is_widened_and_nothing_is_rounded(networks, tmp_path):
    for i, dtype in enumerate((torch.float16, torch.bfloat16)):
        save_file({k: v.to(dtype) for k, v in networks[i].state_dict().items()}, tmp_path / f"{i}.safetensors")
    _, parameters = imported([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tmp_path / "a")
    assert torch.equal(
        parameters, torch.stack([vectors(networks)[0].half().float(), vectors(networks)[1].bfloat16().float()])
    )


def test_repositories_of_the_hub(networks, tmp_path, hub):
    for i, network in enumerate(networks[:3]):
        folder = tmp_path / "repo" / f"checkpoint-{i}"
        folder.mkdir(parents=True)
        save_file(network.state_dict(), folder / "model.safetensors")
        (folder / "trainer_state.json").write_text("{}")
        (folder / "optimizer.pt").write_bytes(b"not to be downloaded")
    api = HfApi()
    api.create_repo("alice/networks")
    api.upload_folder(repo_id="alice/networks", folder_path=tmp_path / "repo")
    dataset, parameters = imported(["alice/networks"], tmp_path / "all")
    assert torch.equal(parameters, vectors(networks[:3])) and dataset["step"][:] == [0, 1, 2]
    assert set(dataset["seed"][:]) == {0}
    paths = ["alice/networks/checkpoint-2", "alice/networks/checkpoint-1@main"]
    dataset, parameters = imported(paths, tmp_path / "two")
    assert torch.equal(parameters, vectors([networks[2], networks[1]])) and dataset["step"][:] == [2, 1]
    root = snapshot_download("alice/networks", allow_patterns="*.safetensors")
    assert not list(Path(root).rglob("*.pt"))
    for wrong in ("alice/nothing", "alice/networks@nowhere", "alice/networks/checkpoint-7"):
        with pytest.raises(SnapshotError, match=wrong):
            import_snapshots([wrong], LAYOUT, tmp_path / "none")


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:-size])


def save_net(path: Path, **changes) -> None:
    """A network with some tensors changed, or left out."""
    tensors = Net().state_dict() | {name.replace("_", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


SAFE, TORCH, FOLDER = "wrong.safetensors", "wrong.pt", "wrong.d"
MODULE = "holds more than tensors.*refers to 'support.blobs.Net'.*save its state dict with safetensors$"
# Name of the file, how it is made, and what is said of it.
WRONG = {
    "truncated safetensors": (SAFE, lambda p: save_net(p) or cut(p, 20), "not a whole safetensors file"),
    "no safetensors": (SAFE, lambda p: p.write_bytes(b"x" * 100), "not a whole safetensors file"),
    "truncated torch": (TORCH, lambda p: torch.save({}, p) or cut(p, 200), "not a whole file of torch.save"),
    "a whole module": (TORCH, lambda p: torch.save(Net(), p), MODULE),
    "an older module": (TORCH, lambda p: torch.save(Net(), p, _use_new_zipfile_serialization=False), MODULE),
    "no state dict": (TORCH, lambda p: torch.save([torch.zeros(3)], p), "holds a list, not a state dict"),
    "another architecture": (SAFE, lambda p: save_file({"b": torch.zeros(2)}, p), "no tensor 'norm.weight'"),
    "missing tensor": (SAFE, lambda p: save_net(p, norm_bias=None), "no tensor 'norm.bias'; similar.*'norm.weight'"),
    "another shape": (
        SAFE,
        lambda p: save_net(p, head_weight=torch.zeros(5, 3)),
        r"tensor 'head.weight' has shape \(5, 3\) there and \(2, 3\)",
    ),
    "integers": (SAFE, lambda p: save_net(p, head_bias=torch.tensor([0, 1])), "tensor 'head.bias' is torch.int64"),
    "double": (SAFE, lambda p: save_net(p, head_bias=torch.zeros(2).double()), "tensor 'head.bias' is torch.float64"),
    "not finite": (SAFE, lambda p: save_net(p, head_bias=torch.tensor([0, torch.inf])), "'head.bias' holds inf"),
    "empty folder": (FOLDER, Path.mkdir, "no checkpoint-N folders and no"),
    "no weights": (FOLDER, lambda p: vit().config.save_pretrained(p), "the folder has no model.safetensors"),
    "nothing": ("wrong.nothing", lambda p: None, "does not exist, and is not a Hub id"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files(kind, networks, tmp_path):
    name, make, message = WRONG[kind]
    save_file(networks[0].state_dict(), tmp_path / "right.safetensors")
    make(tmp_path / name)
    error = LayoutError if "tensor '" in message else SnapshotError
    with pytest.raises((SnapshotError, LayoutError), match=rf"(?s){name}.*{message}") as raised:
        import_snapshots([tmp_path / "right.safetensors", tmp_path / name], LAYOUT, tmp_path / "snapshots")
    assert isinstance(raised.value, error) and not {"\n", "\x1b"} & set(str(raised.value))
    assert not (tmp_path / "snapshots").exists()


def test_a_copy_is_left_out(networks, tmp_path, caplog):
    for name, network in zip("abc", (networks[0], networks[0], networks[1]), strict=True):
        save_file(network.state_dict(), tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    done = import_snapshots(paths, LAYOUT, tmp_path / "snapshots")
    assert done == {"copies": {str(paths[1]): str(paths[0])}}
    assert f"'{paths[1]}' is left out: it equals '{paths[0]}'" in caplog.text
    assert torch.equal(parameter_matrix(*load_snapshots(tmp_path / "snapshots")), vectors(networks[:2]))


# ------------------------------------------------------------------------------------------------------- other names


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict_ema", "model_ema", "ema", "module", "what I found"])
def test_state_dicts_inside_of_checkpoints(key, networks, tmp_path):
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"epoch": 3, "optimizer": optimizer, key: networks[0].state_dict()}, tmp_path / "step-1.pt")
    torch.save({"outer": {"model": networks[1].state_dict()}, "epoch": 3}, tmp_path / "step-2.pt")
    # Of several, the one that was trained.
    raw_and_averaged = {"ema": networks[0].state_dict(), "model": networks[2].state_dict()}
    torch.save(raw_and_averaged, tmp_path / "step-3.pt")
    assert torch.equal(read_networks(tmp_path, LAYOUT), vectors(networks[:3]))


def test_what_is_inside_is_shown(networks, tmp_path):
    several = {"student": networks[0].state_dict(), "teacher": networks[1].state_dict(), "epoch": 3}
    torch.save(several, tmp_path / "several.pt")
    with pytest.raises(
        SnapshotError, match="holds several state dicts, under 'student', 'teacher'; save the right one"
    ):
        read_networks(tmp_path / "several.pt", LAYOUT)
    torch.save({"epoch": 3, "args": {"lr": 0.1}}, tmp_path / "none.pt")
    with pytest.raises(SnapshotError, match="holds a dict with the keys 'epoch', 'args', not a state dict"):
        read_networks(tmp_path / "none.pt", LAYOUT)


def test_a_shared_tensor_under_any_of_its_names(tmp_path):
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    model = tied()
    layout = select_layout(model, "all")
    assert layout.names == ("0.weight", "0.bias", "1.bias")
    for i, missing in enumerate(("0.weight", "1.weight")):
        state_dict = {f"module.{name}": tensor for name, tensor in model.state_dict().items() if name != missing}
        save_file(state_dict, tmp_path / f"step-{i}.safetensors")
    save_model(model, str(tmp_path / "step-2.safetensors"))
    found = read_networks(tmp_path, layout)
    assert torch.equal(found, layout.flatten(model.state_dict()).expand(3, -1))


# --------------------------------------------------------------------------------------------- what is not selected


def test_networks_that_differ_in_what_is_not_selected(networks, tmp_path, caplog):
    """Their own accuracy is not what they are scored with."""
    base, task = networks[0], Blobs()
    layout = select_layout(base, "head")
    others = copy.deepcopy(base), copy.deepcopy(base), copy.deepcopy(base)
    others[0].head.weight.data.mul_(2)  # selected
    others[1].norm.running_mean.add_(3.0)
    others[2].body.weight.data.mul_(-1)
    others[2].norm.num_batches_tracked.add_(1)
    for step, network in enumerate(others):
        network.head.bias.data.add_(step)
        save_file(network.state_dict(), tmp_path / f"step-{step}.safetensors")
    check = FrozenCheck(base, layout)
    import_snapshots([tmp_path], layout, tmp_path / "snapshots", check=check)
    report = check.report(task)
    assert (report["networks"], report["tensor"], report["difference"]) == (2, "body.weight", pytest.approx(2))
    split = task.load_split("validation").tensors
    for score, step in zip(report["scores"], (2, 1), strict=True):
        assert score["file"].endswith(f"step-{step}.safetensors")
        own = others[step].eval()
        hybrid = copy.deepcopy(base).eval()
        hybrid.load_state_dict(layout.unflatten(layout.flatten(own.state_dict())), strict=False)
        for key, network in {"own": own, "hybrid": hybrid}.items():
            accuracy = 100 * (network(split[0]).argmax(1) == split[1]).float().mean().item()
            assert score[key] == pytest.approx(accuracy)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "2 imported networks differ" in message and "by up to 2 of the norm of 'body.weight'" in message
    assert (
        f"an accuracy of {report['scores'][0]['hybrid']:.1f}%, with its own of {report['scores'][0]['own']:.1f}%"
        in (message)
    )
    with pytest.raises(SnapshotError, match="step-1.safetensors': tensor 'norm.running_mean', which is not selected"):
        import_snapshots([tmp_path], layout, tmp_path / "none", check=FrozenCheck(base, layout, require_same=True))
    assert not (tmp_path / "none").exists()


def test_networks_that_differ_in_nothing_else(networks, tmp_path, caplog):
    base = networks[0]
    for step in range(2):
        base.head.bias.data.add_(1)
        state_dict = {f"module.{name}": tensor for name, tensor in base.state_dict().items()}
        if step:  # rounded to half precision, all is equal
            state_dict = {k: t.half() if t.is_floating_point() else t for k, t in state_dict.items()}
        torch.save(state_dict, tmp_path / f"step-{step}.pt")
    torch.save({"head.weight": base.head.weight.data, "head.bias": base.head.bias.data + 1}, tmp_path / "step-2.pt")
    layout = select_layout(base, "head")
    check = FrozenCheck(base, layout, require_same=True)
    import_snapshots([tmp_path], layout, tmp_path / "snapshots", check=check)
    assert check.report(Blobs()) is None and not caplog.records


def test_only_statistics_differ(networks, tmp_path, caplog):
    base = networks[0]
    layout = select_layout(base, "norm")
    save_file(base.state_dict(), tmp_path / "step-1.safetensors")
    changed = copy.deepcopy(base)
    changed.norm.weight.data.add_(1)
    changed.norm.running_var.mul_(4)
    save_file(changed.state_dict(), tmp_path / "step-2.safetensors")
    check = FrozenCheck(base, layout)
    import_snapshots([tmp_path], layout, tmp_path / "snapshots", check=check)
    assert check.report(Blobs())["difference"] == pytest.approx(0.75)
    assert "If that matters, use batch_norm_statistics=generated" in caplog.text
    with_statistics = select_layout(base, "norm", batch_norm_statistics=True)
    check = FrozenCheck(base, with_statistics, require_same=True)
    import_snapshots([tmp_path], with_statistics, tmp_path / "all", check=check)
    assert check.report(Blobs()) is None
