"""What the stages of a run work on: settings, a family of tasks, a folder, and what earlier stages have left."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator, PartialState
from torch import nn
from transformers import TrainerCallback

from .. import __version__
from ..layout import ParameterLayout
from ..models import ParameterAutoencoder, encode_in_batches
from ..models.condition import Condition, Fields
from ..networks.adapters import without_wrapper
from ..pipelines import PDiffPipeline
from ..selection import fit_layout, select_layout
from ..snapshots import load_snapshots, parameter_matrix
from ..snapshots.dataset import condition_columns, condition_table, load_fields
from ..tasks import Task, check_head
from ..tasks.data_task import DataTask
from ..tasks.family import Family, as_family
from ..tasks.task import SPLITS
from ..training import Loop, LoopArguments
from ..utils import names
from ..utils.errors import resource_errors
from ..utils.seeds import named_seed
from ..utils.source import source_digests
from .config import PDiffConfig
from .folder import SOURCE, RunError, RunFolder, Stage
from .settings import SECTIONS

CURVE = 24  # tasks along a field, for a figure


class RunContext:
    """
    What stages work on. What earlier stages have left is loaded when it is asked for.

    Args:
        config (`PDiffConfig`): What the stages are to do.
        task (`Task` or `Family`): What the networks are for; a task is the only member of its own family.
        stages (`Mapping[str, Stage]`): The table of stages, in the order of execution.
        extra_groups (`Callable`, *optional*): `extra_groups(context, compared)` gives further groups of networks for
            the report, `Group`s of the evaluation, beside what is `compared`: a `SingleTask`, `Members` or `Sets`. Its
            name is a setting of the stage `evaluate`.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Are told how trainings go.
    """

    def __init__(
        self,
        config: PDiffConfig,
        task: Task | Family,
        stages: Mapping[str, Stage],
        extra_groups: Callable | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.extra_groups, self.callbacks = extra_groups, callbacks
        self.config, self.family, self.stages = config.changed(), as_family(task), stages
        self.folder = Path(config.output_dir or f"outputs/{config.title}")
        self.files = RunFolder(self.folder)
        self.config.output_dir = str(self.folder)
        self.config.imported = config.snapshots is None and self.is_imported
        self.config._of_data = isinstance(self.task, DataTask)
        self.config.conditional = (self.is_imported and bool(self.fields)) or bool(getattr(self.task, "fields", ()))

    @cached_property
    def task(self) -> Task:
        """All seen tasks as one, which the base model is trained on."""
        return self.family.mixture(self.conditions["train"])

    # ---- stages and their records

    def settings(self, name: str) -> dict[str, Any]:
        """Everything that the outcome of a stage follows from: runs that have it in common can share the stage."""
        settings = stage_settings(self.config, name, self.stages) | self._task_settings
        if getattr(self.task, "start", "") == "meta":  # is learned for what is selected
            settings |= {"select": self.config.select, "exclude": self.config.exclude}
        if name == "evaluate" and self.extra_groups is not None:
            settings["extra_groups"] = self.extra_groups.__name__
        elif name == "evaluate" and (record := self.files.record(self.stages[name])) is not None:
            known = record["settings"]  # a report with further groups serves whoever asks for none
            settings = known if settings | {"extra_groups": known.get("extra_groups")} == known else settings
        return settings

    @cached_property
    def _task_settings(self) -> dict[str, Any]:
        """What tells the task and its data from others."""
        task = type(self.task)
        name = f"{Path(task.__module__).name}.{task.__qualname__}"  # the module of a file is named for its path
        data = {f"{split} data": self.task.fingerprint(split) for split in SPLITS}
        return {"task_class": name, "pdiff_hf": __version__} | data | self._sources

    @cached_property
    def _sources(self) -> dict[str, str]:
        """Digests of the source of your own classes, and of what they import beside them."""
        digests = [source_digests(cls) for cls in dict.fromkeys(self.family.source_classes())]
        return {f"{SOURCE}{file}": digest for found in digests for file, digest in found.items()}

    @property
    def scores(self) -> Path:
        """The folder of scores that are kept; those of an edited class of yours are no longer used."""
        sources = json.dumps(self._sources, sort_keys=True).encode()
        name = hashlib.blake2b(sources, digest_size=8).hexdigest() if self._sources else ""
        return self.folder / names.SCORES / name

    def is_finished(self, name: str) -> bool:
        """Whether the stage has a result that belongs to the settings."""
        return self.files.is_finished(self.stages[name], self.settings(name))

    def is_wanted(self, name: str) -> bool:
        """Whether the run has the stage at all."""
        return self.stages[name].is_wanted(self.config)

    def finish(self, stage: Stage, results: dict[str, Any]) -> None:
        """Records that the stage has its result."""
        self.files.finish(stage, self.settings(stage.name), results)

    def describe(self, stage: Stage) -> str:
        """What the stage does in this run, for people."""
        about = (self.family.fields and stage.about_family) or stage.about
        known = {"tune_steps": self.config.num_tune_steps, "num_snapshots": self.num_snapshots}
        known |= {"baseline_models": self.config.num_models} if self.config.is_of_data else {}
        return about.format(**vars(self.config) | known)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second run out of the folder; for the main process alone."""
        with self.files.lock() if PartialState().is_main_process else contextlib.nullcontext():
            yield

    def resource_errors(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Says how to go on where disk or memory run out."""
        return resource_errors(
            what,
            self.folder,
            "what is finished and the last checkpoint are kept; go on with --resume_from_checkpoint latest",
            "Use a smaller batch size or more --gradient_accumulation_steps, with --overwrite_output_dir, which begins "
            "anew what depends on them. Or make memory free",
        )

    # ---- training

    @contextlib.contextmanager
    def loop(self, stage: Stage) -> Iterator[Loop]:
        """Where the training of a stage runs."""
        c = self.config
        resume = c.resume_from_checkpoint is not None
        if PartialState().is_main_process:
            self.files.open_checkpoints(stage, self.settings(stage.name), resume)
        seed, checkpoints = named_seed(c.seed, f"{stage.name} training"), self.files.checkpoints(stage)
        with self.accelerator() as accelerator:
            yield Loop(accelerator, seed, checkpoints, c.checkpointing_steps, resume, self.callbacks, stage.name)

    @contextlib.contextmanager
    def accelerator(self) -> Iterator[Accelerator]:
        """A fresh one for each training, because an `Accelerator` saves all that it has ever prepared."""
        c = self.config
        accelerator = Accelerator(
            mixed_precision=c.mixed_precision,
            gradient_accumulation_steps=c.gradient_accumulation_steps,
            step_scheduler_with_optimizer=False,
            log_with=c.report_to,
            project_dir=str(self.folder / names.LOGS),
        )
        if c.report_to is not None:
            settings = c.section(*SECTIONS.values())
            loggable = {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
            accelerator.init_trackers("pdiff_hf", config=loggable)
        try:
            yield accelerator
        finally:
            if c.report_to is not None:
                accelerator.end_training()

    # ---- what stages left

    @cached_property
    def conditions(self) -> dict[str, torch.Tensor]:
        """
        The conditions of the seen (`train`), validation and unseen (`test`) tasks, of the family's own sets of unseen
        tasks, and of tasks along a field, by the name of that field: tables of shape `(T, width)`. Those of snapshots
        from elsewhere are in none of them but `train`.
        """
        c, family = self.config, self.family
        sizes = {"train": c.num_tasks, "validation": c.num_validation_tasks, "test": c.num_test_tasks}
        sizes |= dict.fromkeys(family.test_sets, c.num_test_tasks)
        without: list[Hashable] = []
        if family.fields and self.is_imported:
            without = [family.key(condition) for condition in self.fields.conditions(self.seen_conditions)]
        found = family.split(sizes, named_seed(c.seed, "tasks"), without=without)
        field, curve = family.curve(CURVE)
        found |= {field: curve} if curve else {}
        return {name: family.fields.table(conditions) for name, conditions in found.items()}

    @property
    def unseen_tasks(self) -> set[Hashable]:
        """The keys of all tasks that are kept for validation and tests."""
        tables = [table for name, table in self.conditions.items() if name != "train"]
        return {self.family.key(condition) for table in tables for condition in self.family.fields.conditions(table)}

    @property
    def is_imported(self) -> bool:
        """Whether the snapshots come from elsewhere."""
        record = self.files.record(self.stages["collect"])
        return self.config.snapshots is not None or (record is not None and "imported_from" in record["results"])

    @cached_property
    def fields(self) -> Fields:
        """
        Of the conditions of the snapshots; none if they have no conditions.

        Raises:
            RunError: if they are not those of the family, or of the data.
        """
        return self.checked_fields(load_fields(self.config.snapshots or self.folder / names.SNAPSHOTS))

    def checked_fields(self, fields: Fields) -> Fields:
        """Those of some snapshots, in the family's order; see `fields`."""
        family, base = self.family, getattr(self.family, "base", None)
        have = f"the snapshots have conditions with the fields {fields or 'none'}, and"
        if family.fields and fields != family.fields:
            raise RunError(f"{have} {type(family).__name__} has {family.fields}")
        if isinstance(base, DataTask) and fields and fields != base.fields:  # without conditions they fit any data
            raise RunError(
                f"{have} the data {base.fields or 'none'}: give both the same fields and words, as with task_args: "
                "{condition_columns: [...]}"
            )
        return family.fields or fields

    @cached_property
    def snapshot_conditions(self) -> torch.Tensor:
        """The conditions of all snapshots, a table of shape `(K, width)`, NaN where a field is unknown."""
        return condition_table(self.snapshots[0], self.fields)

    @cached_property
    def seen_columns(self) -> Sequence[Condition]:
        """The conditions of the snapshots that generators see."""
        return condition_columns(self.snapshots[0].select(self.seen.tolist()), self.fields)

    @property
    def seen_alternatives(self) -> torch.Tensor:
        """The same with all ways to say them: shape `(N, K, width)`."""
        return self.fields.alternatives(self.seen_columns)

    def known_snapshots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The snapshots without unknown fields, shape `(N, D)`, and their conditions, shape `(N, width)`."""
        known = self.fields.known(self.snapshot_conditions).all(1)
        return self.parameters[known], self.snapshot_conditions[known]

    @property
    def seen_conditions(self) -> torch.Tensor:
        """The different conditions of the snapshots, without those with unknown fields, shape `(T, width)`."""
        table = self.snapshot_conditions
        return table[self.fields.known(table).all(1)].unique(dim=0)

    @cached_property
    def layout(self) -> ParameterLayout:
        """The tensors that are generated."""
        model = self.base_model if self.is_finished("base") else without_wrapper(self.task.load_base_model())
        check_head(self.task, is_trained=self.config.base_epochs > 0)
        if self.config.snapshots is None:
            statistics = self.config.batch_norm_statistics == "generated"
            return select_layout(model, self.config.select, self.config.exclude, batch_norm_statistics=statistics)
        return fit_layout(self.snapshots[1], model)

    @cached_property
    def base_model(self) -> nn.Module:
        """What the stage base has saved, in eval mode."""
        return self.task.load_saved(self.folder / names.BASE_MODEL).eval()

    @cached_property
    def snapshots(self) -> tuple[datasets.Dataset, ParameterLayout]:
        """The parameter data set and its layout."""
        return load_snapshots(self.config.snapshots or self.folder / names.SNAPSHOTS)

    @cached_property
    def parameters(self) -> torch.Tensor:
        """All snapshots, shape `(K, D)`; where they are large they stay in their file."""
        return parameter_matrix(*self.snapshots)

    @property
    def num_snapshots(self) -> int:
        """K, also before they are collected."""
        if self.config.snapshots is not None:
            return len(self.snapshots[0])
        return len(self.task.load_split("train")) if self.config.is_of_data else self.config.num_snapshots

    @cached_property
    def heldout(self) -> torch.Tensor:
        """
        Which snapshots no generator sees, bool of shape `(K,)`: those of held-out data, where the data set says which
        these are, or some at equal distances.
        """
        if "heldout" in self.snapshots[0].column_names:
            return torch.tensor(self.snapshots[0]["heldout"][:]) > 0
        heldout = torch.zeros(len(self.parameters), dtype=torch.bool)
        count = round(len(heldout) * self.config.heldout_snapshots)
        heldout[torch.linspace(0, len(heldout) - 1, count + 2)[1:-1].round().long()] = True
        return heldout

    @property
    def data(self) -> torch.Tensor:
        """Of snapshots that are data: which of those of the splits train and test each is, shape `(K,)`."""
        return torch.tensor(self.snapshots[0]["datum"][:]).long()

    @property
    def seen(self) -> torch.Tensor:
        """Indices of the snapshots that generators see."""
        return torch.nonzero(~self.heldout).flatten()

    @cached_property
    def autoencoder(self) -> ParameterAutoencoder:
        """What the stage autoencoder has saved."""
        autoencoder = ParameterAutoencoder.from_pretrained(self.folder / names.AUTOENCODER).eval()
        autoencoder.register_to_config(_name_or_path="")  # this folder's name would be saved with the pipeline
        return autoencoder

    @cached_property
    @torch.no_grad()
    def latents(self) -> torch.Tensor:
        """The latents of all snapshots, shape `(K, L)`."""
        return encode_in_batches(self.autoencoder, self.parameters)

    @cached_property
    def pipeline(self) -> PDiffPipeline:
        """What the stage denoiser has saved, or the stage tune."""
        pipeline = PDiffPipeline.from_pretrained(
            self.folder / (names.TUNED if self.is_wanted("tune") else names.PIPELINE)
        )
        pipeline.register_to_config(**self.config.sampling)
        pipeline.set_progress_bar_config(desc="sampling", leave=False)
        return pipeline


def stages_before(name: str, stages: Mapping[str, Stage]) -> list[str]:
    """All stages that a stage follows from, in the order of execution."""
    found: set[str] = set()
    pending = {name}
    while pending:
        pending = {need for stage in pending for need in stages[stage].needs}
        found |= pending
    return [stage for stage in stages if stage in found]


def stage_settings(config: PDiffConfig, name: str, stages: Mapping[str, Stage]) -> dict[str, Any]:
    """All of the settings that the outcome of a stage follows from, apart from its task and its data."""
    sections = [section for stage in (*stages_before(name, stages), name) for section in stages[stage].sections]
    keys = ("seed", "mixed_precision", "gradient_accumulation_steps")
    settings = {key: getattr(config, key) for key in keys} | config.section(*sections)
    return json.loads(json.dumps(settings))


def loop_arguments(
    config: PDiffConfig, stage: str, num_steps: int, kind: type[LoopArguments] = LoopArguments, **more: Any
) -> Any:
    """Of a training, by the settings that begin with the name of its stage."""
    batch_size, learning_rate = (getattr(config, f"{stage}_{name}") for name in ("batch_size", "learning_rate"))
    return kind(num_steps, batch_size, learning_rate, **more)
