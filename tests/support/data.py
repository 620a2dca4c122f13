"""Small data sets in folders."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image


def write_csv(path: Path, rows: Iterable[Iterable[Any]], columns: Iterable[str] = ("text", "label")) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([list(columns), *map(list, rows)])


def write_parquet(path: Path, columns: dict[str, list], types: dict[str, Any]) -> None:
    """`types` are the features of `columns`; `image` needs none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image()} if "image" in columns else {}) | types
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)


def grey(value: int = 0, size: int = 8) -> Image.Image:
    return Image.fromarray(np.full((size, size), value, dtype=np.uint8))
