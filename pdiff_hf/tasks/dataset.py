"""Tasks on a Hugging Face data set: its splits, its columns, and examples that cannot be used."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from sklearn.model_selection import train_test_split

from ..lora import config_of_rank, is_lora
from ..networks.adapters import adapter_config, find_base, load_adapter, widen_adapters
from .sources import VALIDATION_NAMES
from .task import Split, Task

logger = logging.getLogger(__name__)

# Fixed, and not the run's seed: models of different runs must be comparable.
SPLIT_SEED = 0
# What of an example cannot be used: its row, to the column and what is wrong there.
BadRows = Mapping[int, tuple[str, str]]


@dataclass
class DatasetTask(Task):
    """
    What tasks on a Hugging Face data set have in common.

    Args:
        model (`str`): The base model.
        dataset (`str`): A local folder, a `.csv`, `.json`, `.jsonl` or `.parquet` file, or the Hub id of a data set,
            `id:config` for one of several configs.
        validation_fraction (`float`, *optional*, defaults to 0.2): Share of the training data that becomes the
            validation split, and the test split, where the data set has none.
        max_train_samples, max_eval_samples (`int`, *optional*): Use no more than this many examples of a split.
        skip_bad_examples (`bool`, *optional*, defaults to `False`): Leave out examples that are empty or cannot be
            read, and say how many, instead of refusing the data set. Reads every image once.
    """

    model: str
    dataset: str
    validation_fraction: float = 0.2
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    skip_bad_examples: bool = False

    def _check_sizes(self, *names: str) -> None:
        """Raises a `ValueError` unless the fractions and sizes of the settings are possible."""
        if not 0 < self.validation_fraction < 0.5:
            raise ValueError(f"validation_fraction must lie between 0 and 0.5, got {self.validation_fraction}")
        for name in ("max_train_samples", "max_eval_samples", *names):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def _take(
        self,
        raw: Mapping[str, datasets.Dataset],
        names: Mapping[str, str],
        *find_bad: Callable[[datasets.Dataset], BadRows],
    ) -> dict[str, datasets.Dataset]:
        """
        The columns `names` of all splits, under new names, and the column `row`, by which messages call an example;
        without the rows that one of `find_bad` finds.
        """
        taken = {}
        for split, rows in raw.items():
            rows = rows.select_columns(list(names)).rename_columns(dict(names)).add_column("row", np.arange(len(rows)))
            bad = {i: what for find in find_bad for i, what in find(rows).items()}
            taken[split] = self._usable(rows, split, bad)
        return taken

    def _set_splits(self, raw: Mapping[str, datasets.Dataset]) -> None:
        """
        Makes `_raw`, the rows of the train, validation and test split, from all usable rows.

        Validation examples are drawn with a fixed seed, stratified by the column `label` if there is one, so that they
        are the same in every run. Where there is a validation split but no test split, it is the one reported, as test,
        and validation comes out of the training data.

        Raises:
            ValueError: with a training split that is too small, and for an empty split.
        """
        train, test = raw["train"], raw.get("test")
        validation = next((raw[name] for name in VALIDATION_NAMES if name in raw), None)
        if test is None:  # what is reported must not be what was selected on
            test, validation = validation, None
        if test is None:
            train, test = hold_out(train, self.dataset, self.validation_fraction)
        if validation is None:
            train, validation = hold_out(train, self.dataset, self.validation_fraction)
        self._raw = {"train": train, "validation": validation, "test": test}
        self._splits: dict[str, Any] = {}
        for name, split in self._raw.items():
            limit = self.max_train_samples if name == "train" else self.max_eval_samples
            if limit is not None and limit < len(split):
                chosen = np.random.default_rng(SPLIT_SEED).permutation(len(split))[:limit]
                self._raw[name] = split.select(np.sort(chosen))
            if len(split) == 0:
                raise ValueError(f"the {name} split of dataset '{self.dataset}' is empty")

    def load_split(self, split: Split) -> Any:
        """The examples of a split, ready for the network; made once."""
        if split not in self._splits:
            self._splits[split] = self._prepare(split)
        return self._splits[split]

    @abstractmethod
    def _prepare(self, split: Split) -> Any:
        """A map-style data set whose `__getitems__(indices)` returns a whole batch."""

    def _usable(self, rows: datasets.Dataset, split: str, bad: BadRows) -> datasets.Dataset:
        """
        All rows, if none is bad, or the others with `skip_bad_examples`.

        Raises:
            ValueError: for the first bad row, otherwise; and if all are bad.
        """
        if not bad:
            return rows
        first = min(bad)
        column, what = bad[first]
        message = f"{describe_row(self.dataset, split, column, first)}: {what}"
        if len(bad) == len(rows):
            hint = "; images in a folder get their classes from its sub-folders" if column == "label" else ""
            raise ValueError(f"{message}, and no other of the {len(rows)} rows can be used either{hint}")
        if not self.skip_bad_examples:
            more = f" (and {len(bad) - 1} more rows)" if len(bad) > 1 else ""
            raise ValueError(f"{message}{more}; fix it, or leave it out with skip_bad_examples")
        logger.warning("%d of %d examples are left out, the first is %s", len(bad), len(rows), message)
        return rows.select([i for i in range(len(rows)) if i not in bad])


@dataclass
class AdaptedTask(DatasetTask):
    """
    What tasks have in common whose networks can have adapters of PEFT.

    Args beyond those of [`DatasetTask`]:
        adapter (`str`, *optional*): Folder or Hub id of an adapter of PEFT that the model gets. Where `model` is one,
            it becomes the adapter, and `model` the network that it belongs to.
        adapter_rank (`int`, *optional*): The adapter is filled up with zeros to this rank, which tuned ones then use: a
            run keeps this rank for them, or the adapter's own, whichever has the lower loss on validation tasks.

    Raises:
        ValueError: when created, for an `adapter_rank` without an adapter, or one that is not above the adapter's own.
    """

    adapter: str | None = None
    adapter_rank: int | None = None

    def __post_init__(self) -> None:
        if base := find_base(self.model):
            self.model, self.adapter = base, self.adapter or self.model
        if self.adapter_rank is None:
            return
        if not self.adapter:
            raise ValueError(f"adapter_rank={self.adapter_rank} is for a model with an adapter, and this one has none")
        config = adapter_config(self.adapter)
        own = config.get("r") if is_lora(config) else None
        if own is None or self.adapter_rank <= own:
            rank = f"has the rank {own}" if own else f"is of the kind {config.get('peft_type')}, which has no rank"
            raise ValueError(
                f"adapter_rank={self.adapter_rank} is for adapters of a lower rank, and '{self.adapter}' {rank}; leave "
                "it out, or choose twice the adapter's own"
            )
        config_of_rank(config, self.adapter_rank)  # an error where it can have no other

    def _with_adapter(self, model: Any) -> Any:
        """`model` with the task's adapter, if there is one, in place."""
        if self.adapter:
            model = load_adapter(model, self.adapter)
        if self.adapter_rank is not None:
            widen_adapters(model, self.adapter_rank)
        return model


def describe_row(dataset: str, split: str, column: str, row: int) -> str:
    return f"dataset '{dataset}', split {split}, column {column}, row {row}"


def empty_rows(rows: datasets.Dataset, column: str) -> BadRows:
    """The rows without a text."""
    return {i: (column, "it is empty") for i, text in enumerate(rows[column][:]) if not str(text or "").strip()}


def choose_column(
    dataset: str, columns: Iterable[str], candidates: Sequence[str], chosen: str | None, setting: str
) -> str:
    """
    The column that serves a purpose: the one chosen, else the only candidate.

    Args:
        dataset (`str`): What the data set is called in messages.
        columns (`Iterable[str]`): All that it has.
        candidates (`Sequence[str]`): Those that could serve.
        chosen (`str`, *optional*): The value of the setting.
        setting (`str`): Its name, such as `label_column`.

    Raises:
        ValueError: if there is none, or more than one; the message names them.
    """
    if chosen is not None and chosen in columns:
        return chosen
    kind = setting.removesuffix("_column")
    if chosen is not None or not candidates:
        name = f"column {chosen}" if chosen else f"{kind} column"
        names = ", ".join(column if column == column.strip() else repr(column) for column in columns)
        raise ValueError(f"dataset '{dataset}' has no {name}; its columns are {names}")
    if len(candidates) > 1:
        names = " and ".join(candidates)
        raise ValueError(f"dataset '{dataset}': {names} could each be the {kind} column; choose one with {setting}")
    return candidates[0]


def hold_out(split: datasets.Dataset, dataset: str, fraction: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The rest and a share of the rows, drawn with a fixed seed, stratified by the column `label` if there is one."""
    labels = np.asarray(split["label"][:]) if "label" in split.column_names else None
    try:
        rest, held_out = train_test_split(
            np.arange(len(split)), test_size=fraction, stratify=labels, random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise ValueError(
            f"dataset '{dataset}' is too small to hold out {fraction:.0%} of its {len(split)} training examples from "
            f"every class: {error}. Give it a split for validation and one for test, or choose another "
            "validation_fraction"
        ) from error
    return split.select(np.sort(rest)), split.select(np.sort(held_out))
