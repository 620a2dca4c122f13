"""Snapshots by fine-tuning."""

import pytest
import torch
from accelerate import Accelerator
from support.blobs import Blobs, Net

from pdiff_hf.selection import select_layout
from pdiff_hf.snapshots import CollectArguments, collect_snapshots, load_snapshots, parameter_matrix
from pdiff_hf.training.loop import epoch_indices

LAYOUT = select_layout(Net(), ["norm", "head"])


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


def test_statistics_of_batch_norm_follow_the_data_if_they_are_selected(tmp_path):
    """Against a plain loop over the same examples."""
    task, args = Blobs(), {"num_snapshots": 6, "batch_size": 16, "learning_rate": 0.01, "weight_decay": 0.0}
    torch.manual_seed(0)
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layout = select_layout(model, "norm", batch_norm_statistics=True)
    accelerator = Accelerator(cpu=True)
    collect_snapshots(accelerator, task, model, layout, tmp_path / "all", CollectArguments(**args), seed=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    dataset, layout = load_snapshots(tmp_path / "all")
    expected, scores = [], []
    model.train()
    optimizer = torch.optim.AdamW([model.norm.weight, model.norm.bias], 0.01, weight_decay=0.0)
    batches = epoch_indices(len(task.load_split("train")), 16, 3)
    points, labels = task.load_split("validation").tensors
    for _ in range(6):
        batch = task.collate([task.load_split("train")[i] for i in next(batches)])
        optimizer.zero_grad()
        task.loss(model.train(), batch).backward()
        optimizer.step()
        expected.append(layout.flatten(model.state_dict()))
        scores.append(100 * (model.eval()(points).argmax(1) == labels).float().mean().item())
    torch.testing.assert_close(parameter_matrix(dataset, layout), torch.stack(expected))
    assert dataset["validation_accuracy"][:] == pytest.approx(scores)
