"""
Runs the experiments and writes the paper's tables with our numbers beside the paper's.

Runs live side by side in one folder, named after a digest of their settings, and take over every stage that another one
has finished with the same settings: a base model is trained and its snapshots are collected once, whichever table asks
for them, and what was killed continues where it stopped.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from benchmarks.training import measure_training
from filelock import FileLock, Timeout

from pdiff_hf.evaluation.groups import named_generator
from pdiff_hf.evaluation.report_data import Metric
from pdiff_hf.evaluation.score import Scorer
from pdiff_hf.evaluation.summary import metric_title
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.context import RunContext
from pdiff_hf.run.folder import RunFolder, Stage
from pdiff_hf.run.settings import TaskSection
from pdiff_hf.run.stages import STAGES
from pdiff_hf.run.trainer import execute, prepare
from pdiff_hf.tasks import Task
from pdiff_hf.utils import names
from pdiff_hf.utils.files import remove, write_json
from pdiff_hf.utils.reports import load_report

from .canvases import write_canvases
from .cells import make_cell, write_table
from .extra_groups import EXTRA_GROUPS
from .figures import FIGURES
from .plan import SMALL_DATASET, Plan, canvases_folder, expand, features_recipe
from .tables import ARCHITECTURES, DATASETS, ExperimentError, Row, find_experiment

logger = logging.getLogger(__name__)

SELECTED = "selected.json"  # in a run's folder: scores on all test images, if its report is on some of them


def reproduce(
    name: str,
    output_dir: str | os.PathLike,
    *,
    scale: str = "small",
    changes: Mapping[str, Any] | None = None,
    **arguments,
) -> Path:
    """
    Runs an experiment, or what is left of it, and writes `table.md`, `table.csv` and the figure to `output_dir/name`,
    anew after every run. `arguments` are those of `expand`.

    Returns:
        `Path`: The folder of the table.

    Raises:
        ExperimentError: if it cannot be run as asked, or another process is at work in `output_dir`.
        ValueError: for everything in a recipe that can be seen to be wrong before any work is done.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ExperimentError("experiments run in one process; start this one without a launcher")
    plan = expand(name, output_dir, scale=scale, changes=changes, **arguments)
    folder = Path(output_dir, name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(Path(output_dir, ".lock"), timeout=0):
            if find_experiment(name).measures_memory:
                _measure_rows(name, [row for row, _ in plan], folder, scale, changes or {})
            else:
                if scale == "small":
                    make_data(plan, output_dir, arguments.get("dataset") or SMALL_DATASET)
                _run_rows(name, plan, folder)
    except Timeout as error:
        raise ExperimentError(f"another experiment is at work in '{output_dir}'; wait, or choose another") from error
    return folder


def make_data(plan: Plan, output_dir: str | os.PathLike, dataset: str) -> None:
    """Makes what the networks of a plan need at the small scale: canvases, and a classifier for FID."""
    for architecture in {row.architecture for row, _ in plan}:
        canvases, folder = ARCHITECTURES[architecture].canvases, canvases_folder(architecture, output_dir, dataset)
        if canvases is not None and not folder.is_dir():
            logger.info("canvases: %s", folder.name)
            write_canvases(dataset, folder, **canvases)
        recipe = features_recipe(architecture, output_dir, dataset)
        if recipe is not None:
            logger.info("features for FID: %s", Path(recipe.output_dir).name)
            execute(prepare(recipe))


def _run_rows(name: str, plan: Plan, folder: Path) -> None:
    runs = {recipe.output_dir: recipe for _, recipes in plan for recipe in recipes}
    on_all = any(column.statistic == "best_on_all" for column in find_experiment(name).columns)
    for number, (path, recipe) in enumerate(runs.items(), start=1):
        logger.info("%s: run %d of %d, %s", name, number, len(runs), Path(path).name)
        extra = EXTRA_GROUPS.get(find_experiment(name).extra_groups)
        run = prepare(recipe, task=_load_task(recipe), extra_groups=extra)
        if not run.is_finished("evaluate"):
            share_stages(run)
            execute(run)
        if on_all and recipe.max_eval_samples is not None and not Path(path, SELECTED).is_file():
            write_json(Path(path, SELECTED), score_selected(run))
        reports_of = [read_reports(recipes) for _, recipes in plan]
        about = _describe(plan, reports_of, {column.statistic for column in find_experiment(name).columns})
        write_tables(name, [row for row, _ in plan], reports_of, folder, about)


def share_stages(run: RunContext) -> None:
    """
    Gives a run, as links, every stage that a run beside it has finished with the same settings, and the scores of all
    runs beside it.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    scores = run.folder.parent.parent / names.SCORES
    scores.mkdir(exist_ok=True)
    link(run.folder / names.SCORES, scores)
    for name, stage in STAGES.items():
        other = take_over(run.files, stage, run.settings(name))
        if other is not None:
            logger.info("%s: taken over from %s", name, other.name)


def take_over(run: RunFolder, stage: Stage, settings: Mapping[str, Any]) -> Path | None:
    """
    Gives a run, as a link, the result of a run beside it that has finished the stage with the same settings.

    Returns:
        `Path`: The other run's folder; None if there is none, or the stage is finished here.
    """
    if run.is_finished(stage, settings):
        return None
    own = run / stage.folder
    if own.is_symlink():
        own.unlink()  # a link to what is gone
    for path in sorted(run.path.parent.iterdir()):
        other = RunFolder(path) if path.is_dir() and path != run.path else None
        if other is not None and other.is_finished(stage, settings):
            remove(own)  # the rest of a stage that was killed
            # The record comes first: a link without one is somebody else's.
            write_json(run.record_file(stage), other.record(stage))
            link(own, other / stage.folder)
            return path
    return None


def link(path: Path, target: Path) -> None:
    """A relative link from `path` to the folder `target`, so that both can be moved together."""
    if not path.is_symlink():
        path.symlink_to(os.path.relpath(target.resolve(), path.parent.resolve()), target_is_directory=True)


def _load_task(recipe: PDiffConfig) -> Task:
    """The same object for runs on the same data, which it holds."""
    return _make_task(json.dumps(recipe.section(TaskSection)))


@lru_cache(maxsize=2)
def _make_task(settings: str) -> Task:
    return PDiffConfig(**json.loads(settings)).make_task()


def score_selected(run: RunContext) -> dict[str, float]:
    """
    Scores the networks of a finished run that validation selects once more, on all test images.

    Returns:
        `dict`: Accuracy in percent of the best snapshot and of the best generated network, and the number of `images`.
    """
    recipe, everything = run.config, run.config.changed(max_eval_samples=None)
    generated = run.pipeline(
        recipe.num_models,
        generator=named_generator(recipe.seed, "generated"),  # as a report samples them
        output_type="pt",
    ).parameters
    some, whole = (
        Scorer(task, run.base_model, run.layout, cache_dir=run.folder / names.SCORES)
        for task in (run.task, _load_task(everything))
    )
    best = {}
    for name, parameters in (("snapshots", run.parameters), ("generated", generated)):
        best[name] = parameters[some.score("validation", list(parameters)).values.argmax()]  # known from the run
    scores = whole.score("test", list(best.values())).values.tolist()
    return {**dict(zip(best, scores, strict=True)), "images": len(whole.task.load_split("test"))}


def read_reports(recipes: Sequence[PDiffConfig]) -> list[dict]:
    """The reports of the runs that are finished, each with `selected`, what `score_selected` gave."""
    reports = []
    for recipe in recipes:
        path, selected = Path(recipe.output_dir, names.EVALUATION, names.REPORT), Path(recipe.output_dir, SELECTED)
        if path.is_file():
            more = {"selected": json.loads(selected.read_text(encoding="utf-8"))} if selected.is_file() else {}
            reports.append(load_report(path) | more)
    return reports


def write_tables(
    name: str, rows: Sequence[Row], reports_of: Sequence[Sequence[dict]], folder: Path, about: list[str]
) -> None:
    """Writes the table of an experiment from the reports that there are so far, and its figure when none is missing."""
    experiment = find_experiment(name)
    cells = [
        (row, [make_cell(column, row, reports) for column in experiment.columns], {"seeds": len(reports)})
        for row, reports in zip(rows, reports_of, strict=True)
    ]
    if experiment.figure is not None and all(reports_of):
        FIGURES[experiment.figure](folder / f"{name}.png", rows, [reports[0] for reports in reports_of])
        about = [f"![{experiment.title}]({name}.png)", *about]
    write_table(experiment, name, cells, folder, about)


def _describe(plan: Plan, reports_of: Sequence[Sequence[dict]], statistics: set[str | None]) -> list[str]:
    """What a reader has to know about the numbers of a table."""
    reports = [report for of_row in reports_of for report in of_row]
    sources = {f"{ARCHITECTURES[row.architecture].label} on {DATASETS[row.dataset].title}": None for row, _ in plan}
    recipes = [(row, recipe) for row, of_row in plan for recipe in of_row]
    settings = {f"{recipe.model} on {_public(recipe.dataset)}": None for _, recipe in recipes}
    runs = {Path(recipe.output_dir).name: row.run for row, recipe in recipes}
    splits = {(r["splits"]["validation"], r["splits"]["test"]): None for r in reports}
    images = " or ".join(f"{test:,} test images (validation: {validation:,})" for validation, test in splits)
    metrics = {metric_title(Metric(**r["metric"])): None for r in reports}
    about = [
        f"Paper: {', '.join(sources)}. Here: {', '.join(settings)}.",
        f"{' and '.join(metrics)} on {images}; ± is the standard deviation over n networks, or over seeds of all "
        "stages. Better, worse and equal within noise: a paired t-test over the seeds, at 95% confidence.",
    ]
    if "best" in statistics:
        about.append(
            "The best network is selected on validation and reported on test. The paper selects on the images that it "
            "reports; that figure is in table.csv as well."
        )
    on_all = sorted({r["selected"]["images"] for r in reports if "selected" in r})
    if on_all:
        counts = " or ".join(f"{count:,}" for count in on_all)
        about.append(f"The two networks that validation selects are scored once more on all {counts} test images.")
    if statistics & {"similarity", "range"}:
        about.append("Similarity is the maximum IoU of wrong predictions to a snapshot, other than itself.")
    return [*about, "Runs, in `../runs`: " + "; ".join(f"{run}: `{path}`" for path, run in runs.items()) + "."]


def _public(dataset: str) -> str:
    """A local folder by its name only: where it lies is nobody's business in a table."""
    return Path(dataset).name if os.path.exists(dataset.rpartition(":")[2]) else dataset


def _measure_rows(name: str, rows: Sequence[Row], folder: Path, scale: str, changes: Mapping[str, Any]) -> None:
    """Table 13: the memory of training the autoencoder and the denoiser."""
    presets = {"autoencoder_preset": "tokens", "denoiser_preset": "small"}
    if scale == "paper":
        presets = dict.fromkeys(presets, "paper")
    unknown = sorted(set(changes) - set(presets))
    if unknown:
        raise ExperimentError(f"{name} takes {' and '.join(presets)}, not {', '.join(unknown)}")
    presets |= changes
    PDiffConfig(**presets)  # refuses unknown ones
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    autoencoder_preset, denoiser_preset = presets.values()
    about = [
        f"Presets {autoencoder_preset} (autoencoder) and {denoiser_preset} (denoiser), on {where}. Paper: an A100."
    ]
    reports_of: list[list[dict]] = [[] for _ in rows]
    for row, reports in zip(rows, reports_of, strict=True):
        logger.info("%s: %s parameters", name, row.label)
        sizes = (row.varies["num_parameters"], row.varies["latent_dim"])
        networks = {key.removesuffix("_preset"): preset for key, preset in presets.items()}
        reports.append({"memory": {net: measure_training(net, *sizes, preset) for net, preset in networks.items()}})
        write_tables(name, rows, reports_of, folder, about)
