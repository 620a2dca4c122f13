"""The stage that tunes a generator on the task, or the family of tasks, of its networks."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState

from ..networks.runner import NetworkRunner
from ..pipelines import PDiffPipeline
from ..tasks import ClassificationTask
from ..training import make_training_scheduler
from ..training.denoiser import LatentGenerator, denoising_loss
from ..training.ensembles import (
    DiffusionLatents,
    EnsembleObjective,
    TunedEnsembles,
    Tuning,
    training_passes,
    validation_batch,
)
from ..training.tune import single_task, tune
from ..utils import names
from ..utils.files import write_json
from ..utils.seeds import named_seed
from .families import generated_networks, make_regime, tune_arguments

if TYPE_CHECKING:
    from .folder import Stage
    from .run import Run


def tune_denoiser(run: "Run", stage: "Stage") -> None:
    """The denoiser fine-tuned on the loss of its networks; validation data say which of its weights are kept."""
    r = run.recipe
    pipeline = PDiffPipeline.from_pretrained(run.folder / names.PIPELINE).to(PartialState().device)
    if r.tune_map:
        pipeline.autoencoder.add_tuned_map()
    networks = NetworkRunner(run.base_model.to(PartialState().device), run.layout)
    args = tune_arguments(run)
    tuning = None
    if run.family is not None:
        model = generated_networks(run, pipeline, networks)
        with run.loop(stage.name) as loop:
            extra = _weight_loss(run, model.generator) if r.tune_weight_loss else None
            regime = make_regime(run, loop.accelerator, networks)
            history = regime.fit(model, args, "tuning", loop, extra_loss=extra)
    else:
        pipeline, tuning, history = _tune_for_task(run, stage, pipeline, networks)
    run.base_model.to("cpu")
    if not PartialState().is_main_process:
        return
    pipeline.to("cpu")
    for part in (pipeline.denoiser.eval(), pipeline.autoencoder, pipeline.condition_encoder):
        if part is not None:
            part.requires_grad_(True)
            part.register_to_config(_name_or_path="")  # the folder of this run would be published with it
    pipeline.register_to_config(_name_or_path="")
    with run.files.replacing(stage) as folder:
        pipeline.save_pretrained(folder)
        if tuning is not None:
            write_json(folder / names.TUNING, tuning.to_dict())
    run.finish(stage.name, history)


def load_tuning(folder: Path) -> Tuning | None:
    """How the pipeline in `folder` was tuned for its task; None where it was not."""
    path = folder / names.TUNING
    return Tuning.from_dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _tune_for_task(
    run: "Run", stage: "Stage", pipeline: PDiffPipeline, networks: NetworkRunner
) -> tuple[PDiffPipeline, Tuning, dict]:
    """
    Tunes once for each weight of diversity.

    Returns:
        `tuple`: The pipeline that is best on validation data, how it was tuned, and the history of that.
    """
    r, task, args = run.recipe, run.task, tune_arguments(run)
    assert isinstance(task, ClassificationTask)  # checked before any work
    device = PartialState().device
    unseen = validation_batch(task, device)
    results: list[tuple[float, float, PDiffPipeline, dict]] = []
    passes = 0
    with run.loop(stage.name) as loop:
        parts = loop.accelerator.num_processes * loop.accelerator.gradient_accumulation_steps
        for diversity in r.tune_diversity:
            objective = EnsembleObjective(r.tune_ensemble_size, diversity, r.tune_penalty)
            candidate = copy.deepcopy(pipeline)
            latents = DiffusionLatents(LatentGenerator(candidate.denoiser), candidate.scheduler, r.tune_inference_steps)
            model = TunedEnsembles(
                latents, candidate.autoencoder, networks, task.predict, objective, r.tune_models // parts
            )

            def validate(model: TunedEnsembles = model) -> float:
                noise = torch.Generator(device).manual_seed(named_seed(r.seed, "tune validation"))
                return model.validate(unseen, noise)

            history = tune(
                replace(loop, checkpoint_dir=Path(str(loop.checkpoint_dir), f"diversity-{diversity:g}")),
                model,
                single_task(task, args, device),
                len(task.load_split("train")),
                args,
                validate=validate,
                extra_loss=_weight_loss(run, latents.generator) if r.tune_weight_loss else None,
            )
            passes += training_passes(len(history["losses"]), r.tune_models, r.tune_batch_size)
            passes += len(history["steps"]) * model.num_networks * len(unseen["labels"])
            lowest = min((loss for loss in history["validation_losses"] if loss is not None), default=math.inf)
            results.append((lowest, diversity, candidate, history))
    _, diversity, chosen, history = min(results, key=lambda result: result[0])
    objective = EnsembleObjective(r.tune_ensemble_size, diversity, r.tune_penalty)
    tuning = Tuning(objective, args.num_steps, r.tune_models, r.tune_batch_size, passes)
    tried = {f"{weight:g}": loss for loss, weight, _, _ in results}
    return chosen, tuning, history | {"diversity": diversity, "validation_loss_of_diversity": tried}


def _weight_loss(run: "Run", generator: LatentGenerator) -> Callable[[torch.Generator], torch.Tensor]:
    """The denoiser's own loss on the snapshots that generators see, weighted."""
    r, device = run.recipe, PartialState().device
    latents = run.latents[run.seen].to(device)
    table = run.snapshot_conditions[run.seen].to(device) if run.fields else None
    scheduler = make_training_scheduler(r.num_train_timesteps, r.prediction_type)
    encoder = generator.encoder

    def loss(noise: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(latents), (r.denoiser_batch_size,), generator=noise, device=device)
        known = None
        if encoder is not None and table is not None:
            known = encoder.complete(table[rows], torch.rand(len(rows), generator=noise, device=device))
        return r.tune_weight_loss * denoising_loss(generator, scheduler, latents[rows], noise, known)

    return loss
