"""The stage that tunes a generator on the task, or the family of tasks, of its networks."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState

from ..networks.stacked import StackedNetworks
from ..pipelines import PDiffPipeline
from ..tasks import ClassificationTask
from ..training import make_training_scheduler
from ..training.denoiser import denoising_loss
from ..training.tune import GeneratedNetworks, TuneArguments, single_task, tune
from ..utils import names
from ..utils.seeds import named_seed
from .families import generated_networks, make_regime, tune_arguments

if TYPE_CHECKING:
    from .folder import Stage
    from .run import Run

# Of each network, when tuning is validated.
VALIDATION_EXAMPLES = 200


def tune_denoiser(run: "Run", stage: "Stage") -> None:
    """The denoiser fine-tuned on the loss of its networks; validation data say which of its weights are kept."""
    r = run.recipe
    pipeline = PDiffPipeline.from_pretrained(run.folder / names.PIPELINE).to(PartialState().device)
    if r.tune_map:
        pipeline.autoencoder.add_tuned_map()
    networks = StackedNetworks(run.base_model.to(PartialState().device), run.layout)
    model, args = generated_networks(run, pipeline, networks), tune_arguments(run)
    loop = run.loop(stage.name, num_steps=args.num_steps, batch_size=r.tune_models, learning_rate=r.tune_learning_rate)
    del loop["args"]
    with run.accelerator() as accelerator:
        extra = _weight_loss(run, model, accelerator) if r.tune_weight_loss else None
        if run.family is not None:
            regime = make_regime(run, accelerator, networks)
            history = regime.fit(model, args, "tuning", extra_loss=extra, **loop)
        else:
            assert isinstance(run.task, ClassificationTask)  # checked before any work
            device = accelerator.device
            history = tune(
                accelerator,
                model,
                single_task(run.task, args, device),
                len(run.task.load_split("train")),
                args,
                validate=_validation(run, run.task, model, args),
                extra_loss=extra,
                **loop,
            )
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
    run.finish(stage.name, history)


def _validation(
    run: "Run", task: ClassificationTask, model: GeneratedNetworks, args: TuneArguments
) -> Callable[[], float]:
    """The mean loss of networks on validation data, always with the same noise and examples."""
    device = PartialState().device
    unseen = single_task(task, replace(args, num_examples=VALIDATION_EXAMPLES), device, "validation")

    @torch.no_grad()
    def validate() -> float:
        generator = torch.Generator(device).manual_seed(named_seed(run.recipe.seed, "tune validation"))
        _, batch = unseen(torch.arange(run.recipe.tune_models), generator)
        logits = model(None, batch, generator)  # (N, B, C)
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item()

    return validate


def _weight_loss(
    run: "Run", model: GeneratedNetworks, accelerator: Accelerator
) -> Callable[[torch.Generator], torch.Tensor]:
    """The denoiser's own loss on the snapshots that generators see, weighted."""
    r, device = run.recipe, accelerator.device
    latents = run.latents[run.seen].to(device)
    table = None if run.fields is None else run.snapshot_conditions[run.seen].to(device)
    scheduler = make_training_scheduler(r.num_train_timesteps, r.prediction_type)
    encoder = model.generator.encoder

    def loss(noise: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(latents), (r.denoiser_batch_size,), generator=noise, device=device)
        known = None
        if encoder is not None and table is not None:
            known = encoder.complete(table[rows], torch.rand(len(rows), generator=noise, device=device))
        return r.tune_weight_loss * denoising_loss(model.generator, scheduler, latents[rows], noise, known)

    return loss
