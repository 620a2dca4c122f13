"""What can be known to fail is found out before any work is done."""

import os

from ..evaluation.score import make_scorer
from ..models.autoencoder import MOST_COMPONENTS
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
    if c.latent_dim > context.layout.num_parameters:
        raise RunError(
            f"latent_dim is {c.latent_dim}, but only {context.layout.num_parameters} parameters are selected; a latent "
            "cannot be longer than the vector"
        )
    num_snapshots = context.num_snapshots
    if round(num_snapshots * (1 - c.heldout_snapshots)) < 2:
        raise RunError(f"{num_snapshots} snapshots leave fewer than 2 to train on")
    num_seen = num_snapshots if c.is_of_data and c.collects else round(num_snapshots * (1 - c.heldout_snapshots))
    if c.autoencoder_preset == "linear" and c.latent_dim > min(MOST_COMPONENTS, num_seen - 1):
        raise RunError(
            f"latent_dim is {c.latent_dim}, more than the {min(MOST_COMPONENTS, num_seen - 1)} components that "
            f"autoencoder_preset=linear has of {num_seen} snapshots; use fewer, or autoencoder_preset=tokens"
        )
    num_inference_steps = c.num_inference_steps or 10
    if num_inference_steps > c.denoiser_args.num_train_timesteps:
        raise RunError(
            f"num_inference_steps is {num_inference_steps}, more than denoiser_args.num_train_timesteps="
            f"{c.denoiser_args.num_train_timesteps}"
        )
    parts = c.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", 1))
    for key in ("autoencoder_batch_size", "denoiser_batch_size"):
        if getattr(c, key) % parts:
            raise RunError(
                f"{key}={getattr(c, key)} cannot be cut into {parts} equal parts (processes × "
                "gradient_accumulation_steps)"
            )
    if c.num_tune_steps and not isinstance(context.task, ClassificationTask):
        raise RunError(
            f"tune_steps={c.num_tune_steps} needs a task of classification, whose loss networks are tuned on"
        )
    if c.num_tune_steps and c.tune_models % (parts * c.tune_args.ensemble_size):
        raise RunError(
            f"tune_models={c.tune_models} cannot be cut into {parts} equal parts of ensembles of "
            f"{c.tune_args.ensemble_size}"
        )
    if c.adapter_products:
        AdapterProducts(context.layout)  # an error where there are none
        if c.num_tune_steps and not context.family.fields:
            raise RunError(
                "adapter_products is not for tuning on a single task, whose opponents work on the factors; leave one "
                "of them out"
            )
    if c.push_to_hub and "denoiser" not in c.stages and not context.is_finished("denoiser"):
        raise RunError("push_to_hub needs a finished generator, which the chosen stages do not make")
    if c.recomputes_statistics and (context.family.fields or c.num_tune_steps):
        raise RunError(
            "batch_norm_statistics=recomputed is not for networks that are trained side by side, as for a family and "
            "in tuning; use base or generated"
        )
    if context.family.fields:
        _check_family(context)
    elif c.num_tune_steps and context.is_imported and context.fields:
        raise RunError(
            f"tune_steps={c.num_tune_steps} with snapshots that have conditions needs --family, which says what tasks "
            "they are for"
        )
    if c.snapshots is not None and c.base_epochs and not context.is_finished("base"):
        _check_frozen(context)
    check_writable(context.folder)
    for name, stage in context.stages.items():
        is_made = context.is_wanted(name) and not (name == "collect" and c.snapshots is not None)
        if is_made and not context.is_finished(name):
            context.files.check_link(stage)
    if not c.overwrite_output_dir:
        _check_folder(context)
    judged = "evaluate" in c.stages and not context.is_finished("evaluate") and not context.family.fields
    if judged and not isinstance(context.task, DataTask):
        _check_memory(context, num_snapshots)


def _check_frozen(context: RunContext) -> None:
    """Snapshots of some tensors belong to a network whose other tensors are as they were."""
    model = without_wrapper(context.task.load_base_model())
    frozen = [name for name, _ in model.named_parameters() if name not in context.layout.names]
    if frozen:
        raise RunError(
            f"the snapshots hold some tensors of a network (not '{frozen[0]}'), and base_epochs="
            f"{context.config.base_epochs} would train another network around them; use base_epochs=0, with the "
            "network that they belong to as the model"
        )


def _check_family(context: RunContext) -> None:
    """What there is for one task alone must not be asked for, because it would not be done."""
    c = context.config
    if context.is_imported:
        context.fields  # noqa: B018  # an error where they are not the family's
    first = c.collect_steps - (c.num_snapshots // c.num_tasks - 1) * c.collect_every
    if c.collects and first < 1:
        raise RunError(
            f"{c.num_snapshots // c.num_tasks} snapshots of each task, every {c.collect_every} steps, need more than "
            f"collect_steps={c.collect_steps}"
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


def _check_memory(context: RunContext, num_snapshots: int) -> None:
    """The scores of all networks must fit into memory."""
    c = context.config
    model = context.base_model if context.is_finished("base") else without_wrapper(context.task.load_base_model())
    scorer = make_scorer(context.task, model, context.layout, recompute_statistics=c.recomputes_statistics)
    for split in ("validation", "test"):
        scorer.check_memory(split, max(num_snapshots, c.num_models, c.baseline_models))
