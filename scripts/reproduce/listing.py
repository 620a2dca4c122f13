"""What experiments there are, which runs they need, and about what these cost."""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from pdiff_hf.evaluation.baselines import standard_baselines
from pdiff_hf.evaluation.render import table
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.context import stage_settings
from pdiff_hf.run.stages import STAGES
from pdiff_hf.selection import select_parameters
from pdiff_hf.training.estimate import estimate_autoencoder, estimate_denoiser

from .plan import Plan, expand
from .tables import ARCHITECTURES, DATASETS, EXPERIMENTS, find_experiment

OPERATIONS_PER_SECOND = 30e9  # of one slow core: 45 to 100 in training were measured, 25 in scoring many networks
GENERATOR_SECONDS = 60  # autoencoder and denoiser of the small scale, there
A100_OPERATIONS_PER_SECOND = 8e12  # assumed, not measured: two fifths of the 19.5e12 of its data sheet for float32
NUM_IMAGES = {d.id: d.num_images for d in DATASETS.values()} | {"digits": (898, 899)}
USUAL_NUM_IMAGES = (60_000, 10_000)  # of Fashion-MNIST, and assumed of data sets that are not known


def list_experiments(**arguments) -> str:
    """Every table and figure, and what it costs; `arguments` are those of `expand`."""
    rows, at_paper = [], arguments.get("scale") == "paper"
    for name, experiment in EXPERIMENTS.items():
        num_runs, price = "–", "minutes"
        if not experiment.measures_memory:
            count, minutes = _cost(expand(name, ".", **arguments), at_paper)
            num_runs, price = str(count), _price(minutes, at_paper)
        rows.append([name, num_runs, price, experiment.title])
    about = (
        f"Costs are counted operations at {A100_OPERATIONS_PER_SECOND / 1e12:.0f} TFLOP/s, assumed of an A100; loading "
        "images is not in them. The paper has 1 to 3 h for each run."
    )
    if not at_paper:
        about = "Costs are estimates for one slow core, if nothing is finished yet."
    about += " What several experiments need is run once."
    return "\n".join([table(["name", "runs", "cost", "title"], rows), "", about])


def list_runs(name: str, **arguments) -> str:
    """The runs of an experiment by name, with what they vary and what each costs by itself."""
    rows, at_paper = {}, arguments.get("scale") == "paper"
    for row, recipes in expand(name, ".", **arguments):
        price = _price(_cost([(row, recipes)], at_paper)[1], at_paper) if recipes else "–"
        varies = ", ".join(f"{key}: {value}" for key, value in row.varies.items()) or "–"
        rows[row.run] = [row.run, price, varies]
    text = table(["run", "cost", "varies"], list(rows.values()))
    return f"{name}: {find_experiment(name).title}\n\n{text}"


def _price(minutes: float, at_paper: bool) -> str:
    return f"{minutes / 60:.1f} h" if at_paper else f"{minutes:.0f} min"


def _cost(plan: Plan, at_paper: bool) -> tuple[int, float]:
    """
    The number of different runs of a plan, and the minutes that they take at the small scale on one slow core, or at
    the paper's on an A100. Stages that runs share are counted once.
    """
    seconds: dict[tuple[str, str], float] = {}
    for row, recipes in plan:
        architecture = ARCHITECTURES[row.architecture]
        for recipe in recipes:
            if architecture.minutes is None or at_paper:
                stages = _stage_seconds(recipe, _network_cost(recipe, architecture.operations), at_paper)
            else:
                stages = {"evaluate": 60 * architecture.minutes}
            seconds |= {(stage, json.dumps(stage_settings(recipe, stage, STAGES))): s for stage, s in stages.items()}
    return sum(stage == "evaluate" for stage, _ in seconds), sum(seconds.values()) / 60


def _network_cost(r: PDiffConfig, known: Mapping[str, float] | None) -> dict[str, float]:
    """
    Operations of the network of a recipe for one image, as `networks.yaml` has them, and how many parameters are
    selected: `known`, or those of a classifier, counted.
    """
    if known is None:
        known = _count(r.model, json.dumps(r.model_args), tuple(r.select), tuple(r.exclude), r.image_size)
    return {"score": known["suffix"], **known}


def _stage_seconds(r: PDiffConfig, cost: Mapping[str, float], at_paper: bool) -> dict[str, float]:
    whole, suffix, score = cost["whole"], cost["suffix"], cost["score"]
    num_train, *validation, num_test = NUM_IMAGES.get(r.dataset, USUAL_NUM_IMAGES)
    num_validation = validation[0] if validation else r.validation_fraction * num_train
    num_train = min(num_train if validation else num_train - num_validation, r.max_train_samples or math.inf)
    num_validation, num_test = (min(count, r.max_eval_samples or math.inf) for count in (num_validation, num_test))
    num_scored = 2 * r.num_snapshots + 1 + r.num_models + (len(standard_baselines()) + 1) * r.baseline_models
    num_seen = r.num_snapshots * r.collect_every * r.collect_batch_size
    collected = min(num_seen, num_train) * (whole - suffix) + num_seen * 3 * suffix
    operations = {
        "base": 3 * whole * num_train * r.base_epochs,
        "collect": collected + num_validation * (whole + r.num_snapshots * score),
        "evaluate": (num_validation + num_test) * (whole + num_scored * score),
    }
    if not at_paper:
        seconds = {stage: count / OPERATIONS_PER_SECOND for stage, count in operations.items()}
        return seconds | {"denoiser": GENERATOR_SECONDS}
    autoencoder, denoiser = _step_operations(
        int(cost["parameters"]), r.latent_dim, r.autoencoder_preset, r.denoiser_preset
    )
    # A forward pass of the denoiser, a third of a step of its training, for each network and step of sampling.
    sampled = r.num_models * (r.num_inference_steps or 10) // 3
    operations["autoencoder"] = autoencoder * r.autoencoder_steps * r.autoencoder_batch_size
    operations["denoiser"] = denoiser * (r.denoiser_steps * r.denoiser_batch_size + sampled)
    return {stage: count / A100_OPERATIONS_PER_SECOND for stage, count in operations.items()}


@lru_cache
def _step_operations(num_parameters: int, latent_dim: int, autoencoder: str, denoiser: str) -> tuple[int, int]:
    """Of a step of training with one example."""
    once = {"num_steps": 1, "batch_size": 1, "device": torch.device("meta")}
    return (
        estimate_autoencoder(num_parameters, latent_dim=latent_dim, preset=autoencoder, **once).flops,
        estimate_denoiser(latent_dim, preset=denoiser, **once).flops,
    )


@lru_cache
def _count(model: str, model_args: str, select: tuple, exclude: tuple, image_size: int) -> dict[str, float]:
    """Operations of the whole network, and of what comes after the first selected tensor is used; and parameters."""
    arguments = json.loads(model_args)
    with torch.device("meta"):
        network = timm.create_model(Path(model).name.partition(".")[0], num_classes=10, **arguments).eval()
        channels, *size = network.pretrained_cfg["input_size"]
        images = torch.zeros(1, arguments.get("in_chans", channels), *([image_size] * 2 if image_size else size))
    before: list[int] = []
    state_dict, selected = network.state_dict(), select_parameters(network, list(select), list(exclude))
    with FlopCounterMode(display=False) as counter:
        for name in selected:
            module = network.get_submodule(name.rpartition(".")[0])
            module.register_forward_pre_hook(lambda *_: before.append(counter.get_total_flops()))
        network(images)
    whole, parameters = counter.get_total_flops(), sum(state_dict[name].numel() for name in selected)
    return {"whole": whole, "suffix": whole - min(before), "parameters": parameters}
