"""What the stages of a run have left in its folder, loaded when it is asked for."""

from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn

from ..layout import ParameterLayout
from ..models import ParameterAutoencoder, encode_in_batches
from ..networks.adapters import without_wrapper
from ..pipelines import PDiffPipeline
from ..selection import fit_layout, select_layout
from ..snapshots import load_snapshots, parameter_matrix
from ..tasks import Task, check_head
from ..tasks.task import Split
from ..utils import names
from .folder import RunFolder
from .recipe import Recipe
from .stages import STAGES, stage_settings

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class RunResults:
    """
    The finished stages of a run, and what they have left.

    Args:
        recipe (`Recipe`): What the stages were to do.
        task (`Task`): What the networks are for.
    """

    def __init__(self, recipe: Recipe, task: Task):
        self.recipe, self.task = recipe, task
        self.folder = Path(recipe.output_dir)
        self.files = RunFolder(self.folder)

    @cached_property
    def _task_settings(self) -> dict[str, Any]:
        """What tells the task and its data from others."""
        task = type(self.task)
        name = f"{Path(task.__module__).name}.{task.__qualname__}"  # the module of a file is named for its path
        return {"task_class": name} | {f"{split} data": self.task.fingerprint(split) for split in SPLITS}

    def settings(self, stage: str) -> dict[str, Any]:
        """Everything that the outcome of a stage follows from."""
        return stage_settings(self.recipe, stage) | self._task_settings

    def is_finished(self, stage: str) -> bool:
        """Whether the stage has a result that belongs to the recipe."""
        return self.files.is_finished(STAGES[stage], self.settings(stage))

    def finish(self, stage: str, results: dict[str, Any]) -> None:
        """Records that the stage has its result."""
        self.files.finish(STAGES[stage], self.settings(stage), results)

    @cached_property
    def layout(self) -> ParameterLayout:
        """The tensors that are generated."""
        model = self.base_model if self.is_finished("base") else without_wrapper(self.task.load_base_model())
        check_head(self.task, is_trained=self.recipe.base_epochs > 0)
        if self.recipe.snapshots is None:
            statistics = self.recipe.batch_norm_statistics == "generated"
            return select_layout(model, self.recipe.select, self.recipe.exclude, batch_norm_statistics=statistics)
        return fit_layout(self.snapshots[1], model)

    @cached_property
    def base_model(self) -> nn.Module:
        """What the stage base has saved, in eval mode."""
        return self.task.load_saved(self.folder / names.BASE_MODEL).eval()

    @cached_property
    def snapshots(self) -> tuple[datasets.Dataset, ParameterLayout]:
        """The parameter data set and its layout."""
        return load_snapshots(self.recipe.snapshots or self.folder / names.SNAPSHOTS)

    @cached_property
    def parameters(self) -> torch.Tensor:
        """All snapshots, shape `(K, D)`; where they are large they stay in their file."""
        return parameter_matrix(*self.snapshots)

    @cached_property
    def heldout(self) -> torch.Tensor:
        """Which snapshots no generator sees, bool of shape `(K,)`: some, at equal distances."""
        heldout = torch.zeros(len(self.parameters), dtype=torch.bool)
        count = round(len(heldout) * self.recipe.heldout_snapshots)
        heldout[torch.linspace(0, len(heldout) - 1, count + 2)[1:-1].round().long()] = True
        return heldout

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
        """What the stage denoiser has saved."""
        pipeline = PDiffPipeline.from_pretrained(self.folder / names.PIPELINE)
        pipeline.set_progress_bar_config(desc="sampling", leave=False)
        return pipeline
