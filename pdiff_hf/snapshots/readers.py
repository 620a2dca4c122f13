"""The tensors of one saved network: safetensors, files of `torch.save`, folders of transformers and of PEFT."""

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from ..layout import EXACT_DTYPES, LayoutError, ParameterLayout, closest_names, some_names
from ..lora import check_base_unchanged, scaling
from ..tensor_names import ADAPTER, PEFT_PREFIX
from ..utils.errors import first_line, limited_modules
from .adapters import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    DIFFUSERS_FILE,
    AdapterFile,
    AdapterReader,
    Notes,
    describe_file,
    find_adapters,
    is_adapter,
    match_tensors,
    read_config,
)
from .dataset import SnapshotError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# What people name in place of them, and what to do with it.
OTHER_FORMATS = dict.fromkeys(
    (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"), "an archive: unpack it, and name the folder"
) | dict.fromkeys(
    (".npz", ".npy", ".h5", ".hdf5", ".keras", ".onnx", ".gguf", ".msgpack", ".tflite"),
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
def open_network(path: Path, layout: ParameterLayout) -> Iterator["NetworkTensors"]:
    """
    The tensors of a file, or of the folder of a network, by name; those of safetensors files are read when they are
    asked for. Tensors of adapters have the names that [`adapter_names`] gives them, whether PEFT, diffusers or kohya
    has written the file. Where a folder of transformers lacks tensors of the layout, its network is loaded, because
    transformers gives some tensors other names in its files.

    Raises:
        SnapshotError: if a file cannot be read, or is a pickle with more than tensors in it.
    """
    with open_tensors(path, layout.names) as tensors:
        missing = len(match_tensors(tensors, layout.names, layout.aliases)) < len(layout.names)
        if missing and (path / "config.json").is_file():
            loaded = _load_pretrained(path)
            tensors = NetworkTensors({name: (loaded, name) for name in loaded})
        yield tensors


@contextmanager
def open_tensors(path: Path, names: Iterable[str] = ()) -> Iterator["NetworkTensors"]:
    """Like `open_network`, but for what the file has; `names` are those of a network that it may be for."""
    with ExitStack() as stack:
        yield _open_folder(path, stack, names) if path.is_dir() else _open_adapter(path, stack, names)


def adapter_reader(layout: ParameterLayout) -> AdapterReader:
    """Reads adapters as a layout has them."""
    return AdapterReader(layout.names, layout.shapes, layout.aliases, layout.adapters)


def read_tensors(
    tensors: "NetworkTensors",
    layout: ParameterLayout,
    reader: AdapterReader | None = None,
    what: str = "",
    notes: Notes | None = None,
) -> dict[str, torch.Tensor]:
    """
    Those of `tensors` that the layout names, in its types, if that changes no value; those of adapters as
    [`~pdiff_hf.snapshots.adapters.AdapterReader`] makes them fit, which notes what it did to the file `what`.

    Raises:
        LayoutError: names the first tensor that is missing, or has another shape or type.
    """
    reader = reader or adapter_reader(layout)
    read = reader.read(tensors, tensors.files, what, notes or Notes())
    missing = [name for name in layout.names if name not in read]
    if missing:
        raise LayoutError(
            f"this file has no tensor '{missing[0]}'; {closest_names(missing[0], tensors)}{_why_missing(missing[0])}"
        )
    layout.check_fits(read, "this file")
    dtypes = (EXACT_DTYPES[dtype] for dtype in layout.dtypes)
    return {name: _convert(name, read[name], dtype) for name, dtype in zip(layout.names, dtypes, strict=True)}


def _why_missing(name: str) -> str:
    if ".original_module." not in name:
        return ""
    return (
        ". That is the base model's own module, which adapters do not have; select the one that was trained with them: "
        "'*.modules_to_save.*'"
    )


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
    sources: dict[str, tuple[Any, str]] = {}
    files = {}
    if file := _first(folder, WEIGHT_FILES):
        sources |= _open_file(file, stack).sources
    for adapter, place in find_adapters(folder).items():
        if (file := _first(place, ADAPTER_FILES)) is None:
            raise SnapshotError(f"'{place}' has an {ADAPTER_CONFIG}, but no {' or '.join(ADAPTER_FILES)}")
        opened = _open_file(file, stack).sources
        sources |= {f"{ADAPTER}{adapter}/{name.removeprefix(PEFT_PREFIX)}": s for name, s in opened.items()}
        try:
            config = read_config(place / ADAPTER_CONFIG)
            check_base_unchanged(config, str(place))
        except ValueError as error:
            raise SnapshotError(str(error)) from error
        files[adapter] = AdapterFile(config, partial(scaling, config))
    if not sources and (file := _first(folder, (DIFFUSERS_FILE,))):
        return _open_adapter(file, stack, names)
    if not sources:
        raise SnapshotError(f"the folder has no {', '.join(WEIGHT_FILES + ADAPTER_FILES)}")
    return NetworkTensors(sources, files)


def _open_adapter(file: Path, stack: ExitStack, names: Iterable[str]) -> NetworkTensors:
    """A file, with names as PEFT has them if it is that of a LoRA adapter."""
    opened = _open_file(file, stack)
    if not is_adapter(opened):
        return opened
    try:
        renamed, description = describe_file(file, opened, names)
        check_base_unchanged(description.config, str(file))
    except ValueError as error:
        raise SnapshotError(str(error)) from error
    sources = {f"{ADAPTER}default/{n.removeprefix(PEFT_PREFIX)}": opened.sources[name] for name, n in renamed.items()}
    return NetworkTensors(sources, {"default": description})


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
    tensors = _load_pickle(file)
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
        # Names alone: a path would lead out of the folder.
        shards = {
            index.with_name(Path(shard).name)
            for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        }
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise SnapshotError(f"{index.name} is not the index of a sharded network ({error!r})") from error
    sources: dict[str, tuple[Any, str]] = {}
    for shard in sorted(shards):
        sources |= _open_safetensors(shard, stack).sources
    return NetworkTensors(sources)


def _load_pickle(file: Path) -> Mapping[str, torch.Tensor]:
    try:
        _check_not_compressed(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
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
    tensors = _tensors(content)
    nested = [key for key in content if _holds_tensors(content[key], depth - 1)] if isinstance(content, Mapping) else []
    chosen = next((key for key in NESTED if key in nested), None)
    if chosen is None and not tensors and len(nested) == 1:
        chosen = nested[0]
    if chosen is not None:
        return _find_tensors(content[chosen], f"{what} under '{chosen}'", depth - 1)
    if not tensors and nested:
        raise SnapshotError(
            f"{what} holds several state dicts, under {some_names(list(map(str, nested)), 20)}; save the right one of "
            f"them alone, or under '{NESTED[0]}'"
        )
    if isinstance(content, torch.Tensor):
        raise SnapshotError(
            f"{what} holds a tensor of shape {tuple(content.shape)}, not a state dict; {IN_MEMORY} one with a row for "
            "each network"
        )
    if isinstance(content, list | tuple) and content and all(_holds_tensors(item, depth - 1) for item in content):
        raise SnapshotError(
            f"{what} holds {len(content)} state dicts in a {type(content).__name__}; {IN_MEMORY} them, or save each as "
            "a file"
        )
    if not tensors:
        keys = f" with the keys {some_names(list(map(str, content)), 20)}" if isinstance(content, Mapping) else ""
        raise SnapshotError(f"{what} holds a {type(content).__name__}{keys}, not a state dict")
    return tensors


def _tensors(content: Any) -> dict[str, torch.Tensor]:
    items = content.items() if isinstance(content, Mapping) else ()
    return {name: value for name, value in items if isinstance(name, str) and isinstance(value, torch.Tensor)}


def _holds_tensors(content: Any, depth: int) -> bool:
    """Whether a mapping holds tensors, or mappings of tensors and so on, all under names."""
    if not isinstance(content, Mapping) or not depth:
        return False
    return bool(_tensors(content)) or any(
        isinstance(key, str) and _holds_tensors(value, depth - 1) for key, value in content.items()
    )


def _check_not_compressed(file: Path) -> None:
    """`torch.save` stores its records as they are. A zip archive that grows when it is read was not written by it."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            size = sum(record.file_size for record in archive.infolist())
        if size > file.stat().st_size:
            raise SnapshotError(
                f"{file.name} would take {size:,} bytes of memory, and is a file of {file.stat().st_size:,}; files of "
                "torch.save are not compressed"
            )


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
