"""Families: tasks that differ by a condition; one task of a family by itself, and many as one."""

import copy
import os
from abc import abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import Dataset

from ..models.condition import Condition, Fields
from ..utils.seeds import derive_seed
from .labels import LabelledTask
from .task import Batch, ClassificationTask, OfNetworks, Split, Task, load_batch

# So many draws without a new task mean that there are no more.
MAX_DRAWS = 1000
# What `Family.check` looks at; at more examples where a field seems to change nothing.
CHECKED_TASKS, CHECKED_EXAMPLES, MOST_CHECKED = 8, 32, 512


class Family(OfNetworks):
    """
    Tasks that differ by a condition. Their examples come from one data set, so that example i of every task follows
    from example i of that.

    Attributes:
        fields (`Fields`): Of a condition.
        test_sets (`Mapping[str, str]`): Regions of conditions that are kept for tests, by name, with what they are;
            none by default.
        takes (`type[Task]`, *optional*): The kind of task that the family is over, which is then the first argument of
            its class.
    """

    takes: ClassVar[type[Task] | None] = None
    fields: Fields
    test_sets: Mapping[str, str] = {}

    def draw(self, generator: torch.Generator) -> dict[str, Any]:
        """
        One random condition; by default each field for itself.

        Raises:
            ConditionError: for a field that cannot be drawn, such as a vector.
        """
        return {name: field.sample(generator) for name, field in self.fields.items()}

    @abstractmethod
    def num_examples(self, split: Split) -> int:
        """Of a split, the same for all tasks."""

    @abstractmethod
    def batch(self, split: Split, table: torch.Tensor, indices: torch.Tensor) -> Batch:
        """
        Examples of many tasks.

        Args:
            table (`torch.Tensor`): The conditions, of `fields.table`, shape `(T, width)`.
            indices (`torch.Tensor`): Of the examples: shape `(B,)`, for all tasks the same, or `(T, B)`.

        Returns:
            `dict`: What `predict` needs, tensors of shape `(T, B, ...)`, and `labels` of shape `(T, B)`.
        """

    def examples(
        self, split: Split, table: torch.Tensor, indices: torch.Tensor, seeds: torch.Tensor, draw: int = 0
    ) -> Batch:
        """
        A `batch`, whose random changes, if it has any, are those of the conditions `seeds`, shape `(T, width)`; another
        `draw` has others, for trainings that see an example again and again.
        """
        return self.batch(split, table, indices)

    def training_batch(self, table: torch.Tensor, indices: torch.Tensor, generator: torch.Generator) -> Batch:
        """A `batch` of training examples, with random changes that follow from the seed of the step's generator."""
        return self.examples("train", table, indices, table, generator.initial_seed())

    def check(self) -> None:
        """
        Looks at a few training examples of a few tasks.

        Raises:
            ValueError: if examples are not the same a second time or beside those of other tasks, or if a field changes
                none of them.
        """
        name, fields = type(self).__name__, getattr(self, "fields", None)
        if not isinstance(fields, Fields):
            raise ValueError(
                f"{name} needs `fields = Fields({{...}})`, which says what conditions hold, got {fields!r}"
            )
        if not fields:
            return

        def draw() -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            return torch.cat([fields.table([self.draw(generator)]) for _ in range(2 * CHECKED_TASKS)])

        drawn = draw()
        if not fields.known(drawn).all():
            raise ValueError(f"{name}.draw must give a value of each field: {fields}")
        if not torch.equal(drawn, draw()):
            raise ValueError(
                f"{name}.draw gives other conditions a second time, so that no run can be repeated: random values must "
                "come from its argument `generator`"
            )
        table = drawn[:CHECKED_TASKS]
        parts = torch.arange(min(MOST_CHECKED, self.num_examples("train"))).split(CHECKED_EXAMPLES)

        def look(table: torch.Tensor, seeds: torch.Tensor, indices: torch.Tensor = parts[0]) -> Batch:
            return self.examples("train", table, indices, seeds)

        def equal(batch: Batch, other: Batch) -> bool:
            return all(torch.allclose(values, other[key], atol=1e-4) for key, values in batch.items())

        batch = look(table, table)
        if not equal(batch, look(table, table)):
            raise ValueError(
                f"{name} gives other examples a second time, so that no two methods see the same data: random changes "
                "must come from the argument `generator` of `change`"
            )
        for start in range(1, CHECKED_TASKS):
            rest = table[start:]
            if not equal(look(rest, rest), {key: values[start:] for key, values in batch.items()}):
                raise ValueError(f"{name} gives a task other examples where there are other tasks beside it")
        for field, columns in self.fields.columns.items():
            mixed = table.clone()
            for shift in range(1, len(drawn)):  # another value, if there is one
                same = (mixed[:, columns] == table[:, columns]).all(1)
                mixed[same, columns] = drawn.roll(shift, 0)[:CHECKED_TASKS][same, columns]
            if all(equal(look(table, table, indices), look(mixed, table, indices)) for indices in parts):
                use = f"conditions[{field!r}]"
                if choices := self.fields[field].choices:  # its numbers equal no word
                    use += f" == {choices[-1]!r}"
                raise ValueError(
                    f"the field '{field}' of {name} ({self.fields[field]}) changes no image and no label of "
                    f"{sum(map(len, parts))} examples of {CHECKED_TASKS} tasks; leave it out, or use {use}"
                )

    def described(self, condition: Condition) -> Condition:
        """The condition of a seen task with all that is said of it, such as several descriptions."""
        return condition

    def prompted(self, model: nn.Module) -> nn.Module | None:
        """
        The base model without weights for a task, which is told in its inputs what the task is: `module(table, batch,
        generator)` gives logits of shape `(T, B, C)`. None where that cannot be.
        """
        return None

    @abstractmethod
    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        """Logits of one network on the examples of its task, shape `(B, C)`."""

    def task(self, condition: Condition) -> Task:
        """One task by itself."""
        return FamilyTask(self, self.fields.table([condition]))

    def mixture(self, table: torch.Tensor) -> Task:
        """Many tasks as one: each example belongs to one of the conditions `table`, shape `(T, width)`, by chance."""
        return FamilyTask(self, table)

    def region(self, condition: Condition) -> str | None:
        """Which of the `test_sets` a condition belongs to; None for the others."""
        return None

    def key(self, condition: Condition) -> Hashable:
        """Equal for conditions of the same task."""
        return tuple(self.fields.table([condition])[0].tolist())

    def conditions(
        self, num: int, seed: int, *, region: str | None = None, without: Collection[Hashable] = ()
    ) -> list[dict[str, Any]]:
        """
        Random conditions of different tasks.

        Args:
            region (`str`, *optional*): One of `test_sets`; by default, what is in none of them.
            without (`Collection`, *optional*): The keys of tasks that must not be among them.

        Raises:
            ValueError: if there are not as many tasks.
        """
        generator = torch.Generator().manual_seed(seed)
        keys: set[Hashable] = set(without)
        conditions: list[dict[str, Any]] = []
        for _ in range(MAX_DRAWS * (num + 1)):
            if len(conditions) == num:
                return conditions
            condition = copy.deepcopy(self.draw(generator))  # it may return the same object each time
            key = self.key(condition)
            if self.region(condition) == region and key not in keys:
                keys.add(key)
                conditions.append(condition)
        raise ValueError(
            f"the family has fewer than {num} tasks {f'in {region!r}' if region else 'outside its test sets'} "
            f"besides {len(without)} others: found {len(conditions)}"
        )

    def curve(self, num: int) -> tuple[str, list[dict[str, Any]]]:
        """
        For a figure: the first field that is an angle or a number, and conditions along it; all other fields stay at
        the lowest value or the first word. Without such a field, or with one that has no such value, there are none.
        """
        lowest = {name: next(iter(field.bounds or field.choices or ()), None) for name, field in self.fields.items()}
        along = next((name for name, field in self.fields.items() if field.bounds), "")
        if not along or None in lowest.values():
            return "", []
        return along, [lowest | {along: value} for value in self.fields[along].line(num)]

    def split(
        self, sizes: Mapping[str, int], seed: int, *, without: Collection[Hashable] = ()
    ) -> dict[str, list[dict[str, Any]]]:
        """
        Conditions of tasks for `train`, `validation`, `test` and any of `test_sets`; no task is in two of them.

        Args:
            without (`Collection`, *optional*): The keys of tasks that only `train` may have.

        Raises:
            ValueError: for another name, or if there are not as many tasks.
        """
        names = ("train", "validation", "test", *self.test_sets)
        unknown = [name for name in sizes if name not in names]
        if unknown:
            raise ValueError(f"there is no set of tasks {unknown[0]!r}; there are {', '.join(names)}")
        taken: set[Hashable] = set()
        result = {}
        for i, name in enumerate(names):
            if sizes.get(name):
                region = name if name in self.test_sets else None
                others = taken if name == "train" else taken | set(without)
                result[name] = self.conditions(sizes[name], derive_seed(seed, i), region=region, without=others)
                taken |= {self.key(condition) for condition in result[name]}
        return result


@dataclass
class TaskFamily(Family):
    """
    A family over the data set of a task.

    Args:
        base (`LabelledTask`): Its data and its network.
    """

    takes: ClassVar[type[Task] | None] = LabelledTask
    base: LabelledTask

    def source_classes(self) -> tuple[type, ...]:
        return (type(self), *self.base.source_classes())

    def num_examples(self, split: Split) -> int:
        return len(self.base.load_split(split))  # type: ignore[arg-type]  # a map-style data set

    def batch(self, split: Split, table: torch.Tensor, indices: torch.Tensor) -> Batch:
        """The examples of the data set, for all tasks the same ones unless `indices` differ."""
        examples = load_batch(self.base, split, indices.flatten().tolist(), table.device)
        shape = len(table), indices.shape[-1]
        return {
            name: values.unflatten(0, indices.shape).expand(*shape, *values.shape[1:])
            for name, values in examples.items()
        }

    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        return self.base.predict(call, batch)

    def prepare_run(self) -> None:
        self.base.prepare_run()

    def load_base_model(self) -> nn.Module:
        return self.base.load_base_model()

    def save_base_model(self, model: nn.Module, folder: str | os.PathLike) -> None:
        self.base.save_base_model(model, folder)

    def fingerprint(self, split: Split) -> str:
        return f"{self.base.fingerprint(split)} {type(self).__qualname__} {self.fields.to_dict()}"


@dataclass
class FamilyOfOne(TaskFamily):
    """
    A task as a family: without fields, and with one member, which is seen and unseen at once. [`as_family`] makes it.

    Args:
        base (`Task`): The member.
    """

    fields = Fields({})
    base: Any  # a task of any kind

    def source_classes(self) -> tuple[type, ...]:
        return self.base.source_classes()

    def draw(self, generator: torch.Generator) -> dict[str, Any]:
        return {}

    def load_saved(self, folder: str | os.PathLike) -> nn.Module:
        return self.base.load_saved(folder)

    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        if not isinstance(self.base, ClassificationTask):
            raise TypeError(f"only classifiers have logits, and {type(self.base).__name__} is a task of another kind")
        return self.base.predict(call, batch)

    def fingerprint(self, split: Split) -> str:
        return self.base.fingerprint(split)

    def task(self, condition: Condition) -> Task:
        self.fields.table([condition])  # an error for a condition with fields
        return self.base

    def mixture(self, table: torch.Tensor) -> Task:
        return self.base

    def split(
        self, sizes: Mapping[str, int], seed: int, *, without: Collection[Hashable] = ()
    ) -> dict[str, list[dict[str, Any]]]:
        """The one member in each set."""
        return {name: [{}] for name in ("train", "validation", "test")}


def as_family(task: Task | Family) -> Family:
    """The family itself, or the family whose only member is `task`."""
    return task if isinstance(task, Family) else FamilyOfOne(task)


class FamilyTask(ClassificationTask):
    """
    One task of a family, or many as one for one network that is to know them all; what [`Family.task`] and
    [`Family.mixture`] return. An example belongs to one of the conditions of `table`, shape `(T, width)`: in training
    by chance, drawn from torch's global generator, else always to the same one.
    """

    def __init__(self, family: Family, table: torch.Tensor):
        self.family, self.table = family, table

    @property
    def new_head(self) -> str:  # type: ignore[override]  # follows what the family has loaded
        return getattr(getattr(self.family, "base", None), "new_head", "")

    def prepare_run(self) -> None:
        self.family.prepare_run()

    def load_base_model(self) -> nn.Module:
        return self.family.load_base_model()

    def save_base_model(self, model: nn.Module, folder: str | os.PathLike) -> None:
        self.family.save_base_model(model, folder)

    def load_saved(self, folder: str | os.PathLike) -> nn.Module:
        return self.family.load_saved(folder)

    def fingerprint(self, split: Split) -> str:
        return f"{self.family.fingerprint(split)} {self.table.tolist()}"

    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        return self.family.predict(call, batch)

    def load_split(self, split: Split) -> "FamilySplit":
        return FamilySplit(self.family, self.table, split)


class FamilySplit(Dataset):
    """The examples of a task of a family; `__getitems__(indices)` returns a batch."""

    def __init__(self, family: Family, table: torch.Tensor, split: Split):
        self.family, self.table, self.split = family, table, split

    def __len__(self) -> int:
        return self.family.num_examples(self.split)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        examples = torch.as_tensor(indices)
        if len(self.table) == 1:
            rows = torch.zeros(1, dtype=torch.long)
        elif self.split == "train":
            rows = torch.randint(len(self.table), examples.shape)
        else:
            rows = examples % len(self.table)
        batch = self.family.batch(self.split, self.table[rows], examples.view(len(rows), -1))
        return {name: values.flatten(0, 1) for name, values in batch.items()}  # (B, ...)
