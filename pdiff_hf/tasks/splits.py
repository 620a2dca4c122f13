"""Train, validation and test splits of a data set that may lack some of them, the same for every task."""

import os
from typing import Any

import datasets
import numpy as np
from sklearn.model_selection import train_test_split

VALIDATION_NAMES = ("validation", "valid", "val", "dev")
# Fixed, and not the run's seed: models of different runs must be comparable.
SPLIT_SEED = 0


def check_sizes(task: Any, *names: str) -> None:
    """Raises a `ValueError` unless a task's `holdout_fraction` and its numbers `names` are possible."""
    if not 0 < task.holdout_fraction < 0.5:
        raise ValueError(f"holdout_fraction must lie between 0 and 0.5, got {task.holdout_fraction}")
    for name in names:
        value = getattr(task, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def load_raw(dataset: str, others: str = "") -> dict[str, datasets.Dataset]:
    """
    The splits of a local folder or of a data set on the Hub, `id:config` for one of several configs.

    Args:
        others (`str`, *optional*): What else the name might have been, for the message.

    Raises:
        ValueError: if it is neither.
    """
    path, config = dataset, None
    if not os.path.exists(path):
        path, _, config = path.partition(":")
    try:
        return datasets.load_dataset(path, config or None)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"dataset '{dataset}' is neither {others}a local data set folder nor a Hub id that can be reached: {error}"
        ) from error


def make_splits(
    raw: dict[str, datasets.Dataset],
    dataset: str,
    holdout_fraction: float,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> dict[str, datasets.Dataset]:
    """
    The train, validation and test splits of a data set.

    Validation examples are drawn with a fixed seed, stratified by the column `label` if there is one. Where there is a
    validation split but no labelled test split, it is the one reported, as test, and validation comes out of the
    training data.

    Args:
        raw (`dict[str, datasets.Dataset]`): The splits that there are.
        dataset (`str`): What the data set is called in messages.
        holdout_fraction (`float`): Share of the training data that becomes a split that is not there.
        max_train_samples, max_eval_samples (`int`, *optional*): Use no more than this many examples of a split.

    Raises:
        ValueError: without a training split, or with one that is too small, and for an empty split.
    """
    if "train" not in raw:
        raise ValueError(f"dataset '{dataset}' needs a split named train, got {sorted(raw)}")
    train, test = raw["train"], raw.get("test")
    validation = next((raw[name] for name in VALIDATION_NAMES if name in raw), None)
    if test is not None and "label" in test.column_names and min(test["label"][:], default=-1) < 0:
        test = None  # its labels are withheld, as those of ImageNet are
    if test is None:  # what is reported must not be what was selected on
        test, validation = validation, None
    if test is None:
        train, test = _hold_out(train, dataset, holdout_fraction)
    if validation is None:
        train, validation = _hold_out(train, dataset, holdout_fraction)
    splits = {"train": train, "validation": validation, "test": test}
    for name, split in splits.items():
        limit = max_train_samples if name == "train" else max_eval_samples
        if limit is not None and limit < len(split):
            chosen = np.random.default_rng(SPLIT_SEED).permutation(len(split))[:limit]
            splits[name] = split.select(np.sort(chosen))
        if len(split) == 0:
            raise ValueError(f"the {name} split of dataset '{dataset}' is empty")
    return splits


def _hold_out(split: datasets.Dataset, dataset: str, fraction: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    labels = np.asarray(split["label"][:]) if "label" in split.column_names else None
    try:
        rest, held_out = train_test_split(
            np.arange(len(split)), test_size=fraction, stratify=labels, random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise ValueError(
            f"dataset '{dataset}' is too small to hold out {fraction:.0%} of its {len(split)} training examples from "
            f"every class: {error}"
        ) from error
    return split.select(np.sort(rest)), split.select(np.sort(held_out))


def label_settings(class_names: list[str]) -> dict[str, Any]:
    """What the configuration of a transformers model says about its classes."""
    return {
        "num_labels": len(class_names),
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: i for i, name in enumerate(class_names)},
    }
