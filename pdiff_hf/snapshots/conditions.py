"""Conditions from a table that people have: one row for each file or adapter, one column for each field."""

import logging
import os
from collections import Counter
from typing import Any

from ..models.condition import ConditionError, Fields
from ..models.fields import nearest
from .tables import Column, read_column, read_numbers, read_table, read_vectors

RESERVED = ("parameters", "step", "seed")  # columns of a parameter data set

logger = logging.getLogger(__name__)


def read_conditions(path: str | os.PathLike, fields: Fields | None = None) -> tuple[dict[str, dict[str, Any]], Fields]:
    """
    Reads a CSV file whose first column names networks (a path or an adapter id), and whose others are fields: numbers,
    words, or lists of numbers. A column `name:angle` holds angles in degrees, `name:category` words as they stand, even
    where they look like numbers or like missing values. An empty cell is unknown; in a column of numbers or lists, so
    is what pandas takes for missing. See [`~pdiff_hf.snapshots.tables.read_table`].

    Args:
        fields (`Fields`, *optional*): What the columns must be. By default types, ranges and words are those that
            occur; what was understood is logged.

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
    name, count = Counter(first.cells).most_common(1)[0]
    if count > 1:
        raise ConditionError(f"'{path}' names {name!r} more than once")
    values: dict[str, list[Any]] = {}
    found = {}
    for column in columns:
        if column.name in RESERVED:
            raise column.error(f"a field cannot be called {', '.join(RESERVED)}")
        if fields is None:
            values[column.name], found[column.name] = read_column(column)
        else:
            values[column.name] = _of_field(column, fields)
    conditions = {name: {field: values[field][i] for field in values} for i, name in enumerate(first.cells)}
    if fields is None:
        fields = Fields(found)
        unknown = {name: cells.count(None) for name, cells in values.items()}
        logger.info(
            "%d networks with their conditions are read from '%s': %s",
            len(conditions),
            path,
            "; ".join(
                f"'{name}' is {field}{f', unknown for {unknown[name]}' if unknown[name] else ''}"
                for name, field in fields.items()
            ),
        )
    return conditions, fields


def _of_field(column: Column, fields: Fields) -> list[Any]:
    """The values of a column whose field is known."""
    if column.name not in fields:
        raise column.error(f"there is no such field{nearest(column.name, fields)}; there is {fields}")
    field = fields[column.name]
    if field.bounds:
        return read_numbers(column)
    return [cell or None for cell in column.cells] if field.choices else read_vectors(column)
