"""The stage that writes the report on a generator."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator

import torch
from accelerate import PartialState

from ..evaluation.groups import Cost, training_cost
from ..evaluation.members import evaluate_members
from ..evaluation.opponents import Pending, Regime, hypernetworks, shared_networks
from ..evaluation.score import make_scorer
from ..evaluation.sets import evaluate_sets
from ..evaluation.single_task import evaluate_task
from ..models import encode_in_batches
from ..networks.runner import NetworkRunner
from ..pipelines import PDiffPipeline
from ..tasks.data_task import DataTask
from ..training.tune import TuneArguments
from ..utils import names
from ..utils.files import write_json
from .collecting import zoo_arguments
from .context import RunContext
from .folder import Stage
from .learning import generator_of_data, regressed_latents
from .tuning import generated_networks, load_tuning, make_regime, tune_arguments


def evaluate(context: RunContext, stage: Stage) -> None:
    """The report on the generated networks, beside the snapshots and trivial generators."""
    c = context.config
    if context.family.fields:
        if PartialState().is_main_process:
            save_sampling(context)
        evaluate_unseen(context, stage)
        return
    if isinstance(context.task, DataTask):
        evaluate_data(context, context.task, stage)
        return
    device = PartialState().device
    model, scores = context.base_model.to(device), context.scores
    scorer = make_scorer(context.task, model, context.layout, scores, c.recomputes_statistics)
    if not PartialState().is_main_process:
        scorer.help()
        return
    with context.files.replacing(stage) as folder, scorer.with_help():
        evaluate_task(
            scorer,
            context.parameters,
            context.pipeline.to(device),
            folder,
            heldout=context.heldout,
            num_models=c.num_models,
            tuning=load_tuning(context.folder / names.TUNED) if context.is_wanted("tune") else None,
            untuned=_untuned(context) if context.is_wanted("tune") else None,
            baseline_models=c.baseline_models,
            baselines=c.baselines,
            extra_groups=() if context.extra_groups is None else context.extra_groups(context, scorer),
            losses=_losses(context),
            latents=context.latents,
            settings=c.section(*stage.sections),
            warnings=_about_conditions(context),
            seed=c.seed,
        )
    context.base_model.to("cpu")
    save_sampling(context)
    context.finish(stage, {})


def evaluate_data(context: RunContext, task: DataTask, stage: Stage) -> None:
    """The report on the data that generated networks make."""
    if not PartialState().is_main_process:
        return
    c, device = context.config, PartialState().device
    with context.files.replacing(stage) as folder:
        evaluate_sets(
            task,
            NetworkRunner(context.base_model.to(device), context.layout),
            context.parameters,
            context.pipeline.to(device),
            folder,
            table=context.snapshot_conditions,
            heldout=context.heldout,
            data=context.data if c.collects else None,
            latents=context.latents,
            num_models=c.num_models,
            on_data=None if c.baselines == "few" else lambda data: generator_of_data(context, data),
            losses=_losses(context),
            settings=c.section(*stage.sections),
            seed=c.seed,
        )
    context.base_model.to("cpu")
    save_sampling(context)
    context.finish(stage, {})


def _about_conditions(context: RunContext) -> list[str]:
    """Networks for many tasks that are all scored on one: their scores say little, which must not go without a word."""
    if not context.fields:
        return []
    return [
        f"The snapshots have conditions ({', '.join(context.fields)}), and no family says which task each is for: all "
        "networks are scored on one data set's labels, whatever their conditions. Give --family, a class whose members "
        "these conditions choose, to score each on a task of its own, and to compare it with the nearest snapshot."
    ]


def save_sampling(context: RunContext) -> None:
    """The generator keeps how the report has sampled it, in its own index."""
    folder, sampling = (
        context.folder / (names.TUNED if context.is_wanted("tune") else names.PIPELINE),
        context.config.sampling,
    )
    path = folder / PDiffPipeline.config_name
    index = json.loads(path.read_text(encoding="utf-8"))
    if not folder.is_symlink() and index != index | sampling:
        write_json(path, index | sampling)


def _untuned(context: RunContext) -> PDiffPipeline:
    """The generator before it was tuned."""
    pipeline = PDiffPipeline.from_pretrained(context.folder / names.PIPELINE).to(PartialState().device)
    pipeline.register_to_config(**context.config.sampling)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _losses(context: RunContext) -> dict[str, dict[str, list[float]]]:
    """The losses of the networks that were trained, for a figure."""
    panels = {
        "base model": {"base": "base model"},
        "autoencoder": {"autoencoder": "autoencoder"},
        "denoiser": {"denoiser": "denoiser"},
        "tuning": {"tune": "task loss"},
    }
    records = {name: context.files.record(stage) for name, stage in context.stages.items() if context.is_finished(name)}
    results = {name: record["results"] for name, record in records.items() if record is not None}
    losses = {
        title: {label: results[name]["losses"] for name, label in curves.items() if results.get(name, {}).get("losses")}
        for title, curves in panels.items()
    }
    return {title: curves for title, curves in losses.items() if curves}


def evaluate_unseen(context: RunContext, stage: Stage) -> None:
    """
    The report on unseen tasks. All processes take part, because some of the generator's opponents have to be trained; a
    stopped evaluation goes on with the groups that it has not scored.
    """
    c, family, device = context.config, context.family, PartialState().device
    args, zoo = tune_arguments(context), zoo_arguments(c)
    networks = NetworkRunner(context.base_model.to(device), context.layout)
    sets = {name: table for name, table in context.conditions.items() if name not in ("train", "validation")}
    key = hashlib.blake2b(json.dumps(context.settings(stage.name), sort_keys=True).encode(), digest_size=8).hexdigest()
    base_steps = max(1, c.base_epochs * family.num_examples("train") // c.base_batch_size) if c.base_epochs else 0
    of_base = training_cost(base_steps, c.base_batch_size)
    of_zoo = of_base
    if not context.is_imported:
        of_zoo += training_cost(len(context.conditions["train"]), zoo.num_steps, zoo.batch_size)
    cost, untuned = of_zoo, None
    if c.num_tune_steps:
        record = json.loads((context.folder / names.STAGES / "tune.json").read_text(encoding="utf-8"))
        cost += training_cost(len(record["results"]["losses"]), args.num_tasks, args.num_examples)
        untuned = _untuned(context)
    snapshots, table = context.known_snapshots()
    is_main = PartialState().is_main_process
    with (
        context.files.replacing(stage) if is_main else contextlib.nullcontext() as folder,
        context.accelerator() as accelerator,
    ):
        regime = make_regime(context, accelerator, networks)
        more = _more_opponents(context, regime, args, of_base, of_zoo, cost) if c.baselines == "all" else ()
        evaluate_members(
            family,
            networks,
            context.pipeline.to(device),
            snapshots,
            table,
            folder,
            sets=sets,
            validation=context.conditions["validation"],
            num_models=c.num_models,
            untuned=untuned,
            cost=Cost(cost),
            of_snapshots=Cost(of_zoo),
            of_base=of_base,
            zoo=zoo,
            factors=(1,) if c.baselines == "few" else (1, 5),
            regime=regime,
            products=context.autoencoder.products,
            more=more,
            losses=_losses(context) if is_main else None,
            settings=c.section(*stage.sections) | {"tune_tasks": c.tune_tasks},
            cache=context.scores / f"members-{key}.json",
            seed=c.seed,
        )
    context.base_model.to("cpu")
    if is_main:
        context.finish(stage, {})


def _more_opponents(
    context: RunContext, regime: Regime, args: TuneArguments, of_base: int, of_zoo: int, cost: int
) -> Iterator[Pending]:
    """What takes long: shared networks at the generator's number of passes, and hypernetworks."""
    c, size = context.config, sum(tensor.numel() for tensor in regime.networks.model.parameters())
    a_step = training_cost(args.num_tasks, args.num_examples)
    longer = dataclasses.replace(args, num_steps=max(1, (cost - of_base) // a_step))
    yield from shared_networks(regime, longer, of_base, size)
    untuned = _untuned(context)
    if c.tune_args.map:
        untuned.autoencoder.add_tuned_map()
    parameters, table = context.known_snapshots()
    latents = encode_in_batches(untuned.autoencoder, parameters)
    if c.num_regressed:  # the hypernetwork learns what the denoiser has learned
        regressed, conditions = regressed_latents(context)
        latents, table = torch.cat([latents, regressed]), torch.cat([table, conditions])
    generated = generated_networks(context, untuned, regime.networks)
    args = dataclasses.replace(args, num_steps=max(1, args.num_steps))
    yield from hypernetworks(regime, generated, latents, table, args, c.denoiser_steps, of_zoo, size)
