"""Where the examples of a data set come from: local files and folders as people have them, and the Hub."""

import os
import warnings
from pathlib import Path

import datasets
import pandas as pd
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

VALIDATION_NAMES = ("validation", "valid", "val", "dev")
# What datasets takes for the name of a split in a path.
SPLIT_NAMES = {"train": "train", "training": "train"} | dict.fromkeys(VALIDATION_NAMES, "validation")
SPLIT_NAMES |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
FILE_TYPES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# An empty cell is missing, and nothing else: `NA`, `None` and `null` are names of regions, defects and genes. The first
# column is a column, where pandas takes it for the names of rows if the header is shorter than they are.
CSV_SETTINGS = {"keep_default_na": False, "na_values": [""], "index_col": False}


def load_raw(dataset: str, others: str = "") -> dict[str, datasets.Dataset]:
    """
    The splits that tasks use of a local folder or file, or of a data set on the Hub; see [`DatasetTask`].

    Args:
        others (`str`, *optional*): What else the name might have been, for the message.

    Raises:
        ValueError: if there is no such data set, or it has no training split.
    """
    try:
        raw = _load(dataset)
    except datasets.exceptions.DatasetGenerationError as error:  # its files are there, but do not belong together
        words = str(cause := error.__cause__ or error).split()
        reason = " ".join(words if len(words) <= 60 else [*words[:30], "...", *words[-20:]])
        if isinstance(cause, pd.errors.ParserError | pd.errors.ParserWarning):
            reason += "; put values with a comma in them into double quotes, and name all columns in the header"
        raise ValueError(f"the files of dataset '{dataset}' cannot be read: {reason}") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"dataset '{dataset}' is neither {others}a local data set folder nor a Hub id that can be "
            f"reached, nor a file that ends in {', '.join(FILE_TYPES)}: {error}"
        ) from error
    if "train" not in raw:
        raise ValueError(f"dataset '{dataset}' needs a split named train, got {sorted(raw)}")
    validation = [name for name in VALIDATION_NAMES if name in raw][:1]
    return {name: raw[name] for name in ("train", *validation, "test") if name in raw}


def _load(dataset: str) -> datasets.DatasetDict:
    suffix = os.path.splitext(dataset)[1]
    path, config = dataset, ""
    files: dict[str, str] | dict[str, list[str]] | None = None
    if os.path.isfile(dataset) and suffix in FILE_TYPES:
        path, files = FILE_TYPES[suffix], {"train": dataset}
    elif os.path.isdir(dataset):
        if (Path(dataset) / datasets.config.DATASETDICT_JSON_FILENAME).is_file():
            return datasets.load_from_disk(dataset)
        files = _folders_of_splits(Path(dataset))
    else:
        path, _, config = dataset.partition(":")
    builder = datasets.load_dataset_builder(path, config or None, data_files=files)
    with warnings.catch_warnings():
        if isinstance(builder.config, CsvConfig):
            builder = datasets.load_dataset_builder(path, config or None, data_files=files, **CSV_SETTINGS)
            # The end of a row would be lost that has more values than the header: most often a text with a comma in it.
            warnings.simplefilter("error", pd.errors.ParserWarning)
        builder.download_and_prepare()
    return builder.as_dataset()


def _folders_of_splits(folder: Path) -> dict[str, list[str]] | None:
    """
    The images of each split where the names of folders alone would mislead datasets, which looks for `train` and `test`
    anywhere in a path: for a class of that name. None for all other folders.
    """
    inside = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    folders = [path for path in inside if path.is_dir()]
    if not folders or any(path.is_file() and path.name != "LICENSE" for path in inside):
        return None
    named = [path for path in folders if path.name.lower() in SPLIT_NAMES]
    classes = [path for path in folders if _is_class(path)]
    if named and classes == folders and len(named) < len(folders):
        return {"train": ["**"]}
    if named and all(any(map(_is_class, path.iterdir())) for path in named):
        splits: dict[str, list[str]] = {}
        for path in named:
            splits.setdefault(SPLIT_NAMES[path.name.lower()], []).append(f"{path.name}/**")
        return splits
    return None


def _is_class(path: Path) -> bool:
    """Whether this is a folder with images in it, and with no other folder."""
    if not path.is_dir():
        return False
    inside = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    has_images = any(entry.suffix.lower() in ImageFolder.EXTENSIONS for entry in inside)
    return has_images and not any(entry.is_dir() for entry in inside)
