"""Conditions from a table that people have: one row for each file or adapter, one column for each field."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from ..models.condition import Fields
from ..models.embedded import DEFAULT_TEXT_ENCODER, ImageField, TextField
from ..models.fields import ConditionError, Field, nearest, shown
from .dataset import COLUMNS
from .files import beside
from .tables import Column, check_differ, read_column, read_numbers, read_table, read_texts, read_vectors

logger = logging.getLogger(__name__)


def read_conditions(
    path: str | os.PathLike, fields: Fields | None = None, *, text_encoder: str = DEFAULT_TEXT_ENCODER
) -> tuple[dict[str, dict[str, Any]], Fields]:
    """
    Reads a CSV file whose first column names networks (a path or an adapter id), and whose others are fields: numbers,
    words, or lists of numbers. A column `name:angle` holds angles in degrees, `name:category` words as they stand, even
    where they look like numbers or like missing values, `name:text` descriptions in words: one, a JSON list of them, or
    one in each of several rows of a network. An empty cell is unknown; in a column of numbers or lists, so is what
    pandas takes for missing. See [`~pdiff_hf.snapshots.tables.read_table`].

    Args:
        fields (`Fields`, *optional*): What the columns must be; those of an [`ImageField`] hold files of pictures. By
            default types, ranges and words are those that occur; what was understood is logged.
        text_encoder (`str`, *optional*): Of columns `name:text`, see [`TextField`].

    Returns:
        `tuple`: The condition of each network, and the fields.

    Raises:
        ConditionError: for a file that cannot be read, a network that is named twice, or a column that can be meant in
            several ways or says nothing; names column and row.
    """
    first, *columns = read_table(path)
    for row, name in first:
        if not name:
            raise ConditionError(f"'{path}', row {row}: the first column must name a network, and it is empty")
    values: dict[str, list[Any]] = {}
    found: dict[str, Field] = {}
    for column in columns:
        if column.name in COLUMNS:
            raise column.error(f"a field cannot be called {', '.join(COLUMNS)}")
        if fields is not None:
            values[column.name] = _of_field(column, fields)
        elif column.kind == "text":
            values[column.name], found[column.name] = read_texts(column), TextField(encoder=text_encoder)
            check_differ(column, values[column.name])
        else:
            values[column.name], found[column.name] = read_column(column)
    conditions: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}  # ./a.pt is a.pt
    for i, (row, name) in enumerate(first):
        name = names.setdefault(os.path.normpath(name), name)
        condition = {field: values[field][i] for field in values}
        if name in conditions:
            _merge(f"'{path}', row {row}: {name!r}", conditions[name], condition, fields or found)
        else:
            conditions[name] = condition
    if fields is None:
        fields = Fields(found)
        unknown = {name: cells.count(None) for name, cells in values.items()}
        said = [f"'{n}' is {field}" + f", unknown for {unknown[n]}" * bool(unknown[n]) for n, field in fields.items()]
        logger.info(f"{len(conditions)} networks with their conditions are read from '{path}': {'; '.join(said)}")
    return conditions, fields


def _merge(where: str, condition: dict[str, Any], more: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    """Adds the descriptions of another row of a network."""
    texts = [name for name in more if isinstance(fields[name], TextField)]
    if not texts:
        raise ConditionError(f"{where} is named more than once")
    for name, value in more.items():
        if name in texts:
            condition[name] = [*(condition[name] or []), *(value or [])] or None
        elif value != condition[name]:
            raise ConditionError(
                f"{where} has another '{name}' than before ({shown(value)}, {shown(condition[name])}); only its "
                "descriptions can differ"
            )


def _of_field(column: Column, fields: Fields) -> list[Any]:
    """The values of a column whose field is known."""
    if column.name not in fields:
        raise column.error(f"there is no such field{nearest(column.name, fields)}; there is {fields}")
    field = fields[column.name]
    if isinstance(field, TextField):
        return read_texts(column)
    if isinstance(field, ImageField):
        return [cells and [beside(column.table, cell) for cell in cells] for cells in read_texts(column)]
    if field.bounds:
        return read_numbers(column)
    return [cell or None for cell in column.cells] if field.choices else read_vectors(column)
