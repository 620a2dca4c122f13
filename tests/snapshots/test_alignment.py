"""Hidden units in one order, and the barrier between snapshots that lie in different basins."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.scripts import run_script
from torch import nn
from torch.func import functional_call

from pdiff_hf.layout import ParameterLayout
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.run.collecting import collect_from_files
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.trainer import execute, prepare
from pdiff_hf.selection import select_layout
from pdiff_hf.snapshots import (
    AlignmentError,
    align_snapshots,
    alignment,
    find_hidden_units,
    load_snapshots,
    parameter_matrix,
)
from pdiff_hf.snapshots.alignment import Axis
from pdiff_hf.snapshots.barrier import choose_pairs, measure_barrier
from pdiff_hf.tasks import ClassificationTask, ImageClassificationTask, Task
from pdiff_hf.training.loop import epoch_indices

ROOT = Path(__file__).parents[2]
MINIS = {"mlp_mini": 8, "convnet_mini": 16, "cnn3_mini": 20}  # with a size of images


class PlainTask(ClassificationTask):
    """For any network, on noise."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...]):
        self.network, self.shape = network, shape

    def load_base_model(self):
        return copy.deepcopy(self.network)

    def load_split(self, split):
        generator = torch.Generator().manual_seed(0)
        return torch.utils.data.TensorDataset(
            torch.randn(40, *self.shape, generator=generator), torch.randint(3, (40,), generator=generator)
        )

    def fingerprint(self, split):
        return "noise"

    def collate(self, examples):
        inputs, labels = zip(*examples, strict=True)
        return {"inputs": torch.stack(inputs), "labels": torch.stack(labels)}

    def loss(self, call, batch):
        return F.cross_entropy(self.predict(call, batch), batch["labels"])

    def predict(self, call, batch):
        return call(batch["inputs"])


def mini_task(name: str) -> ImageClassificationTask:
    size = MINIS.get(name, 16)
    return ImageClassificationTask(
        name, image_size=size, model_args={"img_size": size}, max_train_samples=600, max_eval_samples=200
    )


def other_networks(model: nn.Module, layout: ParameterLayout, count: int, seed: int = 0) -> torch.Tensor:
    """Networks with nothing in common, `(count, D)`; variances, where the layout has them, are positive."""
    generator = torch.Generator().manual_seed(seed)
    rows = 0.3 * torch.randn(count, layout.num_parameters, generator=generator)
    pieces = rows.split(layout.sizes, dim=1)
    for name, piece in zip(layout.names, pieces, strict=True):
        if name.endswith("running_var"):
            piece.abs_().add_(0.1)
    return rows


def outputs(task: Task, model: nn.Module, layout: ParameterLayout, parameters: torch.Tensor) -> torch.Tensor:
    """Logits on validation examples, `(N, B, C)`, one network after the other."""
    split = task.load_split("validation")
    batch = task.collate(split.__getitems__(list(range(30))) if hasattr(split, "__getitems__") else list(split)[:30])
    with torch.no_grad():
        return torch.stack(
            [
                task.predict(lambda *a, row=row, **k: functional_call(model, layout.unflatten(row), a, k), batch)
                for row in parameters
            ]
        )


def shuffled(task: Task, model: nn.Module, layout: ParameterLayout, parameters: torch.Tensor, seed: int = 0):
    """The networks `(N, D)`, each with the units of its hidden layers in one other order."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: tensor.clone() for name, tensor in layout.unflatten(parameters).items()}
    for units in find_hidden_units(task, model, layout):
        order = torch.randperm(units.size, generator=generator)
        for axis in units.axes:
            index = (order[:, None] * axis.block + torch.arange(axis.block)).flatten()
            tensors[axis.name] = tensors[axis.name].index_select(axis.dim + 1, index)
    return layout.flatten(tensors)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def plain_networks() -> dict[str, tuple[nn.Module, tuple[int, ...], list[Axis]]]:
    """Networks, the shape of one example, and the axes of their first hidden layer."""
    return {
        "batch norm, pooled": (
            nn.Sequential(
                nn.Conv2d(2, 6, 3, padding="same"),
                nn.BatchNorm2d(6),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(2),
                nn.Dropout(),
                nn.Conv2d(6, 5, 3),
                nn.LayerNorm(2),  # over the columns: the same weights for all units
                nn.SiLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(5, 3),
            ),
            (2, 8, 8),
            [Axis("0.weight", 0, 1), Axis("0.bias", 0, 1)]
            + [Axis(f"1.{name}", 0, 1) for name in ("weight", "bias", "running_mean", "running_var")]
            + [Axis("5.weight", 1, 1)],
        ),
        "flattened, without biases": (
            nn.Sequential(
                nn.Conv1d(1, 4, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.BatchNorm1d(24), nn.Linear(24, 3)
            ),
            (1, 8),
            [Axis("0.weight", 0, 1)]
            + [Axis(f"3.{name}", 0, 6) for name in ("weight", "bias", "running_mean", "running_var")]
            + [Axis("4.weight", 1, 6)],
        ),
        "weights of activations, units that compete": (
            nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Softmax(1), nn.Linear(6, 3)),
            (4,),
            [Axis("0.weight", 0, 1), Axis("0.bias", 0, 1), Axis("1.weight", 0, 1), Axis("3.weight", 1, 1)],
        ),
        "on every token": (
            nn.Sequential(
                nn.Linear(4, 7),
                nn.GELU(),
                nn.Linear(7, 5),
                Mean(),
                nn.Unflatten(1, (5, 1)),
                nn.Flatten(),
                nn.Linear(5, 3),
            ),
            (2, 4),
            [Axis("0.weight", 0, 1), Axis("0.bias", 0, 1), Axis("2.weight", 1, 1)],
        ),
    }


# ------------------------------------------------------------------------------------------------------------ alignment


@pytest.mark.parametrize("name", MINIS)
def test_the_minis_compute_what_they_computed(name):
    task = mini_task(name)
    model = task.load_base_model().eval()
    layout = select_layout(model, "all")
    parameters = other_networks(model, layout, 5)
    original = parameters.clone()
    aligned = align_snapshots(task, model, layout, parameters)
    assert torch.equal(parameters, original)
    torch.testing.assert_close(
        outputs(task, model, layout, aligned), outputs(task, model, layout, parameters), rtol=1e-4, atol=1e-5
    )
    # The same values in another order, and nearer to each other.
    assert torch.equal(aligned.sort(dim=1).values, parameters.sort(dim=1).values)
    assert (aligned != parameters).any(dim=1).sum() >= 4
    assert aligned.var(0).sum() < parameters.var(0).sum()


@pytest.mark.parametrize("name", MINIS)
def test_permuted_copies_are_recovered_exactly(name):
    task = mini_task(name)
    model = task.load_base_model().eval()
    layout = select_layout(model, "all")
    network = other_networks(model, layout, 1)
    copies = torch.cat([network, *(shuffled(task, model, layout, network, seed) for seed in range(5))])
    assert all((copy != network).float().mean() > 0.5 for copy in copies[1:])
    assert torch.equal(align_snapshots(task, model, layout, copies), network.expand(6, -1))


@pytest.mark.parametrize("name", plain_networks())
def test_networks_of_other_layers(name):
    network, shape, axes = plain_networks()[name]
    task = PlainTask(network, shape)
    names = [key for key, tensor in network.state_dict().items() if tensor.is_floating_point()]
    layout = ParameterLayout.from_state_dict(network.state_dict(), names)  # with running statistics
    assert find_hidden_units(task, network, layout)[0].axes == axes
    parameters = other_networks(network, layout, 4)
    reordered = shuffled(task, network, layout, parameters)
    aligned = align_snapshots(task, network, layout, parameters)
    for changed in (reordered, aligned):
        assert (changed != parameters).any()
        torch.testing.assert_close(
            outputs(task, network, layout, changed), outputs(task, network, layout, parameters), rtol=1e-4, atol=1e-5
        )


def test_networks_that_do_not_fit_into_memory_together(monkeypatch):
    task = mini_task("mlp_mini")
    model = task.load_base_model()
    layout = select_layout(model, "all")
    parameters = other_networks(model, layout, 6)
    together = align_snapshots(task, model, layout, parameters)
    monkeypatch.setattr(alignment, "CHUNK_SIZE", 2 * layout.num_parameters)
    assert torch.equal(align_snapshots(task, model, layout, parameters), together)


def test_the_order_of_outputs_and_inputs_is_left_alone():
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    layout = select_layout(network, "all")
    (units,) = find_hidden_units(PlainTask(network, (4,)), network, layout)
    assert (units.size, units.axes) == (6, [Axis("0.weight", 0, 1), Axis("0.bias", 0, 1), Axis("2.weight", 1, 1)])


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.middle(torch.relu(self.middle(self.first(x)))))


class Scaled(nn.Module):
    """With weights that follow from others."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.first(x))


ALONE = r"the hidden units between the modules '%s' and '%s' cannot be reordered: something else"
REFUSED = {
    "residual connection": (
        lambda: mini_task("resnet_mini").load_base_model(),
        None,
        ALONE % ("timm_model.stages.0.conv", "timm_model.stages.1.block.conv1"),
    ),
    "attention": (lambda: mini_task("vit_mini").load_base_model(), None, ALONE % ("timm_model.patch_embed.proj", ".*")),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
        (4,),
        "'1.running_mean' is a statistic of one network",
    ),
    "grouped convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(16, 3)),
        (2, 2, 2),
        ALONE % (0, 1),
    ),
    "linear layer over positions": (
        lambda: nn.Sequential(nn.Conv1d(1, 4, 1), nn.Linear(8, 5), nn.Flatten(), nn.Linear(20, 3)),
        (1, 8),
        ALONE % (0, 1),
    ),
    "units that are averaged": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.AdaptiveAvgPool1d(3), nn.Linear(3, 3)),
        (2, 4),
        ALONE % (0, 2),
    ),
    "units that are split": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.AvgPool1d(3), nn.Flatten(), nn.Linear(2, 3)),
        (4,),
        ALONE % (0, 4),
    ),
    "groups of channels": (
        lambda: nn.Sequential(nn.Conv1d(1, 4, 1), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3)),
        (1, 4),
        ALONE % (0, 3),
    ),
    "used twice": (Twice, (4,), "module 'middle' is used more than once"),
    "computed weights": (Scaled, (4,), ALONE % ("first", "last")),
    "no hidden layer": (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (4,), "has no hidden layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    make, shape, message = REFUSED[case]
    network = make()
    task = PlainTask(network, shape) if shape else mini_task("resnet_mini" if case.startswith("res") else "vit_mini")
    layout = select_layout(network, "all")
    with pytest.raises(AlignmentError, match=message):
        align_snapshots(task, network, layout, other_networks(network, layout, 2))


def test_a_layout_without_a_tensor_that_is_reordered_is_refused():
    task = mini_task("mlp_mini")
    model = task.load_base_model()
    layout = select_layout(model, "all", exclude="norm[0]")
    with pytest.raises(AlignmentError, match=r"do not hold 'timm_model.stages.0.norm.weight'.*--select all"):
        align_snapshots(task, model, layout, other_networks(model, layout, 2))


# --------------------------------------------------------------------------------------------------------------- basins


def trained(task: Task, seed: int) -> list[dict[str, torch.Tensor]]:
    """The last states of a short training run from weights of its own."""
    torch.manual_seed(seed)
    model = task.load_base_model().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    split = task.load_split("train")
    batches = epoch_indices(len(split), 64, seed)
    states = []
    for _ in range(150):
        loss = task.loss(model, split.__getitems__(next(batches).tolist()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        states = [*states, {name: tensor.clone() for name, tensor in model.state_dict().items()}][-3:]
    return states


@pytest.fixture(scope="module")
def basins(tmp_path_factory):
    """Folders of state dicts: two runs, `run` and `second`; the first of `run` alone, and the others permuted."""
    folder = tmp_path_factory.mktemp("basins")
    task = mini_task("mlp_mini")
    model = task.load_base_model()
    layout = select_layout(model, "all")
    first, second = trained(task, 0), trained(task, 1)
    moved = shuffled(task, model, layout, torch.stack([layout.flatten(state) for state in first[1:]]))
    moved = [layout.unflatten(row) for row in moved]
    for name, states in {"run": first, "second": second, "first": first[:1], "moved": moved}.items():
        (folder / name).mkdir()
        for i, state in enumerate(states):
            state = {key: tensor.contiguous() for key, tensor in state.items()}
            save_file(state, folder / name / f"step-{i}.safetensors")
    return folder


def imported(folder, paths, align=False) -> dict:
    """What a run records about the barrier of snapshots from files."""
    recipe = PDiffConfig(
        output_dir=str(folder),
        model="mlp_mini",
        model_args='{"img_size": 8}',
        max_train_samples=600,
        max_eval_samples=200,
        base_epochs=0,
        select=["all"],
        latent_dim=2,
        stages=["base"],
    )
    run = prepare(recipe)
    execute(run)
    with run.lock():
        collect_from_files(run, [str(path) for path in paths], align=align)
    record = json.loads((folder / "stages" / "collect.json").read_text())["results"]
    assert record["aligned"] == align and len(record["barrier"]["accuracies"]) == 5
    return record["barrier"]


def warnings(caplog) -> list[str]:
    """Those of basins: three steps in a row hardly differ, which has a warning of its own."""
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [message for message in messages if "hardly differ" not in message]


def test_a_run_in_one_basin_is_not_warned_of(basins, tmp_path, caplog):
    caplog.set_level(logging.INFO, "pdiff_hf")
    barrier = imported(tmp_path / "out", [basins / "run"])
    assert barrier["barrier"] <= 2 and not warnings(caplog)
    assert any("lie in one basin" in record.getMessage() for record in caplog.records)


def test_independent_runs_are_warned_of_once_with_the_figure(basins, tmp_path, caplog):
    barrier = imported(tmp_path / "out", [basins / "run", basins / "second"])
    assert barrier["barrier"] > 10 and barrier["loss_barrier"] > 0.1
    (message,) = warnings(caplog)
    assert "lie in different basins" in message and f"falls up to {barrier['barrier']:.1f} points" in message
    assert "--align" in message
    assert {row < 3 for row in barrier["snapshots"]} == {True, False}  # one of each run


def test_alignment_brings_permuted_snapshots_back_into_one_basin(basins, tmp_path, caplog):
    paths = [basins / "first", basins / "moved"]
    assert imported(tmp_path / "as_they_are", paths)["barrier"] > 10
    assert len(warnings(caplog)) == 1
    caplog.clear()
    assert imported(tmp_path / "aligned", paths, align=True)["barrier"] <= 2
    assert not warnings(caplog)
    dataset, layout = load_snapshots(tmp_path / "aligned" / "snapshots")
    assert dataset["step"][:] == [0, 0, 1] and dataset["seed"][:] == [0, 1, 1]
    imported(tmp_path / "never_moved", [basins / "run"])
    expected = parameter_matrix(*load_snapshots(tmp_path / "never_moved" / "snapshots"))
    assert torch.equal(parameter_matrix(dataset, layout), expected)


def test_a_network_that_cannot_be_aligned_is_refused_before_files_are_read(tmp_path):
    recipe = PDiffConfig(
        output_dir=str(tmp_path / "out"), model="test_resnet", base_epochs=0, latent_dim=2, stages=["base"]
    )
    run = prepare(recipe)
    execute(run)
    with pytest.raises(AlignmentError, match="cannot be reordered: something else"):
        collect_from_files(run, [str(tmp_path / "not_there")], align=True)
    assert not run.is_finished("collect")


def test_the_script_aligns_what_it_imports(basins, tmp_path, monkeypatch, capsys):
    flags = ["--model=mlp_mini", '--model_args={"img_size": 8}', "--base_epochs=0", "--select=all", "--latent_dim=2"]
    flags += [f"--output_dir={tmp_path / 'out'}", "--align"]
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "collect.py", *flags)
    assert "--align needs --import" in capsys.readouterr().err
    run_script(monkeypatch, "collect.py", *flags, "--import", basins / "first", basins / "moved")
    assert "3 snapshots of 2,458 parameters" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "stages" / "collect.json").read_text())
    assert record["results"]["aligned"] and record["results"]["barrier"]["barrier"] <= 2


def test_the_barrier_is_what_a_plain_loop_finds(basins):
    task = mini_task("mlp_mini")
    model = task.load_base_model().eval()
    layout = select_layout(model, "all")
    network = copy.deepcopy(model)
    rows = other_networks(model, layout, 2)
    barrier = measure_barrier(task, NetworkRunner(model, layout), *rows, num_points=6)
    split = task.load_split("validation")
    batch = split.__getitems__(list(range(len(split))))
    accuracies, losses = [], []
    for i in range(6):
        network.load_state_dict(layout.unflatten(rows[0] + i / 5 * (rows[1] - rows[0])))
        with torch.no_grad():
            logits = network(pixel_values=batch["pixel_values"]).logits
        accuracies.append(100 * (logits.argmax(-1) == batch["labels"]).double().mean().item())
        losses.append(F.cross_entropy(logits, batch["labels"]).item())
    assert barrier.accuracies == pytest.approx(accuracies, abs=1e-4)
    assert barrier.losses == pytest.approx(losses, rel=1e-4)
    expected = max((1 - i / 5) * accuracies[0] + i / 5 * accuracies[5] - accuracies[i] for i in range(6))
    assert barrier.barrier == pytest.approx(expected, abs=1e-4)
    expected = max(losses[i] - (1 - i / 5) * losses[0] - i / 5 * losses[5] for i in range(6))
    assert barrier.loss_barrier == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_pairs_are_far_apart_and_of_different_runs():
    parameters = torch.tensor([[0.0], [1.0], [2.0], [50.0], [3.0], [4.0]])
    assert choose_pairs(parameters, [0, 0, 0, 0, 0, 0]) == [(0, 3)]
    assert choose_pairs(parameters, [0, 0, 1, 1, 2, 3]) == [(0, 3), (1, 3), (1, 4)]
    assert choose_pairs(parameters[:2], [5, 6]) == [(0, 1)]
