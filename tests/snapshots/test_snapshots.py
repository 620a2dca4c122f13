"""The parameter data set: written row by row, read back exactly, and what it refuses."""

import datasets
import pytest
import torch
from datasets.arrow_writer import ArrowWriter

from pdiff_hf.layout import ParameterLayout
from pdiff_hf.snapshots import SnapshotError, SnapshotWriter, load_snapshots, parameter_matrix
from pdiff_hf.snapshots.dataset import DATA_FILE, LAYOUT_FEATURES, LAYOUT_FILE

LAYOUT = ParameterLayout(("conv.weight", "bias"), ((2, 3), (4,)), ("float32", "float32"))


def write(folder, parameters, layout=LAYOUT):
    with SnapshotWriter(folder, layout, metrics=("validation_accuracy",)) as writer:
        for step, row in enumerate(parameters):
            writer.write(row, step=step, seed=3, validation_accuracy=90 + step / 10)
    return folder


def write_layout(folder, *tensors):
    with ArrowWriter(path=str(folder / LAYOUT_FILE), features=LAYOUT_FEATURES) as writer:
        for name, shape, dtype in tensors:
            writer.write({"name": name, "shape": shape, "dtype": dtype})
        writer.finalize()


def test_round_trip(tmp_path):
    parameters = torch.randn(25, 10)
    dataset, layout = load_snapshots(write(tmp_path / "snapshots", parameters))
    assert layout == LAYOUT
    assert torch.equal(parameter_matrix(dataset, layout), parameters)
    assert dataset.features["parameters"] == datasets.List(datasets.Value("float32"), length=10)
    assert dataset["step"][:] == list(range(25)) and set(dataset["seed"][:]) == {3}
    assert dataset[4]["validation_accuracy"] == pytest.approx(90.4)
    assert torch.equal(parameter_matrix(dataset.select([3, 1]), layout), parameters[[3, 1]])


def test_nothing_is_left_of_a_block_that_fails(tmp_path):
    with pytest.raises(KeyError), SnapshotWriter(tmp_path / "snapshots", LAYOUT) as writer:
        writer.write(torch.zeros(10), step=0, seed=0)
        raise KeyError
    with pytest.raises(SnapshotError, match="no snapshot was written"), SnapshotWriter(tmp_path / "snapshots", LAYOUT):
        pass
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_refused(tmp_path):
    with SnapshotWriter(tmp_path / "snapshots", LAYOUT) as writer:
        writer.write(torch.zeros(10), step=0, seed=0)
        bad = torch.ones(10)
        bad[7] = float("nan")
        with pytest.raises(SnapshotError, match="snapshot 1 is not finite: tensor 'bias' holds nan"):
            writer.write(bad, step=1, seed=0)
        with pytest.raises(SnapshotError, match=r"snapshot 1 has shape \(9,\)"):
            writer.write(torch.ones(9), step=1, seed=0)
        with pytest.raises(SnapshotError, match="snapshot 1 .* equals snapshot 0"):
            writer.write(torch.zeros(10), step=1, seed=0)
    with pytest.raises(SnapshotError, match="exists already"), SnapshotWriter(tmp_path / "snapshots", LAYOUT):
        pass


def test_data_sets_that_are_refused(tmp_path):
    folder = write(tmp_path / "one", torch.randn(1, 10))
    with pytest.raises(SnapshotError, match="at least 2 snapshots .* got 1"):
        parameter_matrix(*load_snapshots(folder))
    with pytest.raises(SnapshotError, match="not a parameter data set"):
        load_snapshots(tmp_path)
    write_layout(folder, ("a", (3,), "float32"))
    with pytest.raises(SnapshotError, match="do not fit their layout of 3 parameters"):
        load_snapshots(folder)
    write_layout(folder, ("a", (3,), "int64"))
    with pytest.raises(SnapshotError, match="layout of .* cannot be used: tensor 'a' is int64"):
        load_snapshots(folder)


def test_rows_of_other_people_are_checked_too(tmp_path):
    features = datasets.Features(parameters=datasets.List(datasets.Value("float32"), length=10))
    rows = torch.randn(3, 10)
    rows[2, 1] = float("inf")
    dataset = datasets.Dataset.from_dict({"parameters": rows.tolist()}, features=features)
    with pytest.raises(SnapshotError, match="snapshot 2 is not finite: tensor 'conv.weight' holds inf"):
        parameter_matrix(dataset, LAYOUT)
    rows[2] = rows[0]
    dataset = datasets.Dataset.from_dict({"parameters": rows.tolist()}, features=features)
    with pytest.raises(SnapshotError, match="snapshot 2 equals snapshot 0"):
        parameter_matrix(dataset, LAYOUT)


def test_rows_are_written_out_as_they_come(tmp_path):
    layout = ParameterLayout(("w",), ((2**20,),), ("float32",))  # 4 MB a row, 16 rows in the buffer
    with SnapshotWriter(tmp_path / "snapshots", layout) as writer:
        for step in range(20):
            writer.write(torch.full((2**20,), float(step)), step=step, seed=0)
        assert (tmp_path / ".snapshots.part" / DATA_FILE).stat().st_size > 60e6
    assert torch.equal(parameter_matrix(*load_snapshots(tmp_path / "snapshots"))[:, 5], torch.arange(20.0))
