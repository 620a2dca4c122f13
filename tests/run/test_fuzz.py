"""
Files that are damaged or made to do harm: whatever is read either works or ends in an error that the docstrings name.
Nothing crashes, hangs, takes all memory, runs code from a file, or writes outside the folder that it was given.

Every case starts from files that are whole, and changes some of their bytes, or some of the values inside them. There
are some 1,150 cases, the same in every run; with `pytest --full`, 17,250.
"""

import contextlib
import copy
import json
import math
import os
import pickle
import resource
import shutil
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import pyarrow as pa
import pytest
import torch
import transformers
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.pipelines import make_pipeline, sample
from support.scripts import generate
from transformers import AutoConfig, AutoModelForImageClassification, ResNetConfig

from pdiff_hf import LayoutError, ParameterLayout, PDiffPipeline, select_parameters
from pdiff_hf.hub.push import HubError, pipeline_files
from pdiff_hf.layout import EXACT_DTYPES
from pdiff_hf.run.recipe import Recipe, RecipeParser
from pdiff_hf.snapshots import SnapshotError, SnapshotWriter, import_snapshots, load_snapshots, parameter_matrix
from pdiff_hf.snapshots.dataset import DATA_FILE, LAYOUT_FILE
from pdiff_hf.snapshots.files import read_networks
from pdiff_hf.utils import errors as limits

# No case takes more memory than this beyond what the process had, and none more seconds: far above what any needs.
MEMORY, SECONDS = 2 * 2**30, 60


class TookTooLong(BaseException):
    """Not an `Exception`, so that no reader takes it for an error of the file."""


def fuzz(test: Callable, cases: int, full: bool) -> None:
    """Runs `test`, a property of hypothesis, on so many cases, or on a fifteenth of them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checks = (
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
        HealthCheck.large_base_example,
    )
    settings(
        max_examples=cases if full else cases // 15,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=checks,
    )(test)()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


@contextlib.contextmanager
def only(*errors: type[Exception]) -> Iterator[None]:
    """What is in the block works, or raises one of `errors`, in time."""

    def stop(*_):
        raise TookTooLong

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    except errors as error:
        assert str(error).strip()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def room(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder in which a test works. Nothing may appear beside it, and no file may call itself `canary`."""
    (tmp_path / "room").mkdir()
    monkeypatch.chdir(tmp_path / "room")
    yield tmp_path / "room"
    assert [path.name for path in tmp_path.iterdir()] == ["room"]
    assert not list(tmp_path.rglob("canary*")) and not Path("/tmp/canary").exists()


@pytest.fixture
def quiet() -> Iterator[None]:
    """diffusers and transformers have a lot to say about odd files."""
    levels = diffusers.utils.logging.get_verbosity(), transformers.utils.logging.get_verbosity()
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(50)
        library.utils.logging.disable_progress_bar()
    yield
    for library, level in zip((diffusers, transformers), levels, strict=True):
        library.utils.logging.set_verbosity(level)
        library.utils.logging.enable_progress_bar()


# --------------------------------------------------------------------------------------------------------- the damage

NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 3, 7, 64, 255, 2**31 - 1, 2**31, 2**32 + 1, 10**9, 10**12, 2**53, 2**63 - 1, 2**63, -(2**63), 10**30]
    + [0.5, -1.5, 1e-300, 1e38, 1e300, math.nan, math.inf, -math.inf]
)
WORDS = "__class__ __init__ os sys os.system builtins eval torch diffusers pdiff_hf pickle weight null DDIMScheduler"
WORDS += " float32 float64 int8 bool F32 F64 BF16 I64 F8_E4M3 C64 . .. ../../canary /tmp/canary a/b a\\b ü/→.☃ e\u0301"
NAMES = st.sampled_from(["", "a\0b", "a b", "\u202e", "x" * 3000, *WORDS.split()]) | st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | NAMES | st.builds(lambda: [1] * 62),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """`content` with some bits turned, bytes replaced, inserted, taken out or doubled, or cut off."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 64, len(content)]))
        kind = draw(st.sampled_from(["flip", "flip", "replace", "insert", "remove", "double", "cut"]))
        if kind == "flip" and start < len(content):
            changed = content[start] ^ (1 << draw(st.integers(0, 7)))
            content = content[:start] + bytes([changed]) + content[start + 1 :]
        elif kind == "replace":
            new = draw(st.sampled_from([b"\0", b"\xff", b"\x80", b"\x7f"])) * length
            content = content[:start] + new + content[start + length :]
        elif kind == "insert":
            content = content[:start] + draw(st.binary(min_size=1, max_size=16)) + content[start:]
        elif kind == "remove":
            content = content[:start] + content[start + length :]
        elif kind == "double":
            content = content[:start] + content[start : start + length] + content[start:]
        else:
            content = content[:start]
    return content


def _places(value, path=()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in inner for place in _places(item, (*path, key))]


@st.composite
def changed(draw, value):
    """`value`, as it comes from JSON, with one to three values replaced, removed, renamed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(value)
        if not places:
            return draw(VALUES)
        *path, key = draw(st.sampled_from(places))
        owner = value
        for step in path:
            owner = owner[step]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "add"]))
        if kind == "replace":
            owner[key] = draw(VALUES)
        elif kind == "remove":
            del owner[key]
        elif isinstance(owner, dict):
            owner[draw(NAMES)] = owner.pop(key) if kind == "rename" else draw(VALUES)
        else:
            owner.insert(key, draw(VALUES) if kind == "add" else owner.pop(key))
    return value


@st.composite
def damaged_safetensors(draw, content: bytes) -> bytes:
    """The same for a safetensors file: its bytes, the values of its header, or the length of its header."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = content[8 : 8 + length], content[8 + length :]
    kind = draw(st.sampled_from(["bytes", "header", "header", "valid", "valid", "valid", "length", "values"]))
    if kind == "bytes":
        return draw(damaged(content))
    if kind == "length":
        return (
            struct.pack("<Q", draw(st.sampled_from([0, 1, length - 1, 10**8 + 1, 2**40, 2**63, 2**64 - 1])))
            + content[8:]
        )
    if kind == "values":  # those of another kind of number
        special = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e-45, -0.0, 3e38]))
        start = draw(st.integers(0, max(0, len(body) // 4 - 1))) * 4
        return content[: 8 + length] + body[:start] + struct.pack("<f", special) + body[start + 4 :]
    header = json.loads(header)
    if kind == "header":
        header = draw(changed(header))
    else:  # still a safetensors file: tensors with other names, of other types, or in other shapes and places
        tensors = [name for name in header if name != "__metadata__"]
        one, other = draw(st.sampled_from(tensors)), draw(st.sampled_from(tensors))
        change = draw(st.sampled_from(["rename", "type", "shape", "swap", "drop"]))
        if change == "rename":
            header[draw(NAMES)] = header.pop(one)
        elif change == "type":
            widths = [["F32", "I32", "U32"], ["F16", "BF16", "I16", "U16"], ["I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"]]
            header[one]["dtype"] = draw(
                st.sampled_from(next((w for w in widths if header[one]["dtype"] in w), ["F64", "I64", "U64", "C64"]))
            )
        elif change == "shape":
            size = math.prod(header[one]["shape"])
            header[one]["shape"] = draw(st.sampled_from([[size], [1, size], [size, 1], [1] * 70 + [size]]))
        elif change == "swap":
            header[one], header[other] = header[other], header[one]
        else:
            del header[one]
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


# --------------------------------------------------------------------------------------------------------- the importer

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
            with pytest.raises(SnapshotError, match="holds more than tensors, and reading it could run code"):
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


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(4).to_sparse(),
        torch.eye(4).to_sparse_csr(),
        torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8),
        torch.empty(4, 4, device="meta"),
        torch.eye(4, dtype=torch.complex64),
        torch.eye(4, dtype=torch.float64),
        torch.eye(4).to(torch.float8_e4m3fn),
        torch.eye(4, dtype=torch.int64),
    ],
    ids=["sparse", "csr", "quantized", "meta", "complex", "double", "float8", "int64"],
)
def test_tensors_of_kinds_that_cannot_be_read(room, tensor):
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
    child_names = st.sampled_from(
        ["checkpoint-1", "checkpoint-0010", "checkpoint-²", "checkpoint-٣", "step-²", "9" * 200, ".hidden", "ü.☃ \n"]
        + [
            "model.safetensors",
            "model.safetensors.index.json",
            "config.json",
            "a.pt",
            "b.pth",
            "network-²1.safetensors",
        ]
    )

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


# ----------------------------------------------------------------------------------------------------------- the layout


def test_damaged_layouts(room, full):
    whole = ParameterLayout(("a.weight", "ü/b"), ((2, 3), (4,)), ("float32", "int8")).to_dict()

    @given(changed(whole))
    def test(case):
        with only(LayoutError):
            layout = ParameterLayout.from_dict(case)
            assert ParameterLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
            if layout.num_parameters < 10**6:
                vector = torch.zeros(2, layout.num_parameters)
                assert torch.equal(layout.flatten(layout.unflatten(vector)), vector)

    fuzz(test, 2000, full)


def test_tensors_of_every_kind_come_back_bit_for_bit(room, full):
    """Also those that are no plain rows of numbers in memory, and numbers that are none."""
    special = st.sampled_from([0.0, -0.0, 1.0, -2.5, 1e-45, -1e-40, 65504.0, 3e38, math.inf, -math.inf, math.nan])

    @st.composite
    def tensors(draw):
        shape = draw(st.lists(st.integers(0, 3), max_size=4))
        values = draw(st.lists(special, min_size=math.prod(shape), max_size=math.prod(shape)))
        tensor = torch.tensor(values, dtype=torch.float32).nan_to_num(7.0, 100.0, -100.0).reshape(shape)
        dtype = EXACT_DTYPES[draw(st.sampled_from(sorted(EXACT_DTYPES)))]
        if dtype.is_floating_point:
            tensor = torch.tensor(values, dtype=torch.float32).reshape(shape).to(dtype)
        else:
            tensor = tensor.clamp(0, 100).to(dtype)
        kind = draw(st.sampled_from(["plain", "transposed", "strided", "expanded", "shifted"]))
        if kind == "transposed":
            tensor = tensor.permute(tuple(range(tensor.ndim))[::-1])
        elif kind == "strided" and tensor.ndim:
            tensor = tensor[::2]
        elif kind == "expanded":
            tensor = tensor.expand(2, *tensor.shape)
        elif kind == "shifted":
            tensor = torch.cat([torch.ones(1, dtype=dtype), tensor.flatten()])[1:].reshape(tensor.shape)
        return tensor

    @given(st.dictionaries(NAMES, tensors(), min_size=1, max_size=4))
    def test(state_dict):
        layout = ParameterLayout.from_state_dict(state_dict)
        back = layout.unflatten(layout.flatten(state_dict))
        for name, tensor in state_dict.items():
            assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
            # NaNs are equal to nothing, and their bits are no part of the promise.
            torch.testing.assert_close(back[name], tensor, rtol=0, atol=0, equal_nan=True)
            if tensor.dtype.is_floating_point:
                numbers = ~tensor.isnan()
                assert torch.equal(back[name].signbit()[numbers], tensor.signbit()[numbers])
        if layout.num_parameters and layout.flatten(state_dict).isfinite().all():
            # what safetensors can write is read as it was
            save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, "t.safetensors")
            assert torch.equal(read_networks("t.safetensors", layout)[0], layout.flatten(state_dict))

    fuzz(test, 1000, full)


def test_selections_of_any_text(full):
    network = AutoModelForImageClassification.from_config(
        ResNetConfig(embedding_size=4, hidden_sizes=[8], depths=[1], layer_type="basic")
    )
    kinds = ["norm", "all", "blocks", "head", "conv", "bias", "linear", "attention", "resnet", "weight", "*", "?"]
    kinds = st.sampled_from([*kinds, "re:", "[!", "(", ")", ".", "+", "\\", "\0", "ü"])
    slices = st.sampled_from(
        ["", "[0]", "[-1]", "[-2:]", "[:1]", "[:]", "[]", "[-]", "[-:-]", f"[{'9' * 25}]", "[²]", "]"]
    )
    entries = (
        st.tuples(kinds, slices).map("".join) | st.lists(kinds | slices, max_size=6).map("".join) | st.text(max_size=10)
    )

    @given(entries | st.lists(entries, max_size=3), st.lists(entries, max_size=1))
    def test(select, exclude):
        with only(LayoutError):
            names = select_parameters(network, select, exclude)
            assert names and set(names) <= set(network.state_dict())

    fuzz(test, 1000, full)


# ----------------------------------------------------------------------------------------------------------- the recipe


def parse(path: Path, capsys) -> Recipe | None:
    """The recipe, or `None` where it was refused in one line."""
    capsys.readouterr()
    try:
        with only():
            return RecipeParser(prog="train.py").parse_recipe([str(path)])
    except SystemExit as end:
        text = capsys.readouterr().err
        assert end.code == 2 and text.count("\n") == 1 and "error: " in text, text
        return None


def test_damaged_recipes(room, full, capsys):
    Recipe(select=["norm[-2:]", "ü*"], exclude=["re:.*bias"], model_args='{"img_size": 32}').save("recipe.yaml")
    content = Path("recipe.yaml").read_bytes()
    values = yaml.safe_load(content)
    tags = st.sampled_from(
        [b"!!python/object/apply:os.system ['touch canary']", b"!!binary x", b"!!timestamp 2001-99-99"]
    )
    tags |= st.sampled_from(
        [b"&a [*a]", b"*x", b"? [a]", b"- - -", b"{" * 3000, b"[" * 3000, b"!!int ''", b"1:99:99", b"~"]
    )
    lines = content.splitlines()
    spoilt = st.tuples(st.integers(0, len(lines) - 1), tags).map(
        lambda case: b"\n".join(
            [*lines[: case[0]], lines[case[0]].partition(b":")[0] + b": " + case[1], *lines[case[0] + 1 :]]
        )
    )
    dumped = changed(values).map(lambda case: yaml.safe_dump(case, allow_unicode=True).encode("utf-8", "replace"))

    @given(damaged(content) | dumped | dumped | spoilt)
    def test(case):
        Path("recipe.yaml").write_bytes(case)
        recipe = parse(Path("recipe.yaml"), capsys)
        if recipe is not None:
            recipe.save("again.yaml")
            assert parse(Path("again.yaml"), capsys) == recipe

    fuzz(test, 2000, full)


def test_a_short_recipe_cannot_stand_for_a_long_one(room, capsys):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]" for i in range(12)]
    Path("recipe.yaml").write_text("\n".join([*lines, "select: [*m]"]))
    assert parse(Path("recipe.yaml"), capsys) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: null", "recipe 'recipe.yaml' has no value for the key 'seed'"),
        ("latent_dim: []", "recipe 'recipe.yaml' has no value for the key 'latent_dim'"),
        ("select: [all, --output_dir=elsewhere]", "'--output_dir=elsewhere' in the list 'select'"),
        ("base_learning_rate: .inf", "base_learning_rate must be finite, got inf"),
        ("collect_weight_decay: .nan", "collect_weight_decay must be finite, got nan"),
        ("num_train_timesteps: 1000000000", "num_train_timesteps must be at most 10**6"),
        ("select: &a [all]\nexclude: *a", "references such as *a cannot be used"),
        ("model: " + "[" * 5000, "is not YAML: maximum recursion depth"),
        ("seed: !!timestamp 2001-99-99", "is not YAML"),
        ("false", "must be a mapping of keys to values, got a bool"),
    ],
)
def test_recipes_that_are_refused(room, capsys, content, message):
    Path("recipe.yaml").write_text(content)
    with pytest.raises(SystemExit):
        RecipeParser(prog="train.py").parse_recipe(["recipe.yaml"])
    assert message in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- the data set


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


# -------------------------------------------------------------------------------------------------------- the pipeline

JSON_FILES = [
    "model_index.json",
    "autoencoder/config.json",
    "denoiser/config.json",
    "scheduler/scheduler_config.json",
    "base_model/config.json",
]
WEIGHTS = [f"{part}/diffusion_pytorch_model.safetensors" for part in ("autoencoder", "denoiser")]
WEIGHTS.append("base_model/model.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model("timm_wrapper", architecture="cnn3_mini", num_labels=4)
    network = AutoModelForImageClassification.from_config(config).eval()
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline(network, select="bias").save_pretrained(folder)
    return folder


def try_pipeline(folder: Path) -> None:
    with only(OSError, ValueError):
        pipe = PDiffPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        parameters = sample(pipe, 2)
        assert parameters.isfinite().all() and parameters.shape == (2, pipe.autoencoder.layout.num_parameters)


def test_damaged_pipelines(room, full, saved, quiet):
    shutil.copytree(saved, "case")
    contents = {name: Path(saved, name).read_bytes() for name in (*JSON_FILES, *WEIGHTS)}

    @st.composite
    def cases(draw):
        name = draw(st.sampled_from([*JSON_FILES, *JSON_FILES, *WEIGHTS]))
        if name in WEIGHTS:
            return name, draw(damaged_safetensors(contents[name]))
        if draw(st.integers(0, 3)) == 0:
            return name, draw(damaged(contents[name]))
        return name, json.dumps(draw(changed(json.loads(contents[name])))).encode()

    @given(cases())
    def test(case):
        name, content = case
        Path("case", name).write_bytes(content)
        try:
            try_pipeline(Path("case"))
        finally:
            Path("case", name).write_bytes(contents[name])

    fuzz(test, 1500, full)


@pytest.mark.parametrize("name", [*JSON_FILES, *WEIGHTS])
def test_the_script_says_in_one_line_that_a_pipeline_is_damaged(room, saved, monkeypatch, name):
    shutil.copytree(saved, "case")
    Path("case", name).write_bytes(Path("case", name).read_bytes()[:-60])
    with pytest.raises(SystemExit, match="^error: ") as end:
        generate(monkeypatch, "case", "--output_dir", "networks")
    assert "case" in str(end.value) and not Path("networks").exists()


def test_names_of_tensors_are_no_paths(room, saved, monkeypatch):
    shutil.copytree(saved, "case")
    config = json.loads(Path("case/autoencoder/config.json").read_text())
    names = config["layout"]["names"]
    names[:2] = ["../../canary", str(room / "canary")]
    Path("case/autoencoder/config.json").write_text(json.dumps(config))
    shutil.rmtree("case/base_model")
    index = json.loads(Path("case/model_index.json").read_text()) | {"base_model": [None, None]}
    Path("case/model_index.json").write_text(json.dumps(index))
    generate(monkeypatch, "case", "--output_dir", "networks", "--only_generated")
    files = [f"network-0000{i}.safetensors" for i in range(3)]
    assert sorted(path.name for path in Path("networks").iterdir()) == files
    assert set(load_file(Path("networks", files[0]))) == set(names)


def test_an_index_cannot_call_what_it_names(room, saved):
    """Only libraries that diffusers knows are imported, and only what is a component is loaded."""
    Path("evil.py").write_text(f"open({str(room / 'canary')!r}, 'w')\n")
    shutil.copytree(saved, "case")
    for part in ("autoencoder", "scheduler"):
        shutil.copy("evil.py", f"case/{part}/evil.py")
    whole = json.loads(Path("case/model_index.json").read_text())
    for part in ("autoencoder", "scheduler", "base_model"):
        for wrong in (["evil", "Evil"], ["os", "system"], ["pdiff_hf", "PDiffPipeline"], ["diffusers", "UNet2DModel"]):
            Path("case/model_index.json").write_text(json.dumps(whole | {part: wrong}))
            with pytest.raises((OSError, ValueError)):
                PDiffPipeline.from_pretrained("case")


@pytest.mark.parametrize("component", ["..", "../private", "autoencoder/..", "."])
def test_an_index_cannot_publish_what_lies_elsewhere(room, saved, component):
    Path("private").mkdir()
    Path("private/key").write_text("secret")
    shutil.copytree(saved, "case")
    index = json.loads(Path("case/model_index.json").read_text()) | {component: ["diffusers", "DDIMScheduler"]}
    Path("case/model_index.json").write_text(json.dumps(index))
    with pytest.raises(HubError, match="'.*' is not the name of a component"):
        pipeline_files(Path("case"))
    with pytest.raises(HubError, match="'case' holds no finished pipeline"):
        Path("case/model_index.json").write_text("[")
        pipeline_files(Path("case"))
