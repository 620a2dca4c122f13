"""What can be known to fail is found out before any work is done."""

import os
from collections.abc import Iterator

from ..evaluation.placing import SPLITS
from ..evaluation.score import Scorer
from ..evaluation.sets import too_few
from ..models.autoencoder import num_components
from ..models.products import AdapterProducts
from ..networks.adapters import without_wrapper
from ..tasks import ClassificationTask
from ..tasks.data_task import DataTask
from ..utils.files import check_writable
from .context import RunContext
from .folder import RunError, difference


def check_run(context: RunContext) -> None:
    """
    Raises:
        RunError: if the run cannot be executed as asked.
        ValueError: where what it starts from cannot be used.
    """
    c = context.config
    c.check()
    for wrong in _complaints(context):
        raise RunError(wrong)
    check_writable(context.folder)
    for name, stage in context.stages.items():
        is_made = context.is_wanted(name) and not (name == "collect" and c.snapshots is not None)
        if is_made and not context.is_finished(name):
            context.files.check_link(stage)
    if not c.overwrite_output_dir:
        _check_folder(context)
    judged = "evaluate" in c.stages and not context.is_finished("evaluate") and not context.family.fields
    if judged and isinstance(context.task, DataTask):
        if few := too_few(*(len(context.task.signals(split)) for split in SPLITS)):
            raise RunError(few)
    elif judged:  # the scores of all networks must fit into memory
        model = context.base_model if context.is_finished("base") else without_wrapper(context.task.load_base_model())
        scorer = Scorer(context.task, model, context.layout, recompute_statistics=c.recomputes_statistics)
        for split in ("validation", "test"):
            scorer.check_memory(split, max(context.num_snapshots, c.num_models, c.baseline_models))


def _complaints(context: RunContext) -> Iterator[str]:
    """What is wrong with the settings, given what they are for."""
    c, fields, tune_steps = context.config, context.family.fields, context.config.num_tune_steps
    if c.latent_dim > (length := context.layout.num_parameters):
        yield f"latent_dim is {c.latent_dim}, but only {length} parameters are selected; a latent cannot be longer"
    share = c.heldout_snapshots
    if round(context.num_snapshots * (1 - share)) < 2:
        yield f"{context.num_snapshots} snapshots leave fewer than 2 to train on"
    num_seen = round(context.num_snapshots * (1 - (0 if c.is_of_data and c.collects else share)))
    if c.autoencoder_preset == "linear" and c.latent_dim > (most := num_components(length, num_seen)):
        yield (
            f"latent_dim is {c.latent_dim}, more than the {most} components that autoencoder_preset=linear has of "
            f"{num_seen} snapshots; use fewer, or autoencoder_preset=tokens"
        )
    if (steps := c.num_inference_steps or 10) > (most := c.denoiser_args.num_train_timesteps):
        yield f"num_inference_steps is {steps}, more than denoiser_args.num_train_timesteps={most}"
    parts = c.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", 1))
    cut = f"cannot be cut into {parts} equal parts (processes × gradient_accumulation_steps)"
    keys = ["autoencoder_batch_size", "denoiser_batch_size"]
    keys += ["base_batch_size"] if c.base_epochs and not context.is_finished("base") else []
    batches = {key: getattr(c, key) for key in keys}
    if c.collects and isinstance(context.task, DataTask) and not context.is_finished("collect"):
        size = min(c.collect_batch_size, num_points := len(context.task.coordinates()))
        batches[f"with {num_points} coordinates collect_batch_size"] = size
    for key, size in batches.items():
        if size % parts:
            yield f"{key}={size} {cut}"
    if tune_steps and not isinstance(context.task, ClassificationTask):
        yield f"tune_steps={tune_steps} needs a task of classification, whose loss networks are tuned on"
    if tune_steps and c.tune_models % (parts * c.tune_args.ensemble_size):
        yield f"tune_models={c.tune_models} {cut}, of ensembles of {c.tune_args.ensemble_size}"
    if c.adapter_products:
        AdapterProducts(context.layout)  # an error where there are none
        if tune_steps and not fields:
            yield (
                "adapter_products is not for tuning on a single task, whose opponents work on the factors; leave one "
                "of them out"
            )
    rank = getattr(getattr(context.family, "base", None), "adapter_rank", None)
    if rank and c.collects and not (tune_steps and c.adapter_products and fields):
        yield f"adapter_rank={rank} is for adapters of a family that are tuned, as adapter_products; leave it out"
    if c.push_to_hub and "denoiser" not in c.stages and not context.is_finished("denoiser"):
        yield "push_to_hub needs a finished generator, which the chosen stages do not make"
    if c.recomputes_statistics and (fields or tune_steps):
        yield (
            "batch_norm_statistics=recomputed is not for networks that are trained side by side, as for a family and "
            "in tuning; use base or generated"
        )
    per_task = c.num_snapshots // c.num_tasks
    if fields and c.collects and c.collect_steps <= (per_task - 1) * c.collect_every:
        yield (
            f"{per_task} snapshots of each task, every {c.collect_every} steps, need more than "
            f"collect_steps={c.collect_steps}"
        )
    if tune_steps and not fields and context.is_imported and context.fields:
        yield (
            f"tune_steps={tune_steps} with snapshots that have conditions needs --family, which says what tasks they "
            "are for"
        )
    if c.snapshots is not None and c.base_epochs and not context.is_finished("base"):
        # Snapshots of some tensors belong to a network whose other tensors are as they were.
        model = without_wrapper(context.task.load_base_model())
        if frozen := [name for name, _ in model.named_parameters() if name not in context.layout.names]:
            yield (
                f"the snapshots hold some tensors of a network (not '{frozen[0]}'), and base_epochs={c.base_epochs} "
                "would train another network around them; use base_epochs=0, with the network that they belong to as "
                "the model"
            )


def _check_folder(context: RunContext) -> None:
    """What the folder holds must belong to the recipe."""
    for name, stage in context.stages.items():
        settings, record = context.settings(name), context.files.record(stage)
        if record is not None and record["settings"] != settings:
            raise RunError(
                f"'{context.folder}' holds a run with other settings "
                f"({difference(record['settings'], settings)}); choose another --output_dir, or execute the "
                "changed stages again with --overwrite_output_dir"
            )
        unfinished = context.files.checkpoint_settings(stage)
        if context.config.resume_from_checkpoint is not None and unfinished not in (None, settings):
            raise RunError(
                f"the checkpoints of stage {name} in '{context.folder}' are those of a run with other settings "
                f"({difference(unfinished, settings)}); go on with those, or begin the stage anew without "
                "--resume_from_checkpoint"
            )
