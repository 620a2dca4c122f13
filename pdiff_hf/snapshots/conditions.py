"""Conditions from a table that people have: one row for each file or adapter, one column for each field."""

import csv
import json
import os
from collections import Counter
from typing import Any

from ..models.condition import AngleField, CategoryField, ConditionError, Field, Fields, ScalarField, VectorField


def read_conditions(path: str | os.PathLike) -> tuple[dict[str, dict[str, Any]], Fields]:
    """
    Reads a CSV file whose first column names networks (a path or an adapter id), and whose others are fields: numbers,
    words, or JSON lists of numbers. A column `name:angle` holds angles in degrees, `name:category` words even where
    they look like numbers. An empty cell is unknown.

    Returns:
        `tuple`: The condition of each network, and the fields, whose ranges and words are those that occur.

    Raises:
        ConditionError: for a file that cannot be read, a table without fields, a network that is named twice, or a
            column of several types.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin a file with a mark
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConditionError(f"the table '{path}' cannot be read: {error}") from error
    if len(rows) < 2 or len(rows[0]) < 2:
        raise ConditionError(
            f"'{path}' needs a header, a first column that names networks, and a column for each field"
        )
    header, *rows = rows
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ConditionError(f"'{path}': row {number} has {len(row)} cells, and the header has {len(header)}")
    names = [row[0].strip() for row in rows]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ConditionError(f"'{path}' names {name!r} more than once")
    columns: dict[str, list[Any]] = {}
    fields: dict[str, Field] = {}
    for i, title in enumerate(header[1:], start=1):
        name, _, kind = title.strip().partition(":")
        columns[name], fields[name] = _column(f"column '{title}' of '{path}'", kind, [row[i].strip() for row in rows])
    conditions = {name: {field: columns[field][i] for field in columns} for i, name in enumerate(names)}
    return conditions, Fields(fields)


def _column(where: str, kind: str, cells: list[str]) -> tuple[list[Any], Field]:
    """Its values, None where a cell is empty, and its field."""
    if kind not in ("", "angle", "category"):
        raise ConditionError(f"{where}: what follows the colon must be angle or category, got {kind!r}")
    known = [cell for cell in cells if cell]
    if not known:
        raise ConditionError(f"{where} is empty")
    values: list[Any] = cells
    if kind != "category":
        try:
            values = [json.loads(cell) if cell else None for cell in cells]
        except ValueError:
            if kind == "angle":
                raise ConditionError(f"{where} must hold numbers") from None
    present = [value for cell, value in zip(cells, values, strict=True) if cell]
    if all(isinstance(value, list) for value in present):
        if len({len(value) for value in present}) > 1:
            raise ConditionError(f"{where} holds lists of {sorted({len(value) for value in present})} numbers")
        return values, VectorField(len(present[0]))
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        if kind == "angle":
            return values, AngleField()
        if min(present) == max(present):
            raise ConditionError(f"{where} is {present[0]} for all networks, which says nothing")
        return values, ScalarField(float(min(present)), float(max(present)))
    return [cell or None for cell in cells], CategoryField(tuple(sorted(set(known))))
