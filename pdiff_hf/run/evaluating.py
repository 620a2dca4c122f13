"""The stage that writes the report on a generator."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..evaluation.compare import compare_generator
from ..evaluation.conditional import GENERATOR, ConditionalAudit, Cost, plot_field
from ..evaluation.conditional_opponents import add_generic, add_hypernetwork, add_oracles
from ..evaluation.render import format_summary
from ..evaluation.scoring import make_scorer
from ..models import encode_in_batches
from ..networks.runner import NetworkRunner
from ..pipelines import PDiffPipeline
from ..pipelines.pipeline_pdiff import PDiffPipelineOutput
from ..tasks.family import Family
from ..training.tune import TuneArguments
from ..utils import names
from ..utils.files import write_json
from ..utils.reports import FIELD_FIGURE, FIGURES
from ..utils.seeds import named_seed
from .collecting import zoo_arguments
from .config import PDiffConfig
from .context import RunContext, Stage
from .learning import regressed_latents
from .tuning import generated_networks, load_tuning, make_regime, tune_arguments

# Rows of the figure of accuracy along a field.
SHOWN = (GENERATOR, "trained on the task", "nearest seen task", "base model")


def evaluate(context: RunContext, stage: Stage) -> None:
    """The report on the generated networks, beside the snapshots and trivial generators."""
    c = context.config
    if context.family.fields:
        if PartialState().is_main_process:
            save_sampling(context)
        audit_family(context, stage)
        return
    device = PartialState().device
    model, scores = context.base_model.to(device), context.scores
    scorer = make_scorer(context.task, model, context.layout, scores, c.recomputes_statistics)
    if not PartialState().is_main_process:
        scorer.help()
        return
    with context.files.replacing(stage) as folder, scorer.with_help():
        compare_generator(
            scorer,
            context.parameters,
            context.pipeline.to(device),
            folder,
            heldout=context.heldout,
            num_models=c.num_models,
            tuning=load_tuning(context.folder / names.TUNED) if context.is_wanted("tune") else None,
            baseline_models=c.baseline_models,
            baselines=c.baselines,
            extra_groups=() if context.extra_groups is None else context.extra_groups(context, scorer),
            losses=_losses(context),
            latents=context.latents,
            seed=c.seed,
        )
    context.base_model.to("cpu")
    save_sampling(context)
    context.finish(stage, {})


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


def audit_family(context: RunContext, stage: Stage) -> None:
    """
    The audit on unseen tasks. All processes take part, because some of the generator's opponents have to be trained; a
    stopped audit goes on with the opponents that it has not scored.
    """
    c, family, device = context.config, context.family, PartialState().device
    args, zoo = tune_arguments(context), zoo_arguments(c)
    networks = NetworkRunner(context.base_model.to(device), context.layout)
    sets = {name: table for name, table in context.conditions.items() if name not in ("train", "validation")}
    key = hashlib.blake2b(json.dumps(context.settings(stage.name), sort_keys=True).encode(), digest_size=8).hexdigest()
    audit = ConditionalAudit(family, networks, sets, cache=context.scores / f"conditional-{key}.json")
    PartialState().wait_for_everyone()  # until every process knows what is scored

    num_examples = family.num_examples("train")
    base_steps = max(1, c.base_epochs * num_examples // c.base_batch_size) if c.base_epochs else 0
    once = base_steps * c.base_batch_size
    of_zoo = once + (0 if context.is_imported else len(context.conditions["train"]) * zoo.num_steps * zoo.batch_size)
    with context.accelerator() as accelerator:
        regime = make_regime(context, accelerator, networks)
        add_generators(context, audit, of_zoo, args)
        parameters, table = context.known_snapshots()
        products = context.autoencoder.products
        audit.add_closed_form(
            parameters, table, context.conditions["validation"], Cost(of_zoo), seed=c.seed, products=products
        )
        base = networks.base_parameters()
        audit.add("base model", "trained", lambda _, rows: base.expand(len(rows), -1), Cost(once))
        add_oracles(audit, regime, zoo, Cost(once), (1,) if c.baselines == "few" else (1, 5))
        if c.baselines == "all":
            passes_a_step = args.num_tasks * args.num_examples
            longer = dataclasses.replace(args, num_steps=max(1, args.num_steps + of_zoo // passes_a_step))
            add_generic(audit, regime, longer, once)
            untuned = PDiffPipeline.from_pretrained(context.folder / names.PIPELINE).to(device)
            if c.tune_args.map:
                untuned.autoencoder.add_tuned_map()
            latents = encode_in_batches(untuned.autoencoder, parameters)
            if c.num_regressed:  # the hypernetwork learns what the denoiser has learned
                regressed, conditions = regressed_latents(context)
                latents, table = torch.cat([latents, regressed]), torch.cat([table, conditions])
            generated = generated_networks(context, untuned, networks)
            add_hypernetwork(audit, regime, generated, latents, table, args, c.denoiser_steps, of_zoo)
    context.base_model.to("cpu")
    if not PartialState().is_main_process:
        return
    report = audit.report(context.config.section(*stage.sections) | {"seed": c.seed, "tune_tasks": c.tune_tasks})
    along = context.conditions.keys() - {"train", "validation", "test", *family.test_sets}
    with context.files.replacing(stage) as folder:
        write_report(report, folder, next(iter(along), None))
    context.finish(stage, {})


def write_report(report: dict[str, Any], folder: Path, field: str | None) -> None:
    """Writes a conditional report, and the figure of accuracy along a field if there is one, into the folder."""
    write_json(folder / names.REPORT, report)
    parts = ["# Report", format_summary(report).rstrip(), report["summary"]["about"]]
    if field is not None:
        shown = [name for name in SHOWN if name in report["rows"]]
        plot_field(report, field, field, shown, folder / FIELD_FIGURE)
        parts.insert(2, f"![{FIGURES[FIELD_FIGURE]}]({FIELD_FIGURE})")
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def sample_for(pipeline: PDiffPipeline, family: Family, config: PDiffConfig, *, shuffled: bool = False) -> Callable:
    """
    What an audit asks for networks, always with the same noise: parameters of shape `(T, num_models, D)` for a table of
    conditions, or, where they are shuffled, for those of the task before.
    """
    pipeline.set_progress_bar_config(disable=True)

    def sample(_, table: torch.Tensor) -> torch.Tensor:
        conditions = family.fields.conditions(table.roll(1, 0) if shuffled else table)
        generator = torch.Generator().manual_seed(named_seed(config.seed, "evaluate"))
        output = pipeline(config.num_models, generator=generator, condition=conditions, output_type="pt")
        assert isinstance(output, PDiffPipelineOutput) and isinstance(output.parameters, torch.Tensor)
        return output.parameters.unflatten(0, (len(table), config.num_models))

    return sample


def add_generators(context: RunContext, audit: ConditionalAudit, of_zoo: int, args: TuneArguments) -> None:
    """The generator as it is published, before it was tuned, and with the conditions of other tasks."""
    c, family, device = context.config, context.family, PartialState().device
    tuning = 0
    if c.num_tune_steps:
        record = json.loads((context.folder / names.STAGES / "tune.json").read_text(encoding="utf-8"))
        tuning = len(record["results"]["losses"]) * args.num_tasks * args.num_examples
        untuned = PDiffPipeline.from_pretrained(context.folder / names.PIPELINE).to(device)
        untuned.register_to_config(**c.sampling)
        audit.add("generator by weights", "generator", sample_for(untuned, family, c), Cost(of_zoo))
    pipeline = context.pipeline.to(device)
    audit.add(GENERATOR, "generator", sample_for(pipeline, family, c), Cost(of_zoo + tuning))
    shuffled = sample_for(pipeline, family, c, shuffled=True)
    audit.add("generator, shuffled conditions", "control", shuffled, Cost())
