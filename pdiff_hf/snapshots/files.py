"""Snapshots from files: state dicts, checkpoints of `transformers.Trainer`, and repositories of the Hub."""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from ..layout import EXACT_DTYPES, LayoutError, ParameterLayout
from ..utils.errors import first_line, limited_modules
from .dataset import SnapshotError, SnapshotWriter, check_finite

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# Where a folder has several of these, the first is read.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "adapter_model.safetensors",
    "pytorch_model.bin",
)
# A folder with one of these is one network; others are folders of networks.
MARKS = ("config.json", "adapter_config.json", "trainer_state.json", "model.safetensors.index.json")
# What wrappers put before every name: DistributedDataParallel, torch.compile, PEFT, transformers (for timm networks).
_WRAPPERS = re.compile(r"^(module\.)?(_orig_mod\.)?(base_model\.model\.)?(timm_model\.)?")
# PEFT leaves the name of the adapter out of its files.
_ADAPTER = re.compile(r"(\.lora_\w+)\.default(?=\.|$)")
# Where training scripts keep the state dict among other things.
NESTED = ("state_dict", "model_state_dict", "model")
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<subfolder>[\w./-]+))?(?:@(?P<revision>[\w./-]+))?")


def import_snapshots(
    paths: Sequence[str | os.PathLike], layout: ParameterLayout, folder: str | os.PathLike, **hub_kwargs
) -> None:
    """
    Writes the parameter data set `folder` from networks that were saved during other training runs, one row each.

    Args:
        paths (`Sequence[str | os.PathLike]`): In order, each of

            - a state dict: `.safetensors`, or `.pt`, `.pth` or `.bin` that `torch.load(weights_only=True)` reads, which
              may hold it under `state_dict`, `model_state_dict` or `model`;
            - a folder that `save_pretrained` or `Trainer` wrote, of a network or of PEFT adapters;
            - a folder with `checkpoint-N` folders, taken by N, or of state dicts or such folders, in natural order
              of their names;
            - a Hub id `owner/name`, with a subfolder (`owner/name/checkpoint-500`) or a revision
              (`owner/name@step500`) if need be, of which only safetensors files are downloaded.
        layout (`ParameterLayout`): Which tensors to read, such as
            [`~pdiff_hf.selection.select_layout`]`(model, "norm[-2:]")`. Floats of half precision are widened; names
            may have the prefixes that PEFT, `torch.compile`, data parallelism and transformers' wrapper of timm add.
        folder (`str` or `os.PathLike`): Must not exist yet.
        hub_kwargs: For `huggingface_hub.snapshot_download`, such as `token`.

    The column `step` is the number that a file's or folder's name ends in, or its place in the list; `seed` counts the
    folders that the files lie in, as each is taken to be a run of its own.

    Raises:
        SnapshotError: for a file that cannot be read, is a pickle with more than tensors in it, or gives a snapshot
            that [`SnapshotWriter`] refuses; names the file.
        LayoutError: for a file whose tensors do not fit the layout; names the file and the tensor.
    """
    runs: dict[Path, int] = {}
    with SnapshotWriter(folder, layout) as writer:
        found = [checkpoint for path in paths for checkpoint in _expand(path, hub_kwargs)]
        for position, (name, path) in enumerate(found):
            try:
                vector = layout.flatten(_read(path, layout))
                seed = runs.setdefault(path.parent, len(runs))
                writer.write(vector, step=_step(name, position), seed=seed)
            except (SnapshotError, LayoutError) as error:
                raise type(error)(f"'{path}': {error}") from error


def read_networks(path: str | os.PathLike, layout: ParameterLayout) -> torch.Tensor:
    """
    All networks that `path` stands for, as [`import_snapshots`] understands it, as one tensor of shape `(N, D)`. They
    may be equal to each other.

    Raises:
        SnapshotError: for a file that cannot be read, or holds values that are not finite; names the file.
        LayoutError: for a file whose tensors do not fit the layout; names the file and the tensor.
    """
    found = [file for _, file in _expand(path, {})]
    parameters = torch.empty(len(found), layout.num_parameters)
    for row, file in zip(parameters, found, strict=True):
        try:
            row.copy_(layout.flatten(_read(file, layout)))
            check_finite(row[None].numpy(), layout)
        except (SnapshotError, LayoutError) as error:
            raise type(error)(f"'{file}': {error}") from error
    return parameters


def _expand(path: str | os.PathLike, hub_kwargs: Mapping) -> list[tuple[str, Path]]:
    """The checkpoints that `path` stands for: what each is called, and the file, or the folder of one network."""
    local = Path(path)
    if local.is_file():
        return [(local.stem, local)]
    if not local.is_dir():
        return _expand_hub(str(path), hub_kwargs)
    checkpoints = [child for child in local.iterdir() if re.fullmatch(r"checkpoint-\d+", child.name)]
    if not checkpoints and any((local / name).is_file() for name in MARKS):
        return [(local.name, local)]
    if not checkpoints:
        checkpoints = [child for child in local.iterdir() if child.suffix in SUFFIXES]
    if not checkpoints:  # as scripts/generate.py writes them
        checkpoints = [child for child in local.iterdir() if any((child / name).is_file() for name in MARKS)]
    if not checkpoints:
        raise SnapshotError(f"'{path}' has no checkpoint-N folders and no {', '.join(SUFFIXES)} files")
    return [(child.stem, child) for child in sorted(checkpoints, key=_natural_order)]


def _expand_hub(path: str, hub_kwargs: Mapping) -> list[tuple[str, Path]]:
    hub_id = _HUB_ID.fullmatch(path)
    if hub_id is None:
        raise SnapshotError(f"'{path}' does not exist, and is not a Hub id such as owner/name@revision")
    repo, subfolder, revision = hub_id["repo"], hub_id["subfolder"] or "", hub_id["revision"]
    lead = f"{subfolder.rstrip('/')}/" if subfolder else ""
    patterns = [f"{lead}{name}" for name in ("*.safetensors", *MARKS, *(f"*/{mark}" for mark in MARKS))]
    try:
        root = snapshot_download(repo, revision=revision, allow_patterns=patterns, **hub_kwargs)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise SnapshotError(f"'{path}' does not exist, and cannot be had from the Hub: {error}") from error
    local = Path(root) / subfolder
    if not local.is_dir():
        raise SnapshotError(f"'{path}': the repository has no safetensors files in such a folder")
    found = _expand(local, hub_kwargs)
    # One network is called by its revision, if it has one: its folder is called by the hash of a commit.
    return [(revision or found[0][0], found[0][1])] if len(found) == 1 and not subfolder else found


def _natural_order(path: Path) -> list:
    """Key by which `step-9` comes before `step-10`."""
    return [int(piece) if i % 2 else piece for i, piece in enumerate(re.split(r"(\d{1,18})", path.name))]


def _step(name: str, default: int) -> int:
    number = re.search(r"(?:^|[^0-9a-f])(\d{1,18})$", name)
    return int(number[1]) if number else default


def _read(path: Path, layout: ParameterLayout) -> dict[str, torch.Tensor]:
    """The tensors of the layout from a file or the folder of a network, in the layout's types."""
    file = path
    if path.is_dir():
        file = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
        if file is None:
            raise SnapshotError(f"the folder has no {', '.join(WEIGHT_FILES)}")
    if not file.is_file():  # a broken link, or what would wait for ever for someone to write into it
        raise SnapshotError("it is not a file")
    with ExitStack() as stack:
        if file.suffix == ".json":
            tensors = _open_shards(file, stack)
        elif file.suffix == ".safetensors":
            tensors = _open_safetensors(file, stack)
        else:
            tensors = _load_pickle(file)
        renamed = _rename(tensors, layout)
        read = {name: tensors[renamed[name]] for name in layout.names if name in renamed}
    if len(read) < len(layout.names) and (path / "config.json").is_file():
        renamed = read = _load_pretrained(path)
    layout.check_fits(dict.fromkeys(renamed) | read, "this file")
    dtypes = (EXACT_DTYPES[dtype] for dtype in layout.dtypes)
    return {name: _convert(name, read[name], dtype) for name, dtype in zip(layout.names, dtypes, strict=True)}


class _LazyTensors(Mapping):
    """Tensors that are read from safetensors files when they are asked for."""

    def __init__(self, files: dict[str, safe_open]):
        self.files = files  # by tensor

    def __getitem__(self, name: str) -> torch.Tensor:
        try:
            return self.files[name].get_tensor(name)
        except SafetensorError as error:
            raise SnapshotError(f"tensor '{name}' cannot be read ({error})") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _open_safetensors(file: Path, stack: ExitStack) -> _LazyTensors:
    try:
        opened = stack.enter_context(safe_open(file, framework="pt"))
        return _LazyTensors(dict.fromkeys(opened.keys(), opened))
    except (SafetensorError, OSError) as error:
        raise SnapshotError(f"{file.name} is not a whole safetensors file ({error})") from error


def _open_shards(index: Path, stack: ExitStack) -> _LazyTensors:
    try:
        # Names alone: a path would lead out of the folder.
        shards = {index.with_name(Path(shard).name) for shard in json.loads(index.read_text())["weight_map"].values()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise SnapshotError(f"{index.name} is not the index of a sharded network ({error!r})") from error
    files = {}
    for shard in sorted(shards):
        files |= _open_safetensors(shard, stack).files
    return _LazyTensors(files)


def _load_pickle(file: Path) -> Mapping[str, torch.Tensor]:
    try:
        _check_not_compressed(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SnapshotError(
            f"{file.name} holds more than tensors, and reading it could run code. If you trust it, load it yourself "
            f"and save its state dict with safetensors ({first_line(error)})"
        ) from error
    except SnapshotError:
        raise
    except Exception as error:  # what a damaged file makes the parts of torch.load raise has no common type
        raise SnapshotError(f"{file.name} is not a whole file of torch.save ({first_line(error)})") from error
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in items if isinstance(name, str) and isinstance(value, torch.Tensor)}
    if not tensors:
        raise SnapshotError(f"{file.name} holds a {type(content).__name__}, not a state dict")
    return tensors


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
    """The state dict of a network of transformers, which gives some tensors other names in its files."""
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


def _rename(tensors: Iterable[str], layout: ParameterLayout) -> dict[str, str]:
    """The file's names by the layout's names for the same tensors, as far as the layout has them."""
    by_plain_name = {_plain(name): name for name in layout.names}
    renamed = {by_plain_name.get(_plain(key), key): key for key in tensors}
    return renamed | {key: key for key in tensors if key in renamed}  # an equal name is the better match


def _plain(name: str) -> str:
    return _ADAPTER.sub(r"\1", _WRAPPERS.sub("", name, count=1))


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
