"""Snapshots from files: state dicts, checkpoints of `transformers.Trainer`, and repositories of the Hub."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..layout import LayoutError, ParameterLayout, some_names
from ..lora import ADAPTER_CONFIG, find_adapters, read_config
from ..models.condition import Condition, Fields
from ..models.fields import ConditionError
from ..selection import check_adapters
from ..utils.files import expand_path
from .adapters import DIFFUSERS_FILE, Notes
from .canonical import canonical_adapter
from .dataset import (
    DATA_FILE,
    SnapshotError,
    SnapshotWriter,
    check_finite,
    condition_columns,
    load_fields,
    load_snapshots,
    parameter_matrix,
)
from .frozen import FrozenCheck
from .readers import SUFFIXES, adapter_reader, open_network, read_vector
from .tables import Column, read_column

logger = logging.getLogger(__name__)

# A folder with one of these is one network; others are folders of networks.
MARKS = ("config.json", ADAPTER_CONFIG, DIFFUSERS_FILE, "trainer_state.json", "model.safetensors.index.json")
# What `Trainer` saves beside networks.
_NO_NETWORK = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*)\.(bin|pt|pth)")
_ONE_NETWORK = re.compile(r"(checkpoint|network)-\d+")
# Folders of folders are looked through to this depth, as that of `datasets--owner--name/snapshots/commit` is.
MAX_DEPTH = 4
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<subfolder>[\w./-]+))?(?:@(?P<revision>[\w./-]+))?")

# Of a zoo, some of whose networks fit.
OTHER_KIND = (
    ". The networks before it fit: those of another architecture or width are a data set of their own, so import each "
    "kind with a --model and an --output_dir of its own"
)


def import_snapshots(
    paths: Sequence[str | os.PathLike],
    layout: ParameterLayout,
    folder: str | os.PathLike,
    *,
    conditions: Sequence[Condition] | None = None,
    fields: Fields | None = None,
    check: FrozenCheck | None = None,
    **hub_kwargs: Any,
) -> dict[str, Any]:
    """
    Writes the parameter data set `folder` from networks that were saved during other training runs, one row each.

    Args:
        paths (`Sequence[str | os.PathLike]`): In order, each of

            - a state dict: `.safetensors`, an `.npz` of numbers, or `.pt`, `.pth` or `.bin` that
              `torch.load(weights_only=True)` reads, which may hold it under a key such as `state_dict` or `model`;
            - a folder that `save_pretrained` or `Trainer` wrote, of a network or of PEFT adapters of any method;
            - a file of a LoRA adapter that diffusers or kohya has written, or a folder with
              `pytorch_lora_weights.safetensors`;
            - a folder with `checkpoint-N` folders, taken by N, and after them the adapter that training has left beside
              them; or of state dicts or such folders, and folders of these (`runs/TASK/checkpoint-N`, the Hub's cache),
              in natural order of their names;
            - a folder with a parameter data set, as [`SnapshotRecorder`] writes it, of which all rows are taken with
              their steps and conditions;
            - a Hub id `owner/name`, with a subfolder (`owner/name/checkpoint-500`) or a revision
              (`owner/name@step500`) if need be, of which only safetensors files are downloaded.
        layout (`ParameterLayout`): Which tensors to read, such as
            [`~pdiff_hf.selection.select_layout`]`(model, "norm[-2:]")`. Floats of half precision are widened; names
            may have the prefixes that `torch.compile`, FSDP, data parallelism, EMA, PEFT and transformers' wrapper of
            timm add, in any order and number, or be those of PEFT's files, or of another module that shares the tensor.
            Where all modules have other names, tensors of the same shapes are taken in order, with a warning.
        folder (`str` or `os.PathLike`): Must not exist yet.
        conditions (`Sequence[Mapping]`, *optional*): One for each of the paths, which all networks that it stands for
            have; see [`~pdiff_hf.snapshots.conditions.read_conditions`].
        fields (`Fields`, *optional*): Of the conditions; by default those of the first parameter data set.
        check (`FrozenCheck`, *optional*): Is shown each network, to compare what is not selected.
        hub_kwargs: For `huggingface_hub.snapshot_download`, such as `token`.

    LoRA adapters may have other scalings, ranks and modules than the layout's: see
    [`~pdiff_hf.snapshots.adapters`]. A network that equals an earlier one is left out with a warning.

    The column `step` is the number that a file's or folder's name ends in, or its place in the list; `seed` counts the
    folders that the files lie in, as each is taken to be a run of its own.

    Returns:
        `dict`: What was done to adapters (`scaled`, `padded`, ...), and the `copies` that were left out; empty if
        nothing was.

    Raises:
        SnapshotError: for a file that cannot be read, is a pickle with more than tensors in it, or gives a snapshot
            that [`SnapshotWriter`] refuses; names the file.
        LayoutError: for a file whose tensors do not fit the layout; names the file and the tensor.
        ConditionError: for a condition that does not fit the fields.
    """
    if fields is None:
        fields = next((load_fields(path) for path in paths if _is_data_set(Path(path))), Fields({}))
    if conditions:
        fields.table(conditions)  # an error comes before files are read
    given: Sequence[Condition | None] = conditions or [None] * len(paths)
    named = zip(paths, given, strict=True)
    found = [(*network, condition) for path, condition in named for network in _expand(path, hub_kwargs)]
    runs: dict[Path, int] = {}
    notes, names, reader = Notes(), [], adapter_reader(layout)
    with SnapshotWriter(folder, layout, fields=fields) as writer:
        for position, (name, path, condition) in enumerate(found):
            try:
                if _is_data_set(path):
                    names += [str(path)] * _copy_rows(path, writer, runs.setdefault(path, len(runs)))
                    continue
                with open_network(path, layout) as tensors:
                    vector = read_vector(tensors, layout, reader, str(path), notes)
                    if check is not None:
                        check.compare(path, tensors, notes)
                    for unused in reader.unused(tensors) if check is None else ():
                        notes.left_out[unused].add(str(path))
                    bases = (file.config.get("base_model_name_or_path") for file in tensors.files.values())
                    notes.base_models.update(str(base) for base in bases if base)
                if not writer.layout.adapters:  # of a layout that says nothing of them: those of the first
                    writer.layout = replace(layout, adapters=reader.adapters)
                if (copy := writer.find(vector)) is not None:
                    notes.copies[str(path)] = names[copy]
                    continue
                run = path if any(path.glob("checkpoint-*")) else path.parent
                seed = runs.setdefault(run, len(runs))
                writer.write(vector, step=_step(name, position), seed=seed, condition=condition)
                names.append(str(path))
            except (SnapshotError, LayoutError) as error:
                hint = OTHER_KIND if names and isinstance(error, LayoutError) else ""
                raise type(error)(f"'{path}': {error}{hint}") from error
    return notes.report()


def _is_data_set(path: Path) -> bool:
    return (path / DATA_FILE).is_file()


def _copy_rows(folder: Path, writer: SnapshotWriter, seed: int) -> int:
    """Writes all rows of a parameter data set, with their conditions, and returns their number."""
    dataset, layout = load_snapshots(folder)
    if layout != writer.layout:
        raise LayoutError("the data set has snapshots of other tensors than are selected")
    check_adapters(layout, writer.layout.adapters)
    fields = load_fields(folder)
    if fields != writer.fields:
        raise SnapshotError(f"the conditions of the data set have the fields {fields}, and not {writer.fields}")
    steps = dataset["step"][:]
    conditions = condition_columns(dataset, fields)
    for row, step, condition in zip(parameter_matrix(dataset, layout, minimum=1), steps, conditions, strict=True):
        writer.write(row, step=step, seed=seed, condition=condition)
    return len(dataset)


def read_networks(path: str | os.PathLike, layout: ParameterLayout) -> torch.Tensor:
    """
    All networks that `path` stands for, as [`import_snapshots`] understands it, as one tensor of shape `(N, D)`. They
    may be equal to each other.

    Raises:
        SnapshotError: for a file that cannot be read, or holds values that are not finite; names the file.
        LayoutError: for a file whose tensors do not fit the layout; names the file and the tensor.
    """
    found = _expand(path, {})
    parameters = torch.empty(len(found), layout.num_parameters)
    reader, notes = adapter_reader(layout), Notes()
    for row, (_, file) in zip(parameters, found, strict=True):
        try:
            with open_network(file, layout) as tensors:
                row.copy_(read_vector(tensors, layout, reader, str(file), notes))
            check_finite(row[None].numpy(), layout)
        except (SnapshotError, LayoutError) as error:
            raise type(error)(f"'{file}': {error}") from error
    notes.report()
    return parameters


def conditions_of_paths(paths: Sequence[str | os.PathLike], pattern: str) -> tuple[list[str], list[Condition], Fields]:
    """
    All networks that the paths stand for, as [`import_snapshots`] understands them, and what their paths say of them.

    Args:
        pattern (`str`): A regular expression that each path contains; its named groups are fields of words, such as
            `training_(?P<label>[0-9])_`.

    Raises:
        ConditionError: if it has no groups, a path does not contain it, or all have the same word.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConditionError(f"{pattern!r} is not a regular expression: {error}") from None
    if not expression.groupindex:
        raise ConditionError(f"{pattern!r} has no named group such as (?P<label>[a-z]+), which would be a field")
    networks = [str(file) for path in paths for _, file in _expand(path, {})]
    found = []
    for network in networks:
        if (match := expression.search(Path(network).as_posix())) is None:
            raise ConditionError(f"the path '{network}' does not contain {pattern!r}")
        found.append(match.groupdict(""))
    rows = range(1, len(found) + 1)
    columns = {
        name: read_column(Column(f"paths with {pattern}", name, "category", [one[name] for one in found], rows))
        for name in expression.groupindex
    }
    conditions: list[Condition] = [
        {name: values[i] for name, (values, _) in columns.items()} for i in range(len(found))
    ]
    return networks, conditions, Fields({name: field for name, (_, field) in columns.items()})


def beside(table: str | os.PathLike, name: str) -> str:
    """What a table calls `name`: relative to the table where it exists there, and else as it stands."""
    path = Path(table).parent / expand_path(name)
    return str(path) if path.exists() else expand_path(name)


def find_adapter(paths: Sequence[str | os.PathLike], folder: str | os.PathLike, model: str | None = None) -> str | None:
    """
    The adapter that a base model needs so that networks can be imported for it: for adapters of PEFT, one with room for
    all; see [`~pdiff_hf.snapshots.canonical.canonical_adapter`]. None for other networks.

    Args:
        folder (`str` or `os.PathLike`): Where it is written.
        model (`str`, *optional*): The base model. If it is itself the folder of an adapter, that comes first.

    Raises:
        SnapshotError: for adapters that cannot be read, or have no configuration.
        ValueError: for adapters that are different networks with the same tensors.
    """
    has_own = model is not None and Path(model, ADAPTER_CONFIG).is_file()
    folders = [Path(str(model))] if has_own else []
    for path in [path for one in paths for _, path in _expand(one, {}) if not _is_data_set(path)]:
        if path.is_dir():
            folders += find_adapters(path).values()
            continue
        with open_network(path) as tensors:
            described = tensors.files.get("default")
        if described is None:
            continue
        if has_own and not described.config and not described.alphas:
            return None  # it is taken to be scaled as that adapter
        if not described.config or not path.with_name(ADAPTER_CONFIG).is_file():
            raise SnapshotError(
                f"'{path}' is an adapter without its {ADAPTER_CONFIG}, which says how it is scaled; give the folder "
                "that has both, or as --model an adapter that is scaled alike"
            )
        folders.append(path.parent)
    if not folders[has_own:]:
        return None
    named = {str(read_config(one / ADAPTER_CONFIG).get("base_model_name_or_path") or "") for one in folders}
    others = sorted(name for name in named if name and model and not has_own and Path(name).name != Path(model).name)
    if others:
        logger.warning(
            f"the adapters were trained for {some_names(others)}, and the base model is '{model}': if it has "
            "other weights, they are other networks with it"
        )
    return str(canonical_adapter(list(dict.fromkeys(folders)), Path(folder)))


def _expand(path: str | os.PathLike, hub_kwargs: Mapping) -> list[tuple[str, Path]]:
    """The checkpoints that `path` stands for: what each is called, and the file, or the folder of one network."""
    local = Path(path)
    if local.is_file():
        return [(local.stem, local)]
    if not local.is_dir():
        return _expand_hub(str(path), hub_kwargs)
    if _is_data_set(local):
        return [(local.name, local)]
    found = _look_through(local)
    if not found:
        raise SnapshotError(f"'{path}' has no checkpoint-N folders and no {', '.join(SUFFIXES)} files")
    return found


def _look_through(folder: Path, depth: int = MAX_DEPTH) -> list[tuple[str, Path]]:
    own = [(folder.name, folder)] if any((folder / name).is_file() for name in MARKS) else []
    children = sorted((child for child in folder.iterdir() if not child.name.startswith(".")), key=_natural_order)
    checkpoints = [(child.stem, child) for child in children if re.fullmatch(r"checkpoint-\d+", child.name)]
    if checkpoints:  # an adapter beside them is the end of the same run
        return checkpoints + (own if (folder / ADAPTER_CONFIG).is_file() else [])
    # Of one network, adapters with a name lie in folders of that name.
    if own or (_ONE_NETWORK.fullmatch(folder.name) and any(folder.glob(f"*/{ADAPTER_CONFIG}"))):
        return own or [(folder.stem, folder)]
    found = []
    for child in children:
        if child.suffix in SUFFIXES and not _NO_NETWORK.fullmatch(child.name):
            found.append((child.stem, child))
        elif child.is_dir() and depth:
            found += _look_through(child, depth - 1)
    return found


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
        raise SnapshotError(f"'{path}' does not exist, and is not available from the Hub: {error}") from error
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
