"""Tables that people have: the cells of a CSV file, and what numbers, vectors and words stand in them."""

import csv
import io
import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..models.fields import AngleField, CategoryField, ConditionError, Field, ScalarField, VectorField, shown
from .readers import SUFFIXES

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
NEEDED = "a header, a first column that names networks, and a column for each field"
# What pandas takes for a missing value, but for the empty cell, in any case.
MISSING = {
    *("na", "n/a", "#n/a", "#n/a n/a", "#na", "<na>", "nan", "-nan", "null", "none"),
    *("1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan"),
}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?inf(inity)?", re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"[-+]?\d*,\d+")
# Meant as a number or several, and readable in more than one way.
_NUMBERISH = re.compile(r"[-+$€£]?\s*\d[\d.,;:'’\s_e+-]*[%°]?", re.IGNORECASE)
# 5 ms, 1/2, <0.5, 10⁻³: meant as a number, and not written as one; or a word such as 3x3.
_BEGINS_WITH_NUMBER = re.compile(r"['\"~≈<>=#$€£¥(+−–-]*\s*[.,]?\d\S*(\s\S+)?")
_ARRAY = re.compile(r"(?:\w+\.)?(?:[aA]rray|tensor|list)\(\s*(.*?)\s*(?:,\s*\w+=[^\])]*)?\)", re.DOTALL)
_NUMPY_SCALAR = re.compile(r"(?:np|numpy)\.\w+\(([^()]*)\)")
LARGEST = float(np.finfo(np.float32).max)  # as tables and data sets have numbers
# A column of more words than this, most of which occur once, or of sentences, is hardly one of classes.
MANY_WORDS = 20
WORDS_OF_A_SENTENCE = 3


@dataclass(frozen=True)
class Column:
    """
    One column of a table.

    Args:
        table (`str`): What messages call the table.
        name (`str`), kind (`str`): Its title is the name, or `name:kind`.
        cells (`Sequence[str]`), rows (`Sequence[int]`): Without spaces at their ends; and where they stand, from 1.
    """

    table: str
    name: str
    kind: str
    cells: Sequence[str]
    rows: Sequence[int]

    def error(self, message: str, row: int | None = None) -> ConditionError:
        """What is wrong with the column, or with a row of it."""
        title = f"{self.name}:{self.kind}" if self.kind else self.name
        return ConditionError(f"'{self.table}', column '{title}'{'' if row is None else f', row {row}'}: {message}")

    def __iter__(self):
        return iter(zip(self.rows, self.cells, strict=True))


def read_table(path: str | os.PathLike) -> list[Column]:
    """
    The columns of a CSV file; those of its first row are titles, and the first column names networks.

    The cells are separated by commas, semicolons, tabs or vertical bars, whichever gives all rows equally many. Empty
    rows are left out, and so is a last column without a title or a cell.

    Raises:
        ConditionError: for a file that cannot be read, or has no titles, or two columns of one title.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig").lstrip("\r\n")  # spreadsheets begin a file with a mark
    except UnicodeDecodeError as error:
        raise ConditionError(f"the table '{path}' is not in UTF-8 ({error}); save it as CSV UTF-8") from error
    except OSError as error:
        raise ConditionError(f"the table '{path}' cannot be read: {error}") from error
    if not text.strip():
        raise ConditionError(f"the table '{path}' is empty")
    (_, titles), *body = _rows(str(path), text)
    if not body:
        raise ConditionError(f"'{path}' has no rows besides its titles")
    while titles and not titles[-1] and not any(row[len(titles) - 1] for _, row in body):
        titles.pop()
    columns = []
    for i, title in enumerate(titles):
        name, _, kind = (part.strip() for part in title.partition(":"))
        columns.append(Column(str(path), name, kind, [row[i] for _, row in body], [number for number, _ in body]))
    index = columns[0]
    if not index.name and list(index.cells) == [str(i) for i in range(len(body))]:
        columns = columns[1:]  # the index that pandas writes
    _check_titles(path, columns)
    return columns


def _rows(path: str, text: str) -> list[tuple[int, list[str]]]:
    """The rows that are not empty, each with its number from 1, in cells."""
    found, wrong = {}, [(0, "it has one column, and none of " + ", ".join(DELIMITERS.values()) + " separates others")]
    for delimiter in DELIMITERS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            rows = [(number, [cell.strip() for cell in row]) for number, row in enumerate(reader, start=1)]
        except csv.Error as error:
            wrong.append((1, str(error)))
            continue
        rows = [(number, row) for number, row in rows if any(row)]
        width = len(rows[0][1]) if rows else 0
        short = [f"row {i} has {len(row)} cells, and the header has {width}" for i, row in rows if len(row) != width]
        if short:
            wrong.append((width, short[0]))
        elif width > 1:
            found[delimiter] = rows
    if len(found) > 1:
        kinds = " and ".join(DELIMITERS[delimiter] for delimiter in found)
        raise ConditionError(f"'{path}' can be read with {kinds} between its cells; put cells that have both in quotes")
    if not found:  # what is wrong with the most likely way to read it
        raise ConditionError(f"'{path}' needs {NEEDED}: {max(wrong, key=lambda item: item[0])[1]}")
    return next(iter(found.values()))


def _check_titles(path: str | os.PathLike, columns: Sequence[Column]) -> None:
    first, *fields = columns
    if not fields:
        raise ConditionError(f"'{path}' needs {NEEDED}")
    untitled = [
        column.name or "(empty)"
        for column in fields
        if not column.name or _number(column.name) is not None or column.name in column.cells
    ]
    is_path = "/" in first.name and Path(path).parent.joinpath(first.name).exists()
    names_network = is_path or first.name.endswith(SUFFIXES) or (first.name and first.name in first.cells)
    if untitled or names_network:
        raise ConditionError(
            f"'{path}' needs a header such as network,rate: its first row has {shown(first.name)} and "
            f"{shown(untitled[0] if untitled else fields[0].name)}, which look like a network and its values"
        )
    for column in fields:
        if all(cell.endswith(SUFFIXES) for cell in column.cells):
            raise ConditionError(f"'{path}': column '{column.name}' names networks, and must be the first one")
    alike = defaultdict(list)
    for column in fields:
        alike[" ".join(column.name.casefold().split())].append(column.name)
    for names in alike.values():
        if len(names) > 1:
            raise ConditionError(f"'{path}' has several columns of one name: {', '.join(map(shown, names))}")


def read_column(column: Column) -> tuple[list, Field]:
    """
    The values of a column, None where a cell is unknown, and the field that it is of.

    An empty cell is unknown; in a column of numbers or vectors, so is what pandas takes for missing (NA, NaN, None …).

    Raises:
        ConditionError: for what can be meant in several ways, says nothing, or cannot be a value.
    """
    if column.kind not in ("", "angle", "category"):
        raise column.error(f"what follows the colon must be angle, category or text, got {column.kind!r}")
    if column.kind == "category":
        return words(column, as_they_stand=True)
    present = [cell for cell in column.cells if not _is_missing(cell)]
    if not any(column.cells):
        raise column.error("it is empty")
    if present and any(cell.startswith(("[", "{")) or _ARRAY.fullmatch(cell) or _vector(cell) for cell in present):
        vectors = read_vectors(column)
        lengths = sorted({len(vector) for vector in vectors if vector is not None})
        if len(lengths) > 1:
            raise column.error(f"it holds lists of {lengths} numbers")
        check_differ(column, vectors)
        return vectors, VectorField(lengths[0])
    is_number = any(_number(cell) is not None or _NUMBERISH.fullmatch(cell) for cell in present)
    is_number |= 2 * sum(bool(_BEGINS_WITH_NUMBER.fullmatch(cell)) for cell in present) > len(present)
    if column.kind != "angle" and not is_number:
        return words(column)
    values = read_numbers(column)
    known = sorted({value for value in values if value is not None})
    if not known:
        raise column.error("it has no values")
    check_differ(column, values)
    if column.kind == "angle":
        return values, AngleField()
    if len(set(np.array(known, dtype=np.float32).tolist())) < len(known):
        raise column.error(
            "some of its numbers are equal in single precision: if they are not quantities but names, call it "
            f"'{column.name}:category'"
        )
    return values, ScalarField(known[0], known[-1])


def check_differ(column: Column, values: Sequence) -> None:
    """Raises a `ConditionError` for a column that has the same for all networks."""
    known = [value for value in values if value is not None]
    if all(value == known[0] for value in known):
        raise column.error(f"it is {shown(known[0])} for all networks, which says nothing; leave it out")


def read_texts(column: Column) -> list[list[str] | None]:
    """Descriptions in words, one or several as a JSON list. Raises a `ConditionError` if there are none."""
    texts: list[list[str] | None] = []
    for row, cell in column:
        found = [cell] if cell else None
        if cell.startswith("["):
            try:
                found = json.loads(cell)
            except ValueError:
                pass  # words in brackets
            else:
                if not found or not all(isinstance(text, str) and text.strip() for text in found):
                    raise column.error(f"{shown(cell)} is not a list of texts", row)
        texts.append(found)
    if not any(texts):
        raise column.error("it is empty")
    return texts


def _is_missing(cell: str) -> bool:
    return not cell or cell.casefold() in MISSING


def _number(cell: str) -> float | None:
    cell = _NUMPY_SCALAR.sub(r"\1", cell.replace("\N{MINUS SIGN}", "-"))
    return float(cell) if _NUMBER.fullmatch(cell) else None


def _read(column: Column, read: Callable[[str], Any], kind: str) -> list:
    """The value of each cell, None where it is missing. Raises a `ConditionError` that names the row with another."""
    values = [None if _is_missing(cell) else read(cell) for cell in column.cells]
    for (row, cell), value in zip(column, values, strict=True):
        if value is None and not _is_missing(cell):
            hint = "; it was shortened when it was printed" if "..." in cell or "…" in cell else ""
            raise column.error(f"{shown(cell)} is not {kind}{hint}", row)
        if value is not None and not np.all(np.abs(value) <= LARGEST):
            raise column.error(f"{shown(cell)} is infinite or too large", row)
    return values


def read_numbers(column: Column) -> list[float | None]:
    """Numbers with a decimal point or comma. Raises a `ConditionError` that names the row of what is none."""
    cells = [cell for cell in column.cells if _DECIMAL_COMMA.fullmatch(cell)]
    # 1,500 and 2,250 could be thousands; 0,125 and 1,5 cannot.
    decimal = any(len(cell.partition(",")[2]) != 3 or cell.lstrip("+-").startswith(("0", ",")) for cell in cells)
    if cells and (not decimal or any("." in cell for cell in column.cells)):
        row = column.rows[column.cells.index(cells[0])]
        raise column.error(f"{cells[0]!r} can have a decimal comma or thousands; write it with a decimal point", row)
    otherwise = f"leave the cell empty if it is unknown, or call the column '{column.name}:category' if it holds words"
    return _read(
        column, lambda cell: _number(cell.replace(",", ".") if cell in cells else cell), f"a number; {otherwise}"
    )


def _vector(cell: str) -> list[float] | None:
    """The numbers of a cell, as JSON, Python, NumPy, pandas or torch write them; None for anything else."""
    array = _ARRAY.fullmatch(cell)
    inner = _NUMPY_SCALAR.sub(r"\1", array[1] if array else cell).strip()
    # (5) is no tuple, but minus five to an accountant.
    if not re.fullmatch(r"\[.+\]|\(.*[,\s].*\)", inner, re.DOTALL):
        return None
    numbers = [_number(part) for part in re.split(r"[,\s]+", inner[1:-1].strip().rstrip(","))]
    return None if None in numbers else numbers  # type: ignore[return-value]


def read_vectors(column: Column) -> list[list[float] | None]:
    """Lists of numbers. Raises a `ConditionError` that names the row of what is none."""
    return _read(column, _vector, "a list of numbers such as [0.5, 1.0]")


def words(column: Column, as_they_stand: bool = False) -> tuple[list[str | None], CategoryField]:
    """
    The words of a column of classes.

    Args:
        as_they_stand (`bool`, *optional*, defaults to `False`): Takes also what is probably a mistake.
    """
    places = {cell: row for row, cell in reversed(list(column)) if cell}  # the first row of each
    if not places:
        raise column.error("it is empty")
    cells = [cell or None for cell in column.cells]
    if as_they_stand:
        return cells, CategoryField(tuple(sorted(places)))
    keep = f"call the column '{column.name}:category' to keep them"
    alike: dict[str, str] = {}
    for cell, row in reversed(places.items()):
        if _is_missing(cell):
            said = "can be a missing value or a word; leave the cell empty if it is unknown, or"
            raise column.error(f"{cell!r} {said} {keep} as words", row)
        letters = "".join(c for c in unicodedata.normalize("NFKC", cell) if unicodedata.category(c) != "Cf")
        other = alike.setdefault(" ".join(letters.casefold().split()), cell)
        if other != cell:
            said = f"differs from {other!r} (row {places[other]}) only in case or spaces, or in how it is encoded; "
            said += "write both alike, or"
            raise column.error(f"{cell!r} {said} {keep} apart", row)
    check_differ(column, cells)
    length = sum(len(cell.split()) for cell in places) / len(places)
    once = len(places) > sum(map(bool, cells)) / 2
    if once and (len(places) > MANY_WORDS or length >= WORDS_OF_A_SENTENCE):
        raise column.error(
            f"it has {len(places)} different texts, such as {shown(next(filter(None, cells)))}. As classes they say "
            f"nothing of a new one. Call it '{column.name}:text' if they describe the networks, which a text encoder "
            f"then reads; or {keep} as classes"
        )
    return cells, CategoryField(tuple(sorted(places)))
