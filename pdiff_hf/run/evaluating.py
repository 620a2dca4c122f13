"""The stage that compares a generator with other ways to the same networks, in a report."""

import contextlib
import hashlib
import json
from functools import partial
from typing import Any

from accelerate import PartialState

from ..evaluation import evaluate
from ..evaluation.groups import training_cost
from ..evaluation.members import Spent
from ..evaluation.opponents import Regime
from ..evaluation.score import Scorer
from ..networks.runner import NetworkRunner
from ..pipelines import PDiffPipeline
from ..tasks.data_task import DataTask
from ..utils import names
from ..utils.files import write_json
from .collecting import zoo_arguments
from .context import RunContext
from .folder import Stage
from .tuning import load_tuning, make_regime, tune_arguments


def write_report(context: RunContext, stage: Stage) -> None:
    """
    The report on the generated networks. For a family, and for networks that are data, all processes take part, because
    networks are trained for it, and of a family a stopped evaluation goes on with the groups that it has not scored.
    For a single task the main process does, and the others help it to score.
    """
    c, family, is_main = context.config, context.family, PartialState().is_main_process
    device, task = PartialState().device, context.task
    model, is_tuned = context.base_model.to(device), context.is_wanted("tune")
    options: dict[str, Any] = {"settings": c.section(*stage.sections)}
    record = context.files.record(context.stages["autoencoder"]) or {"results": {}}
    options["outputs"] = record["results"].get("outputs")
    with contextlib.ExitStack() as stack:
        if isinstance(task, DataTask):
            snapshots, heldout = context.parameters, context.heldout
            options |= {"conditions": context.snapshot_conditions, "heldout": heldout, "latents": context.latents}
            options["data"] = context.data if c.collects else None
        elif family.fields:
            snapshots, options["conditions"] = context.known_snapshots()
            regime = make_regime(
                context, stack.enter_context(context.accelerator()), NetworkRunner(model, context.layout)
            )
            options["settings"] |= {"tune_tasks": c.tune_tasks}
            options |= _family_options(context, stage, regime)
        else:
            scorer = Scorer(task, model, context.layout, context.scores, c.recomputes_statistics)
            if not is_main:
                return scorer.help()
            stack.enter_context(scorer.with_help())
            snapshots, tuning = context.parameters, load_tuning(context.folder / names.TUNED) if is_tuned else None
            options |= {"scorer": scorer, "heldout": context.heldout, "latents": context.latents, "tuning": tuning}
            options |= {"baseline_models": c.baseline_models, "warnings": _about_conditions(context)}
        if context.extra_groups is not None:
            options["extra_groups"] = partial(context.extra_groups, context)
        if is_tuned:
            options["untuned"] = untuned_pipeline(context)
        folder = stack.enter_context(context.files.replacing(stage)) if is_main else None
        evaluate(
            context.pipeline.to(device),
            family,
            snapshots=snapshots,
            base_model=model,
            layout=context.layout,
            num_models=c.num_models,
            baselines=c.baselines,
            losses=_losses(context),
            folder=folder,
            seed=c.seed,
            **options,
        )
    context.base_model.to("cpu")
    if is_main:
        _save_sampling(context)
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


def _save_sampling(context: RunContext) -> None:
    """The generator keeps how the report has sampled it, in its own index."""
    folder = context.folder / (names.TUNED if context.is_wanted("tune") else names.PIPELINE)
    path, sampling = folder / PDiffPipeline.config_name, context.config.sampling
    index = json.loads(path.read_text(encoding="utf-8"))
    if not folder.is_symlink() and index != index | sampling:
        write_json(path, index | sampling)


def untuned_pipeline(context: RunContext) -> PDiffPipeline:
    """The generator before it was tuned."""
    pipeline = PDiffPipeline.from_pretrained(context.folder / names.PIPELINE).to(PartialState().device)
    pipeline.register_to_config(**context.config.sampling)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _losses(context: RunContext) -> dict[str, list[float]]:
    """The losses of the networks that were trained, for a figure."""
    losses = {}
    for name, title in (("base", "base model"), ("autoencoder",) * 2, ("denoiser",) * 2, ("tune", "tuning")):
        record = context.files.record(context.stages[name]) if context.is_finished(name) else None
        if record is not None and record["results"].get("losses"):
            losses[title] = record["results"]["losses"]
    return losses


def _passes_spent(context: RunContext) -> Spent:
    """What the generator of a family took; of snapshots from elsewhere nothing is counted."""
    c, args, zoo = context.config, tune_arguments(context), zoo_arguments(context.config)
    steps = max(1, c.base_epochs * context.family.num_examples("train") // c.base_batch_size) if c.base_epochs else 0
    base = training_cost(steps, c.base_batch_size)
    of_zoo = 0 if context.is_imported else len(context.conditions["train"])
    snapshots = base + training_cost(of_zoo, zoo.num_steps, zoo.batch_size)
    generator = snapshots
    if c.num_tune_steps:
        record = context.files.record(context.stages["tune"]) or {}
        generator += training_cost(len(record["results"]["losses"]), args.num_tasks, args.num_examples)
    return Spent(base, snapshots, generator)


def _family_options(context: RunContext, stage: Stage, regime: Regime) -> dict[str, Any]:
    """What the report on a family needs besides: its members, and what the generator took."""
    key = hashlib.blake2b(json.dumps(context.settings(stage.name), sort_keys=True).encode(), digest_size=8).hexdigest()
    return {
        "sets": {name: table for name, table in context.conditions.items() if name != "train"},
        "spent": _passes_spent(context),
        "zoo": zoo_arguments(context.config),
        "regime": regime,
        "cache": context.scores / f"members-{key}.json",
    }
