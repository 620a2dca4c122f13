"""What the stages of a run have left in its folder, loaded when it is asked for."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn

from ..layout import ParameterLayout
from ..models import ParameterAutoencoder, encode_in_batches
from ..models.condition import Fields
from ..networks.adapters import without_wrapper
from ..pipelines import PDiffPipeline
from ..selection import fit_layout, select_layout
from ..snapshots import load_snapshots, parameter_matrix
from ..snapshots.dataset import condition_table, load_fields
from ..tasks import Task, check_head
from ..tasks.family import Family
from ..tasks.task import Split
from ..utils import names
from ..utils.seeds import named_seed
from .folder import RunError, RunFolder
from .recipe import Recipe
from .stages import STAGES, stage_settings

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
CURVE = 24  # tasks along a field, for a figure


class RunResults:
    """
    The finished stages of a run, and what they have left.

    Args:
        recipe (`Recipe`): What the stages were to do.
        task (`Task`): What the networks are for.
        family (`Family`, *optional*): Of tasks, which the networks are for in place of `task`.
        extra_groups (`Callable`, *optional*): `extra_groups(run, scorer)` gives further groups of networks for the
            report, `Group`s of the evaluation. Its name is a setting of the stage `evaluate`.
    """

    def __init__(self, recipe: Recipe, task: Task, family: Family | None = None, extra_groups: Callable | None = None):
        self.extra_groups = extra_groups
        self.recipe, self.family = recipe, family
        self.folder = Path(recipe.output_dir)
        self.files = RunFolder(self.folder)
        self.task = task if family is None else family.mixture(self.conditions["train"])

    @cached_property
    def conditions(self) -> dict[str, torch.Tensor]:
        """
        Of a family the conditions of its seen (`train`), validation and unseen (`test`) tasks, of its own sets of
        unseen tasks, and of tasks along a field, by the name of that field: tables of shape `(T, width)`. Those of
        snapshots from elsewhere are in none of them but `train`.
        """
        r, family = self.recipe, self.family
        assert family is not None
        sizes = {"train": r.num_tasks, "validation": r.num_validation_tasks, "test": r.num_test_tasks}
        sizes |= dict.fromkeys(family.test_sets, r.num_test_tasks)
        without = []
        if self.is_imported:
            known = self.snapshot_conditions[family.fields.known(self.snapshot_conditions).all(1)]
            without = [family.key(condition) for condition in family.fields.conditions(known)]
        found = family.split(sizes, named_seed(r.seed, "tasks"), without=without)
        field, curve = family.curve(CURVE)
        found |= {field: curve} if curve else {}
        return {name: family.fields.table(conditions) for name, conditions in found.items()}

    @property
    def is_imported(self) -> bool:
        """Whether the snapshots come from elsewhere."""
        record = self.files.record(STAGES["collect"])
        return self.recipe.snapshots is not None or (record is not None and "imported_from" in record["results"])

    @cached_property
    def fields(self) -> Fields:
        """
        Of the conditions of the snapshots; none if they have no conditions.

        Raises:
            RunError: if they are not those of the family.
        """
        fields = load_fields(self.recipe.snapshots or self.folder / names.SNAPSHOTS)
        if self.family is not None and fields != self.family.fields:
            raise RunError(
                f"the snapshots have conditions with the fields {fields}, and family={self.recipe.family} has "
                f"{self.family.fields}"
            )
        return fields

    @cached_property
    def snapshot_conditions(self) -> torch.Tensor:
        """The conditions of all snapshots, a table of shape `(K, width)`, NaN where a field is unknown."""
        return condition_table(self.snapshots[0], self.fields)

    @cached_property
    def _task_settings(self) -> dict[str, Any]:
        """What tells the task and its data from others."""
        task = type(self.task)
        name = f"{Path(task.__module__).name}.{task.__qualname__}"  # the module of a file is named for its path
        return {"task_class": name} | {f"{split} data": self.task.fingerprint(split) for split in SPLITS}

    def settings(self, stage: str) -> dict[str, Any]:
        """Everything that the outcome of a stage follows from."""
        settings = stage_settings(self.recipe, stage) | self._task_settings
        if stage == "evaluate" and self.extra_groups is not None:
            settings["extra_groups"] = self.extra_groups.__name__
        return settings

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
        """What the stage denoiser has saved, or the stage tune."""
        tuned = STAGES["tune"].is_wanted(self.recipe)
        pipeline = PDiffPipeline.from_pretrained(self.folder / (names.TUNED if tuned else names.PIPELINE))
        pipeline.register_to_config(**self.recipe.sampling)
        pipeline.set_progress_bar_config(desc="sampling", leave=False)
        return pipeline
