"""The stage that tunes a generator on the task of its networks."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from accelerate import PartialState

from ..networks.stacked import StackedNetworks
from ..pipelines import PDiffPipeline
from ..tasks import ClassificationTask
from ..training.denoiser import LatentGenerator
from ..training.tune import GeneratedNetworks, TuneArguments, single_task, tune
from ..utils import names
from ..utils.seeds import named_seed

if TYPE_CHECKING:
    from .folder import Stage
    from .run import Run

# Of each network, when tuning is validated.
VALIDATION_EXAMPLES = 200


def tune_denoiser(run: "Run", stage: "Stage") -> None:
    """The denoiser fine-tuned on the loss of its networks; validation data say which of its weights are kept."""
    r, task = run.recipe, run.task
    assert isinstance(task, ClassificationTask)  # checked before any work
    pipeline = PDiffPipeline.from_pretrained(run.folder / names.PIPELINE)
    device = PartialState().device
    args = TuneArguments(
        num_steps=r.tune_steps,
        learning_rate=r.tune_learning_rate,
        num_tasks=r.tune_models,
        num_examples=r.tune_batch_size,
        validate_every=max(1, r.tune_steps // 5),
        checkpointing_steps=r.checkpointing_steps,
    )
    model = GeneratedNetworks(
        LatentGenerator(pipeline.denoiser),
        pipeline.autoencoder.to(device),
        pipeline.scheduler,
        r.tune_inference_steps,
        StackedNetworks(run.base_model.to(device), run.layout),
        task.predict,
    )
    unseen = single_task(task, replace(args, num_examples=VALIDATION_EXAMPLES), device, "validation")

    @torch.no_grad()
    def validate() -> float:
        generator = torch.Generator(device).manual_seed(named_seed(r.seed, "tune validation"))
        _, batch = unseen(torch.arange(r.tune_models), generator)
        logits = model(None, batch, generator)  # (N, B, C)
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item()

    loop = run.loop(stage.name, num_steps=r.tune_steps, batch_size=r.tune_models, learning_rate=r.tune_learning_rate)
    del loop["args"]
    with run.accelerator() as accelerator:
        history = tune(
            accelerator,
            model,
            single_task(task, args, device),
            len(task.load_split("train")),
            args,
            validate=validate,
            **loop,
        )
    run.base_model.to("cpu")
    if not PartialState().is_main_process:
        return
    pipeline.to("cpu")
    pipeline.denoiser.eval().requires_grad_(True)
    pipeline.autoencoder.requires_grad_(True)
    for part in (pipeline, pipeline.denoiser, pipeline.autoencoder):
        part.register_to_config(_name_or_path="")  # the folder of this run would be saved, and published, with it
    with run.files.replacing(stage) as folder:
        pipeline.save_pretrained(folder)
    run.finish(stage.name, history)
