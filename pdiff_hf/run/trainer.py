"""`PDiffTrainer`: from a task, snapshots and settings to a generator and its report."""

import dataclasses
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from transformers import TrainerCallback

from ..evaluation.report import Report
from ..hub.push import push_run_to_hub
from ..layout import ParameterLayout
from ..models.condition import Condition
from ..pipelines import PDiffPipeline
from ..selection import select_layout
from ..snapshots import SnapshotWriter, parameter_matrix
from ..tasks import Task
from ..tasks.family import Family
from ..utils import names
from ..utils.files import replacing
from .checks import check_run
from .config import PDiffConfig
from .context import RunContext, stages_before
from .folder import RunError
from .options import default_of
from .processes import check_shared, lost_processes, start_processes
from .settings import TaskSection
from .stages import STAGES
from .terminal import duration

logger = logging.getLogger(__name__)


class PDiffTrainer:
    """
    Trains a generator of networks, as `transformers.Trainer` trains a network.

    Args:
        task (`Task` or `Family`, *optional*): What the networks are for, such as a [`ModuleTask`]; by default what
            `args` describe. With a family in `args`, that family is over this task.
        snapshots (*optional*): Networks to learn from. A tensor of shape `(K, D)`, a sequence of state dicts, a
            `datasets.Dataset` of this package with its `layout`, or the folder or Hub id of one. By default the run
            collects its own, or takes those that `args` name.
        args (`PDiffConfig`, *optional*): All settings. Without an `output_dir`, the run lives in a temporary folder
            that goes with the trainer.
        layout (`ParameterLayout`, *optional*): Which tensors the rows of a tensor of snapshots are; by default those
            that `args.select` takes of the base model.
        conditions (`Sequence[Mapping]`, *optional*): Of each snapshot, with the fields of the family.
        callbacks (`Sequence[transformers.TrainerCallback]`, *optional*): Are told of `on_train_begin`, `on_step_end`,
            `on_log`, `on_save` and `on_train_end`, and may stop a stage's training with
            `control.should_training_stop`. What is trained comes as `stage`.

    Raises:
        RunError: if a finished stage in `args.output_dir` has other settings, and `overwrite_output_dir` is not set.
        ValueError: for everything that can be seen to be wrong before any work is done.

    Examples:

    ```py
    >>> import torch
    >>> from pdiff_hf import ModuleTask, PDiffConfig, PDiffTrainer

    >>> x = torch.randn(1000, 4)
    >>> y = (x.sum(1) > 0).long()
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> trainer = PDiffTrainer(ModuleTask(net, (x, y)), args=PDiffConfig(select=["all"], latent_dim=16))
    >>> pipe = trainer.train()
    >>> networks = pipe(num_models=5, output_type="model").parameters
    >>> report = trainer.evaluate()
    ```
    """

    def __init__(
        self,
        task: Task | Family | None = None,
        snapshots: Any = None,
        args: PDiffConfig | None = None,
        *,
        layout: ParameterLayout | None = None,
        conditions: Sequence[Condition] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        extra_groups: Callable | None = None,
    ):
        self.args, self.task, self.callbacks, self.extra_groups = args or PDiffConfig(), task, callbacks, extra_groups
        if self.args.output_dir is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="pdiff-")
            self.args = self.args.changed(output_dir=str(Path(self._temporary.name, "run")))
        if task is not None:
            for key in dataclasses.fields(TaskSection):
                if getattr(self.args, key.name) != default_of(key) and key.name not in self.args.soft:
                    raise ValueError(f"{key.name}={getattr(self.args, key.name)} has no effect: the task is given")
        if isinstance(task, Family):
            task.check()
        if isinstance(snapshots, str | os.PathLike):
            self.args, snapshots = self.args.changed(snapshots=os.fspath(snapshots)), None
        elif snapshots is not None:
            self.args, self.task = described(self.args, task)
            self.args = given_snapshots(self.task, snapshots, self.args, layout, conditions)
        if snapshots is None and (layout is not None or conditions is not None):
            raise ValueError("layout and conditions are those of snapshots in memory: pass them as snapshots=")
        self.context = prepare(self.args, self.task, self.extra_groups, self.callbacks)

    def train(self, resume_from_checkpoint: bool = False) -> PDiffPipeline:
        """
        Trains what is not finished yet, without the report.

        Args:
            resume_from_checkpoint (`bool`, *optional*, defaults to `False`): Continue an unfinished stage from its last
                checkpoint.
        """
        if resume_from_checkpoint:
            self.args = self.args.changed(resume_from_checkpoint="latest")
            self.context = prepare(self.args, self.task, self.extra_groups, self.callbacks)
        execute(self.context, [name for name in self.context.config.stages if name != "evaluate"])
        return self.pipeline

    def evaluate(self) -> Report:
        """The report on the generator."""
        execute(self.context, ["evaluate"])
        return Report.load(self.context.folder / names.EVALUATION)

    def push_to_hub(self, repo_id: str | None = None, **kwargs: Any) -> str:
        """Publishes the generator, with its report as the model card; see [`~pdiff_hf.hub.push.push_run_to_hub`]."""
        config = self.context.config
        arguments = {"private": config.hub_private_repo or None} | kwargs
        name = repo_id or config.hub_model_id or self.context.folder.name
        return push_run_to_hub(self.context.folder, name, **arguments)

    @property
    def pipeline(self) -> PDiffPipeline:
        """The finished generator, with the base model."""
        pipeline = self.context.pipeline
        if pipeline.base_model is None:  # of no library that could save it
            folder = names.generator_folder(self.context.folder)
            pipeline = PDiffPipeline.from_pretrained(folder, base_model=self.context.base_model)
        return pipeline


def given_snapshots(
    family: Family,
    snapshots: Any,
    config: PDiffConfig,
    layout: ParameterLayout | None,
    conditions: Sequence[Condition] | None,
) -> PDiffConfig:
    """
    Writes snapshots from memory to a parameter data set in the run's folder, named by what is in it.

    Returns:
        `PDiffConfig`: With that data set, and without the selection, which the data set has made.
    """
    if isinstance(snapshots, datasets.Dataset):
        if layout is None:
            raise ValueError("a data set of snapshots needs its layout: pass layout=, as load_snapshots returns it")
        names_of = [name for name in family.fields if name in snapshots.column_names]
        conditions = conditions or ([{n: row[n] for n in names_of} for row in snapshots] if names_of else None)
        rows = parameter_matrix(snapshots, layout)
    else:
        if layout is None:
            statistics = config.batch_norm_statistics == "generated"
            layout = select_layout(
                family.load_base_model(), config.select, config.exclude, batch_norm_statistics=statistics
            )
        is_tensor = isinstance(snapshots, torch.Tensor)
        rows = snapshots if is_tensor else torch.stack([layout.flatten(state) for state in snapshots])
    if rows.ndim != 2 or rows.shape[1] != layout.num_parameters:
        raise ValueError(
            f"snapshots must have shape (K, {layout.num_parameters}), as is selected, got {tuple(rows.shape)}"
        )
    given = list(conditions) if conditions is not None else [None] * len(rows)
    if len(given) != len(rows):
        raise ValueError(f"there are {len(rows)} snapshots and {len(given)} conditions")
    digest = hashlib.blake2b(repr((layout.to_dict(), given)).encode(), digest_size=6)
    digest.update(rows.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    folder = Path(config.output_dir or "", f"snapshots-{digest.hexdigest()}")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with SnapshotWriter(folder, layout, fields=family.fields if conditions is not None else None) as writer:
            for step, (row, condition) in enumerate(zip(rows, given, strict=True)):
                writer.write(row, step=step, seed=0, condition=condition)
    statistics_of = config.batch_norm_statistics if config.recomputes_statistics else "base"
    selection = {"select": PDiffConfig().select, "exclude": [], "batch_norm_statistics": statistics_of}
    return config.changed(snapshots=str(folder), **selection)


def choose_precision(asked_for: str | None) -> str:
    """
    The precision of training: as asked for, or else what Accelerate's launcher and configuration say.

    Raises:
        RunError: if this machine cannot train in it.
    """
    precision = asked_for or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "fp16", "bf16"):
        raise RunError(f"the launcher is set to mixed_precision={precision}; use no, fp16 or bf16")
    device = PartialState().device.type
    if precision == "fp16" and device == "cpu":
        raise RunError("mixed_precision=fp16 needs a GPU, and this run has a CPU; use bf16 or no")
    return precision


def described(config: PDiffConfig, task: Task | Family | None) -> tuple[PDiffConfig, Family]:
    """The family of tasks that a config describes, over `task` if it is given, and the config with it."""
    if task is None:
        config = config.with_dataset()
        task = config.make_task()
    if not isinstance(task, Family):
        return config, config.make_family(task)
    if task.fields and config.family is None:
        config = config.changed(family=f"{type(task).__module__}:{type(task).__qualname__}")
    return config, task


def prepare(
    config: PDiffConfig,
    task: Task | Family | None = None,
    extra_groups: Callable | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunContext:
    """
    What the stages of a run work on. Finished stages are reused as long as their settings are the same.

    Args:
        config (`PDiffConfig`): What to do.
        task (`Task` or `Family`, *optional*): Your own, in place of what `config` describes. With a family in
            `config`, that family is over this task.
        extra_groups (`Callable`, *optional*): Further groups of the report; see [`RunContext`].
        callbacks (`Sequence[transformers.TrainerCallback]`, *optional*): See [`PDiffTrainer`].

    Raises:
        RunError: if a finished stage has other settings, and `overwrite_output_dir` is not set.
        ValueError: for everything in the settings that can be seen to be wrong before any work is done.
    """
    start_processes()
    config = config.changed(mixed_precision=choose_precision(config.mixed_precision))
    config, family = described(config, task)
    context = RunContext(config, family, STAGES, extra_groups, callbacks)
    check_run(context)
    return context


def execute(context: RunContext, stages: Sequence[str] | None = None) -> None:
    """
    Executes all stages that the settings ask for and that are not finished yet, in order. Networks are trained on all
    processes; the main one does the rest, and alone writes to the folder.

    Args:
        stages (`Sequence[str]`, *optional*): These, in place of what the settings ask for.

    Raises:
        RunError: if a stage is missing, the processes have no folder in common, or one of them is lost.
    """
    with context.lock(), lost_processes():
        _execute(context, context.config.stages if stages is None else stages)


def _execute(context: RunContext, stages: Sequence[str]) -> None:
    state = PartialState()
    check_shared(context.folder)
    if state.is_main_process:
        with context.resource_errors(names.RECIPE), replacing(context.folder / names.RECIPE) as path:
            context.config.save(path)
        for name in filter(context.is_finished, context.stages):
            context.files.clean_up(context.stages[name])
    wanted = [name for name in context.stages if name in stages and context.is_wanted(name)]
    seconds: dict[str, float] = {}
    for number, name in enumerate(wanted, start=1):
        heading, stage = f"[{number}/{len(wanted)}] {name}", context.stages[name]
        # A process that is ahead must not look for what another one is still writing.
        state.wait_for_everyone()
        needed = filter(context.is_wanted, stages_before(name, context.stages))
        missing = [need for need in needed if not context.is_finished(need)]
        finished = context.is_finished(name)
        state.wait_for_everyone()
        if missing:
            raise RunError(f"stage {name} needs {', '.join(missing)} first, which '{context.folder}' does not have")
        if finished:
            logger.info("%s: already finished; reusing", heading)
            continue
        logger.info("%s: %s", heading, context.describe(stage))
        start = time.perf_counter()
        with context.resource_errors(f"stage {name}"):
            stage.execute(context, stage)
        seconds[name] = time.perf_counter() - start
        logger.info("%s: done in %s", heading, duration(seconds[name]))
    if len(seconds) > 1:
        parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
        logger.info("all stages: %s (%s)", duration(sum(seconds.values())), parts)
