"""What stages do where a run has a family of tasks."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, PartialState

from ..evaluation.conditional import GENERATOR, ConditionalAudit, Cost, mean_networks, plot_field
from ..evaluation.conditional_opponents import Regime, add_generic, add_hypernetwork, add_oracles
from ..evaluation.render import format_summary
from ..models import encode_in_batches
from ..models.products import contracted
from ..networks.runner import NetworkRunner
from ..pipelines import PDiffPipeline
from ..pipelines.pipeline_pdiff import PDiffPipelineOutput
from ..snapshots.zoo import ZooArguments, train_specialists, write_zoo
from ..tasks.family import MAX_DRAWS, Family
from ..training.denoiser import LatentGenerator
from ..training.tune import GeneratedNetworks, TaskBatches, TuneArguments, fresh_tasks, seen_tasks
from ..utils import names
from ..utils.files import write_json
from ..utils.reports import FIELD_FIGURE, FIGURES
from ..utils.seeds import named_seed

if TYPE_CHECKING:
    from .folder import Stage
    from .recipe import Recipe
    from .run import Run

# So many networks of a regression are made at once.
REGRESSED_AT_ONCE = 256
# Rows of the figure of accuracy along a field.
SHOWN = (GENERATOR, "trained on the task", "nearest seen task", "base model")


def collect(run: "Run", stage: "Stage") -> None:
    """Snapshots of a network for each seen task, all fine-tuned from the base model side by side."""
    r, family = run.recipe, run.family
    assert family is not None
    args, networks = zoo_arguments(run.recipe), NetworkRunner(run.base_model, run.layout)
    with run.loop(stage.name) as loop:
        snapshots = train_specialists(loop, family, networks, run.conditions["train"], args)
    run.base_model.to("cpu")
    if not PartialState().is_main_process:
        return
    with run.files.replacing(stage) as folder:
        folder.rmdir()
        conditions = family.fields.conditions(run.conditions["train"])
        write_zoo(folder, family, run.layout, conditions, args, snapshots, named_seed(r.seed, "collect"))
    run.finish(stage.name, {})


def regressed_latents(run: "Run") -> tuple[torch.Tensor, torch.Tensor]:
    """
    Latents, shape `(N, L)`, and conditions, `(N, width)`, of the networks that kernel ridge regression gives
    for conditions that are in no set of unseen tasks. Where seen tasks are few, a denoiser that learns them too says
    between the seen tasks what the regression says, and tuning on seen tasks goes on from there.
    """
    r, family, autoencoder = run.recipe, run.family, run.autoencoder
    assert family is not None and r.regressed_networks
    networks = NetworkRunner(run.base_model, run.layout)
    products = run.autoencoder.products
    seen, _, means = mean_networks(*known_snapshots(run), products)
    audit = ConditionalAudit(family, networks, {})
    ridge = audit.tuned_ridge(seen, means, run.conditions["validation"], products)
    unseen, generator = unseen_tasks(run), torch.Generator().manual_seed(named_seed(r.seed, "regressed"))
    draws = (family.draw(generator) for _ in range(MAX_DRAWS * r.regressed_networks))
    allowed = (c for c in draws if family.region(c) is None and family.key(c) not in unseen)
    table = family.fields.table(list(itertools.islice(allowed, r.regressed_networks)))
    latents = [
        encode_in_batches(autoencoder, contracted(ridge(rows), products)) for rows in table.split(REGRESSED_AT_ONCE)
    ]
    return torch.cat(latents), table


def known_snapshots(run: "Run") -> tuple[torch.Tensor, torch.Tensor]:
    """The snapshots without unknown fields, shape `(N, D)`, and their conditions, shape `(N, width)`."""
    known = run.fields.known(run.snapshot_conditions).all(1)
    return run.parameters[known], run.snapshot_conditions[known]


def zoo_arguments(recipe: "Recipe") -> ZooArguments:
    return ZooArguments(
        num_steps=recipe.collect_steps,
        num_snapshots=recipe.num_snapshots // recipe.num_tasks,
        every_n_steps=recipe.collect_every,
        batch_size=recipe.collect_batch_size,
        learning_rate=recipe.collect_learning_rate,
        weight_decay=recipe.collect_weight_decay,
    )


def tune_arguments(run: "Run") -> TuneArguments:
    r = run.recipe
    return TuneArguments(
        num_steps=r.tune_steps or 0,
        learning_rate=r.tune_learning_rate,
        num_tasks=r.tune_models,
        num_examples=r.tune_batch_size,
        validate_every=max(1, (r.tune_steps or 0) // (10 if run.family else 5)),
    )


def make_regime(run: "Run", accelerator: Accelerator, networks: NetworkRunner) -> Regime:
    """Which tasks the recipe allows to train on."""
    r, family = run.recipe, run.family
    assert family is not None
    unseen = unseen_tasks(run)
    seen = seen_conditions(run)

    def batches(args: TuneArguments) -> TaskBatches:
        if r.tune_tasks == "fresh":
            return fresh_tasks(family, args, unseen, accelerator.device)
        return seen_tasks(family, args, seen, accelerator.device, condition_noise=r.tune_condition_noise)

    return Regime(
        family,
        networks,
        accelerator,
        batches,
        len(seen),
        run.conditions["validation"],
        r.seed,
    )


def unseen_tasks(run: "Run") -> set[Hashable]:
    """The keys of all tasks that are kept for validation and tests."""
    family = run.family
    assert family is not None
    tables = [table for name, table in run.conditions.items() if name != "train"]
    return {family.key(condition) for table in tables for condition in family.fields.conditions(table)}


def seen_conditions(run: "Run") -> torch.Tensor:
    """The different conditions of the snapshots, without those with unknown fields, shape `(T, width)`."""
    table = run.snapshot_conditions
    return table[run.fields.known(table).all(1)].unique(dim=0)


def generated_networks(run: "Run", pipeline: PDiffPipeline, networks: NetworkRunner) -> GeneratedNetworks:
    """The generator of a pipeline, followed by the networks that it gives, to be tuned."""
    predict = run.task.predict  # type: ignore[attr-defined]  # of classification, which is checked before any work
    return GeneratedNetworks(
        LatentGenerator(pipeline.denoiser, pipeline.condition_encoder),
        pipeline.autoencoder,
        pipeline.scheduler,
        run.recipe.tune_inference_steps,
        networks,
        predict,
    )


def evaluate(run: "Run", stage: "Stage") -> None:
    """
    The audit on unseen tasks. All processes take part, because some of the generator's opponents have to be trained; a
    stopped audit goes on with the opponents that it has not scored.
    """
    r, family, device = run.recipe, run.family, PartialState().device
    assert family is not None
    args, zoo = tune_arguments(run), zoo_arguments(r)
    networks = NetworkRunner(run.base_model.to(device), run.layout)
    sets = {name: table for name, table in run.conditions.items() if name not in ("train", "validation")}
    key = hashlib.blake2b(json.dumps(run.settings(stage.name), sort_keys=True).encode(), digest_size=8).hexdigest()
    audit = ConditionalAudit(family, networks, sets, cache=run.folder / names.SCORES / f"conditional-{key}.json")
    PartialState().wait_for_everyone()  # until every process knows what is scored

    num_examples = family.num_examples("train")
    base_steps = max(1, r.base_epochs * num_examples // r.base_batch_size) if r.base_epochs else 0
    once = base_steps * r.base_batch_size
    of_zoo = once + (0 if run.is_imported else len(run.conditions["train"]) * zoo.num_steps * zoo.batch_size)
    with run.accelerator() as accelerator:
        regime = make_regime(run, accelerator, networks)
        add_generators(run, audit, of_zoo, args)
        parameters, table = known_snapshots(run)
        products = run.autoencoder.products
        audit.add_closed_form(
            parameters, table, run.conditions["validation"], Cost(of_zoo), seed=r.seed, products=products
        )
        base = networks.base_parameters()
        audit.add("base model", "trained", lambda _, rows: base.expand(len(rows), -1), Cost(once))
        add_oracles(audit, regime, zoo, Cost(once), (1,) if r.baselines == "few" else (1, 5))
        if r.baselines == "all":
            passes_a_step = args.num_tasks * args.num_examples
            longer = dataclasses.replace(args, num_steps=max(1, args.num_steps + of_zoo // passes_a_step))
            add_generic(audit, regime, longer, once)
            untuned = PDiffPipeline.from_pretrained(run.folder / names.PIPELINE).to(device)
            if r.tune_map:
                untuned.autoencoder.add_tuned_map()
            latents = encode_in_batches(untuned.autoencoder, parameters)
            if r.regressed_networks:  # the hypernetwork learns what the denoiser has learned
                regressed, conditions = regressed_latents(run)
                latents, table = torch.cat([latents, regressed]), torch.cat([table, conditions])
            generated = generated_networks(run, untuned, networks)
            add_hypernetwork(audit, regime, generated, latents, table, args, r.denoiser_steps, of_zoo)
    run.base_model.to("cpu")
    if not PartialState().is_main_process:
        return
    report = audit.report(run.recipe.without_secrets(*stage.sections) | {"seed": r.seed, "tune_tasks": r.tune_tasks})
    along = run.conditions.keys() - {"train", "validation", "test", *family.test_sets}
    with run.files.replacing(stage) as folder:
        write_report(report, folder, next(iter(along), None))
    run.finish(stage.name, {})


def write_report(report: dict[str, Any], folder: Path, field: str | None) -> None:
    """Writes a conditional report, and the figure of accuracy along a field if there is one, into the folder."""
    write_json(folder / names.REPORT, report)
    parts = ["# Report", format_summary(report).rstrip(), report["summary"]["about"]]
    if field is not None:
        shown = [name for name in SHOWN if name in report["rows"]]
        plot_field(report, field, field, shown, folder / FIELD_FIGURE)
        parts.insert(2, f"![{FIGURES[FIELD_FIGURE]}]({FIELD_FIGURE})")
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def sample_for(pipeline: PDiffPipeline, family: Family, recipe: "Recipe", *, shuffled: bool = False) -> Callable:
    """
    What an audit asks for networks, always with the same noise: parameters of shape `(T, num_models, D)` for a table of
    conditions, or, where they are shuffled, for those of the task before.
    """
    pipeline.set_progress_bar_config(disable=True)

    def sample(_, table: torch.Tensor) -> torch.Tensor:
        conditions = family.fields.conditions(table.roll(1, 0) if shuffled else table)
        generator = torch.Generator().manual_seed(named_seed(recipe.seed, "evaluate"))
        output = pipeline(recipe.num_models, generator=generator, condition=conditions, output_type="pt")
        assert isinstance(output, PDiffPipelineOutput) and isinstance(output.parameters, torch.Tensor)
        return output.parameters.unflatten(0, (len(table), recipe.num_models))

    return sample


def add_generators(run: "Run", audit: ConditionalAudit, of_zoo: int, args: TuneArguments) -> None:
    """The generator as it is published, before it was tuned, and with the conditions of other tasks."""
    r, family, device = run.recipe, run.family, PartialState().device
    assert family is not None
    tuning = 0
    if r.tune_steps:
        record = json.loads((run.folder / names.STAGES / "tune.json").read_text(encoding="utf-8"))
        tuning = len(record["results"]["losses"]) * args.num_tasks * args.num_examples
        untuned = PDiffPipeline.from_pretrained(run.folder / names.PIPELINE).to(device)
        untuned.register_to_config(**r.sampling)
        audit.add("generator by weights", "generator", sample_for(untuned, family, r), Cost(of_zoo))
    pipeline = run.pipeline.to(device)
    audit.add(GENERATOR, "generator", sample_for(pipeline, family, r), Cost(of_zoo + tuning))
    shuffled = sample_for(pipeline, family, r, shuffled=True)
    audit.add("generator, shuffled conditions", "control", shuffled, Cost())
