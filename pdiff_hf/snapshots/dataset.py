"""The parameter data set: one row a snapshot, kept as a folder that is also a data set repository of the Hub."""

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.arrow_writer import ArrowWriter

from ..layout import ParameterLayout
from ..models.condition import Condition, Fields
from ..utils.errors import first_line
from ..utils.files import sync

# Rows are written out when this much has come together; long ones each for itself, so that they lie in the file at
# equal distances and can be used where they are.
WRITE_BUFFER = 64 * 2**20
LONG_ROW = 2**20
# Values are checked in parts of so many bytes.
CHECK_BUFFER = 64 * 2**20
COLUMNS = ("parameters", "step", "seed")  # beside metrics and the fields of conditions
DATA_FILE = "data/snapshots.arrow"
LAYOUT_FILE = "layout/layout.arrow"
FIELDS_FILE = "fields/fields.arrow"
# All configs are Arrow files: a data set repository has one format for all of its configs.
FILES = {"default": DATA_FILE, "layout": LAYOUT_FILE, "fields": FIELDS_FILE}
LAYOUT_FEATURES = datasets.Features(
    name=datasets.Value("string"),
    shape=datasets.List(datasets.Value("int64")),
    dtype=datasets.Value("string"),
    aliases=datasets.List(datasets.Value("string")),
)
# Of the adapters of PEFT that tensors belong to, in the first row.
ADAPTERS_FEATURE = {"adapters": datasets.Value("string")}
FIELDS_FEATURES = datasets.Features(name=datasets.Value("string"), field=datasets.Value("string"))
FIELDS_CONFIG = """- config_name: fields
  data_files: fields/*
"""
CARD = """---
configs:
- config_name: default
  data_files: data/*
- config_name: layout
  data_files: layout/*
{fields_config}tags:
- pdiff-hf
- neural-network-weights
---
# Parameter snapshots

Each row of the config `default` holds `parameters`, the {num_parameters:,} selected parameters of one snapshot of a
network. The config `layout` says which tensors (name, shape, dtype) they belong to, in order. Written by `pdiff_hf`.
"""


class SnapshotError(ValueError):
    """A snapshot, or a data set of them, cannot be used; the message names the row and the tensor."""


class SnapshotWriter:
    """
    Writes a parameter data set row by row; a context manager. The folder appears, whole, when the block ends without an
    exception.

    Args:
        folder (`str` or `os.PathLike`): Must not exist yet.
        layout (`ParameterLayout`): Of every row.
        metrics (`Sequence[str]`, *optional*): Names of the float columns beside `parameters`, `step` and `seed`.
        fields (`Fields`, *optional*): Of the conditions of the networks: a column for each, null where it is unknown.

    Raises:
        SnapshotError: by `write`, for a row of another length, with a value that is not finite, or that was written
            before; on leaving the block, if nothing was written.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        layout: ParameterLayout,
        metrics: Sequence[str] = (),
        fields: Fields | None = None,
    ):
        self.folder, self.layout, self.metrics = Path(folder), layout, tuple(metrics)
        self.fields = Fields({}) if fields is None else fields
        reserved = [name for name in self.fields if name in (*COLUMNS, *self.metrics)]
        if reserved:
            raise SnapshotError(
                f"a field of a condition cannot have the name {reserved[0]!r}, which is a column already"
            )
        self._part = self.folder.with_name(f".{self.folder.name}.part")
        self._rows_by_digest: dict[bytes, int] = {}

    def __enter__(self) -> "SnapshotWriter":
        if self.folder.exists():
            raise SnapshotError(f"'{self.folder}' exists already; snapshots are never added to a finished data set")
        if self.layout.num_parameters == 0:
            raise SnapshotError("all tensors of the layout are empty, so that there is nothing to write")
        shutil.rmtree(self._part, ignore_errors=True)
        # Before what is in it: where a link has this name, nothing is written through it.
        self._part.mkdir(parents=True)
        size, number = 4 * self.layout.num_parameters, datasets.Value("int64")
        features = {"parameters": datasets.List(datasets.Value("float32"), length=self.layout.num_parameters)}
        features |= {"step": number, "seed": number} | dict.fromkeys(self.metrics, datasets.Value("float32"))
        features |= {name: field.feature() for name, field in self.fields.items()}
        (self._part / DATA_FILE).parent.mkdir()
        self._writer = ArrowWriter(
            path=str(self._part / DATA_FILE),
            features=datasets.Features(features),
            writer_batch_size=1 if size >= LONG_ROW else WRITE_BUFFER // size,
        )
        return self

    def find(self, parameters: torch.Tensor) -> int | None:
        """The row that was written with these parameters, `(D,)`; None if there is none."""
        return self._rows_by_digest.get(_digest(parameters))

    def write(
        self, parameters: torch.Tensor, *, step: int, seed: int, condition: Condition | None = None, **metrics: Any
    ) -> None:
        """
        Adds one row.

        Args:
            parameters (`torch.Tensor`): Shape `(D,)`.
            condition (`Mapping`, *optional*): Of the network; fields that are left out are unknown.

        Raises:
            ConditionError: for a condition that does not fit the fields.
        """
        row = len(self._rows_by_digest)
        if parameters.shape != (self.layout.num_parameters,):
            raise SnapshotError(
                f"snapshot {row} has shape {tuple(parameters.shape)}, the layout needs ({self.layout.num_parameters},)"
            )
        values = parameters.detach().to("cpu", torch.float32).contiguous().numpy()
        check_finite(values[None], self.layout, first_row=row)
        if (equal := self.find(parameters)) is not None:
            raise SnapshotError(
                f"snapshot {row} (step {step}) equals snapshot {equal} in every parameter; are "
                "the selected tensors being trained, and is the learning rate above 0?"
            )
        self._rows_by_digest[_digest(parameters)] = row
        if condition and not self.fields:
            raise SnapshotError(
                "a condition was given, but the data set was made without fields; pass fields=Fields(...)"
            )
        columns = self.fields.stored(condition or {})
        self._writer.write({"parameters": values, "step": step, "seed": seed, **metrics, **columns})

    def __exit__(self, exception_type, exception, traceback) -> None:
        try:
            if exception_type is None and not self._rows_by_digest:
                raise SnapshotError("no snapshot was written")
            if exception_type is None:
                self._writer.finalize()
                self._write_layout()
                fields = [{"name": name, "field": json.dumps(field)} for name, field in self.fields.to_dict().items()]
                if fields:
                    _write_arrow(self._part / FIELDS_FILE, FIELDS_FEATURES, fields)
                config = FIELDS_CONFIG if fields else ""
                card = CARD.format(num_parameters=self.layout.num_parameters, fields_config=config)
                (self._part / "README.md").write_text(card, encoding="utf-8")
                sync(self._part)
                self._part.rename(self.folder)
        finally:
            try:
                self._writer.close()  # which writes again, and fails again where the disk is full
            finally:
                shutil.rmtree(self._part, ignore_errors=True)

    def _write_layout(self) -> None:
        layout, features = self.layout, dict(LAYOUT_FEATURES)
        columns = zip(layout.names, layout.shapes, layout.dtypes, layout.aliases, strict=True)
        rows = [dict(zip(LAYOUT_FEATURES, values, strict=True)) for values in columns]
        if layout.adapters:
            features |= ADAPTERS_FEATURE
            rows = [row | {"adapters": "" if i else json.dumps(dict(layout.adapters))} for i, row in enumerate(rows)]
        _write_arrow(self._part / LAYOUT_FILE, datasets.Features(features), rows)


def _write_arrow(file: Path, features: datasets.Features, rows: Iterable[dict[str, Any]]) -> None:
    file.parent.mkdir()
    with ArrowWriter(path=str(file), features=features) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()


def _digest(parameters: torch.Tensor) -> bytes:
    values = parameters.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.blake2b(values.data, digest_size=16).digest()


def check_finite(parameters: np.ndarray, layout: ParameterLayout, first_row: int = 0) -> None:
    """Raises a `SnapshotError` for a NaN or infinity in `parameters`, `(N, D)`, that names the row and the tensor."""
    bad = ~np.isfinite(parameters)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise SnapshotError(
            f"snapshot {first_row + row} is not finite: tensor '{layout.locate(column)}' holds "
            f"{parameters[row, column]} ({int(bad[row].sum())} such values in the row). Did the training diverge?"
        )


def load_snapshots(path: str | os.PathLike, **kwargs: Any) -> tuple[datasets.Dataset, ParameterLayout]:
    """
    The data set and the layout of a folder that `SnapshotWriter` wrote (memory-mapped), or of a Hub id.

    Args:
        path (`str` or `os.PathLike`): The folder, or the id.
        kwargs: For `datasets.load_dataset` where `path` is an id, such as `revision` or `token`.

    Raises:
        SnapshotError: if it is not a parameter data set, or its rows do not have the layout's length.
    """
    if Path(path).is_dir() and not (Path(path, DATA_FILE).is_file() and Path(path, LAYOUT_FILE).is_file()):
        raise SnapshotError(f"'{path}' is not a parameter data set: it has no {DATA_FILE} or no {LAYOUT_FILE}")
    try:
        dataset, rows = _load(path, "default", **kwargs), list(_load(path, "layout", **kwargs))
    except SnapshotError:
        raise
    except (OSError, ValueError) as error:
        raise SnapshotError(
            f"'{path}' is neither a folder nor a Hub id with the configs default and layout: {error}"
        ) from error
    try:
        # Data sets of version 0.1 have no aliases.
        layout = ParameterLayout(
            tuple(row["name"] for row in rows),
            tuple(row["shape"] for row in rows),
            tuple(row["dtype"] for row in rows),
            tuple(row.get("aliases") or () for row in rows),
            json.loads(rows[0].get("adapters") or "{}") if rows else {},
        )
    except (KeyError, ValueError) as error:
        raise SnapshotError(f"the layout of '{path}' cannot be used: {error}") from error
    feature = dataset.features.get("parameters")
    if feature != datasets.List(datasets.Value("float32"), length=layout.num_parameters):
        raise SnapshotError(
            f"the rows of '{path}' do not fit their layout of {layout.num_parameters} parameters: the column "
            f"`parameters` is {feature}"
        )
    return dataset, layout


def load_fields(path: str | os.PathLike, **kwargs: Any) -> Fields:
    """
    The fields of the conditions of a parameter data set, a folder or a Hub id; none if its networks have none.

    Raises:
        SnapshotError: if they cannot be read.
    """
    is_folder = Path(path).is_dir()
    configs = [] if is_folder else datasets.get_dataset_config_names(str(path), **kwargs)
    has_fields = Path(path, FIELDS_FILE).is_file() if is_folder else "fields" in configs
    rows = _load(path, "fields", **kwargs) if has_fields else []
    try:
        return Fields({row["name"]: json.loads(row["field"]) for row in rows})
    except (KeyError, ValueError) as error:
        raise SnapshotError(f"the fields of '{path}' cannot be used: {error}") from error


def condition_table(dataset: datasets.Dataset, fields: Fields) -> torch.Tensor:
    """The conditions of all rows as a table of shape `(N, width)`, NaN where a field is unknown."""
    return fields.table(condition_columns(dataset, fields))


def condition_columns(dataset: datasets.Dataset, fields: Fields) -> Sequence[Condition]:
    """The conditions of all rows, as the data set has them: of a text, with all that describe the network."""
    return list(dataset.select_columns(list(fields))) if fields else [{}] * len(dataset)


def _load(path: str | os.PathLike, config: str, **kwargs: Any) -> datasets.Dataset:
    """One config of a folder or Hub id."""
    if not Path(path).is_dir():
        return datasets.load_dataset(str(path), config, split="train", **kwargs)
    file = Path(path, FILES[config])
    try:
        dataset = datasets.Dataset.from_file(str(file))
        # Arrow trusts the offsets in a file, and ends the process where they lead out of it.
        dataset.data.table.validate(full=True)
    except Exception as error:  # what a damaged file makes the parts of datasets raise has no common type
        raise SnapshotError(f"'{file}' is not a whole Arrow file of a data set ({first_line(error)})") from error
    return dataset


def parameter_matrix(dataset: datasets.Dataset, layout: ParameterLayout, minimum: int = 2) -> torch.Tensor:
    """
    All snapshots as one float32 tensor of shape `(N, D)`. Those of a data set file of up to 64 MB, or with rows of at
    least 1 MB each, stay in the file, mapped into memory; what is written to the tensor does not reach the file.

    Raises:
        SnapshotError: for fewer than `minimum` rows, values that are not finite, or equal rows.
    """
    if len(dataset) < minimum:
        raise SnapshotError(f"at least {minimum} snapshots are needed to learn a distribution, got {len(dataset)}")
    chunks = dataset.with_format("arrow")[:].column("parameters").chunks
    if any(chunk.null_count or chunk.values.null_count for chunk in chunks):
        raise SnapshotError("some snapshots have no value for some of their parameters")
    matrix = _mapped(dataset, layout.num_parameters)
    if matrix is None:
        matrix = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks])
        matrix = matrix.reshape(len(dataset), layout.num_parameters)
    rows = max(1, CHECK_BUFFER // (4 * layout.num_parameters))
    for start in range(0, len(matrix), rows):
        check_finite(matrix[start : start + rows], layout, first_row=start)
    rows_by_digest: dict[bytes, int] = {}
    for row, values in enumerate(torch.from_numpy(matrix)):
        earlier = rows_by_digest.setdefault(_digest(values), row)
        if earlier != row:
            raise SnapshotError(f"snapshot {row} equals snapshot {earlier} in every parameter")
    return torch.from_numpy(matrix)


def _mapped(dataset: datasets.Dataset, num_parameters: int) -> np.ndarray | None:
    """The parameters where they lie in the file, `(N, D)`; None if they do not lie at equal distances in one file."""
    if len(dataset.cache_files) != 1:
        return None
    path = dataset.cache_files[0]["filename"]
    with pa.memory_map(path) as source:
        file = source.read_buffer()
        table = pa.ipc.open_stream(file).read_all()
    if len(table) != len(dataset) or dataset._indices is not None:  # some rows of the file, or in another order
        return None
    starts = []
    for chunk in table.column("parameters").chunks:
        values = chunk.flatten()
        start = values.buffers()[1].address + 4 * values.offset - file.address
        starts += [start + 4 * num_parameters * row for row in range(len(chunk))]
    distances = set(np.diff(starts))
    if len(distances) > 1:
        return None
    with open(path, "rb") as opened:
        memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    strides = (int(distances.pop()) if distances else 4 * num_parameters, 4)
    return np.ndarray((len(dataset), num_parameters), np.float32, memory, starts[0], strides)
