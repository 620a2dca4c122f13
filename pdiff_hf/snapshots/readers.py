"""The tensors of one saved network: safetensors, `torch.save`, `numpy.savez`, folders of transformers and of PEFT."""

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from ..layout import EXACT_DTYPES, LayoutError, ParameterLayout, closest_names, some_names
from ..lora import ADAPTER_CONFIG, check_base_unchanged, find_adapters
from ..tensor_names import ADAPTER, PEFT_PREFIX
from ..utils.errors import first_line, limited_modules
from .adapters import (
    ADAPTER_FILES,
    DIFFUSERS_FILE,
    AdapterFile,
    AdapterReader,
    Notes,
    describe_file,
    has_config,
    is_adapter,
    match_tensors,
)
from .dataset import SnapshotError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz")
# What people name in place of them, and what to do with it.
OTHER_FORMATS = dict.fromkeys(
    (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"), "an archive: unpack it, and name the folder"
) | dict.fromkeys(
    (".npy", ".h5", ".hdf5", ".keras", ".onnx", ".gguf", ".msgpack", ".tflite"),
    f"of a format that is not read: save the state dict of each network as one of {', '.join(SUFFIXES)}",
)
IN_MEMORY = "PDiffTrainer(snapshots=torch.load(FILE)) takes"
# Where a folder has several of these, the first is read.
WEIGHT_FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")
# Where training scripts keep the state dict among other things; of several, the first.
NESTED = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema", "ema_state_dict", "ema", "module")
MAX_DEPTH = 4
# How torch.load names what it refuses to make.
_REFUSED = re.compile(r"(?:GLOBAL|class|Type) ([\w.]+)")


@contextmanager
def open_network(path: Path, layout: ParameterLayout | None = None) -> Iterator["NetworkTensors"]:
    """
    The tensors of a file, or of the folder of a network, by name; those of safetensors files are read when they are
    asked for. Tensors of adapters have the names that [`adapter_names`] gives them, whether PEFT, diffusers or kohya
    has written the file. Where a folder of transformers lacks tensors of the layout, its network is loaded, because
    transformers gives some tensors other names in its files.

    Raises:
        SnapshotError: if a file cannot be read, or is a pickle with more than tensors in it.
    """
    names, aliases = ((), ()) if layout is None else (layout.names, layout.aliases)
    with ExitStack() as stack:
        tensors = _open_folder(path, stack, names) if path.is_dir() else _open_adapter(path, stack, names)
        if len(match_tensors(tensors, names, aliases)) < len(names) and (path / "config.json").is_file():
            loaded = _load_pretrained(path)
            tensors = NetworkTensors({name: (loaded, name) for name in loaded})
        yield tensors


def adapter_reader(layout: ParameterLayout) -> AdapterReader:
    """Reads adapters as a layout has them."""
    return AdapterReader(layout.names, layout.shapes, layout.aliases, layout.adapters)


def read_vector(
    tensors: "NetworkTensors", layout: ParameterLayout, reader: AdapterReader, what: str, notes: Notes
) -> torch.Tensor:
    """
    The tensors that the layout names, in its types, if that changes no value, as a vector of shape `(D,)`; those of
    adapters as [`~pdiff_hf.snapshots.adapters.AdapterReader`] makes them fit, which notes what it did to the file
    `what`.

    Raises:
        LayoutError: names the first tensor that is missing, or has another shape or type.
    """
    read = reader.read(tensors, tensors.files, what, notes)
    if not read and (theirs := _same_order(tensors, layout)):
        read = {name: tensors[key] for name, key in theirs.items()}
        notes.done["renamed"].add(what)
    for name in layout.names:
        if name not in read:
            own = ". That is the base model's own module, which adapters do not have; select the one that was trained "
            hint = own + "with them: '*.modules_to_save.*'" if ".original_module." in name else ""
            raise LayoutError(f"this file has no tensor '{name}'; {closest_names(name, tensors)}{hint}")
    layout.check_fits(read, "this file")
    dtypes = (EXACT_DTYPES[dtype] for dtype in layout.dtypes)
    converted = {name: _convert(name, read[name], dtype) for name, dtype in zip(layout.names, dtypes, strict=True)}
    return layout.flatten(converted)


def _same_order(tensors: "NetworkTensors", layout: ParameterLayout) -> dict[str, str]:
    """
    For each tensor of a layout what a file calls it whose modules have other names: the same weights and biases of the
    same shapes, in the order of their numbers. Nothing if they are not the same.
    """

    def ordered(names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: [(len(part), part) for part in re.split(r"(\d+)", name)])

    ours, theirs = ordered(layout.names), ordered(tensors)
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    alike = [(name.rpartition(".")[2], shapes[name]) for name in ours]
    same = alike == [(name.rpartition(".")[2], tensors.shape(name)) for name in theirs]
    return dict(zip(ours, theirs, strict=True)) if same else {}


class NetworkTensors(Mapping[str, torch.Tensor]):
    """
    Tensors that are read from safetensors files when they are asked for; `files` says of the adapters among them how
    they are scaled.
    """

    def __init__(self, sources: dict[str, tuple[Any, str]], files: dict[str, AdapterFile] | None = None):
        self.sources = sources  # the file, or what it holds, and the name there
        self.files = files or {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, which is not read for it."""
        source, key = self.sources[name]
        return tuple(source[key].shape if isinstance(source, Mapping) else source.get_slice(key).get_shape())

    def __getitem__(self, name: str) -> torch.Tensor:
        source, key = self.sources[name]
        if isinstance(source, Mapping):
            return source[key]
        try:
            return source.get_tensor(key)
        except SafetensorError as error:
            raise SnapshotError(f"tensor '{name}' cannot be read ({error})") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


def _open_folder(folder: Path, stack: ExitStack, names: Iterable[str]) -> NetworkTensors:
    file = _first(folder, WEIGHT_FILES)
    tensors = NetworkTensors({}) if file is None else _open_file(file, stack)
    for adapter, place in find_adapters(folder).items():
        if (file := _first(place, ADAPTER_FILES)) is None:
            raise SnapshotError(f"'{place}' has an {ADAPTER_CONFIG}, but no {' or '.join(ADAPTER_FILES)}")
        opened = _open_adapter(file, stack, names, adapter)
        tensors = NetworkTensors(tensors.sources | opened.sources, tensors.files | opened.files)
    if not tensors and (file := _first(folder, (DIFFUSERS_FILE,))):
        return _open_adapter(file, stack, names)
    if not tensors:
        raise SnapshotError(f"the folder has no {', '.join(WEIGHT_FILES + ADAPTER_FILES)}")
    return tensors


def _open_adapter(file: Path, stack: ExitStack, names: Iterable[str], adapter: str = "default") -> NetworkTensors:
    """A file, with names as PEFT has them if it is that of an adapter."""
    opened = _open_file(file, stack)
    if not has_config(file) and not is_adapter(opened):
        return opened
    try:
        renamed, description = describe_file(file, opened, names)
        check_base_unchanged(description.config, str(file.parent if has_config(file) else file))
    except ValueError as error:
        raise SnapshotError(str(error)) from error
    prefix = f"{ADAPTER}{adapter}/"
    sources = {prefix + new.removeprefix(PEFT_PREFIX): opened.sources[name] for name, new in renamed.items()}
    return NetworkTensors(sources, {adapter: description})


def _first(folder: Path, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _open_file(file: Path, stack: ExitStack) -> NetworkTensors:
    if not file.is_file():  # a broken link, or what would wait for ever for someone to write into it
        raise SnapshotError("it is not a file")
    if file.suffix == ".json":
        return _open_shards(file, stack)
    if file.suffix == ".safetensors":
        return _open_safetensors(file, stack)
    if hint := OTHER_FORMATS.get(file.suffix.lower()):
        raise SnapshotError(f"{file.name} is {hint}")
    tensors = _load_arrays(file) if file.suffix == ".npz" else _load_pickle(file)
    return NetworkTensors({name: (tensors, name) for name in tensors})


def _open_safetensors(file: Path, stack: ExitStack) -> NetworkTensors:
    try:
        opened = stack.enter_context(safe_open(file, framework="pt"))
        names = opened.keys()
        return NetworkTensors({name: (opened, name) for name in names})
    except (SafetensorError, OSError) as error:
        raise SnapshotError(f"{file.name} is not a whole safetensors file ({error})") from error


def _open_shards(index: Path, stack: ExitStack) -> NetworkTensors:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        shards = {index.with_name(Path(file).name) for file in files}  # names alone: a path would lead elsewhere
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise SnapshotError(f"{index.name} is not the index of a sharded network ({error!r})") from error
    opened = [_open_safetensors(shard, stack).sources for shard in sorted(shards)]
    return NetworkTensors({name: source for sources in opened for name, source in sources.items()})


def _load_arrays(file: Path) -> Mapping[str, torch.Tensor]:
    try:
        _check_not_compressed(file)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except SnapshotError:
        raise
    except Exception as error:  # as of torch.save
        raise SnapshotError(
            f"{file.name} is not a whole file of numbers of numpy.savez ({first_line(error)})"
        ) from error


def _load_pickle(file: Path) -> Mapping[str, torch.Tensor]:
    try:
        _check_not_compressed(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
        _check_whole(file, content)
    except pickle.UnpicklingError as error:
        refused = _REFUSED.search(str(error))
        what = f": it refers to '{refused[1]}'" if refused else ""
        raise SnapshotError(
            f"{file.name} holds more than tensors, and reading it could run code{what}. If you trust it, load it "
            "yourself and save its state dict with safetensors"
        ) from error
    except SnapshotError:
        raise
    except Exception as error:  # what a damaged file makes the parts of torch.load raise has no common type
        raise SnapshotError(f"{file.name} is not a whole file of torch.save ({first_line(error)})") from error
    return _find_tensors(content, file.name)


def _find_tensors(content: Any, what: str, depth: int = MAX_DEPTH) -> Mapping[str, torch.Tensor]:
    """The state dict that `content` is, or holds under one of its keys."""
    items = content if isinstance(content, Mapping) else {}
    tensors = {name: value for name, value in items.items() if isinstance(name, str) and torch.is_tensor(value)}
    nested = [key for key in items if _holds_tensors(items[key], depth - 1)]
    chosen = next((key for key in NESTED if key in nested), None)
    if chosen is None and not tensors and len(nested) == 1:
        chosen = nested[0]
    if chosen is not None:
        return _find_tensors(content[chosen], f"{what} under '{chosen}'", depth - 1)
    if tensors:
        return tensors
    kind, keys = type(content).__name__, some_names(list(map(str, nested or items)), 20)
    if nested:
        save = f"save the right one of them alone, or under '{NESTED[0]}'"
        raise SnapshotError(f"{what} holds several state dicts, under {keys}; {save}")
    if torch.is_tensor(content):
        shape = tuple(content.shape)
        row = f"{IN_MEMORY} one with a row for each network"
        raise SnapshotError(f"{what} holds a tensor of shape {shape}, not a state dict; {row}")
    if isinstance(content, list | tuple) and content and all(_holds_tensors(item, depth - 1) for item in content):
        save = f"{IN_MEMORY} them, or save each as a file"
        raise SnapshotError(f"{what} holds {len(content)} state dicts in a {kind}; {save}")
    raise SnapshotError(f"{what} holds a {kind}{f' with the keys {keys}' if items else ''}, not a state dict")


def _holds_tensors(content: Any, depth: int) -> bool:
    """Whether a mapping holds tensors, or mappings of tensors and so on, all under names."""
    named = [value for key, value in content.items() if isinstance(key, str)] if isinstance(content, Mapping) else []
    return depth > 0 and any(torch.is_tensor(value) or _holds_tensors(value, depth - 1) for value in named)


def _check_not_compressed(file: Path) -> None:
    """`torch.save` and `numpy.savez` store records as they are. An archive that grows when it is read is of neither."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            size = sum(record.file_size for record in archive.infolist())
        if size > file.stat().st_size:
            raise SnapshotError(
                f"{file.name} would take {size:,} bytes of memory, and is a file of {file.stat().st_size:,}; files of "
                "torch.save are not compressed, nor those of numpy.savez"
            )


def _check_whole(file: Path, content: Any) -> None:
    """Some releases of torch fill up a record that is too short with whatever lies behind it in memory."""
    if zipfile.is_zipfile(file):
        tensors = [leaf for leaf in tree_leaves(content) if isinstance(leaf, torch.Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
        needed = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.device.type == "cpu"}
        with zipfile.ZipFile(file) as archive:
            size = sum(record.file_size for record in archive.infolist() if "/data/" in record.filename)
        if sum(needed.values()) > size:
            raise SnapshotError(f"{file.name} is not a whole file of torch.save: its tensors are longer than its data")


def _load_pretrained(folder: Path) -> dict[str, torch.Tensor]:
    """The state dict of a network of transformers."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model_class = getattr(transformers, config.architectures[0])
        if not issubclass(model_class, transformers.PreTrainedModel):
            raise TypeError(f"{config.architectures[0]} is not a network")
        with limited_modules():
            model, info = model_class.from_pretrained(
                folder, dtype="auto", output_loading_info=True, use_safetensors=True
            )
    except Exception as error:  # what damaged files make transformers raise has no common type
        raise SnapshotError(f"transformers cannot load it ({first_line(error)})") from error
    return {name: tensor for name, tensor in model.state_dict().items() if name not in info["missing_keys"]}


def _convert(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in the layout's type, if that changes no value."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise LayoutError(
            f"tensor '{name}' is sparse, quantized or without values there; only dense tensors can be read"
        )
    known = tensor.dtype in EXACT_DTYPES.values() and tensor.dtype.is_floating_point == dtype.is_floating_point
    if not known or torch.promote_types(tensor.dtype, dtype) != dtype:
        raise LayoutError(f"tensor '{name}' is {tensor.dtype} there, which {dtype}, the layout's type, cannot hold")
    return tensor.to(dtype)
