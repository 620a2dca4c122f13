"""The stage that tunes a generator on the task, or the family of tasks, of its networks."""

import copy
import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import nn

from ..evaluation.opponents import Regime
from ..networks.adapters import adapter_config
from ..networks.runner import NetworkRunner
from ..pipelines import PDiffPipeline
from ..tasks import ClassificationTask
from ..training import make_training_scheduler
from ..training.denoiser import LatentGenerator, denoising_loss
from ..training.ensembles import (
    EnsembleObjective,
    TunedEnsembles,
    Tuning,
    validation_batch,
)
from ..training.tune import (
    GeneratedNetworks,
    TaskBatches,
    TuneArguments,
    fresh_tasks,
    seen_tasks,
    single_task,
    tune,
)
from ..utils import names
from ..utils.files import write_json
from ..utils.seeds import named_seed
from .context import RunContext
from .folder import Stage

logger = logging.getLogger(__name__)


def tune_denoiser(context: RunContext, stage: Stage) -> None:
    """The denoiser fine-tuned on the loss of its networks; validation data say which of its weights are kept."""
    c = context.config
    pipeline = PDiffPipeline.from_pretrained(context.folder / names.PIPELINE).to(PartialState().device)
    if c.tune_args.map:
        pipeline.autoencoder.add_tuned_map()
    networks = NetworkRunner(context.base_model.to(PartialState().device), context.layout)
    args = tune_arguments(context)
    tuning = None
    if context.family.fields:
        model = generated_networks(context, pipeline, networks)
        with context.loop(stage) as loop:
            extra = _weight_loss(context, model.generator) if c.tune_args.weight_loss else None
            regime = make_regime(context, loop.accelerator, networks)
            history = keep_better(
                model,
                lambda: regime.scorer.score("validation", model).values.mean().item(),
                lambda: regime.fit(model, args, "tuning", loop, extra_loss=extra),
            ) | _choose_rank(context, regime, model)
    else:
        pipeline, tuning, history = _tune_for_task(context, stage, pipeline, networks)
    context.base_model.to("cpu")
    if not PartialState().is_main_process:
        return
    pipeline.to("cpu")
    for part in (pipeline.denoiser.eval(), pipeline.autoencoder, pipeline.condition_encoder):
        if part is not None:
            part.requires_grad_(True)
            part.register_to_config(_name_or_path="")  # the folder of this run would be published with it
    pipeline.register_to_config(_name_or_path="")
    with context.files.replacing(stage) as folder:
        pipeline.save_pretrained(folder)
        if tuning is not None:
            write_json(folder / names.TUNING, tuning.to_dict())
    context.finish(stage, history)


def keep_better(model: nn.Module, accuracy: Callable[[], float], fit: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """
    What `fit`, which trains `model` on a loss, returns, with the accuracies before and after. Where the one before is
    higher, the weights are those from before: networks without a clue have a lower loss than good ones that are too
    sure of themselves.
    """
    start, before = copy.deepcopy(model.state_dict()), accuracy()
    results, after = fit(), accuracy()
    if after < before:
        model.load_state_dict(start)
        logger.warning(
            "tuning lowered the loss on validation tasks, but also the accuracy, from %.2f to %.2f %%. The weights "
            "stay as they were; another tune_learning_rate or more tune_steps may help",
            before,
            after,
        )
    return results | {"validation_accuracies": [before, after]}


def _choose_rank(context: RunContext, regime: Regime, model: GeneratedNetworks) -> dict:
    """Cuts adapters of a rank that was made higher to their own if their loss on validation tasks is no higher then."""
    task: Any = getattr(context.family, "base", None)
    autoencoder = model.autoencoder
    rank = getattr(task, "adapter_rank", None)
    if rank is None or autoencoder.products is None:
        return {}
    losses = {}
    for autoencoder.products.most in (adapter_config(task.adapter)["r"], rank):
        losses[autoencoder.products.most] = regime.scorer.loss(model)
    autoencoder.products.most = min(losses, key=lambda one: losses[one])
    autoencoder.register_to_config(adapter_rank=autoencoder.products.most)
    return {"adapter_rank": autoencoder.products.most, "validation_loss_of_rank": losses}


def load_tuning(folder: Path) -> Tuning | None:
    """How the pipeline in `folder` was tuned for its task; None where it was not."""
    path = folder / names.TUNING
    return Tuning.from_dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _tune_for_task(
    context: RunContext, stage: Stage, pipeline: PDiffPipeline, networks: NetworkRunner
) -> tuple[PDiffPipeline, Tuning, dict]:
    """
    Tunes once for each weight of diversity.

    Returns:
        `tuple`: The pipeline that is best on validation data, how it was tuned, and the history of that.
    """
    c, task, args = context.config, context.task, tune_arguments(context)
    assert isinstance(task, ClassificationTask)  # checked before any work
    device = PartialState().device
    unseen = validation_batch(task, device)
    results: list[tuple[float, float, PDiffPipeline, dict]] = []
    passes = 0
    with context.loop(stage) as loop:
        parts = loop.accelerator.num_processes * loop.accelerator.gradient_accumulation_steps
        for diversity in c.tune_args.diversity:
            objective = EnsembleObjective(c.tune_args.ensemble_size, diversity, c.tune_args.penalty)
            candidate = copy.deepcopy(pipeline)
            generated = generated_networks(context, candidate, networks)
            model = TunedEnsembles(generated, objective, c.tune_models // parts)

            def validate(model: TunedEnsembles = model) -> float:
                noise = torch.Generator(device).manual_seed(named_seed(c.seed, "tune validation"))
                return model.validate(unseen, noise)

            history = tune(
                replace(loop, checkpoint_dir=Path(str(loop.checkpoint_dir), f"diversity-{diversity:g}")),
                model,
                single_task(task, args, device),
                len(task.load_split("train")),
                args,
                validate=validate,
                extra_loss=_weight_loss(context, generated.generator) if c.tune_args.weight_loss else None,
            )
            passes += 3 * len(history["losses"]) * c.tune_models * c.tune_batch_size
            passes += len(history["steps"]) * model.num_networks * len(unseen["labels"])
            lowest = min((loss for loss in history["validation_losses"] if loss is not None), default=math.inf)
            results.append((lowest, diversity, candidate, history))
    _, diversity, chosen, history = min(results, key=lambda result: result[0])
    objective = EnsembleObjective(c.tune_args.ensemble_size, diversity, c.tune_args.penalty)
    tuning = Tuning(objective, args.num_steps, c.tune_models, c.tune_batch_size, passes)
    tried = {f"{weight:g}": loss for loss, weight, _, _ in results}
    return chosen, tuning, history | {"diversity": diversity, "validation_loss_of_diversity": tried}


def _weight_loss(context: RunContext, generator: LatentGenerator) -> Callable[[torch.Generator], torch.Tensor]:
    """The denoiser's own loss on the snapshots that generators see, weighted."""
    c, device = context.config, PartialState().device
    latents = context.latents[context.seen].to(device)
    table = context.snapshot_conditions[context.seen].to(device) if context.fields else None
    scheduler = make_training_scheduler(c.denoiser_args.num_train_timesteps, c.prediction_type)
    encoder = generator.encoder

    def loss(noise: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(latents), (c.denoiser_batch_size,), generator=noise, device=device)
        known = None
        if encoder is not None and table is not None:
            known = encoder.complete(table[rows], torch.rand(len(rows), generator=noise, device=device))
        return c.tune_args.weight_loss * denoising_loss(generator, scheduler, latents[rows], noise, known)

    return loss


def tune_arguments(context: RunContext) -> TuneArguments:
    c = context.config
    return TuneArguments(
        num_steps=c.num_tune_steps or 0,
        learning_rate=c.tune_learning_rate,
        num_tasks=c.tune_models,
        num_examples=c.tune_batch_size,
        validate_every=max(1, (c.num_tune_steps or 0) // (10 if context.family.fields else 5)),
    )


def make_regime(context: RunContext, accelerator: Accelerator, networks: NetworkRunner) -> Regime:
    """Which tasks the recipe allows to train on."""
    c, family = context.config, context.family
    unseen = context.unseen_tasks
    seen, told = context.seen_conditions, context.seen_alternatives  # (T, width), (N, K, width)
    if told.shape[1] > 1:  # with K ways to say what a task is
        seen = told[~told.flatten(1).isnan().any(1)].unique(dim=0)

    def batches(args: TuneArguments) -> TaskBatches:
        if c.tune_tasks == "fresh":
            return fresh_tasks(family, args, unseen, accelerator.device)
        return seen_tasks(family, args, seen, accelerator.device, condition_noise=c.tune_args.condition_noise)

    return Regime(
        family,
        networks,
        accelerator,
        batches,
        len(seen),
        context.conditions["validation"],
        c.seed,
    )


def generated_networks(context: RunContext, pipeline: PDiffPipeline, networks: NetworkRunner) -> GeneratedNetworks:
    """The generator of a pipeline, followed by the networks that it gives, to be tuned."""
    predict = context.task.predict  # type: ignore[attr-defined]  # of classification, which is checked before any work
    return GeneratedNetworks(
        LatentGenerator(pipeline.denoiser, pipeline.condition_encoder),
        pipeline.autoencoder,
        pipeline.scheduler,
        context.config.tune_args.inference_steps,
        networks,
        predict,
    )
