"""Conditions of networks from elsewhere: from a table, from recorded runs, and what is refused."""

import pytest
import torch
from safetensors.torch import save_file
from support.blobs import Net
from support.scripts import run_script
from torch import nn

from pdiff_hf.layout import LayoutError
from pdiff_hf.models import ConditionError
from pdiff_hf.models.condition import Fields
from pdiff_hf.selection import select_layout
from pdiff_hf.snapshots import SnapshotError, SnapshotRecorder, import_snapshots, load_snapshots, parameter_matrix
from pdiff_hf.snapshots.conditions import read_conditions
from pdiff_hf.snapshots.dataset import load_fields


def write(tmp_path, text: str):
    path = tmp_path / "table.csv"
    path.write_text(text)
    return path


def test_columns_of_every_type(tmp_path):
    text = (
        "network,angle:angle,rank,domain,label:category,embedding\n"
        'a.safetensors,30,8,news,1,"[0.5, 1]"\n'
        '"b, c",-30.5,16,,2,\n'
        'org/d,,8,law,1,"[1, 2]"\n'
    )
    conditions, fields = read_conditions(write(tmp_path, text))
    assert conditions["b, c"] == {"angle": -30.5, "rank": 16, "domain": None, "label": "2", "embedding": None}
    assert conditions["org/d"] == {"angle": None, "rank": 8, "domain": "law", "label": "1", "embedding": [1, 2]}
    assert {name: str(field) for name, field in fields.items()} == {
        "angle": "an angle with period 360",
        "domain": "one of law, news",
        "embedding": "2 numbers",
        "label": "one of 1, 2",
        "rank": "a number from 8 to 16",
    }
    assert fields.table(conditions.values()).shape == (3, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("network\na\n", "needs a header, a first column that names networks, and a column for each field"),
        ("n,x\na,1\na,2\n", "names 'a' more than once"),
        ("n,x\na,1\nb\n", "row 3 has 1 cells, and the header has 2"),
        ("n,x:angle\na,north\n", "column 'x:angle' of .* must hold numbers"),
        ("n,x:angel\na,1\n", "must be angle or category, got 'angel'"),
        ("n,x,y\na,,1\nb,,2\n", "column 'x' of .* is empty"),
        ("n,x\na,3\nb,3\n", "is 3 for all networks, which says nothing"),
        ('n,x\na,"[1]"\nb,"[1,2]"\n', r"holds lists of \[1, 2\] numbers"),
    ],
)
def test_what_is_refused(tmp_path, text, message):
    with pytest.raises(ConditionError, match=message):
        read_conditions(write(tmp_path, text))


ANGLES = {"angle": {"type": "angle"}}
LAYOUT = select_layout(Net(), "head")


def record(folder, condition, fields=ANGLES) -> None:
    network = Net()
    with SnapshotRecorder(network, folder, "head", condition=condition, fields=fields) as recorder:
        for step in (1, 2):
            nn.init.normal_(network.head.weight)
            recorder.snapshot(step)


def test_recorded_runs_are_imported_with_their_conditions(tmp_path):
    for i in range(2):
        record(tmp_path / f"run{i}", {"angle": 30.0 * i})
    import_snapshots([tmp_path / "run0", tmp_path / "run1"], LAYOUT, tmp_path / "all")
    dataset, layout = load_snapshots(tmp_path / "all")
    assert load_fields(tmp_path / "all").to_dict() == Fields(ANGLES).to_dict()
    assert [dataset[name][:] for name in ("angle", "step", "seed")] == [[0, 0, 30, 30], [1, 2, 1, 2], [0, 0, 1, 1]]
    runs = [parameter_matrix(*load_snapshots(tmp_path / f"run{i}")) for i in range(2)]
    assert torch.equal(parameter_matrix(dataset, layout), torch.cat(runs))


def test_recorders_and_imports_refuse_conditions_that_do_not_fit(tmp_path):
    with pytest.raises(ConditionError, match="needs fields="):
        record(tmp_path / "a", {"angle": 30.0}, fields=None)
    with pytest.raises(ConditionError, match="no field 'angel'"):
        record(tmp_path / "a", {"angel": 30.0})
    record(tmp_path / "a", {"angle": 30.0})
    record(tmp_path / "b", {"hue": 30.0}, fields={"hue": {"type": "angle"}})
    with pytest.raises(SnapshotError, match=r"'.*b': the conditions of the data set have the fields 'hue'"):
        import_snapshots([tmp_path / "a", tmp_path / "b"], LAYOUT, tmp_path / "all")
    with pytest.raises(LayoutError, match="other tensors"):
        import_snapshots([tmp_path / "a"], select_layout(Net(), "norm"), tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_a_table_names_the_networks_that_collect_imports(tmp_path, monkeypatch):
    networks = [Net() for _ in range(3)]
    for i, network in enumerate(networks):
        save_file(network.state_dict(), tmp_path / f"net-{i}.safetensors")
    table = write(tmp_path, "network,angle:angle\nnet-2.safetensors,90\nnet-0.safetensors,\nnet-1.safetensors,10\n")
    flags = ["--task", "support.blobs:Blobs", "--base_epochs", 0, "--select", "head", "--latent_dim", 2]
    run_script(monkeypatch, "collect.py", *flags, "--conditions", table, "--output_dir", tmp_path / "out")
    dataset, layout = load_snapshots(tmp_path / "out" / "snapshots")
    assert dataset["angle"][:] == [90, None, 10] and dataset["step"][:] == [2, 0, 1]
    expected = torch.stack([LAYOUT.flatten(networks[i].state_dict()) for i in (2, 0, 1)])
    assert torch.equal(parameter_matrix(dataset, layout), expected)
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "collect.py", *flags, "--conditions", table, "--import", tmp_path)
