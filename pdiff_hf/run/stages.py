"""The stages of a run: one function for each, and the table that names them all."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, ModelMixin
from transformers import PreTrainedModel

from ..evaluation.compare import compare_generator
from ..evaluation.scoring import make_scorer
from ..models import DENOISER_PRESETS, ConditionEncoder, autoencoder_architecture
from ..models.condition import Condition, Fields
from ..models.products import AdapterProducts
from ..networks.adapters import without_wrapper
from ..networks.runner import NetworkRunner
from ..pipelines import PDiffPipeline
from ..snapshots import (
    CollectArguments,
    SnapshotWriter,
    align_snapshots,
    collect_snapshots,
    find_hidden_units,
    import_snapshots,
    load_snapshots,
    parameter_matrix,
    train_base_model,
)
from ..snapshots.barrier import check_basins
from ..snapshots.dataset import load_fields
from ..snapshots.frozen import FrozenCheck
from ..tasks import ClassificationTask
from ..training import LoopArguments, NoiseArguments, make_training_scheduler, train_autoencoder, train_denoiser
from ..utils import names
from ..utils.files import remove, write_json
from ..utils.seeds import named_seed
from . import families
from .folder import RunError, Stage
from .recipe import (
    AutoencoderSection,
    BaseSection,
    CollectSection,
    DenoiserSection,
    EvaluateSection,
    FamilySection,
    Recipe,
    TaskSection,
    TuneSection,
)
from .tuning import load_tuning, tune_denoiser

if TYPE_CHECKING:
    from .run import Run


def train_base(run: "Run") -> None:
    """The network that everything else starts from: trained, or as the task gives it."""
    r, stage = run.recipe, STAGES["base"]
    torch.manual_seed(named_seed(r.seed, "base weights"))
    model = without_wrapper(run.task.load_base_model())
    results = {}
    if r.base_epochs:
        num_examples = len(run.task.load_split("train"))  # type: ignore[arg-type]  # a map-style data set
        steps = max(1, r.base_epochs * num_examples // r.base_batch_size)
        args = LoopArguments(
            num_steps=steps,
            batch_size=r.base_batch_size,
            learning_rate=r.base_learning_rate,
            lr_warmup_steps=r.base_warmup_steps,
            weight_decay=r.base_weight_decay,
        )
        with run.loop(stage.name) as loop:
            losses = train_base_model(loop, run.task, model, args)
        results["losses"] = losses.tolist()
    if not PartialState().is_main_process:
        return
    model = model.to("cpu").eval()
    with run.files.replacing(stage) as folder:
        run.task.save_base_model(model, folder)
    run.finish(stage.name, results)


def collect(run: "Run") -> None:
    """Snapshots: fine-tuning, or the data set that the recipe names, which stays where it is."""
    r, stage = run.recipe, STAGES["collect"]
    if run.family is not None and r.snapshots is None:
        families.collect(run, stage)
        return
    if not PartialState().is_main_process:
        return
    if r.snapshots is not None:
        run.finish(stage.name, {"num_snapshots": len(run.snapshots[0]), "barrier": _check_basins(run)})
        return
    with run.accelerator() as accelerator, run.files.replacing(stage) as target:
        target.rmdir()
        collect_snapshots(
            accelerator,
            run.task,
            run.base_model,
            run.layout,
            target,
            CollectArguments(
                num_snapshots=r.num_snapshots,
                num_runs=r.num_runs,
                every_n_steps=r.collect_every,
                optimizer=r.collect_optimizer,
                learning_rate=r.collect_learning_rate,
                weight_decay=r.collect_weight_decay,
                batch_size=r.collect_batch_size,
            ),
            seed=named_seed(r.seed, "collect"),
        )
    run.base_model.to("cpu")
    run.finish(stage.name, {"barrier": _check_basins(run)})


def collect_from_files(
    run: "Run",
    paths: Sequence[str],
    align: bool = False,
    conditions: Sequence[Condition] | None = None,
    fields: Fields | None = None,
) -> None:
    """
    Takes the place of the stage collect: snapshots from files, with their conditions, as `import_snapshots` reads them,
    and with `align` reordered as `align_snapshots` does.

    Raises:
        RunError: if there are snapshots already.
    """
    stage = STAGES["collect"]
    if run.files.record(stage) is not None and not run.recipe.overwrite_output_dir:
        raise RunError(
            f"'{run.folder}' has snapshots already; choose another --output_dir, or replace them with "
            "--overwrite_output_dir"
        )
    if align:  # an error, if they cannot be, comes before the files are read
        find_hidden_units(_classifier(run), run.base_model, run.layout)
    check = FrozenCheck(run.base_model, run.layout, require_same=run.recipe.require_same_frozen)
    with run.resource_errors("import"), run.files.replacing(stage) as folder:
        folder.rmdir()
        adapters = import_snapshots(paths, run.layout, folder, conditions=conditions, fields=fields, check=check)
        if align:
            _align(run, folder)
    results = {
        "imported_from": [str(path) for path in paths],
        "aligned": align,
        "adapters": adapters,
        "frozen": check.report(run.task),
        "barrier": _check_basins(run, align),
    }
    run.finish(stage.name, results)


def _classifier(run: "Run") -> ClassificationTask:
    if not isinstance(run.task, ClassificationTask):
        raise RunError(f"networks are aligned by what classifiers predict, and {type(run.task).__name__} is not of any")
    return run.task


def _align(run: "Run", folder: Path) -> None:
    """Replaces the parameter data set `folder` by an aligned one."""
    dataset, layout = load_snapshots(folder)
    fields = load_fields(folder)
    columns = list(dataset.remove_columns("parameters"))
    aligned = align_snapshots(_classifier(run), run.base_model, layout, parameter_matrix(dataset, layout))
    remove(folder)
    with SnapshotWriter(folder, layout, fields=fields) as writer:
        for row, known in zip(aligned, columns, strict=True):
            condition = {name: known[name] for name in fields}
            writer.write(row, seed=known["seed"], step=known["step"], condition=condition)


def _check_basins(run: "Run", aligned: bool = False) -> dict | None:
    """Warns of snapshots that one generator can hardly learn; see `check_basins`. For classifiers."""
    if not isinstance(run.task, ClassificationTask) or run.family is not None:
        return None
    dataset = run.snapshots[0]
    models = NetworkRunner(run.base_model.to(PartialState().device), run.layout)
    # Data sets from elsewhere may have the parameters alone.
    seeds, steps = (
        dataset[name][:] if name in dataset.column_names else [0] * len(dataset) for name in ("seed", "step")
    )
    barrier = check_basins(run.task, models, run.parameters, seeds, steps, aligned)
    run.base_model.to("cpu")
    return barrier


def autoencoder_arguments(recipe: Recipe) -> LoopArguments:
    """Of the autoencoder's training."""
    return LoopArguments(
        num_steps=recipe.autoencoder_steps,
        batch_size=recipe.autoencoder_batch_size,
        learning_rate=recipe.autoencoder_learning_rate,
        lr_warmup_steps=recipe.autoencoder_warmup_steps,
        max_grad_norm=recipe.max_grad_norm,
    )


def fit_autoencoder(run: "Run") -> None:
    """The autoencoder that turns snapshots into latents."""
    r, stage = run.recipe, STAGES["autoencoder"]
    with run.loop(stage.name) as loop:
        autoencoder, losses = train_autoencoder(
            loop,
            run.parameters,
            run.layout,
            autoencoder_arguments(r),
            seen=run.seen,
            latent_dim=r.latent_dim,
            architecture=architecture(run),
            normalization=r.normalization,
            latent_scaling=r.latent_scaling,
            noise=NoiseArguments(parameter_noise=r.parameter_noise, latent_noise=r.latent_noise),
        )
    if not PartialState().is_main_process:
        return
    with run.files.replacing(stage) as folder:
        autoencoder.save_pretrained(folder)
    geometry = {} if autoencoder.adapter_geometry is None else {"adapters": autoencoder.adapter_geometry}
    run.finish(stage.name, {"losses": losses.tolist()} | geometry)


def architecture(run: "Run") -> dict[str, Any]:
    """Of the autoencoder, apart from the length of a latent."""
    r = run.recipe
    if not r.adapter_products:
        return autoencoder_architecture(r.autoencoder_preset, run.layout.num_parameters, r.token_size, len(run.seen))
    # K adapters of rank r span no more than K r rows and columns.
    frame_size = min(r.adapter_frame_size, len(run.seen) * max(AdapterProducts(run.layout).ranks.values())) or None
    products = AdapterProducts(run.layout, frame_size)
    length, size = products.layout.num_parameters, r.token_size
    settings = autoencoder_architecture(r.autoencoder_preset, length, size, len(run.seen), products.has_frames)
    return settings | {"adapter_products": True, "adapter_frame_size": frame_size}


def fit_denoiser(run: "Run") -> None:
    """The denoiser, and with it the whole pipeline."""
    r, stage = run.recipe, STAGES["denoiser"]
    scheduler = make_training_scheduler(r.num_train_timesteps, r.prediction_type)
    encoder, table, latents = None, None, run.latents[run.seen]
    if run.fields:
        torch.manual_seed(named_seed(r.seed, "condition encoder"))
        encoder, table = ConditionEncoder(run.fields.to_dict()), run.snapshot_conditions[run.seen]
        encoder.remember(table.nan_to_num(torch.inf).unique(dim=0).nan_to_num(posinf=torch.nan))
    if run.family is not None and r.regressed_networks:
        regressed, conditions = families.regressed_latents(run)
        latents, table = torch.cat([latents, regressed]), torch.cat([run.snapshot_conditions[run.seen], conditions])
    args = LoopArguments(
        num_steps=r.denoiser_steps,
        batch_size=r.denoiser_batch_size,
        learning_rate=r.denoiser_learning_rate,
        lr_warmup_steps=r.denoiser_warmup_steps,
        max_grad_norm=r.max_grad_norm,
        ema_decay=r.ema_decay,
    )
    with run.loop(stage.name) as loop:
        denoiser, losses = train_denoiser(
            loop,
            latents,
            args,
            scheduler=scheduler,
            encoder=encoder,
            table=table,
            condition_dropout=r.condition_dropout if encoder is not None else 0.0,
            **DENOISER_PRESETS[r.denoiser_preset],
        )
    if not PartialState().is_main_process:
        return
    # A network of no library that can save it does not go with its generator.
    base_model = run.base_model if isinstance(run.base_model, PreTrainedModel | ModelMixin) else None
    sampler = make_sampling_scheduler(scheduler)
    pipeline = PDiffPipeline(
        run.autoencoder,
        denoiser,
        sampler,
        base_model=base_model,
        condition_encoder=encoder,
        processor=run.task.processor,
        recomputed_statistics=r.recomputes_statistics,
        **r.sampling,
    )
    with run.files.replacing(stage) as folder:
        pipeline.save_pretrained(folder)
    run.finish(stage.name, {"losses": losses.tolist()})


def tune(run: "Run") -> None:
    """The denoiser fine-tuned on the loss of the networks that it generates."""
    tune_denoiser(run, STAGES["tune"])


def make_sampling_scheduler(scheduler: DDPMScheduler) -> DPMSolverMultistepScheduler:
    """The scheduler that a pipeline is saved with: DPM-Solver++, which needs 10 steps where DDPM needs 1000."""
    return DPMSolverMultistepScheduler.from_config(
        scheduler.config, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )


def evaluate(run: "Run") -> None:
    """The report on the generated networks, beside the snapshots and trivial generators."""
    r, stage = run.recipe, STAGES["evaluate"]
    if run.family is not None:
        if PartialState().is_main_process:
            save_sampling(run)
        families.evaluate(run, stage)
        return
    device = PartialState().device
    model, scores = run.base_model.to(device), run.folder / names.SCORES
    scorer = make_scorer(run.task, model, run.layout, scores, r.recomputes_statistics)
    if not PartialState().is_main_process:
        scorer.help()
        return
    with run.files.replacing(stage) as folder, scorer.with_help():
        compare_generator(
            scorer,
            run.parameters,
            run.pipeline.to(device),
            folder,
            heldout=run.heldout,
            num_models=r.num_models,
            score_models=r.score_models,
            tuning=load_tuning(run.folder / names.TUNED) if STAGES["tune"].is_wanted(r) else None,
            baseline_models=r.baseline_models,
            baselines=r.baselines,
            extra_groups=() if run.extra_groups is None else run.extra_groups(run, scorer),
            losses=_losses(run),
            latents=run.latents,
            seed=r.seed,
        )
    run.base_model.to("cpu")
    save_sampling(run)
    run.finish(stage.name, {})


def save_sampling(run: "Run") -> None:
    """The generator keeps how the report has sampled it, in its own index."""
    folder = run.folder / (names.TUNED if STAGES["tune"].is_wanted(run.recipe) else names.PIPELINE)
    path = folder / PDiffPipeline.config_name
    index = json.loads(path.read_text(encoding="utf-8"))
    if not folder.is_symlink() and index != index | run.recipe.sampling:
        write_json(path, index | run.recipe.sampling)


def _losses(run: "Run") -> dict[str, dict[str, list[float]]]:
    """The losses of the networks that were trained, for a figure."""
    panels = {
        "base model": {"base": "base model"},
        "autoencoder": {"autoencoder": "autoencoder"},
        "denoiser": {"denoiser": "denoiser"},
        "tuning": {"tune": "task loss"},
    }
    records = {name: run.files.record(stage) for name, stage in STAGES.items() if run.is_finished(name)}
    results = {name: record["results"] for name, record in records.items() if record is not None}
    losses = {
        title: {label: results[name]["losses"] for name, label in curves.items() if results.get(name, {}).get("losses")}
        for title, curves in panels.items()
    }
    return {title: curves for title, curves in losses.items() if curves}


# In the order in which they are executed.
STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "base",
            names.BASE_MODEL,
            (),
            (TaskSection, FamilySection, BaseSection),
            "the base model, {base_epochs} epochs of training",
            train_base,
        ),
        Stage(
            "collect",
            names.SNAPSHOTS,
            ("base",),
            (CollectSection,),
            "{num_snapshots} snapshots",
            collect,
            about_family="{num_snapshots} snapshots of networks for {num_tasks} tasks",
        ),
        Stage(
            "autoencoder",
            names.AUTOENCODER,
            ("collect",),
            (AutoencoderSection,),
            "{autoencoder_steps} steps, to latents of {latent_dim}",
            fit_autoencoder,
        ),
        Stage(
            "denoiser",
            names.PIPELINE,
            ("autoencoder",),
            (DenoiserSection,),
            "{denoiser_steps} steps, on the latents",
            fit_denoiser,
        ),
        Stage(
            "tune",
            names.TUNED,
            ("denoiser",),
            (TuneSection,),
            "{tune_steps} steps on the loss of generated networks",
            tune,
            lambda recipe: bool(recipe.tune_steps),
        ),
        Stage(
            "evaluate",
            names.EVALUATION,
            ("denoiser", "tune"),
            (EvaluateSection,),
            "{num_models} generated networks, and {baseline_models} of each baseline",
            evaluate,
            about_family="{num_models} generated networks for each of {num_test_tasks} unseen tasks, and other answers",
        ),
    )
}


def stages_before(name: str) -> list[str]:
    """All stages that a stage follows from, in the order in which they are executed."""
    found: set[str] = set()
    pending = {name}
    while pending:
        pending = {need for stage in pending for need in STAGES[stage].needs}
        found |= pending
    return [stage for stage in STAGES if stage in found]


def stage_settings(recipe: Recipe, name: str) -> dict[str, Any]:
    """All of a recipe that the outcome of a stage follows from: two runs that have it in common can share the stage."""
    sections = [section for stage in (*stages_before(name), name) for section in STAGES[stage].sections]
    keys = ("seed", "mixed_precision", "gradient_accumulation_steps")
    settings = {key: getattr(recipe, key) for key in keys} | recipe.section(*sections)
    return json.loads(json.dumps(settings))
