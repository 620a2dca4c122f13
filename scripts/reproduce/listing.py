"""What experiments there are, which runs they need, and about what these cost."""

import json
import math
from functools import lru_cache
from pathlib import Path

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from pdiff_hf.evaluation.baselines import standard_baselines
from pdiff_hf.evaluation.render import table
from pdiff_hf.run.recipe import Recipe
from pdiff_hf.run.stages import stage_settings
from pdiff_hf.selection import select_parameters

from .plan import SMALL_DATASET, Plan, expand
from .tables import ARCHITECTURES, DATASETS, EXPERIMENTS, find_experiment

OPERATIONS_PER_SECOND = 30e9  # of one slow core: 45 to 100 in training were measured, 25 in scoring many networks
GENERATOR_SECONDS = 60  # autoencoder and denoiser of the small scale, there
TRAIN_IMAGES = {d.id: d.train_images for d in DATASETS.values()} | {SMALL_DATASET: 60_000, "digits": 898}


def list_experiments(**arguments) -> str:
    """Every table and figure, and what it costs; `arguments` are those of `expand`."""
    rows, at_paper = [], arguments.get("scale") == "paper"
    for name, experiment in EXPERIMENTS.items():
        num_runs, price = "–", "minutes"
        if not experiment.measures_memory:
            count, minutes = _cost(expand(name, ".", **arguments))
            num_runs, price = str(count), "1 to 3 h each" if at_paper else f"{minutes:.0f} min"
        rows.append([name, num_runs, price, experiment.title])
    about = "Costs are the paper's, on an A100."
    if not at_paper:
        about = "Costs are estimates for one slow core, if nothing is finished yet."
    about += " What several experiments need is run once."
    return "\n".join([table(["name", "runs", "cost", "title"], rows), "", about])


def list_runs(name: str, **arguments) -> str:
    """The runs of an experiment by name, with what they vary and what each costs by itself."""
    rows = {}
    for row, recipes in expand(name, ".", **arguments):
        price = "–"
        if recipes and arguments.get("scale") != "paper":
            price = f"{_cost([(row, recipes)])[1]:.0f} min"
        varies = ", ".join(f"{key}: {value}" for key, value in row.varies.items()) or "–"
        rows[row.run] = [row.run, price, varies]
    text = table(["run", "cost", "varies"], list(rows.values()))
    return f"{name}: {find_experiment(name).title}\n\n{text}"


def _cost(plan: Plan) -> tuple[int, float]:
    """
    The number of different runs of a plan, and the minutes that they take at the small scale on one slow core. Stages
    that runs share are counted once.
    """
    seconds: dict[tuple[str, str], float] = {}
    for row, recipes in plan:
        minutes = ARCHITECTURES[row.architecture].minutes
        for recipe in recipes:
            stages = _stage_seconds(recipe) if minutes is None else {"evaluate": 60 * minutes}
            seconds |= {(stage, json.dumps(stage_settings(recipe, stage))): s for stage, s in stages.items()}
    return sum(stage == "evaluate" for stage, _ in seconds), sum(seconds.values()) / 60


def _stage_seconds(r: Recipe) -> dict[str, float]:
    total, suffix = _operations(r.model, r.image_size, r.model_args, tuple(r.select), tuple(r.exclude))
    num_train = min(TRAIN_IMAGES.get(r.dataset, 60_000), r.max_train_samples or math.inf)
    num_eval = r.max_eval_samples or 10_000
    num_scored = 2 * r.num_snapshots + 1 + r.num_models + (len(standard_baselines()) + 1) * r.baseline_models
    num_scored += 5 * r.num_models * r.hyper_representations  # candidates are scored on one of the two splits
    num_seen = r.num_snapshots * r.collect_every * r.collect_batch_size
    collected = min(num_seen, num_train) * (total - suffix) + num_seen * 3 * suffix
    operations = {
        "base": 3 * total * num_train * r.base_epochs,
        "collect": collected + num_eval * (total + r.num_snapshots * suffix),
        "evaluate": 2 * num_eval * (total + num_scored * suffix),
    }
    seconds = {stage: count / OPERATIONS_PER_SECOND for stage, count in operations.items()}
    return seconds | {"denoiser": GENERATOR_SECONDS}


@lru_cache
def _operations(model: str, image_size: int, model_args: str, select: tuple, exclude: tuple) -> tuple[int, int]:
    """Operations for one image, of the whole network and of what comes after the first selected tensor is used."""
    arguments = json.loads(model_args)
    with torch.device("meta"):
        network = timm.create_model(Path(model).name.partition(".")[0], num_classes=10, **arguments).eval()
        channels, *size = network.pretrained_cfg["input_size"]
        images = torch.zeros(1, arguments.get("in_chans", channels), *([image_size] * 2 if image_size else size))
    before: list[int] = []
    with FlopCounterMode(display=False) as counter:
        for name in select_parameters(network, list(select), list(exclude)):
            module = network.get_submodule(name.rpartition(".")[0])
            module.register_forward_pre_hook(lambda *_: before.append(counter.get_total_flops()))
        network(images)
    return counter.get_total_flops(), counter.get_total_flops() - min(before)
