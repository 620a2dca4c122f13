"""From an experiment's rows to the recipes of its runs."""

import dataclasses
import fnmatch
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pdiff_hf.run.cli import flat, read_recipe
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.context import stage_settings
from pdiff_hf.run.options import nested
from pdiff_hf.run.stages import STAGES
from pdiff_hf.utils import names

from .tables import ARCHITECTURES, DATASETS, SCALE_SETTINGS, ExperimentError, Row, find_experiment

RECIPES = Path(__file__).parents[1] / "recipes"
SCALES = ("small", "paper")
SMALL_DATASET = "zalando-datasets/fashion_mnist"
Plan = list[tuple[Row, list[PDiffConfig]]]


def expand(
    name: str,
    output_dir: str | os.PathLike,
    *,
    scale: str = "small",
    dataset: str | None = None,
    seeds: Sequence[int] = (0,),
    patterns: Sequence[str] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Plan:
    """
    The rows of an experiment, each with a recipe for each seed (none where memory is measured).

    Args:
        name (`str`): Name of the experiment.
        output_dir (`str` or `os.PathLike`): Runs are in its folder `runs`.
        scale (`str`, *optional*, defaults to `"small"`): `"small"`, or `"paper"` for its data sets and its Table 5.
        dataset (`str`, *optional*): In place of the paper's data sets; at the small scale `SMALL_DATASET` by default.
        seeds (`Sequence[int]`, *optional*, defaults to `(0,)`): Every row is run with each.
        patterns (`Sequence[str]`, *optional*): Globs of the names of runs; all by default.
        changes (`Mapping`, *optional*): Settings to set for all rows.

    Raises:
        ExperimentError: for an unknown experiment, row or scale, and for changes of what the experiment itself varies.
        ValueError: for a value that a recipe refuses.
    """
    if scale not in SCALES:
        raise ExperimentError(f"scale must be one of {', '.join(SCALES)}, got '{scale}'")
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ExperimentError(f"seeds must be different numbers, got {list(seeds)}")
    changes = changes or {}
    for key, flag in (("seed", "--seeds"), ("output_dir", "--output_dir"), ("dataset", "--dataset")):
        if key in changes:
            raise ExperimentError(f"{key} is set with {flag}")
    if scale == "small":
        dataset = dataset or SMALL_DATASET
    experiment, plan = find_experiment(name), []
    for row in _select_rows(name, patterns, one_dataset=dataset is not None):
        clash = sorted((set(row.varies) | set(experiment.settings)) & set(changes))
        if clash:
            raise ExperimentError(f"{name} sets {', '.join(clash)} itself")
        if experiment.measures_memory:
            plan.append((row, []))
            continue
        settings = _row_settings(row, scale, dataset, output_dir)
        settings |= {**experiment.settings, **changes, **row.varies}
        plan.append((row, [_place(settings | {"seed": seed}, output_dir, experiment.extra_groups) for seed in seeds]))
    return plan


def canvases_folder(architecture: str, output_dir: str | os.PathLike, dataset: str) -> Path:
    """Of the canvases that `architecture` needs at the small scale, made of the images of `dataset`."""
    sizes = "-".join(map(str, (ARCHITECTURES[architecture].canvases or {}).values()))
    return Path(output_dir, f"canvases-{Path(dataset).name.partition(':')[0]}-{sizes}")


def features_recipe(architecture: str, output_dir: str | os.PathLike, dataset: str) -> PDiffConfig | None:
    """
    Of the classifier on whose features FID is measured, if `architecture` needs one: the same for all seeds, because
    FIDs on different features cannot be compared.
    """
    features = ARCHITECTURES[architecture].features
    if features is None:
        return None
    return _place(_read_recipe(features) | {"dataset": dataset, "stages": ["base"]}, output_dir)


def _select_rows(name: str, patterns: Sequence[str] | None, one_dataset: bool) -> list[Row]:
    """
    The rows that match. With `one_dataset`, of rows that differ only in the paper's data set the first, without its
    name: another data set takes its place.
    """
    rows = list(find_experiment(name).rows)
    if one_dataset:
        first: dict[str, str] = {}
        for row in rows:
            first.setdefault(row.architecture, row.dataset)
        rows = [
            dataclasses.replace(row, label=row.label.replace(f", {DATASETS[row.dataset].title}", ""))
            for row in rows
            if row.dataset == first[row.architecture]
        ]
    for pattern in patterns or ():
        if not any(fnmatch.fnmatch(row.run, pattern) for row in rows):
            names = ", ".join(dict.fromkeys(row.run for row in rows))
            raise ExperimentError(f"no row of {name} is named '{pattern}'; there are {names}")
    return [row for row in rows if not patterns or any(fnmatch.fnmatch(row.run, pattern) for pattern in patterns)]


def _row_settings(row: Row, scale: str, dataset: str | None, output_dir: str | os.PathLike) -> dict[str, Any]:
    """Settings that follow from the row's architecture, the scale and the data set."""
    architecture = ARCHITECTURES[row.architecture]
    settings = dict(_read_recipe(architecture.recipe))
    if scale == "paper":
        extent = "paper_entire" if settings.get("select") == ["all"] else "paper_partial"
        settings |= SCALE_SETTINGS["paper"] | SCALE_SETTINGS[extent] | architecture.paper
        if dataset is None:
            settings |= {"dataset": DATASETS[row.dataset].id, **DATASETS[row.dataset].settings}
        else:
            settings["dataset"] = dataset
        return settings
    assert dataset is not None
    if architecture.canvases is None and architecture.features is None:  # recipes of other tasks are small
        settings |= SCALE_SETTINGS["small"]
    settings |= {**architecture.small, "dataset": dataset}
    if architecture.canvases is not None:
        settings["dataset"] = str(canvases_folder(row.architecture, output_dir, dataset))
    classifier = features_recipe(row.architecture, output_dir, dataset)
    if classifier is not None:
        settings["task_args.fid_features"] = str(Path(classifier.output_dir, names.BASE_MODEL))
    return settings


@lru_cache
def _read_recipe(name: str) -> dict[str, Any]:
    return flat(read_recipe(RECIPES / f"{name}.yaml"))


def _place(settings: Mapping[str, Any], output_dir: str | os.PathLike, extra_groups: str | None = None) -> PDiffConfig:
    """A recipe in a folder that is named after what it is about, with a digest of all that its outcome follows from."""
    recipe = PDiffConfig(**nested(settings), resume_from_checkpoint="latest")
    recipe.soft = frozenset(settings)  # what a row varies may leave others of its recipe without effect
    settings = stage_settings(recipe, "evaluate", STAGES) | ({"extra_groups": extra_groups} if extra_groups else {})
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=5).hexdigest()
    model, dataset = (Path(name).name.partition(":")[0] for name in (recipe.model, recipe.dataset))
    folder = Path(output_dir, "runs", f"{model}-{dataset}-seed{recipe.seed}-{digest}")
    return recipe.changed(output_dir=str(folder))
