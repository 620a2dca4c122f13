"""Where snapshots come from: a Trainer run, a plain loop, files, repeated fine-tuning, and a user's own task."""

import dataclasses
import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessor,
)

from pdiff_hf import PDiffPipeline
from pdiff_hf.layout import LayoutError, ParameterLayout
from pdiff_hf.run.recipe import Recipe
from pdiff_hf.run.run import Run, RunError
from pdiff_hf.selection import select_layout
from pdiff_hf.snapshots import (
    CollectArguments,
    SnapshotCallback,
    SnapshotError,
    SnapshotRecorder,
    collect_snapshots,
    import_snapshots,
    load_snapshots,
    parameter_matrix,
)
from pdiff_hf.tasks import ClassificationTask, Task

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


# ------------------------------------------------------------------------------------------------ a run of the Trainer


def vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=10,
    )
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(config)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(
        ResNetConfig(embedding_size=4, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=10)
    )


class Digits(torch.utils.data.Dataset):
    def __init__(self, start: int, stop: int):
        self.digits = load_digits()
        self.numbers = range(start, stop)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> dict:
        image = torch.from_numpy(self.digits.images[self.numbers[i]] / 16).float()
        return {"pixel_values": image.expand(3, 8, 8), "labels": int(self.digits.target[self.numbers[i]])}


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_trainer(folder, *callbacks, model=None, **kwargs) -> Trainer:
    arguments = {
        "max_steps": 12,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "save_steps": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    return Trainer(
        model if model is not None else resnet(),
        TrainingArguments(str(folder), **arguments | kwargs),
        train_dataset=Digits(0, 200),
        eval_dataset=Digits(200, 260),
        compute_metrics=accuracy,
        callbacks=list(callbacks),
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """`snapshots`, recorded during a Trainer run, and `out` with its checkpoints."""
    folder = tmp_path_factory.mktemp("recorded")
    callback = SnapshotCallback(folder / "snapshots", select="norm[-2:]")
    make_trainer(folder / "out", callback, eval_strategy="steps", eval_steps=4).train()
    return folder


def test_the_callback_records_what_the_trainer_saves(recorded):
    dataset, layout = load_snapshots(recorded / "snapshots")
    assert layout == select_layout(resnet(), "norm[-2:]")
    assert dataset["step"][:] == list(range(1, 13)) and set(dataset["seed"][:]) == {7}
    parameters = parameter_matrix(dataset, layout)
    for step in (4, 8, 12):
        saved = load_file(recorded / "out" / f"checkpoint-{step}" / "model.safetensors")
        assert torch.equal(parameters[step - 1], layout.flatten(saved))
    history = json.loads((recorded / "out" / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    expected = {entry["step"]: entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry}
    assert set(dataset.column_names) == {"parameters", "step", "seed", "eval_loss", "eval_accuracy"}
    found = {row["step"]: row["eval_accuracy"] for row in dataset if row["eval_accuracy"] is not None}
    assert found == pytest.approx(expected) and set(found) == {4, 8, 12}
    assert [path.name for path in recorded.iterdir() if path.name.startswith(".")] == []


def test_every_n_steps_from_a_first_step(tmp_path):
    callback = SnapshotCallback(tmp_path / "snapshots", "head", every_n_steps=3, first_step=5)
    make_trainer(tmp_path / "out", callback, save_strategy="no").train()
    dataset, layout = load_snapshots(tmp_path / "snapshots")
    assert dataset["step"][:] == [6, 9, 12] and layout.names == ("classifier.1.weight", "classifier.1.bias")


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 10:
            raise KeyboardInterrupt


def test_a_run_that_was_interrupted_goes_on_recording(recorded, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "out", SnapshotCallback(tmp_path / "snapshots"), Interrupt()).train()
    assert not (tmp_path / "snapshots").exists()
    trainer = make_trainer(tmp_path / "out", SnapshotCallback(tmp_path / "snapshots"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    dataset, layout = load_snapshots(tmp_path / "snapshots")
    assert dataset["step"][:] == list(range(1, 13))
    uninterrupted = parameter_matrix(*load_snapshots(recorded / "snapshots"))
    torch.testing.assert_close(parameter_matrix(dataset, layout), uninterrupted)


def test_an_interrupted_run_is_not_mixed_with_another(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "out", SnapshotCallback(tmp_path / "snapshots"), Interrupt()).train()
    trainer = make_trainer(tmp_path / "out", SnapshotCallback(tmp_path / "snapshots", "head"))
    with pytest.raises(SnapshotError, match="the interrupted run recorded other tensors"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    make_trainer(tmp_path / "out", SnapshotCallback(tmp_path / "snapshots", "head"), max_steps=3).train()
    assert load_snapshots(tmp_path / "snapshots")[0]["step"][:] == [1, 2, 3]  # a fresh start drops the old recording


def test_adapters_of_a_peft_model_are_recorded(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(vit(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    callback = SnapshotCallback(tmp_path / "snapshots", "*.lora_*")
    make_trainer(tmp_path / "out", callback, model=model, max_steps=6, save_steps=2).train()
    dataset, layout = load_snapshots(tmp_path / "snapshots")
    assert len(dataset) == 6 and layout.num_parameters == 2 * 2 * 2 * 32
    import_snapshots([tmp_path / "out"], layout, tmp_path / "imported")  # the adapters that the Trainer saved
    imported = load_snapshots(tmp_path / "imported")
    assert imported[0]["step"][:] == [2, 4, 6]
    assert torch.equal(parameter_matrix(*imported), parameter_matrix(dataset, layout)[1::2])


# --------------------------------------------------------------------------------------------------------- a plain loop


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


def train_net(model: nn.Module, steps: range, recorder: SnapshotRecorder, learning_rate: float = 0.1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), learning_rate)
    for step in steps:
        torch.manual_seed(step)
        F.cross_entropy(model(torch.randn(8, 4)), torch.randint(2, (8,))).backward()
        optimizer.step()
        optimizer.zero_grad()
        recorder.snapshot(step, **({"accuracy": step / 10} if step % 2 else {}))


def test_recorder_in_a_plain_loop(tmp_path):
    model = Net()
    with SnapshotRecorder(model, tmp_path / "snapshots", ["norm", "head"], exclude="bias", seed=5) as recorder:
        train_net(model, range(1, 6), recorder)
    dataset, layout = load_snapshots(tmp_path / "snapshots")
    assert layout.names == ("norm.weight", "head.weight") and dataset["seed"][:] == [5] * 5
    assert dataset["accuracy"][:] == [pytest.approx(0.1), None, pytest.approx(0.3), None, pytest.approx(0.5)]
    assert torch.equal(parameter_matrix(dataset, layout)[-1], layout.flatten(model.state_dict()))
    with pytest.raises(SnapshotError, match="exists already"):
        SnapshotRecorder(model, tmp_path / "snapshots")


def test_a_plain_loop_goes_on(tmp_path):
    model = Net()
    with pytest.raises(KeyError), SnapshotRecorder(model, tmp_path / "snapshots", "head") as recorder:
        train_net(model, range(1, 6), recorder)
        raise KeyError
    with SnapshotRecorder(model, tmp_path / "snapshots", "head", resume_step=3) as recorder:
        train_net(model, range(4, 8), recorder)
    assert load_snapshots(tmp_path / "snapshots")[0]["step"][:] == list(range(1, 8))


def test_what_a_recorder_refuses(tmp_path, caplog):
    model = Net()
    recorder = SnapshotRecorder(model, tmp_path / "still", "head")
    train_net(model, range(1, 4), recorder, learning_rate=0.0)
    with pytest.raises(SnapshotError, match="only 1 snapshots.*a step that changed"):
        recorder.finish()
    assert "step 2 changed none of the recorded tensors" in caplog.text
    with pytest.raises(SnapshotError, match="cannot be named seed"):
        recorder.add_metrics(1, {"seed": 3})
    with torch.no_grad():
        model.head.bias[1] = torch.nan
    with pytest.raises(SnapshotError, match="step 4.*'head.bias' holds nan"):
        recorder.snapshot(4)
    model.requires_grad_(False)
    with pytest.raises(SnapshotError, match="none of the selected tensors is trained.*'head.weight'"):
        SnapshotRecorder(model, tmp_path / "frozen", "head")
    with pytest.raises(LayoutError, match="'haed.\\*' selects no parameter of Net"):
        SnapshotRecorder(model, tmp_path / "nothing", "haed.*")


TWO_PROCESSES = """
import sys
sys.path.insert(0, sys.argv[1])
from test_sources import SnapshotCallback, make_trainer
callback = SnapshotCallback(sys.argv[2] + "/snapshots")
make_trainer(sys.argv[2] + "/out", callback, max_steps=4, save_strategy="no").train()
"""


@pytest.mark.slow
def test_two_processes_record_once(tmp_path):
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*command, tmp_path / "run.py", Path(__file__).parent, tmp_path], check=True)
    assert load_snapshots(tmp_path / "snapshots")[0]["step"][:] == [1, 2, 3, 4]


# --------------------------------------------------------------------------------------------------------------- files


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


def test_ten_thousand_tensors(tmp_path):
    state_dict = {f"layers.{i}.weight": torch.full((2,), float(i)) for i in range(10_000)}
    layout = ParameterLayout.from_state_dict(state_dict)
    save_file(state_dict, tmp_path / "0.safetensors")
    torch.save({name: tensor + 1 for name, tensor in state_dict.items()}, tmp_path / "1.pt")
    _, parameters = imported([tmp_path / "0.safetensors", tmp_path / "1.pt"], tmp_path / "a", layout)
    assert parameters.shape == (2, 20_000) and torch.equal(parameters[0] + 1, parameters[1])


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


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def wrong_file(kind: str, folder: Path) -> Path:
    state_dict = Net().state_dict()
    path = folder / "wrong.safetensors"
    if kind == "truncated safetensors":
        save_file(state_dict, path)
        path.write_bytes(path.read_bytes()[:-20])
    elif kind == "no safetensors":
        path.write_bytes(b"x" * 100)
    elif kind == "truncated torch":
        path = folder / "wrong.pt"
        torch.save(state_dict, path)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "code":
        path = folder / "wrong.pt"
        torch.save({"head.weight": Harm(folder / "touched")}, path)
    elif kind == "plain pickle with code":
        path = folder / "wrong.pth"
        path.write_bytes(pickle.dumps(Harm(folder / "touched")))
    elif kind == "a whole module":
        path = folder / "wrong.pt"
        torch.save(Net(), path)
    elif kind == "no state dict":
        path = folder / "wrong.pt"
        torch.save([torch.zeros(3)], path)
    elif kind == "another architecture":
        save_file({"heed.weight": torch.zeros(2, 3), "conv.bias": torch.zeros(2)}, path)
    elif kind == "missing tensor":
        del state_dict["norm.bias"]
        save_file(state_dict, path)
    elif kind == "another shape":
        save_file(state_dict | {"head.weight": torch.zeros(5, 3)}, path)
    elif kind == "integers":
        save_file(state_dict | {"head.bias": torch.zeros(2, dtype=torch.int64)}, path)
    elif kind == "double precision":
        save_file(state_dict | {"head.bias": torch.zeros(2, dtype=torch.float64)}, path)
    elif kind == "not finite":
        save_file(state_dict | {"head.bias": torch.tensor([0.0, torch.inf])}, path)
    elif kind == "empty folder":
        path = folder / "wrong.d"
        path.mkdir()
    elif kind == "a folder without weights":
        path = folder / "wrong.d"
        vit().config.save_pretrained(path)
    elif kind == "nothing":
        path = folder / "wrong.nothing"
    return path


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("truncated safetensors", SnapshotError, "not a whole safetensors file"),
        ("no safetensors", SnapshotError, "not a whole safetensors file"),
        ("truncated torch", SnapshotError, "not a whole file of torch.save"),
        ("code", SnapshotError, "holds more than tensors"),
        ("plain pickle with code", SnapshotError, "holds more than tensors"),
        ("a whole module", SnapshotError, "holds more than tensors"),
        ("no state dict", SnapshotError, "holds a list, not a state dict"),
        ("another architecture", LayoutError, "no tensor 'norm.weight'"),
        ("missing tensor", LayoutError, "no tensor 'norm.bias'; similar names there are.*'norm.weight'"),
        ("another shape", LayoutError, r"tensor 'head.weight' has shape \(5, 3\) there and \(2, 3\)"),
        ("integers", LayoutError, "tensor 'head.bias' is torch.int64"),
        ("double precision", LayoutError, "tensor 'head.bias' is torch.float64"),
        ("not finite", SnapshotError, "tensor 'head.bias' holds inf"),
        ("empty folder", SnapshotError, "no checkpoint-N folders and no"),
        ("a folder without weights", SnapshotError, "the folder has no model.safetensors"),
        ("nothing", SnapshotError, "does not exist, and is not a Hub id"),
    ],
)
def test_wrong_files(kind, error, message, networks, tmp_path):
    save_file(networks[0].state_dict(), tmp_path / "right.safetensors")
    wrong = wrong_file(kind, tmp_path)
    with pytest.raises(error, match=rf"(?s){wrong.name}.*{message}") as raised:
        import_snapshots([tmp_path / "right.safetensors", wrong], LAYOUT, tmp_path / "snapshots")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "snapshots").exists() and not (tmp_path / "touched").exists()


def test_a_copy_is_refused(networks, tmp_path):
    for name in ("a", "b"):
        save_file(networks[0].state_dict(), tmp_path / f"{name}.safetensors")
    with pytest.raises(SnapshotError, match="b.safetensors.*equals snapshot 0"):
        import_snapshots([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], LAYOUT, tmp_path / "snapshots")


# --------------------------------------------------------------------------------------- fine-tuning, from our own task


class Blobs(ClassificationTask):
    """Two clouds of points, told apart by a network that no library knows."""

    def load_base_model(self):
        return Net()

    def load_split(self, split):
        rng = np.random.default_rng(["train", "validation", "test"].index(split))
        labels = rng.integers(0, 2, 90)
        points = rng.normal(0, 1, (90, 4)) + labels[:, None]
        return torch.utils.data.TensorDataset(torch.tensor(points, dtype=torch.float32), torch.tensor(labels))

    def fingerprint(self, split):
        return f"blobs {split}"

    def collate(self, examples):
        points, labels = zip(*examples, strict=True)
        return {"points": torch.stack(points), "labels": torch.stack(labels)}

    def loss(self, call, batch):
        return F.cross_entropy(call(batch["points"]), batch["labels"])

    def predict(self, call, batch):
        return call(batch["points"])


def collected(folder, **kwargs):
    torch.manual_seed(0)
    model = Net()
    args = CollectArguments(**{"batch_size": 16, "learning_rate": 0.01} | kwargs)
    collect_snapshots(Accelerator(cpu=True), Blobs(), model, LAYOUT, folder, args, seed=3)
    dataset, layout = load_snapshots(folder)
    return dataset, parameter_matrix(dataset, layout), layout.flatten(model.state_dict())


def test_several_runs_and_snapshots_every_n_steps(tmp_path):
    dense, parameters, base = collected(tmp_path / "dense", num_snapshots=12)
    sparse, every_third, _ = collected(tmp_path / "sparse", num_snapshots=4, every_n_steps=3)
    assert dense["step"][:] == list(range(1, 13)) and sparse["step"][:] == [3, 6, 9, 12]
    torch.testing.assert_close(every_third, parameters[2::3])
    runs, of_runs, _ = collected(tmp_path / "runs", num_snapshots=12, num_runs=3)
    assert runs["step"][:] == [1, 2, 3, 4] * 3
    seeds = runs["seed"][:]
    assert len(set(seeds)) == 3 and seeds == sorted(seeds, key=seeds.index)
    for run in range(3):  # each starts at the base model: one step of AdamW moves a number by about the learning rate
        assert (of_runs[4 * run] - base).abs().max() < 0.011
    again, one_run, _ = collected(tmp_path / "again", num_snapshots=12, num_runs=3)
    torch.testing.assert_close(one_run, of_runs)


def test_a_task_of_ones_own(tmp_path):
    recipe = Recipe(**TINY, output_dir=str(tmp_path / "out"), base_epochs=3, base_batch_size=16, num_snapshots=20)
    recipe = dataclasses.replace(recipe, select=["all"], collect_batch_size=16, collect_learning_rate=0.01)
    run = Run(recipe, task=Blobs())
    with run.lock():
        run.carry_out()
    assert run.layout.num_parameters == sum(p.numel() for p in Net().parameters())
    report = json.loads((tmp_path / "out" / "evaluation" / "report.json").read_text())
    assert report["num_parameters"] == run.layout.num_parameters
    pipe = PDiffPipeline.from_pretrained(tmp_path / "out" / "pipeline")  # a plain network stays out of it
    assert pipe.base_model is None
    Net().load_state_dict(pipe(1, num_inference_steps=2).parameters[0], strict=False)
    saved = load_file(tmp_path / "out" / "base_model" / "model.safetensors")
    assert torch.equal(saved["norm.running_mean"], run.base_model.norm.running_mean)


@pytest.mark.slow
def test_the_example_of_the_readme(tmp_path):
    """A user's own task, in under 40 lines, with the flags of scripts/train.py."""
    script = ROOT / "tests" / "support" / "own_task.py"
    assert len(script.read_text().splitlines()) < 40
    flags = [f"--{key}={value}" for key, value in TINY.items()]
    subprocess.run(
        [sys.executable, script, "--select=all", "--base_epochs=5", "--num_snapshots=20",
         "--collect_learning_rate=0.01", *flags, "--output_dir", tmp_path],
        check=True,
    )  # fmt: skip
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    assert report["num_parameters"] == 146
    assert report["groups"][0]["score_mean"] > 75  # chance is 50


def test_a_task_says_how_networks_are_judged(tmp_path):
    class Neither(Task):
        load_base_model, load_split, fingerprint = Blobs.load_base_model, Blobs.load_split, Blobs.fingerprint
        collate, loss = Blobs.collate, Blobs.loss

    with pytest.raises(RunError, match="Neither must be a ClassificationTask or a MeasuredTask"):
        Run(Recipe(**TINY, output_dir=str(tmp_path / "out"), select=["all"]), task=Neither())
    assert not (tmp_path / "out").exists()


def test_a_task_needs_all_its_methods():
    class Half(Task):
        def load_base_model(self):
            return Net()

    with pytest.raises(TypeError, match="abstract method"):
        Half()


# ----------------------------------------------------------------------- from a Trainer run to networks, as a user does


@pytest.mark.slow
def test_from_a_trainer_run_to_generated_networks(recorded, tmp_path):
    """README: the run has one more callback; the rest are two commands."""
    model = AutoModelForImageClassification.from_pretrained(recorded / "out" / "checkpoint-12")
    model.save_pretrained(tmp_path / "model")
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0] * 3, image_std=[1] * 3)
    processor.save_pretrained(tmp_path / "model")
    flags = [f"--{key}={value}" for key, value in TINY.items()]
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "train.py", "--model", tmp_path / "model", "--base_epochs=0",
         "--image_size=0", "--snapshots", recorded / "snapshots", "--output_dir", tmp_path / "out", *flags],
        check=True,
    )  # fmt: skip
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "generate.py", tmp_path / "out" / "pipeline", "--num_models=20",
         "--output_dir", tmp_path / "networks"],
        check=True,
    )  # fmt: skip
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
        Run(Recipe(**TINY, model="test_resnet", snapshots=str(recorded / "snapshots"), output_dir=str(tmp_path)))
    with pytest.raises(SnapshotError, match="not a parameter data set"):
        Run(Recipe(**TINY, model="test_resnet", snapshots=str(tmp_path), output_dir=str(tmp_path)))


def run_collect(*flags) -> str:
    command = [sys.executable, ROOT / "scripts" / "collect.py", *map(str, flags)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" not in result.stderr, result.stderr
    return result.stdout + result.stderr


def test_collect_lists_what_would_be_generated(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("collect", ROOT / "scripts" / "collect.py")
    collect = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(collect)
    flags = ["--model=test_resnet", "--select", "norm[-2:]", "head", "--exclude", "bias", "--latent_dim=16"]
    monkeypatch.setattr(sys, "argv", ["collect.py", "--list", *flags, f"--output_dir={tmp_path / 'out'}"])
    collect.main()
    text = capsys.readouterr().out
    model = timm.create_model("test_resnet", num_classes=10)
    layout = select_layout(model, ["norm[-2:]", "head"], "bias")
    rows = {line[2:].split()[0]: line for line in text.splitlines() if "timm_model." in line}
    assert set(rows) == {f"timm_model.{name}" for name, _ in model.named_parameters()}
    marked = [name for name, line in rows.items() if line.startswith("* ")]
    assert marked == [f"timm_model.{name}" for name in layout.names]
    assert f"* selected: {layout.num_parameters:,} of" in text and "TFLOP, about" in text
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", ["collect.py", "--list", "--model=test_resnet", "--select=nrm"])
    with pytest.raises(SystemExit, match="error: 'nrm' selects no parameter"):
        collect.main()


@pytest.mark.slow
def test_collect_and_import_as_stages_of_a_run(recorded, tmp_path):
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    resnet().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    flags = (
        *(f"--{key}={value}" for key, value in TINY.items()),
        *("--model", tmp_path / "model", "--image_size=0", "--base_epochs=0", "--max_train_samples=64"),
        *("--max_eval_samples=20", "--output_dir", tmp_path / "out"),
    )
    text = run_collect(*flags, "--import", recorded / "out")
    assert "3 snapshots of 32 numbers" in text
    assert load_snapshots(tmp_path / "out" / "snapshots")[0]["step"][:] == [4, 8, 12]
    assert "has snapshots already" in run_collect(*flags, "--import", recorded / "out")
    record = json.loads((tmp_path / "out" / "stages" / "collect.json").read_text())
    assert record["results"]["imported_from"] == [str(recorded / "out")]
