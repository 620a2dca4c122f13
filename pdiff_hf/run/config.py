"""`PDiffConfig`: the settings of a run, which Python, recipe files and flags share."""

import dataclasses
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from . import settings
from .options import check_value, default_of, group_of, nested
from .settings import SECTIONS

if TYPE_CHECKING:
    from ..tasks import Task
    from ..tasks.family import Family


@dataclass
class PDiffConfig(
    settings.RunSection,
    settings.TaskSection,
    settings.FamilySection,
    settings.BaseSection,
    settings.CollectSection,
    settings.AutoencoderSection,
    settings.DenoiserSection,
    settings.TuneSection,
    settings.EvaluateSection,
):
    """
    Everything that a run is made of; flags of `scripts/train.py` and keys of a recipe file have these names. A setting
    that would have no effect is refused, by [`check`].

    Raises:
        ValueError: for a value that is not possible; the message begins with the key.
    """

    # No settings: what a run knows besides them, and which come from a file, where a flag may make them idle.
    imported, conditional, soft = False, True, frozenset[str]()
    _of_data = cast("bool | None", None)

    def __post_init__(self) -> None:
        for key in dataclasses.fields(self):
            setattr(self, key.name, check_value(key, getattr(self, key.name)))
        tune, per_task = self.tune_args, self.has_family and self.collects
        divisors = {
            "tune_args.ensemble_size": (tune.ensemble_size, "tune_models"),
            "collect_args.num_runs": (self.collect_args.num_runs, "num_snapshots"),
            "num_tasks": (self.num_tasks if per_task else 1, "num_snapshots"),  # every task has as many
        }
        for name, (value, of) in divisors.items():
            if getattr(self, of) % value:
                raise ValueError(f"{name} must be a divisor of {of}={getattr(self, of)}, got {value}")
        if any(tune.diversity) and tune.ensemble_size == 1:
            raise ValueError(
                f"tune_args.diversity={tune.diversity} needs an ensemble_size above 1: one network has no other to "
                "differ from"
            )

    @property
    def title(self) -> str:
        """What the run is about, as the name of a folder."""
        name = self.task.rpartition(":")[2] if ":" in self.task or self.model is None else self.model
        return Path(name.partition(":")[0]).name.lower()

    @property
    def has_family(self) -> bool:
        """Whether networks answer to conditions of a family of tasks."""
        return self.family is not None

    @property
    def is_of_data(self) -> bool | None:
        """Whether each network is a datum; None of your own class, before a run knows it."""
        if self._of_data is not None:
            return self._of_data
        return self.task == "neural_field" or (None if ":" in self.task else False)

    @property
    def collects(self) -> bool:
        """Whether snapshots are made in this run."""
        return self.snapshots is None and not self.imported

    @property
    def latent_scaling(self) -> str:
        """`autoencoder_args.latent_scaling`, or its default for this run."""
        several = self.has_family or self.is_of_data or (self.imported and self.conditional)
        return self.autoencoder_args.latent_scaling or ("together" if several else "each")

    @property
    def has_conditions(self) -> bool:
        """Whether the generator has conditions, as far as that is known."""
        return self.has_family or self.conditional or self.has_clusters

    @property
    def has_clusters(self) -> bool:
        """Whether clusters of latents stand for the conditions that data have not."""
        return bool(self.is_of_data) and not self.conditional and self.denoiser_args.clusters > 1

    @property
    def tunes(self) -> bool:
        """Whether there is a stage of tuning."""
        return self.num_tune_steps > 0

    @property
    def num_tune_steps(self) -> int:
        """`tune_steps`, or its default for this run."""
        return (1200 if self.has_family else 0) if self.tune_steps is None else self.tune_steps

    @property
    def num_regressed(self) -> int:
        """`denoiser_args.regressed_networks`, or its default for this run."""
        # The family `tabled` has no tasks beside those of its data.
        default = 1500 if self.has_family and self.tune_tasks == "seen" and self.family != "tabled" else 0
        number = self.denoiser_args.regressed_networks
        return default if number is None else number

    @property
    def recomputes_statistics(self) -> bool:
        """Whether each network gets its own statistics of batch norm, from training data."""
        return self.batch_norm_statistics == "recomputed"

    @property
    def sampling(self) -> dict[str, Any]:
        """What is set of how a pipeline samples, as its config has it."""
        values = {name: getattr(self, name) for name in ("num_inference_steps", "temperature")}
        values["guidance_scale"] = self.denoiser_args.guidance_scale
        return {name: value for name, value in values.items() if value is not None}

    def changed(self, **changes: Any) -> "PDiffConfig":
        """
        This config with some settings changed, and knowing what it knows. Those in groups may have names such as
        `tune_args.penalty`; what else a group holds stays as it is.
        """
        values = nested(changes)
        for name in values:
            if isinstance(values[name], dict) and dataclasses.is_dataclass(group := getattr(self, name)):
                values[name] = dataclasses.asdict(group) | values[name]  # type: ignore[arg-type]
        config = dataclasses.replace(self, **values)
        config.imported, config.conditional, config._of_data = self.imported, self.conditional, self._of_data
        config.soft = self.soft - flat(changes).keys()
        return config

    def unread(self) -> Iterator[tuple[str, Any, str]]:
        """Settings that have no effect in this run: name, value (not the default one), and why."""
        for name, key, value in self._settings():
            if not key.metadata["when"].holds(self) and value != default_of(key):
                yield name, value, key.metadata["when"].why_not

    def check(self) -> None:
        """
        Raises:
            ValueError: for a setting without effect. One that is in a recipe file may have none because of a flag.
        """
        for name, value, why in self.unread():
            if name not in self.soft:
                raise ValueError(f"{name}={value} has no effect: {why}; leave it out")

    def section(self, *sections: type) -> dict[str, Any]:
        """The settings of some sections that this run reads, by name; those of groups as `group.name`."""
        names = {key.name for section in sections for key in dataclasses.fields(section)}
        return {
            name: value
            for name, key, value in self._settings()
            if name.partition(".")[0] in names and key.metadata["when"].holds(self)
        }

    def save(self, path: str | os.PathLike) -> None:
        """Writes a recipe file that gives this config again."""
        sections = [(section.__doc__, nested(self.section(section))) for section in SECTIONS.values()]
        parts = [f"# {about}\n{yaml.safe_dump(s, sort_keys=False, allow_unicode=True)}" for about, s in sections if s]
        Path(path).write_text("\n".join(parts), encoding="utf-8")

    def with_dataset(self) -> "PDiffConfig":
        """
        This config with the default data set where it names none.

        Raises:
            ValueError: if it has your own model, which must not be judged by data that it was not made for.
        """
        if self.dataset is not None or ":" in self.task:
            return self
        if self.model is not None and ("/" in self.model or os.path.exists(self.model)):
            raise ValueError(
                f"--dataset is needed: there is no default one for '{self.model}', a model of your own; name the data "
                "set that it was trained for"
            )
        return self.changed(dataset=settings.DEFAULT_DATASET)

    def make_task(self, adapter: str | None = None) -> "Task":
        """
        The task that this config describes. A class from elsewhere gets only the settings that differ from their
        defaults, which are those of this package's tasks. The task's model gets `adapter`, the folder or Hub id of one
        of PEFT, if given.

        Raises:
            ValueError: for a setting that the task's class does not take, and for what the class itself refuses.
        """
        from .. import tasks  # takes seconds

        keys = [key for key in dataclasses.fields(settings.TaskSection) if key.name not in ("task", "task_args")]
        changed = {key.name for key in keys if getattr(self, key.name) != default_of(key)}
        taken = inspect.signature(tasks.task_class(self.task)).parameters
        for name in sorted(changed - self.soft - {"dataset"} - set(taken)):
            raise ValueError(
                f"{name}={getattr(self, name)} has no effect: task '{self.task}' does not take it; leave it out"
            )
        given = {name: getattr(self, name) for name in (changed if ":" in self.task else {key.name for key in keys})}
        args = {name: value for name, value in given.items() if name in taken and value is not None} | self.task_args
        return tasks.make_task(self.task, args | ({} if adapter is None else {"adapter": adapter}))

    def make_family(self, base: "Task") -> "Family":
        """The family that this config describes, over its task `base`; without one, that whose only member it is."""
        from ..tasks.family import as_family
        from ..tasks.registry import make_family

        return as_family(base) if self.family is None else make_family(self.family, base, self.family_args)

    def _settings(self) -> Iterator[tuple[str, dataclasses.Field, Any]]:
        for key in dataclasses.fields(self):
            value = getattr(self, key.name)
            if group_of(key) is None:
                yield key.name, key, value
            else:
                for inner in dataclasses.fields(value):
                    yield f"{key.name}.{inner.name}", inner, getattr(value, inner.name)


KEYS = {key.name: key for key in dataclasses.fields(PDiffConfig)}
GROUPS = {name: group for name, key in KEYS.items() if (group := group_of(key)) is not None}


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those of groups, and a task's arguments, under names such as `tune_args.penalty`."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if (name in GROUPS or name == "task_args") and not isinstance(value, str):  # of a mapping as JSON
            inner = value if isinstance(value, Mapping) else vars(value)
            result |= {f"{name}.{key}": item for key, item in inner.items()}
        else:
            result[name] = value
    return result
