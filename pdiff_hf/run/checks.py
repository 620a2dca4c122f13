"""What can be known to fail is found out before any work is done."""

import os
from typing import TYPE_CHECKING

from ..evaluation.scoring import make_scorer
from ..models.products import AdapterProducts
from ..networks.adapters import without_wrapper
from ..tasks import ClassificationTask
from ..utils.files import check_writable
from .folder import RunError, difference
from .stages import STAGES

if TYPE_CHECKING:
    from .run import Run


def check_run(run: "Run") -> None:
    """
    Raises:
        RunError: if the run cannot be executed as asked.
        ValueError: where what it starts from cannot be used.
    """
    r = run.recipe
    if r.latent_dim > run.layout.num_parameters:
        raise RunError(
            f"latent_dim is {r.latent_dim}, but only {run.layout.num_parameters} parameters are selected; a latent "
            "cannot be longer than the vector"
        )
    num_snapshots = r.num_snapshots if r.snapshots is None else len(run.snapshots[0])
    if round(num_snapshots * (1 - r.heldout_snapshots)) < 2:
        raise RunError(f"{num_snapshots} snapshots leave fewer than 2 to train on")
    num_inference_steps = r.num_inference_steps or 10
    if num_inference_steps > r.num_train_timesteps:
        raise RunError(
            f"num_inference_steps is {num_inference_steps}, more than num_train_timesteps={r.num_train_timesteps}"
        )
    parts = r.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", 1))
    for key in ("autoencoder_batch_size", "denoiser_batch_size"):
        if getattr(r, key) % parts:
            raise RunError(
                f"{key}={getattr(r, key)} cannot be cut into {parts} equal parts (processes × "
                "gradient_accumulation_steps)"
            )
    if r.tune_steps and not isinstance(run.task, ClassificationTask):
        raise RunError(f"tune_steps={r.tune_steps} needs a task of classification, whose loss networks are tuned on")
    if r.tune_steps and r.tune_models % (parts * r.tune_ensemble_size):
        raise RunError(
            f"tune_models={r.tune_models} cannot be cut into {parts} equal parts of ensembles of {r.tune_ensemble_size}"
        )
    if r.adapter_products:
        AdapterProducts(run.layout)  # an error where there are none
        if r.tune_steps and run.family is None:
            raise RunError(
                "adapter_products is not for tuning on a single task, whose opponents work on the factors; leave one "
                "of them out"
            )
    if r.push_to_hub and "denoiser" not in r.stages and not run.is_finished("denoiser"):
        raise RunError("push_to_hub needs a finished generator, which the chosen stages do not make")
    if r.recomputes_statistics and (run.family is not None or r.tune_steps):
        raise RunError(
            "batch_norm_statistics=recomputed is not for networks that are trained side by side, as for a family and "
            "in tuning; use base or generated"
        )
    if run.family is not None:
        _check_family(run)
    elif r.tune_steps and run.is_imported and run.fields:
        raise RunError(
            f"tune_steps={r.tune_steps} with snapshots that have conditions needs --family, which says what tasks they "
            "are for"
        )
    check_writable(run.folder)
    for name, stage in STAGES.items():
        is_made = stage.is_wanted(r) and not (name == "collect" and r.snapshots is not None)
        if is_made and not run.is_finished(name):
            run.files.check_link(stage)
    if not r.overwrite_output_dir:
        _check_folder(run)
    if "evaluate" in r.stages and not run.is_finished("evaluate") and run.family is None:
        _check_memory(run, num_snapshots)


def _check_family(run: "Run") -> None:
    """What there is for one task alone must not be asked for, because it would not be done."""
    r = run.recipe
    if run.is_imported:
        run.fields  # noqa: B018  # an error where they are not the family's
    unused = {"augmentation": "none", "score_models": None, "num_runs": 1}
    unused |= {"tune_ensemble_size": 1, "tune_diversity": [0.0], "tune_penalty": 0.0}
    for key, value in unused.items():
        if getattr(r, key) != value:
            raise RunError(f"{key}={getattr(r, key)} is not for a family of tasks; leave it out")
    if r.snapshots is None and r.collect_optimizer != "adamw":
        raise RunError(f"the networks of a family are trained with adamw, not with {r.collect_optimizer}")
    first = r.collect_steps - (r.num_snapshots // r.num_tasks - 1) * r.collect_every
    if r.snapshots is None and first < 1:
        raise RunError(
            f"{r.num_snapshots // r.num_tasks} snapshots of each task, every {r.collect_every} steps, need more than "
            f"collect_steps={r.collect_steps}"
        )


def _check_folder(run: "Run") -> None:
    """What the folder holds must belong to the recipe."""
    for name, stage in STAGES.items():
        settings, record = run.settings(name), run.files.record(stage)
        if record is not None and record["settings"] != settings:
            raise RunError(
                f"'{run.folder}' holds a run with other settings "
                f"({difference(record['settings'], settings)}); choose another --output_dir, or execute the "
                "changed stages again with --overwrite_output_dir"
            )
        unfinished = run.files.checkpoint_settings(stage)
        if run.recipe.resume_from_checkpoint is not None and unfinished not in (None, settings):
            raise RunError(
                f"the checkpoints of stage {name} in '{run.folder}' are those of a run with other settings "
                f"({difference(unfinished, settings)}); go on with those, or begin the stage anew without "
                "--resume_from_checkpoint"
            )


def _check_memory(run: "Run", num_snapshots: int) -> None:
    """The scores of all networks must fit into memory."""
    r = run.recipe
    model = run.base_model if run.is_finished("base") else without_wrapper(run.task.load_base_model())
    scorer = make_scorer(run.task, model, run.layout, recompute_statistics=r.recomputes_statistics)
    for split in ("validation", "test"):
        scorer.check_memory(split, max(num_snapshots, r.score_models or r.num_models, r.baseline_models))
