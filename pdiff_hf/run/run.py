"""A run: what it is made of, and its stages in order."""

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from accelerate import Accelerator, PartialState

from ..tasks import Task
from ..training import Loop
from ..utils import names
from ..utils.errors import resource_errors
from ..utils.files import replacing
from ..utils.seeds import named_seed
from .checks import check_run
from .folder import RunError
from .processes import check_shared, lost_processes, start_processes
from .recipe import SECTIONS, Recipe
from .results import RunResults
from .stages import STAGES, stages_before
from .task import make_family, make_task
from .terminal import duration

logger = logging.getLogger(__name__)


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


class Run(RunResults):
    """
    A run in its output folder. Finished stages are reused as long as their settings are the same.

    Args:
        recipe (`Recipe`): What to do.
        task (`Task`, *optional*): A task of your own, in place of the one that the recipe describes.
        extra_groups (`Callable`, *optional*): Further groups of the report; see [`RunResults`].

    Raises:
        RunError: if a finished stage has other settings, and `overwrite_output_dir` is not set.
        ValueError: for everything in the recipe that can be seen to be wrong before any work is done.
    """

    def __init__(self, recipe: Recipe, task: Task | None = None, extra_groups: Callable | None = None):
        start_processes()
        recipe = dataclasses.replace(recipe, mixed_precision=choose_precision(recipe.mixed_precision))
        recipe = recipe if task is not None else recipe.with_dataset()
        task = make_task(recipe) if task is None else task
        super().__init__(recipe, task, make_family(recipe, task), extra_groups)
        check_run(self)

    @contextlib.contextmanager
    def loop(self, stage: str) -> Iterator[Loop]:
        """Where the training of a stage runs."""
        r = self.recipe
        resume = r.resume_from_checkpoint is not None
        if PartialState().is_main_process:
            self.files.open_checkpoints(STAGES[stage], self.settings(stage), resume)
        with self.accelerator() as accelerator:
            yield Loop(
                accelerator,
                named_seed(r.seed, f"{stage} training"),
                self.files.checkpoints(STAGES[stage]),
                r.checkpointing_steps,
                r.checkpoints_total_limit,
                resume,
            )

    @contextlib.contextmanager
    def accelerator(self) -> Iterator[Accelerator]:
        """A fresh one for each training, because an `Accelerator` saves all that it has ever prepared."""
        r = self.recipe
        accelerator = Accelerator(
            mixed_precision=r.mixed_precision,
            gradient_accumulation_steps=r.gradient_accumulation_steps,
            step_scheduler_with_optimizer=False,
            log_with=r.report_to,
            project_dir=str(self.folder / names.LOGS),
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
        with self.files.lock() if PartialState().is_main_process else contextlib.nullcontext():
            yield

    def execute(self) -> None:
        """
        Executes all stages that the recipe asks for and that are not finished yet, in order. Networks are trained on
        all processes; the main one does the rest, and alone writes to the folder.

        Raises:
            RunError: if a stage is missing, the processes have no folder in common, or one of them is lost.
        """
        with lost_processes():
            self._execute()

    def _execute(self) -> None:
        state = PartialState()
        check_shared(self.folder)
        if state.is_main_process:
            with self.resource_errors(names.RECIPE), replacing(self.folder / names.RECIPE) as path:
                self.recipe.save(path)
            for name in filter(self.is_finished, STAGES):
                self.files.clean_up(STAGES[name])
        wanted = [STAGES[name] for name in STAGES if name in self.recipe.stages and STAGES[name].is_wanted(self.recipe)]
        seconds: dict[str, float] = {}
        for number, stage in enumerate(wanted, start=1):
            heading = f"[{number}/{len(wanted)}] {stage.name}"
            # A process that is ahead must not look for what another one is still writing.
            state.wait_for_everyone()
            needed = [name for name in stages_before(stage.name) if STAGES[name].is_wanted(self.recipe)]
            missing = [name for name in needed if not self.is_finished(name)]
            finished = self.is_finished(stage.name)
            state.wait_for_everyone()
            if missing:
                raise RunError(
                    f"stage {stage.name} needs {', '.join(missing)} first, which '{self.folder}' does not have"
                )
            if finished:
                logger.info("%s: finished before, reused", heading)
                continue
            logger.info("%s: %s", heading, stage.describe(self.recipe))
            start = time.perf_counter()
            with self.resource_errors(f"stage {stage.name}"):
                stage.execute(self)
            seconds[stage.name] = time.perf_counter() - start
            logger.info("%s: done in %s", heading, duration(seconds[stage.name]))
        if len(seconds) > 1:
            parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
            logger.info("all stages: %s (%s)", duration(sum(seconds.values())), parts)

    def resource_errors(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Says how to go on where disk or memory run out."""
        return resource_errors(
            what,
            self.folder,
            "what is finished and the last checkpoint are kept; go on with --resume_from_checkpoint latest",
            "Use a smaller batch size or more --gradient_accumulation_steps, with --overwrite_output_dir, which begins "
            "anew what depends on them. Or make memory free",
        )


def _loggable(value: Any) -> int | float | str | bool:
    return value if isinstance(value, int | float | str | bool) else str(value)
