"""Classes of a data set: one numbering for all of its splits, and the order of a fine-tuned network's outputs."""

import copy
import logging
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.timm_wrapper import TimmWrapperConfig

from ..networks.adapters import adapter_config, load_network
from .dataset import AdaptedTask, BadRows, choose_column, describe_row
from .task import ClassificationTask, Split

logger = logging.getLogger(__name__)

# Of a network with as many outputs as the data have classes, this share of the names must be equal, each in the same
# place, for the rest to be taken for other spellings of the same.
ALMOST_ALL = 0.9
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
# Files of weights, whole or in parts.
WEIGHTS = re.compile(r"(pytorch_)?model.*\.(safetensors|bin)(\.index\.json)?")
# What stands for a missing value in a column of numbers, and may be a class in one of names.
NO_CLASS = ("na", "n/a", "nan", "null", "none", "?")
# What adapters of PEFT for language models say they are for.
LANGUAGE_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
# What transformers calls classes that nobody has named.
NO_NAME = re.compile(r"LABEL_\d+")


@dataclass
class LabelledTask(AdaptedTask, ClassificationTask):
    """
    What tasks with a class for every example have in common.

    Classes are numbered once, by the training split: in the order of a `ClassLabel`, or else sorted, and by their value
    where all names are numbers. A fine-tuned network keeps the order of its own outputs, which its config names in
    `id2label` or `label2id`.

    Args beyond those of [`AdaptedTask`]:
        label_column (`str`, *optional*): By default `label` or `labels`, or else the only `ClassLabel`.

    Attributes:
        class_names (`list[str]`): What the network's outputs stand for, in their order.
        auto_model (`type`): The class of transformers that loads networks for such tasks.
    """

    auto_model: ClassVar[Any]
    label_column: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = adapter_config(self.adapter).get("task_type") if self.adapter else None
        if kind in LANGUAGE_TASKS:
            raise ValueError(
                f"adapter '{self.adapter}' is one of a language model (task_type {kind}), not of a classifier; use "
                "--task causal_lm"
            )

    def _choose_label(self, features: Mapping[str, Any]) -> str:
        if list(features) == ["image"]:
            raise ValueError(
                f"dataset '{self.dataset}' has images and no label column; images in a folder get their classes from "
                "its sub-folders"
            )
        name = choose_column(self.dataset, features, label_candidates(features), self.label_column, "label_column")
        feature = features[name]
        if not isinstance(feature, datasets.ClassLabel | datasets.Value) or feature.dtype.startswith(("time", "date")):
            raise ValueError(f"dataset '{self.dataset}': column {name} holds {feature}, not one class for each example")
        return name

    def _set_labels(self, raw: Mapping[str, datasets.Dataset], config: PretrainedConfig, has_weights: bool) -> None:
        """Makes the splits of rows with the columns `label` and `row`, and aligns their classes with the network's."""
        self._config, self._has_weights = config, has_weights
        self._data_names, numbered = number_labels(raw, self.dataset)
        self._set_splits(numbered)
        outputs = align_labels(self._data_names, config, self.model, self.dataset) if has_weights else None
        if outputs is None:
            if len(self._data_names) == 1:
                raise ValueError(
                    f"all examples of dataset '{self.dataset}' are of the class {self._data_names[0]!r}; a classifier "
                    "needs two classes"
                )
            self.class_names, self._outputs = self._data_names, torch.arange(len(self._data_names))
        else:
            self.class_names, self._outputs = output_names(config) or self._data_names, torch.tensor(outputs)

    def align(self, config: PretrainedConfig) -> None:
        """
        Numbers the labels as the outputs of another network than the task's own.

        Raises:
            ValueError: if that network has other classes than the data.
        """
        outputs = align_labels(self._data_names, config, "the network", self.dataset)
        if outputs is None:
            both = _both_sides(config, self._data_names)
            raise ValueError(f"the network is not for the classes of dataset '{self.dataset}': {both}")
        self.class_names, self._outputs = output_names(config) or self._data_names, torch.tensor(outputs)
        self._splits.clear()

    def _labels(self, split: Split) -> torch.Tensor:
        """The output that is right for each example, int64 of shape `(N,)`."""
        return self._outputs[torch.as_tensor(self._raw[split]["label"][:])]

    def load_base_model(self) -> PreTrainedModel:
        """
        The network with one output a class: a pretrained one with its own head if it has the data's classes, else with
        a fresh one. Fresh weights depend on torch's global seed.
        """
        if not self._has_weights:
            config = copy.deepcopy(self._config)
            name_classes(config, self.class_names)
            return self.auto_model.from_config(config)
        # Those that `find_weights` made usable.
        args = getattr(self._config, "model_args", None)
        model, found = self.auto_model.from_pretrained(
            self.model,
            **label_settings(self.class_names),
            **({"model_args": args} if args else {}),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        fresh = sorted({*found["missing_keys"], *(mismatch[0] for mismatch in found["mismatched_keys"])})
        name_classes(model.config, self.class_names)
        model = self._with_adapter(model)
        if self.adapter:
            fresh = [name for name in fresh if not _is_from_adapter(model, name)]
        self.new_head = ""
        if fresh:
            reason = _both_sides(self._config, self._data_names) if found["mismatched_keys"] else "its files lack them"
            self.new_head = f"{', '.join(fresh)} of model '{self.model}' must be drawn anew: {reason}"
        return model

    def load_saved(self, folder: str | os.PathLike) -> PreTrainedModel:
        """What `save_base_model` wrote."""
        return load_network(folder, self.auto_model)


def _is_from_adapter(model: PreTrainedModel, name: str) -> bool:
    """Whether an adapter of PEFT brought a tensor of the network with it, as it does for the heads of classifiers."""
    parts, modules = name.split("."), dict(model.named_modules())
    return any(hasattr(modules.get(".".join(parts[:i])), "modules_to_save") for i in range(1, len(parts)))


def label_candidates(features: Mapping[str, Any]) -> list[str]:
    """The columns that could be the label: `label` or `labels`, else any `ClassLabel`, else `class`."""
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    named = [name for name in ("label", "labels") if name in features]
    return named or classes or [name for name in ("class",) if name in features]


def find_weights(model: str) -> tuple[PretrainedConfig, bool]:
    """
    The configuration of a transformers model, and whether there are weights beside it.

    Args:
        model (`str`): A local folder or a Hub id; only a folder may lack weights.
    """
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model '{model}' is neither a folder with a transformers config.json nor a Hub id that can be reached: "
            f"{error}"
        ) from error
    if getattr(config, "model_args", None):
        # Newer releases of timm save it with all other arguments; transformers passes the number of classes itself.
        config.model_args.pop("num_classes", None)
    files = os.listdir(model) if os.path.isdir(model) else ["model.safetensors"]
    return config, any(map(WEIGHTS.fullmatch, files))


def number_labels(raw: Mapping[str, datasets.Dataset], dataset: str) -> tuple[list[str], dict[str, datasets.Dataset]]:
    """
    The names of the classes, and the splits with a `ClassLabel` of them as their column `label`.

    Raises:
        ValueError: for a label that is not a class of the training split.
    """
    feature = raw["train"].features["label"]
    named = {split: _names_of(rows) for split, rows in raw.items()}
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else sorted(set(named["train"]))
    if all(map(NUMBER.fullmatch, names)):
        names.sort(key=float)
    if alike := _alike(names):
        logger.warning(
            "the classes %a and %a of dataset '%s' (%d such pairs) differ in case, spaces or invisible characters "
            "alone, and are two",
            *alike[0],
            dataset,
            len(alike),
        )
    numbers, result = {name: i for i, name in enumerate(names)}, {}
    for split, rows in raw.items():
        for name, row in zip(named[split], rows["row"], strict=True):
            if name not in numbers:
                raise ValueError(
                    f"{describe_row(dataset, split, 'label', row)}: the class '{name}' is none of the training split, "
                    f"which has {_shorten(names)}"
                )
        ids = np.array([numbers[name] for name in named[split]], dtype=np.int64)
        classes = datasets.ClassLabel(names=names)
        result[split] = rows.remove_columns("label").add_column("label", ids, feature=classes)
    return names, result


def _alike(names: Sequence[str]) -> list[tuple[str, str]]:
    seen: dict[str, str] = {}
    for name in names:
        seen.setdefault(_plain(name), name)
    return [(seen[_plain(name)], name) for name in names if seen[_plain(name)] != name]


def _plain(name: str) -> str:
    return "".join(filter(str.isprintable, unicodedata.normalize("NFKC", name))).strip().casefold()


def _names_of(rows: datasets.Dataset) -> list[str]:
    feature, values = rows.features["label"], rows["label"][:]
    if isinstance(feature, datasets.ClassLabel):
        return feature.int2str(values)
    # Whole numbers beside an empty cell are read as floats.
    return [str(int(value) if isinstance(value, float) else value) for value in values]


def without_unlabelled_test(
    raw: dict[str, datasets.Dataset], dataset: str, label: str = "label"
) -> dict[str, datasets.Dataset]:
    """Without a test split of which all labels are withheld, as those of ImageNet are; a warning says so."""
    if "test" not in raw or not all(value == -1 or _is_empty(value) for value in raw["test"][label]):
        return raw
    logger.warning("the test split of dataset '%s' has no labels: another one takes its place", dataset)
    return {name: rows for name, rows in raw.items() if name != "test"}


def bad_labels(rows: datasets.Dataset) -> BadRows:
    """The rows without a class: empty, -1 beside classes from 0, `NA` and the like beside numbers, or not whole."""
    labels = rows["label"][:]
    counted = isinstance(rows.features["label"], datasets.ClassLabel) or 0 in labels
    texts = {label for label in labels if isinstance(label, str)}
    are_numbers = any(map(NUMBER.fullmatch, texts)) and all(NUMBER.fullmatch(t) or t.lower() in NO_CLASS for t in texts)

    def wrong(label: Any) -> str | None:
        if _is_empty(label):
            return "it is empty"
        if isinstance(label, float) and not label.is_integer():
            return f"{label} is no class; classes are names or whole numbers"
        if counted and label == -1 and not isinstance(label, bool):
            return "it is -1, which stands for no class"
        return f"it is '{label}' among numbers" if are_numbers and label.lower() in NO_CLASS else None

    return {i: ("label", what) for i, label in enumerate(labels) if (what := wrong(label))}


def _is_empty(label: Any) -> bool:
    if isinstance(label, str):
        return not label.strip()
    return label is None or (isinstance(label, float) and math.isnan(label))


def output_names(config: PretrainedConfig) -> list[str] | None:
    """What the outputs of a network stand for, in their order; None if nobody has named them."""
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if not all(map(NO_NAME.fullmatch, names)):
        return names
    ids = {i: str(name) for name, i in (config.label2id or {}).items()}
    if set(ids) == set(range(config.num_labels)) and not all(map(NO_NAME.fullmatch, ids.values())):
        return [ids[i] for i in range(config.num_labels)]
    return None


def align_labels(names: Sequence[str], config: PretrainedConfig, model: str, dataset: str) -> list[int] | None:
    """
    The output of a network for each of the data's classes, by name, whatever the case. Whole numbers from 0 stand for
    the outputs themselves where the network's names are no numbers.

    Args:
        names (`Sequence[str]`): The classes of the data, in the order of their numbers.
        config (`PretrainedConfig`): Of the network.
        model, dataset (`str`): What they are called in messages.

    Returns:
        `list[int]` or `None`: None if the network is for other classes, and as many of them as the data do not have.

    Raises:
        ValueError: if there are as many classes as outputs, and they cannot be aligned.
    """
    own = output_names(config)
    same_number = len(names) == config.num_labels
    if own is None:
        if same_number:
            logger.warning(
                "%s does not name its classes: its outputs, in their order, are taken for %s", model, _shorten(names)
            )
        return list(range(len(names))) if same_number else None
    by_name = _by_name(own, config, model)
    found = [by_name.get(name, by_name.get(name.casefold())) for name in names]
    outputs = [output for output in found if output is not None]
    if len(outputs) == len(names) and len(set(outputs)) == len(outputs):
        return outputs
    if not same_number:
        return None
    in_place = sum(output == i for i, output in enumerate(found))
    are_ids = list(names) == [str(i) for i in range(len(names))] and not any(map(NUMBER.fullmatch, own))
    if are_ids or (in_place == len(outputs) and in_place >= ALMOST_ALL * len(names)):
        logger.warning(
            "%s: the classes %s are taken for its outputs in their order, %s", model, _shorten(names), _shorten(own)
        )
        return list(range(len(names)))
    raise ValueError(
        f"the classes of dataset '{dataset}' cannot be aligned with those of model '{model}': "
        f"{_both_sides(config, names)}. Rename the classes of one of them; to train the network for other classes, "
        "take id2label and label2id out of its config.json"
    )


def _by_name(own: Sequence[str], config: PretrainedConfig, model: str) -> dict[str, int]:
    """The output of each name, as it is spelled and without case, where that is not ambiguous."""
    pairs = [(name, i) for i, name in enumerate(own)]
    # A head that was replaced may have left the names of its classes there, with numbers that no output has.
    numbers = {str(name): int(i) for name, i in (config.label2id or {}).items() if int(i) < len(own)}
    pairs += [(name, i) for name, i in numbers.items() if not NO_NAME.fullmatch(name)]
    found: dict[str, set[int]] = {}
    for name, i in pairs:
        found.setdefault(name, set()).add(i)
    contradictions = [name for name, ids in found.items() if len(ids) > 1 and list(own).count(name) < 2]
    if contradictions:
        raise ValueError(f"the id2label and label2id of {model} contradict each other about '{contradictions[0]}'")
    for name, i in pairs:
        if name.casefold() not in own:
            found.setdefault(name.casefold(), set()).add(i)
    return {name: ids.pop() for name, ids in found.items() if len(ids) == 1}


def _both_sides(config: PretrainedConfig, names: Sequence[str]) -> str:
    own = output_names(config)
    outputs = f"{config.num_labels} outputs" + (f" ({_shorten(own)})" if own else ", which it does not name")
    return f"the data have {len(names)} classes ({_shorten(names)}), the network has {outputs}"


def _shorten(names: Sequence[Any], limit: int = 12) -> str:
    return ", ".join(map(str, names[:limit])) + (", ..." if len(names) > limit else "")


def label_settings(class_names: Sequence[str]) -> dict[str, Any]:
    """What the configuration of a transformers model says about its classes."""
    names = dict(enumerate(class_names))
    return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}


def name_classes(config: PretrainedConfig, class_names: Sequence[str]) -> None:
    """Writes the names of the outputs into the configuration of a network."""
    for name, value in label_settings(class_names).items():
        setattr(config, name, value)
    if isinstance(config, TimmWrapperConfig):  # when it is saved, the names that it was loaded with would win
        config.label_names = list(class_names)
