"""The stages of a run, each of which can be carried out alone, resumed, and reused."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, ModelMixin
from filelock import FileLock, Timeout
from torch import nn
from transformers import PreTrainedModel

from ..evaluation.baselines import standard_baselines
from ..evaluation.generator import evaluate_generator
from ..evaluation.measured import Measurer
from ..evaluation.scoring import Scorer
from ..layout import ParameterLayout
from ..models import DENOISER_PRESETS, ParameterAutoencoder, autoencoder_architecture
from ..networks.adapters import without_wrapper
from ..networks.batched import BatchedModels
from ..pipelines import PDiffPipeline
from ..selection import fit_layout, select_layout
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
from ..snapshots.frozen import FrozenCheck
from ..tasks import (
    ClassificationTask,
    ImageClassificationTask,
    ImageGenerationTask,
    MeasuredTask,
    ObjectDetectionTask,
    SemanticSegmentationTask,
    Task,
    TextClassificationTask,
)
from ..training import NoiseArguments, make_training_scheduler, train_autoencoder, train_denoiser
from ..training.loop import LoopArguments
from ..utils.errors import explaining
from ..utils.files import part_of, remove, replacing, write_json
from ..utils.seeds import derive_seed
from .recipe import (
    SECTIONS,
    STAGES,
    AutoencoderSection,
    BaseSection,
    CollectSection,
    DenoiserSection,
    EvaluateSection,
    Recipe,
    TaskSection,
)

logger = logging.getLogger(__name__)

# What each stage depends on. A stage also depends on all stages before it.
SETTINGS = {
    "base": (TaskSection, BaseSection),
    "collect": (CollectSection,),
    "autoencoder": (AutoencoderSection,),
    "vae": (),
    "denoiser": (DenoiserSection,),
    "evaluate": (EvaluateSection,),
}
FOLDERS = {
    "base": "base_model",
    "collect": "snapshots",
    "autoencoder": "autoencoder",
    "vae": "vae",
    "denoiser": "pipeline",
    "evaluate": "evaluation",
}


class RunError(ValueError):
    """A run cannot be carried out as asked; nothing was changed."""


def start_processes() -> PartialState:
    """
    What the processes of a run have in common; the first call in a program makes it. The main process collects
    snapshots alone, for which the others wait longer than they do by default.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(weeks=4))


class Run:
    """
    A run in its output folder. Finished stages are reused as long as their settings are the same.

    Args:
        recipe (`Recipe`): What to do.
        task (`Task`, *optional*): A task of your own, in place of the one that the recipe describes.

    Raises:
        RunError: if a finished stage has other settings, and `overwrite_output_dir` is not set.
        ValueError: for everything in the recipe that can be seen to be wrong before any work is done.
    """

    def __init__(self, recipe: Recipe, task: Task | None = None):
        start_processes()
        self.recipe = recipe
        self.task = make_task(recipe) if task is None else task
        self.folder = Path(recipe.output_dir)
        if self.folder.exists() and not self.folder.is_dir():
            raise RunError(f"output_dir '{self.folder}' is a file")
        self._check()

    @cached_property
    def layout(self) -> ParameterLayout:
        model = self.base_model if self.is_finished("base") else without_wrapper(self.task.load_base_model())
        if self.recipe.snapshots is None:
            statistics = self.recipe.batch_norm_statistics == "generated"
            return select_layout(model, self.recipe.select, self.recipe.exclude, batch_norm_statistics=statistics)
        return fit_layout(self.snapshots[1], model)

    def _check(self) -> None:
        """Everything that can be known to fail is found out here."""
        r = self.recipe
        if r.latent_dim > self.layout.num_parameters:
            raise RunError(
                f"latent_dim is {r.latent_dim}, but only {self.layout.num_parameters} parameters are selected; a "
                "latent cannot be longer than the vector"
            )
        num_snapshots = r.num_snapshots if r.snapshots is None else len(self.snapshots[0])
        if round(num_snapshots * (1 - r.heldout_fraction)) < 2:
            raise RunError(f"{num_snapshots} snapshots leave fewer than 2 to train on")
        if r.num_inference_steps > r.num_train_timesteps:
            raise RunError(
                f"num_inference_steps is {r.num_inference_steps}, more than num_train_timesteps={r.num_train_timesteps}"
            )
        for stage in ("autoencoder", "denoiser"):
            parts = r.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", 1))
            if getattr(r, f"{stage}_batch_size") % parts:
                raise RunError(
                    f"{stage}_batch_size={getattr(r, f'{stage}_batch_size')} cannot be cut into {parts} equal parts "
                    "(processes × gradient_accumulation_steps)"
                )
        if r.push_to_hub and "denoiser" not in r.stages and not self.is_finished("denoiser"):
            raise RunError("push_to_hub needs a finished generator, which the chosen stages do not make")
        for stage in SETTINGS:
            record = self._record(stage)
            if record is not None and record["settings"] != self._settings(stage) and not r.overwrite_output_dir:
                difference = _difference(record["settings"], self._settings(stage))
                raise RunError(
                    f"'{self.folder}' holds a run with other settings ({difference}"
                    "); choose another --output_dir, or carry the changed stages out again with --overwrite_output_dir"
                )
            path = self._checkpoint_dir(stage) / "settings.json"
            if r.resume_from_checkpoint is not None and not r.overwrite_output_dir and path.is_file():
                settings = _read(path)
                if settings != self._settings(stage):
                    raise RunError(
                        f"the checkpoints of stage {stage} in '{self.folder}' are those of a run with other settings "
                        f"({_difference(settings, self._settings(stage))}); go on with those, or begin the stage anew "
                        "without --resume_from_checkpoint"
                    )
        if not isinstance(self.task, ClassificationTask | MeasuredTask):
            raise RunError(
                f"{type(self.task).__name__} must be a ClassificationTask or a MeasuredTask: it has to say how "
                "networks are judged"
            )
        classifies = isinstance(self.task, ClassificationTask)
        if r.hyper_representations and not classifies:
            raise RunError("hyper_representations chooses networks by their accuracy, which only classifiers have")
        if classifies and "evaluate" in r.stages and not self.is_finished("evaluate"):
            model = self.base_model if self.is_finished("base") else without_wrapper(self.task.load_base_model())
            count = 2 * num_snapshots + 1 + r.num_models + (len(standard_baselines()) + 1) * r.baseline_models
            count += 3 * r.num_models * r.hyper_representations
            for split in ("validation", "test"):
                Scorer(self.task, model, self.layout).check_memory(split, count)

    # ------------------------------------------------------------------------------------------- bookkeeping of stages

    def _settings(self, stage: str) -> dict:
        return stage_settings(self.recipe, stage)

    def _record_path(self, stage: str) -> Path:
        return self.folder / "stages" / f"{stage}.json"

    def _record(self, stage: str) -> dict | None:
        path = self._record_path(stage)
        return _read(path) if path.is_file() else None

    def is_finished(self, stage: str) -> bool:
        record = self._record(stage)
        return (
            record is not None
            and record["settings"] == self._settings(stage)
            and ((self.folder / FOLDERS[stage]).is_dir() or (stage == "collect" and self.recipe.snapshots is not None))
        )

    def _finish(self, stage: str, results: dict) -> None:
        write_json(self._record_path(stage), {"settings": self._settings(stage), "results": results})
        remove(self._checkpoint_dir(stage))

    @contextlib.contextmanager
    def _replacing(self, stage: str) -> Iterator[Path]:
        """
        A new folder for the result of a stage. The record of an older result goes before that does, so that there is
        never a record beside what it does not describe.
        """
        with replacing(self.folder / FOLDERS[stage]) as folder:
            folder.mkdir()
            yield folder
            remove(self._record_path(stage))

    def _checkpoint_dir(self, stage: str) -> Path:
        return self.folder / "checkpoints" / stage

    def _loop(self, stage: str, **kwargs) -> dict:
        """What the training stages have in common, as arguments."""
        r = self.recipe
        if PartialState().is_main_process:
            path = self._checkpoint_dir(stage) / "settings.json"
            if r.resume_from_checkpoint is None or not path.is_file() or _read(path) != self._settings(stage):
                remove(self._checkpoint_dir(stage))
                write_json(path, self._settings(stage))
        return {
            "args": LoopArguments(
                checkpointing_steps=r.checkpointing_steps, checkpoints_total_limit=r.checkpoints_total_limit, **kwargs
            ),
            "seed": derive_seed(r.seed, (*STAGES, "vae").index(stage)),
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
            settings = r.without_secrets(*SECTIONS)
            accelerator.init_trackers("pdiff_hf", config={k: _loggable(v) for k, v in settings.items()})
        try:
            yield accelerator
        finally:
            if r.report_to is not None:
                accelerator.end_training()
            accelerator.free_memory()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second run out of the folder; for the main process alone."""
        if not PartialState().is_main_process:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                yield
        except Timeout as error:
            raise RunError(
                f"another run is at work in '{self.folder}'; choose another --output_dir, or wait"
            ) from error

    def carry_out(self) -> None:
        """
        All stages that the recipe asks for and that are not finished yet, in order. Networks are trained on all
        processes; the main one does the rest, and alone writes to the folder.
        """
        state = PartialState()
        if state.is_main_process:
            with self._explaining("recipe.yaml"), replacing(self.folder / "recipe.yaml") as path:
                self.recipe.save(path)
            for stage in filter(self.is_finished, SETTINGS):  # what a kill left
                remove(self._checkpoint_dir(stage))
                remove(part_of(self.folder / FOLDERS[stage]))
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
                # A process that is ahead must not look for what another one is still writing.
                state.wait_for_everyone()
                missing = [name for name in earlier if not self.is_finished(name)]
                finished = self.is_finished(stage)
                state.wait_for_everyone()
                if missing:
                    raise RunError(
                        f"stage {stage} needs {', '.join(missing)} first, which '{self.folder}' does not have"
                    )
                if finished:
                    logger.info("%s: finished before, reused", stage)
                else:
                    with self._explaining(f"stage {stage}"):
                        function()
            earlier.append(stage)

    def _explaining(self, what: str) -> contextlib.AbstractContextManager[None]:
        return explaining(
            what,
            self.folder,
            "what is finished and the last checkpoint are kept; go on with --resume_from_checkpoint latest",
            "Use a smaller batch size or more --gradient_accumulation_steps, with --overwrite_output_dir, which begins "
            "anew what depends on them. Or make memory free",
        )

    # ------------------------------------------------------------------------------------------------------ the stages

    def train_base(self) -> None:
        r = self.recipe
        torch.manual_seed(derive_seed(r.seed, 100))
        model = without_wrapper(self.task.load_base_model())
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
        if not PartialState().is_main_process:
            return
        model = model.to("cpu").eval()
        with self._replacing("base") as folder:
            self.task.save_base_model(model, folder)
        self._finish("base", results)

    @cached_property
    def base_model(self) -> nn.Module:
        return self.task.load_saved(self.folder / FOLDERS["base"]).eval()

    def collect(self) -> None:
        r = self.recipe
        if not PartialState().is_main_process:
            return
        if r.snapshots is not None:  # they stay where they are
            self._finish("collect", {"num_snapshots": len(self.snapshots[0]), "barrier": self._check_basins()})
            return
        with self._accelerator() as accelerator, self._replacing("collect") as target:
            target.rmdir()
            collect_snapshots(
                accelerator,
                self.task,
                self.base_model,
                self.layout,
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
                seed=derive_seed(r.seed, 1),
            )
        self.base_model.to("cpu")
        self._finish("collect", {"barrier": self._check_basins()})

    def import_snapshots(self, paths: Sequence[str], align: bool = False) -> None:
        """
        Takes the place of the stage collect: snapshots from files, as `import_snapshots` reads them, and with `align`,
        reordered as `align_snapshots` does.
        """
        if self._record("collect") is not None and not self.recipe.overwrite_output_dir:
            raise RunError(
                f"'{self.folder}' has snapshots already; choose another --output_dir, or replace them with "
                "--overwrite_output_dir"
            )
        if align:  # an error, if they cannot be, comes before the files are read
            find_hidden_units(self.task, self.base_model, self.layout)
        check = FrozenCheck(self.base_model, self.layout, require_same=self.recipe.require_same_frozen)
        with self._explaining("import"), self._replacing("collect") as folder:
            folder.rmdir()
            import_snapshots(paths, self.layout, folder, check=check)
            if align:
                self._align(folder)
        self._finish(
            "collect",
            {
                "imported_from": [str(path) for path in paths],
                "aligned": align,
                "frozen": check.report(self.task),
                "barrier": self._check_basins(),
            },
        )

    def _align(self, folder: Path) -> None:
        """Replaces the parameter data set `folder` by an aligned one."""
        dataset, layout = load_snapshots(folder)
        seeds, steps = dataset["seed"][:], dataset["step"][:]
        aligned = align_snapshots(self.task, self.base_model, layout, parameter_matrix(dataset, layout))
        remove(folder)
        with SnapshotWriter(folder, layout) as writer:
            for row, seed, step in zip(aligned, seeds, steps, strict=True):
                writer.write(row, seed=seed, step=step)

    def _check_basins(self) -> dict | None:
        """Warns of snapshots that one generator can hardly learn; see `check_basins`. For classifiers."""
        if not isinstance(self.task, ClassificationTask):
            return None
        dataset = self.snapshots[0]
        models = BatchedModels(self.base_model.to(PartialState().device), self.layout)
        # Data sets from elsewhere may have the parameters alone.
        seeds, steps = (
            dataset[name][:] if name in dataset.column_names else [0] * len(dataset) for name in ("seed", "step")
        )
        barrier = check_basins(self.task, models, self.parameters, seeds, steps)
        self.base_model.to("cpu")
        return barrier

    @cached_property
    def snapshots(self) -> tuple[datasets.Dataset, ParameterLayout]:
        return load_snapshots(self.recipe.snapshots or self.folder / FOLDERS["collect"])

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

    @property
    def seen(self) -> torch.Tensor:
        """The snapshots that generators see; not a copy if they see all."""
        return self.parameters[~self.heldout] if self.heldout.any() else self.parameters

    def train_autoencoder(self) -> None:
        r = self.recipe
        noise = NoiseArguments(parameter_noise=r.parameter_noise, latent_noise=r.latent_noise)
        self._train_autoencoder("autoencoder", noise=noise)

    def _train_autoencoder(self, stage: str, **kwargs) -> None:
        r = self.recipe
        with self._accelerator() as accelerator:
            autoencoder, losses = train_autoencoder(
                accelerator,
                self.seen,
                self.layout,
                latent_dim=r.latent_dim,
                architecture=autoencoder_architecture(r.autoencoder_preset, self.layout.num_parameters, r.token_size),
                normalization=r.normalization,
                **self._loop(
                    stage,
                    num_steps=r.autoencoder_steps,
                    batch_size=r.autoencoder_batch_size,
                    learning_rate=r.autoencoder_learning_rate,
                    lr_warmup_steps=r.autoencoder_warmup_steps,
                    max_grad_norm=r.max_grad_norm,
                ),
                **kwargs,
            )
        if not PartialState().is_main_process:
            return
        with self._replacing(stage) as folder:
            autoencoder.save_pretrained(folder)
        self._finish(stage, {"losses": losses.tolist()})

    @cached_property
    def autoencoder(self) -> ParameterAutoencoder:
        autoencoder = ParameterAutoencoder.from_pretrained(self.folder / FOLDERS["autoencoder"]).eval()
        autoencoder.register_to_config(_name_or_path="")  # this folder's name would be saved with the pipeline
        return autoencoder

    def train_denoiser(self) -> None:
        r = self.recipe
        scheduler = make_training_scheduler(r.num_train_timesteps)
        with torch.no_grad():  # the autoencoder is frozen, so every latent is computed once
            batches = self.seen.split(64)
            latents = torch.cat([self.autoencoder.encode(batch).latents for batch in batches])
        with self._accelerator() as accelerator:
            denoiser, losses = train_denoiser(
                accelerator,
                latents,
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
        if not PartialState().is_main_process:
            return
        # A network of no library that can save it does not go with its generator.
        base_model = self.base_model if isinstance(self.base_model, PreTrainedModel | ModelMixin) else None
        pipeline = PDiffPipeline(self.autoencoder, denoiser, make_sampling_scheduler(scheduler), base_model=base_model)
        with self._replacing("denoiser") as folder:
            pipeline.save_pretrained(folder)
        self._finish("denoiser", {"losses": losses.tolist()})

    @cached_property
    def pipeline(self) -> PDiffPipeline:
        pipeline = PDiffPipeline.from_pretrained(self.folder / FOLDERS["denoiser"])
        pipeline.set_progress_bar_config(desc="sampling")
        return pipeline

    def train_vae(self) -> None:
        """The VAE of the paper's Table 8, a baseline: trained as the autoencoder is, but with the KL term."""
        noise = NoiseArguments(parameter_noise=self.recipe.parameter_noise, latent_noise=0.0)
        self._train_autoencoder("vae", noise=noise, kl_weight=1.0)

    def evaluate(self) -> None:
        r = self.recipe
        device = PartialState().device
        vae = None
        # A linear autoencoder with noise has no VAE beside it but the low-rank Gaussian, which is a baseline already.
        with_vae = r.baseline_models > 0 and r.autoencoder_preset != "pca"
        if with_vae and not self.is_finished("vae"):
            self.train_vae()
        classifies = isinstance(self.task, ClassificationTask)
        scorer = (Scorer if classifies else Measurer)(
            self.task, self.base_model.to(device), self.layout, cache_dir=self.folder / "scores"
        )
        if not PartialState().is_main_process:
            if classifies:  # what measures other networks is not shared between processes
                scorer.help()
            return
        if with_vae:
            generator = torch.Generator().manual_seed(derive_seed(r.seed, *b"vae"))
            autoencoder = ParameterAutoencoder.from_pretrained(self.folder / FOLDERS["vae"]).eval()
            vae = autoencoder.sample_prior(r.baseline_models, generator)
        helped = scorer.with_help() if classifies else contextlib.nullcontext()
        with self._replacing("evaluate") as folder, helped:
            evaluate_generator(
                scorer,
                self.parameters,
                self.pipeline.to(device),
                folder,
                heldout=self.heldout,
                num_models=r.num_models,
                num_inference_steps=r.num_inference_steps,
                baseline_models=r.baseline_models,
                hyper_representations=r.hyper_representations,
                vae=vae,
                losses=self._losses(),
                seed=r.seed,
            )
        self.base_model.to("cpu")
        self._finish("evaluate", {})

    def _losses(self) -> dict[str, dict[str, list[float]]]:
        """The losses of the networks that were trained, for a figure."""
        panels = {
            "base model": {"base": "base model"},
            "autoencoder": {"autoencoder": "autoencoder", "vae": "VAE, with its KL term"},
            "denoiser": {"denoiser": "denoiser"},
        }
        results = {stage: self._record(stage)["results"] for stage in SETTINGS if self.is_finished(stage)}
        losses = {
            title: {name: results[stage]["losses"] for stage, name in stages.items() if results.get(stage)}
            for title, stages in panels.items()
        }
        return {title: curves for title, curves in losses.items() if curves}


def stage_settings(recipe: Recipe, stage: str) -> dict:
    """Everything that the outcome of a stage follows from: two runs that have it in common have the stage in common."""
    settings = {
        "seed": recipe.seed,
        "mixed_precision": recipe.mixed_precision,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
    }
    for name, sections in SETTINGS.items():
        settings |= recipe.section(*sections)
        if name == stage:
            return json.loads(json.dumps(settings))
    raise KeyError(stage)


def make_task(recipe: Recipe, adapter: str | None = None) -> Task:
    """The task that a recipe describes; its model gets an adapter of PEFT, if there is one."""
    shared = {
        "model": recipe.model,
        "dataset": recipe.dataset,
        "holdout_fraction": recipe.holdout_fraction,
        "max_train_samples": recipe.max_train_samples,
        "max_eval_samples": recipe.max_eval_samples,
    }
    if recipe.task == "text_classification":
        return TextClassificationTask(**shared, max_length=recipe.max_length, adapter=adapter)
    shared |= {"image_size": recipe.image_size or None, "model_args": json.loads(recipe.model_args)}
    if recipe.task == "image_generation":
        return ImageGenerationTask(**shared, fid_features=recipe.fid_features)
    vision_tasks = {
        "image_classification": ImageClassificationTask,
        "object_detection": ObjectDetectionTask,
        "semantic_segmentation": SemanticSegmentationTask,
    }
    if adapter is not None:
        if recipe.task != "image_classification":
            raise ValueError(f"'{adapter}' is an adapter of PEFT, which networks for {recipe.task} cannot have")
        shared["adapter"] = adapter
    return vision_tasks[recipe.task](**shared)


def make_sampling_scheduler(scheduler: DDPMScheduler) -> DPMSolverMultistepScheduler:
    """The scheduler that a pipeline is saved with: DPM-Solver++, which needs 20 steps where DDPM needs 1000."""
    return DPMSolverMultistepScheduler.from_config(
        scheduler.config, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def _difference(old: dict, new: dict) -> str:
    changed = [f"{key}: {old.get(key)!r} there, {new[key]!r} asked for" for key in new if old.get(key) != new[key]]
    return "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")


def _loggable(value):
    return value if isinstance(value, int | float | str | bool) else str(value)
