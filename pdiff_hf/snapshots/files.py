"""Snapshots from files: state dicts, checkpoints of `transformers.Trainer`, and repositories of the Hub."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..layout import LayoutError, ParameterLayout
from ..models.condition import Condition, Fields
from ..utils.paths import expand_path
from .dataset import (
    DATA_FILE,
    SnapshotError,
    SnapshotWriter,
    check_finite,
    condition_table,
    load_fields,
    load_snapshots,
    parameter_matrix,
)
from .frozen import FrozenCheck
from .readers import ADAPTER_CONFIG, SUFFIXES, find_adapters, open_network, read_tensors

# A folder with one of these is one network; others are folders of networks.
MARKS = ("config.json", ADAPTER_CONFIG, "trainer_state.json", "model.safetensors.index.json")
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<subfolder>[\w./-]+))?(?:@(?P<revision>[\w./-]+))?")


def import_snapshots(
    paths: Sequence[str | os.PathLike],
    layout: ParameterLayout,
    folder: str | os.PathLike,
    *,
    conditions: Sequence[Condition] | None = None,
    fields: Fields | None = None,
    check: FrozenCheck | None = None,
    **hub_kwargs: Any,
) -> None:
    """
    Writes the parameter data set `folder` from networks that were saved during other training runs, one row each.

    Args:
        paths (`Sequence[str | os.PathLike]`): In order, each of

            - a state dict: `.safetensors`, or `.pt`, `.pth` or `.bin` that `torch.load(weights_only=True)` reads, which
              may hold it under a key such as `state_dict`, `model` or `model_ema`;
            - a folder that `save_pretrained` or `Trainer` wrote, of a network or of PEFT adapters of any method;
            - a folder with `checkpoint-N` folders, taken by N, or of state dicts or such folders, in natural order
              of their names;
            - a folder with a parameter data set, as [`SnapshotRecorder`] writes it, of which all rows are taken with
              their steps and conditions;
            - a Hub id `owner/name`, with a subfolder (`owner/name/checkpoint-500`) or a revision
              (`owner/name@step500`) if need be, of which only safetensors files are downloaded.
        layout (`ParameterLayout`): Which tensors to read, such as
            [`~pdiff_hf.selection.select_layout`]`(model, "norm[-2:]")`. Floats of half precision are widened; names
            may have the prefixes that `torch.compile`, FSDP, data parallelism, EMA, PEFT and transformers' wrapper of
            timm add, in any order and number, or be those of PEFT's files, or of another module that shares the tensor.
        folder (`str` or `os.PathLike`): Must not exist yet.
        conditions (`Sequence[Mapping]`, *optional*): One for each of the paths, which all networks that it stands for
            have; see [`~pdiff_hf.snapshots.conditions.read_conditions`].
        fields (`Fields`, *optional*): Of the conditions; by default those of the first parameter data set.
        check (`FrozenCheck`, *optional*): Is shown each network, to compare what is not selected.
        hub_kwargs: For `huggingface_hub.snapshot_download`, such as `token`.

    The column `step` is the number that a file's or folder's name ends in, or its place in the list; `seed` counts the
    folders that the files lie in, as each is taken to be a run of its own.

    Raises:
        SnapshotError: for a file that cannot be read, is a pickle with more than tensors in it, or gives a snapshot
            that [`SnapshotWriter`] refuses; names the file.
        LayoutError: for a file whose tensors do not fit the layout; names the file and the tensor.
        ConditionError: for a condition that does not fit the fields.
    """
    given: Sequence[Condition | None] = conditions or [None] * len(paths)
    if fields is None:
        fields = next((load_fields(path) for path in paths if _is_data_set(Path(path))), Fields({}))
    if conditions:
        fields.table(conditions)  # an error comes before files are read
    found = [
        (*network, condition)
        for path, condition in zip(paths, given, strict=True)
        for network in _expand(path, hub_kwargs)
    ]
    runs: dict[Path, int] = {}
    with SnapshotWriter(folder, layout, fields=fields) as writer:
        for position, (name, path, condition) in enumerate(found):
            try:
                if _is_data_set(path):
                    _copy_rows(path, writer, runs.setdefault(path, len(runs)))
                    continue
                with open_network(path, layout) as tensors:
                    vector = layout.flatten(read_tensors(tensors, layout))
                    if check is not None:
                        check.compare(path, tensors)
                seed = runs.setdefault(path.parent, len(runs))
                writer.write(vector, step=_step(name, position), seed=seed, condition=condition)
            except (SnapshotError, LayoutError) as error:
                raise type(error)(f"'{path}': {error}") from error


def _is_data_set(path: Path) -> bool:
    return (path / DATA_FILE).is_file()


def _copy_rows(folder: Path, writer: SnapshotWriter, seed: int) -> None:
    """Writes all rows of a parameter data set, with their conditions."""
    dataset, layout = load_snapshots(folder)
    if layout != writer.layout:
        raise LayoutError("the data set has snapshots of other tensors than are selected")
    fields = load_fields(folder)
    if fields != writer.fields:
        raise SnapshotError(f"the conditions of the data set have the fields {fields}, and not {writer.fields}")
    steps = dataset["step"][:]
    conditions = fields.conditions(condition_table(dataset, fields))
    for row, step, condition in zip(parameter_matrix(dataset, layout, minimum=1), steps, conditions, strict=True):
        writer.write(row, step=step, seed=seed, condition=condition)


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
            with open_network(file, layout) as tensors:
                row.copy_(layout.flatten(read_tensors(tensors, layout)))
            check_finite(row[None].numpy(), layout)
        except (SnapshotError, LayoutError) as error:
            raise type(error)(f"'{file}': {error}") from error
    return parameters


def beside(table: str | os.PathLike, name: str) -> str:
    """What a table calls `name`: relative to the table where it exists there, and else as it stands."""
    path = Path(table).parent / expand_path(name)
    return str(path) if path.exists() else expand_path(name)


def find_adapter(paths: Sequence[str | os.PathLike]) -> str | None:
    """The folder of the first adapter of PEFT among networks that [`import_snapshots`] could read, if there is one."""
    for path in paths[:1]:
        for _, network in _expand(path, {})[:1]:
            folders = find_adapters(network).values() if network.is_dir() else ()
            return next(map(str, folders), None)
    return None


def _expand(path: str | os.PathLike, hub_kwargs: Mapping) -> list[tuple[str, Path]]:
    """The checkpoints that `path` stands for: what each is called, and the file, or the folder of one network."""
    local = Path(path)
    if local.is_file():
        return [(local.stem, local)]
    if not local.is_dir():
        return _expand_hub(str(path), hub_kwargs)
    if _is_data_set(local):
        return [(local.name, local)]
    checkpoints = [child for child in local.iterdir() if re.fullmatch(r"checkpoint-\d+", child.name)]
    if not checkpoints and any((local / name).is_file() for name in MARKS):
        return [(local.name, local)]
    if not checkpoints:
        checkpoints = [child for child in local.iterdir() if child.suffix in SUFFIXES]
    if not checkpoints:  # as scripts/generate.py writes them; adapters with a name lie in a folder of that name
        marks = (*MARKS, f"*/{ADAPTER_CONFIG}")
        checkpoints = [child for child in local.iterdir() if any(any(child.glob(mark)) for mark in marks)]
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
