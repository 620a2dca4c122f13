"""The stages of a run, each of which can be carried out alone, resumed, and reused."""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from filelock import FileLock, Timeout
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.models.timm_wrapper import TimmWrapperConfig

from .checkpoints import CollectArguments, collect_snapshots, load_snapshots, parameter_matrix, train_base_model
from .evaluation.report import evaluate, write_report
from .evaluation.scoring import Scorer
from .loop import LoopArguments, derive_seed
from .models import AUTOENCODER_PRESETS, DENOISER_PRESETS, ParameterAutoencoder
from .parameters import ParameterLayout, select_parameters
from .pipelines import PDiffPipeline
from .recipe import (
    AutoencoderSection,
    BaseSection,
    CollectSection,
    DenoiserSection,
    EvaluateSection,
    Recipe,
    TaskSection,
)
from .tasks import ImageClassificationTask
from .training import NoiseArguments, make_training_scheduler, reconstruct, train_autoencoder, train_denoiser

logger = logging.getLogger(__name__)

# What each stage depends on. A stage also depends on all stages before it.
SETTINGS = {
    "base": (TaskSection, BaseSection),
    "collect": (CollectSection,),
    "autoencoder": (AutoencoderSection,),
    "denoiser": (DenoiserSection,),
    "evaluate": (EvaluateSection,),
}
FOLDERS = {
    "base": "base_model",
    "collect": "snapshots",
    "autoencoder": "autoencoder",
    "denoiser": "pipeline",
    "evaluate": "evaluation",
}


class RunError(ValueError):
    """A run cannot be carried out as asked; nothing was changed."""


class Run:
    """
    A run in its output folder. Finished stages are reused as long as their settings are the same.

    Args:
        recipe (`Recipe`): What to do.

    Raises:
        RunError: if a finished stage has other settings, and `overwrite_output_dir` is not set.
        ValueError: for everything in the recipe that can be seen to be wrong before any work is done.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.folder = Path(recipe.output_dir)
        if self.folder.exists() and not self.folder.is_dir():
            raise RunError(f"output_dir '{self.folder}' is a file")
        self._check()

    @cached_property
    def task(self) -> ImageClassificationTask:
        r = self.recipe
        return ImageClassificationTask(
            model=r.model,
            dataset=r.dataset,
            image_size=r.image_size or None,
            model_args=json.loads(r.model_args),
            holdout_fraction=r.holdout_fraction,
            max_train_samples=r.max_train_samples,
            max_eval_samples=r.max_eval_samples,
        )

    @cached_property
    def layout(self) -> ParameterLayout:
        model = self.base_model if self.is_finished("base") else self.task.load_base_model()
        return ParameterLayout.from_state_dict(
            model.state_dict(), select_parameters(model, self.recipe.select, self.recipe.exclude)
        )

    def _check(self) -> None:
        """Everything that can be known to fail is found out here."""
        r = self.recipe
        if r.latent_dim > self.layout.num_parameters:
            raise RunError(
                f"latent_dim is {r.latent_dim}, but only {self.layout.num_parameters} parameters are selected; a "
                "latent cannot be longer than the vector"
            )
        if round(r.num_snapshots * (1 - r.heldout_fraction)) < 2:
            raise RunError(f"num_snapshots={r.num_snapshots} leaves fewer than 2 snapshots to train on")
        if r.num_inference_steps > r.num_train_timesteps:
            raise RunError(
                f"num_inference_steps is {r.num_inference_steps}, more than the {r.num_train_timesteps} steps of training"
            )
        for stage in ("autoencoder", "denoiser"):
            parts = r.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", 1))
            if getattr(r, f"{stage}_batch_size") % parts:
                raise RunError(
                    f"{stage}_batch_size={getattr(r, f'{stage}_batch_size')} cannot be cut into {parts} equal parts "
                    "(processes × gradient_accumulation_steps)"
                )
        for stage in SETTINGS:
            record = self._record(stage)
            if record is not None and record["settings"] != self._settings(stage) and not r.overwrite_output_dir:
                difference = _difference(record["settings"], self._settings(stage))
                raise RunError(
                    f"'{self.folder}' holds a run with other settings ({difference}"
                    "); choose another --output_dir, or carry the changed stages out again with --overwrite_output_dir"
                )

    # ------------------------------------------------------------------------------------------- bookkeeping of stages

    def _settings(self, stage: str) -> dict:
        r = self.recipe
        settings = {
            "seed": r.seed,
            "mixed_precision": r.mixed_precision,
            "gradient_accumulation_steps": r.gradient_accumulation_steps,
        }
        for name, sections in SETTINGS.items():
            settings |= r.section(*sections)
            if name == stage:
                return json.loads(json.dumps(settings))
        raise KeyError(stage)

    def _record_path(self, stage: str) -> Path:
        return self.folder / "stages" / f"{stage}.json"

    def _record(self, stage: str) -> dict | None:
        path = self._record_path(stage)
        return json.loads(path.read_text()) if path.is_file() else None

    def is_finished(self, stage: str) -> bool:
        record = self._record(stage)
        return (
            record is not None
            and record["settings"] == self._settings(stage)
            and (self.folder / FOLDERS[stage]).is_dir()
        )

    def _finish(self, stage: str, results: dict) -> None:
        write_json(self._record_path(stage), {"settings": self._settings(stage), "results": results})
        shutil.rmtree(self._checkpoint_dir(stage), ignore_errors=True)

    def _checkpoint_dir(self, stage: str) -> Path:
        return self.folder / "checkpoints" / stage

    def _loop(self, stage: str, **kwargs) -> dict:
        """What the training stages have in common, as arguments."""
        r = self.recipe
        if r.resume_from_checkpoint is None:
            shutil.rmtree(self._checkpoint_dir(stage), ignore_errors=True)
        return {
            "args": LoopArguments(
                checkpointing_steps=r.checkpointing_steps, checkpoints_total_limit=r.checkpoints_total_limit, **kwargs
            ),
            "seed": derive_seed(r.seed, list(SETTINGS).index(stage)),
            "checkpoint_dir": self._checkpoint_dir(stage),
            "resume": r.resume_from_checkpoint is not None,
        }

    @contextlib.contextmanager
    def _accelerator(self) -> Iterator[Accelerator]:
        """A fresh one for each training, because an `Accelerator` saves all that it has ever prepared."""
        r = self.recipe
        accelerator = Accelerator(
            mixed_precision=r.mixed_precision,
            gradient_accumulation_steps=r.gradient_accumulation_steps,
            step_scheduler_with_optimizer=False,
            log_with=r.report_to,
            project_dir=str(self.folder / "logs"),
        )
        if r.report_to is not None:
            accelerator.init_trackers("pdiff_hf", config={k: _loggable(v) for k, v in dataclasses.asdict(r).items()})
        try:
            yield accelerator
        finally:
            if r.report_to is not None:
                accelerator.end_training()
            accelerator.free_memory()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second run out of the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                yield
        except Timeout as error:
            raise RunError(
                f"another run is at work in '{self.folder}'; choose another --output_dir, or wait"
            ) from error

    def carry_out(self) -> None:
        """All stages that the recipe asks for and that are not finished yet, in order."""
        self.recipe.save(self.folder / "recipe.yaml")
        stages = {
            "base": self.train_base,
            "collect": self.collect,
            "autoencoder": self.train_autoencoder,
            "denoiser": self.train_denoiser,
            "evaluate": self.evaluate,
        }
        earlier: list[str] = []
        for stage, function in stages.items():
            if stage in self.recipe.stages:
                missing = [name for name in earlier if not self.is_finished(name)]
                if missing:
                    raise RunError(
                        f"stage {stage} needs {', '.join(missing)} first, which '{self.folder}' does not have"
                    )
                if self.is_finished(stage):
                    logger.info("%s: finished before, reused", stage)
                else:
                    function()
            earlier.append(stage)

    # ------------------------------------------------------------------------------------------------------ the stages

    def train_base(self) -> None:
        r = self.recipe
        torch.manual_seed(derive_seed(r.seed, 100))
        model = self.task.load_base_model()
        results = {}
        if r.base_epochs:
            steps = max(1, r.base_epochs * len(self.task.load_split("train")) // r.base_batch_size)
            with self._accelerator() as accelerator:
                losses = train_base_model(
                    accelerator,
                    self.task,
                    model,
                    **self._loop(
                        "base",
                        num_steps=steps,
                        batch_size=r.base_batch_size,
                        learning_rate=r.base_learning_rate,
                        weight_decay=r.base_weight_decay,
                    ),
                )
            results["losses"] = losses.tolist()
        model = model.to("cpu").eval()
        with _replacing(self.folder / FOLDERS["base"]) as folder:
            model.save_pretrained(folder)
            if not isinstance(model.config, TimmWrapperConfig):
                AutoImageProcessor.from_pretrained(r.model).save_pretrained(folder)
        self._finish("base", results)

    @cached_property
    def base_model(self) -> PreTrainedModel:
        return AutoModelForImageClassification.from_pretrained(self.folder / FOLDERS["base"]).eval()

    def collect(self) -> None:
        r = self.recipe
        target = self.folder / FOLDERS["collect"]
        shutil.rmtree(target, ignore_errors=True)
        with self._accelerator() as accelerator:
            collect_snapshots(
                accelerator,
                self.task,
                self.base_model,
                self.layout,
                target,
                CollectArguments(
                    num_snapshots=r.num_snapshots,
                    optimizer=r.collect_optimizer,
                    learning_rate=r.collect_learning_rate,
                    weight_decay=r.collect_weight_decay,
                    batch_size=r.collect_batch_size,
                ),
                seed=derive_seed(r.seed, 1),
            )
        self.base_model.to("cpu")
        self._finish("collect", {})

    @cached_property
    def snapshots(self) -> tuple[datasets.Dataset, ParameterLayout]:
        return load_snapshots(self.folder / FOLDERS["collect"])

    @cached_property
    def parameters(self) -> torch.Tensor:
        """All snapshots, shape `(K, D)`."""
        return parameter_matrix(*self.snapshots)

    @cached_property
    def heldout(self) -> torch.Tensor:
        """Which snapshots no generator sees, shape `(K,)`: every n-th of the run."""
        heldout = torch.zeros(len(self.parameters), dtype=torch.bool)
        count = round(len(heldout) * self.recipe.heldout_fraction)
        heldout[torch.linspace(0, len(heldout) - 1, count + 2)[1:-1].round().long()] = True
        return heldout

    def train_autoencoder(self) -> None:
        r = self.recipe
        with self._accelerator() as accelerator:
            autoencoder, losses = train_autoencoder(
                accelerator,
                self.parameters[~self.heldout],
                self.layout,
                noise=NoiseArguments(parameter_noise=r.parameter_noise, latent_noise=r.latent_noise),
                latent_dim=r.latent_dim,
                **AUTOENCODER_PRESETS[r.autoencoder_preset],
                **self._loop(
                    "autoencoder",
                    num_steps=r.autoencoder_steps,
                    batch_size=r.autoencoder_batch_size,
                    learning_rate=r.autoencoder_learning_rate,
                    lr_warmup_steps=r.autoencoder_warmup_steps,
                ),
            )
        with _replacing(self.folder / FOLDERS["autoencoder"]) as folder:
            autoencoder.save_pretrained(folder)
        self._finish("autoencoder", {"losses": losses.tolist()})

    @cached_property
    def autoencoder(self) -> ParameterAutoencoder:
        return ParameterAutoencoder.from_pretrained(self.folder / FOLDERS["autoencoder"]).eval()

    def train_denoiser(self) -> None:
        r = self.recipe
        scheduler = make_training_scheduler(r.num_train_timesteps)
        with self._accelerator() as accelerator:
            denoiser, losses = train_denoiser(
                accelerator,
                self.autoencoder,
                self.parameters[~self.heldout],
                scheduler=scheduler,
                **DENOISER_PRESETS[r.denoiser_preset],
                **self._loop(
                    "denoiser",
                    num_steps=r.denoiser_steps,
                    batch_size=r.denoiser_batch_size,
                    learning_rate=r.denoiser_learning_rate,
                    lr_warmup_steps=r.denoiser_warmup_steps,
                    max_grad_norm=r.max_grad_norm,
                    ema_decay=r.ema_decay,
                ),
            )
        pipeline = PDiffPipeline(
            self.autoencoder, denoiser, make_sampling_scheduler(scheduler), base_model=self.base_model
        )
        with _replacing(self.folder / FOLDERS["denoiser"]) as folder:
            pipeline.save_pretrained(folder)
        self._finish("denoiser", {"losses": losses.tolist()})

    @cached_property
    def pipeline(self) -> PDiffPipeline:
        pipeline = PDiffPipeline.from_pretrained(self.folder / FOLDERS["denoiser"])
        pipeline.set_progress_bar_config(desc="sampling")
        return pipeline

    def evaluate(self) -> None:
        r = self.recipe
        pipeline = self.pipeline
        generated = pipeline(
            r.num_models,
            num_inference_steps=r.num_inference_steps,
            generator=torch.Generator().manual_seed(derive_seed(r.seed, 4)),
            output_type="pt",
        ).parameters
        reconstructed = reconstruct(self.autoencoder, self.parameters)
        report = evaluate(
            Scorer(self.task, self.base_model, self.layout, cache_dir=self.folder / "scores"),
            {
                "original": self.parameters,
                "ensemble": self.parameters.mean(0, keepdim=True),
                "reconstructed": reconstructed,
                "generated": generated,
            },
            heldout=self.heldout,
        )
        with _replacing(self.folder / FOLDERS["evaluate"]) as folder:
            write_report(report, folder)
        self._finish("evaluate", {})


def make_sampling_scheduler(scheduler: DDPMScheduler) -> DPMSolverMultistepScheduler:
    """The scheduler that a pipeline is saved with: DPM-Solver++, which needs 20 steps where DDPM needs 1000."""
    return DPMSolverMultistepScheduler.from_config(
        scheduler.config, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )


def write_json(path: str | os.PathLike, values) -> None:
    """Under a temporary name first, so that the file is always whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
    part.rename(path)


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` when the block ends without an exception."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _difference(old: dict, new: dict) -> str:
    changed = [f"{key}: {old.get(key)!r} there, {new[key]!r} asked for" for key in new if old.get(key) != new[key]]
    return "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")


def _loggable(value):
    return value if isinstance(value, int | float | str | bool) else str(value)
