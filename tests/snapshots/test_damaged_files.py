"""Damaged and hostile files of networks and parameter data sets; see `support/damage.py`."""

import json
import math
import os
import pickle
import resource
import shutil
import struct
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import save_file
from support.damage import NAMES, changed, damaged, damaged_safetensors, fuzz, only
from transformers import AutoModelForImageClassification, ResNetConfig

from pdiff_hf import LayoutError, ParameterLayout
from pdiff_hf.snapshots import SnapshotError, SnapshotWriter, import_snapshots, load_snapshots, parameter_matrix
from pdiff_hf.snapshots.dataset import DATA_FILE, LAYOUT_FILE
from pdiff_hf.snapshots.files import read_networks
from pdiff_hf.utils import errors as limits

TENSORS = {
    "block.conv.weight": torch.arange(24.0).reshape(2, 3, 4),
    "block.bias": torch.tensor([1.5, -2.0]).bfloat16(),
    "half": torch.tensor(0.25, dtype=torch.float16),
    "quantized": torch.tensor([-128, 127], dtype=torch.int8),
    "empty": torch.zeros(0, 5),
    "Gewicht/ü.☃": torch.tensor([[1e-45, 3e38]]),
}
LAYOUT = ParameterLayout.from_state_dict(TENSORS)


def try_import(path: Path) -> None:
    """Also that the data set is there if and only if there was no error, and holds what `read_networks` says."""
    target = Path("imported")
    shutil.rmtree(target, ignore_errors=True)
    with only(SnapshotError, LayoutError):
        import_snapshots([path], LAYOUT, target)
        dataset, layout = load_snapshots(target)
        assert layout == LAYOUT
        assert torch.equal(parameter_matrix(dataset, layout, minimum=1), read_networks(path, LAYOUT))
        shutil.rmtree(target)
    assert not target.exists() and not list(Path().glob(".imported*"))


def test_damaged_safetensors_files(room, full):
    save_file(TENSORS, "network.safetensors")
    content = Path("network.safetensors").read_bytes()

    @given(damaged_safetensors(content))
    def test(case):
        Path("network.safetensors").write_bytes(case)
        try_import(Path("network.safetensors"))

    fuzz(test, 3000, full)


class Harmful:
    """Leaves a file behind when it is unpickled by a reader that runs what a pickle says."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def rewritten(file: Path, record: str, content: bytes, **kwargs) -> None:
    """The archive `file` with one record replaced, or added."""
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", **kwargs) as archive:
        for name, old in (records | {record: content}).items():
            archive.writestr(name, content if name == record else old)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pickles(room, full, zipped):
    file = Path("network.pt")
    torch.save({"model": TENSORS, "epoch": 3}, file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    if zipped:
        with zipfile.ZipFile(file) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
        pickled = next(name for name in records if name.endswith("data.pkl"))
        cases = st.one_of(
            st.tuples(st.none(), damaged(whole)),
            st.tuples(st.just(pickled), damaged(records[pickled])),
            st.tuples(st.just(pickled), damaged(records[pickled])),
            st.sampled_from(sorted(records)).flatmap(lambda name: st.tuples(st.just(name), damaged(records[name]))),
            st.tuples(NAMES.filter(lambda name: name.partition("\0")[0]), st.binary(max_size=8)),
        )
    else:
        cases = st.tuples(st.none(), damaged(whole))

    @given(cases)
    def test(case):
        record, content = case
        file.write_bytes(content if record is None else whole)
        if record is not None:
            rewritten(file, record, content)
        try_import(file)

    fuzz(test, 1500, full)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_pickles_that_run_code_do_not(room, suffix, zipped):
    target = str(room / "canary")
    calls = [
        (os.system, f"touch {target}"),
        (eval, f"open({target!r}, 'w')"),
        (exec, f"open({target!r}, 'w')"),
        (Path.touch, Path(target)),
        (open, target, "w"),
        (shutil.copytree, str(room), target),
        (getattr, "canary", "upper"),
        (torch.load, target),
        (torch.save, {}, target),
        (torch.hub.load, str(room), "canary"),
    ]
    for call in calls:
        for content in (Harmful(*call), {"state_dict": TENSORS | {"extra": Harmful(*call)}}, {Harmful(*call): TENSORS}):
            file = Path(f"network{suffix}")
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            with pytest.raises(SnapshotError, match="holds more than tensors.*, and reading it could run code"):
                import_snapshots([file], LAYOUT, "imported")
            file.write_bytes(pickle.dumps(content))
            with pytest.raises(SnapshotError, match="holds more than tensors|is not a whole file of torch.save"):
                import_snapshots([file], LAYOUT, "imported")
            file.unlink()


def test_archives_that_grow_are_not_unpacked(room):
    torch.save(TENSORS, "network.pt")
    with zipfile.ZipFile("network.pt") as archive:
        names = [name for name in archive.namelist() if name.endswith(("data.pkl", "data/0"))]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in names:
        torch.save(TENSORS, "network.pt")
        rewritten(Path("network.pt"), name, bytes(2**28), compression=zipfile.ZIP_DEFLATED)
        for _ in range(6):  # no reader may unpack them one after the other either
            with pytest.raises(SnapshotError, match="would take 268,43.* files of torch.save are not compressed"):
                import_snapshots(["network.pt"], LAYOUT, "imported")
    # What was packed here took some hundred megabytes; to read it would take as much again each time.
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 3 * 2**28


def test_tensors_that_are_claimed_but_not_there(room):
    def claim(shape, dtype="F32", end=None):
        size = math.prod(shape) * 4 if end is None else end
        header = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
        return struct.pack("<Q", len(header)) + header + bytes(64)

    for shape, end in [((2**31,), None), ((2**31 + 5,), 64), ((2**62, 4), 64), ((2**40, 0), 0), ((2**33,), 2**63)]:
        Path("w.safetensors").write_bytes(claim(shape, end=end))
        with pytest.raises((SnapshotError, LayoutError)):
            import_snapshots(["w.safetensors"], ParameterLayout(("w",), ((16,),), ("float32",)), "imported")
    # A view of one number can have any shape without being large, until it is copied.
    torch.save({"w": torch.zeros(1).expand(2**40)}, "w.pt")
    with pytest.raises(LayoutError, match="has shape .1099511627776,. there and .16,. in the layout"):
        import_snapshots(["w.pt"], ParameterLayout(("w",), ((16,),), ("float32",)), "imported")


def test_tensors_of_kinds_that_cannot_be_read(room):
    whole = torch.eye(4)
    quantized = torch.quantize_per_tensor(whole, 0.1, 0, torch.qint8)
    dtypes = (torch.complex64, torch.float64, torch.float8_e4m3fn, torch.int64)
    for tensor in (whole.to_sparse(), whole.to_sparse_csr(), quantized, whole.to("meta"), *map(whole.to, dtypes)):
        torch.save({"w": tensor}, "w.pt")
        with pytest.raises(LayoutError, match="tensor 'w' is "):
            import_snapshots(["w.pt"], ParameterLayout(("w",), ((4, 4),), ("float32",)), "imported")


def test_damaged_folders(room, full):
    """Shards with their index, checkpoints of transformers, names and kinds of files that no one expects."""
    names = list(TENSORS)
    Path("whole").mkdir()
    save_file({name: TENSORS[name] for name in names[:3]}, "whole/a.safetensors")
    save_file({name: TENSORS[name] for name in names[3:]}, "whole/b.safetensors")
    index = {"weight_map": {name: f"{'a' if name in names[:3] else 'b'}.safetensors" for name in names}}
    config = ResNetConfig(embedding_size=4, hidden_sizes=[8], depths=[1], layer_type="basic").to_dict()
    config["architectures"] = ["ResNetForImageClassification"]
    oddities = st.sampled_from(["link", "dangling", "loop", "folder", "pipe", "empty"])
    names = [
        "checkpoint-1",
        "checkpoint-0010",
        "checkpoint-²",
        "checkpoint-٣",
        "step-²",
        "9" * 200,
        ".hidden",
        "ü.☃ \n",
    ]
    names += [
        "model.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "a.pt",
        "b.pth",
        "network-²1.safetensors",
    ]
    child_names = st.sampled_from(names)

    @given(
        st.just(index) | changed(index),
        st.just(config) | changed(config),
        st.booleans(),
        st.lists(st.tuples(child_names, oddities), max_size=3),
    )
    def test(index, config, with_config, children):
        shutil.rmtree("case", ignore_errors=True)
        shutil.copytree("whole", "case")
        Path("case/model.safetensors.index.json").write_text(json.dumps(index))
        if with_config:
            Path("case/config.json").write_text(json.dumps(config))
        for name, kind in children:
            child = Path("case", name)
            if child.exists() or child.is_symlink():
                shutil.rmtree(child) if child.is_dir() else child.unlink()
            if kind == "link":
                child.symlink_to(Path("whole/a.safetensors").absolute())
            elif kind == "dangling":
                child.symlink_to("../../canary")
            elif kind == "loop":
                child.symlink_to(name)
            elif kind == "folder":
                shutil.copytree("whole", child)
            elif kind == "pipe":
                os.mkfifo(child)
            else:
                child.touch()
        try_import(Path("case"))

    fuzz(test, 1500, full)


def test_damaged_networks_of_transformers(room, full, quiet):
    """A tensor that the file does not have is looked for in the network that transformers makes of the folder."""
    config = ResNetConfig(embedding_size=4, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=2)
    AutoModelForImageClassification.from_config(config).save_pretrained("whole")
    layout = ParameterLayout(("classifier.1.bias", "elsewhere"), ((2,), (2,)), ("float32", "float32"))
    contents = {name: Path("whole", name).read_bytes() for name in ("config.json", "model.safetensors")}
    configs = st.tuples(
        st.just("config.json"), changed(json.loads(contents["config.json"])).map(json.dumps).map(str.encode)
    )
    weights = st.tuples(st.just("model.safetensors"), damaged_safetensors(contents["model.safetensors"]))

    @given(configs | configs | weights)
    def test(case):
        name, content = case
        for whole, old in contents.items():
            Path("whole", whole).write_bytes(content if whole == name else old)
        with only(SnapshotError, LayoutError):
            read_networks("whole", layout)
            raise AssertionError("there is no tensor 'elsewhere'")

    fuzz(test, 750, full)


@pytest.mark.parametrize("depth", [10**6, 10**12])
def test_a_network_of_endless_layers_is_not_built(room, monkeypatch, depth):
    monkeypatch.setattr(limits, "MAX_MODULES", 5000)  # the first 100,000 take some seconds
    config = ResNetConfig(embedding_size=4, hidden_sizes=[8], depths=[1], layer_type="basic")
    AutoModelForImageClassification.from_config(config).save_pretrained("whole")
    config = json.loads(Path("whole/config.json").read_text()) | {"depths": [depth]}
    Path("whole/config.json").write_text(json.dumps(config))
    with pytest.raises(SnapshotError, match="transformers cannot load it .*network of more than 5,000 modules"):
        read_networks("whole", LAYOUT)


def test_a_link_in_the_way_of_a_data_set_is_not_followed(room, tmp_path):
    save_file(TENSORS, "network.safetensors")
    Path("elsewhere").mkdir()
    Path(".imported.part").symlink_to("elsewhere")
    with pytest.raises(FileExistsError):
        import_snapshots(["network.safetensors"], LAYOUT, "imported")
    assert list(Path("elsewhere").iterdir()) == []


def test_code_beside_a_checkpoint_does_not_run(room):
    """`auto_map` is how a checkpoint of transformers names code of its own."""
    save_file({"other": torch.zeros(1)}, "model.safetensors")
    Path("evil.py").write_text(f"open({str(room / 'canary')!r}, 'w')\n")
    config = {
        "model_type": "evil",
        "architectures": ["Evil"],
        "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"},
    }
    for extra in ({}, {"model_type": "resnet"}, {"architectures": ["evil.M"]}, {"architectures": ["pipeline"]}):
        Path("config.json").write_text(json.dumps(config | extra))
        with pytest.raises((SnapshotError, LayoutError)):
            import_snapshots([room], LAYOUT, "imported")


def write_snapshots(folder: Path) -> None:
    torch.manual_seed(0)
    with SnapshotWriter(folder, LAYOUT, metrics=("accuracy",)) as writer:
        for step in range(3):
            row = LAYOUT.unflatten(torch.randn(LAYOUT.num_parameters))
            writer.write(LAYOUT.flatten(row), step=step, seed=0, accuracy=90.0)


def test_damaged_data_sets(room, full):
    write_snapshots(Path("whole"))
    contents = {name: Path("whole", name).read_bytes() for name in (DATA_FILE, LAYOUT_FILE)}
    tables = {name: pa.ipc.open_stream(content).read_all() for name, content in contents.items()}

    @st.composite
    def cases(draw):
        name = draw(st.sampled_from(sorted(contents)))
        if draw(st.booleans()):
            return name, draw(damaged(contents[name]))
        # What datasets says of the columns, and whole tables of other columns.
        table = tables[name]
        features = json.loads(table.schema.metadata[b"huggingface"])
        if draw(st.booleans()):
            table = table.replace_schema_metadata({"huggingface": json.dumps(draw(changed(features)))})
        else:
            column = draw(st.integers(0, table.num_columns - 1))
            kind = draw(st.sampled_from(["drop", "rename", "nulls", "strings", "lists", "halved"]))
            field = table.schema.field(column).name
            new = {
                "nulls": pa.nulls(len(table), table.schema.field(column).type),
                "strings": pa.array(["x"] * len(table)),
                "lists": pa.array([[1.0]] * len(table)),
            }
            if kind == "drop":
                table = table.remove_column(column)
            elif kind == "rename":
                table = table.rename_columns([draw(NAMES) if c == field else c for c in table.column_names])
            elif kind == "halved":
                table = table.slice(0, 1)
            else:
                table = table.set_column(column, field, new[kind])
            if draw(st.booleans()):
                table = table.replace_schema_metadata(None)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return name, sink.getvalue().to_pybytes()

    @given(cases())
    def test(case):
        name, content = case
        shutil.rmtree("case", ignore_errors=True)
        shutil.copytree("whole", "case")
        Path("case", name).write_bytes(content)
        with only(SnapshotError):
            matrix = parameter_matrix(*load_snapshots("case"))
            assert matrix.isfinite().all() and matrix.dtype == torch.float32

    fuzz(test, 1500, full)
