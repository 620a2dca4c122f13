"""Language models on questions with answers to choose from, and families of such tasks that a data set names."""

import inspect
import json
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.condition import Condition, ConditionError, Fields
from ..models.embedded import EmbeddedField
from .causal_lm import IGNORED, LanguageTask, padded
from .family import TaskFamily
from .registry import register_family, register_task
from .sources import load_raw
from .task import SPLITS, Batch, ClassificationTask, Split, Task, load_batch

# Conditions that differ by more are not those of the same task.
MAX_DISTANCE = 1e-3


@register_task("multiple_choice")
@dataclass
class MultipleChoiceTask(LanguageTask, ClassificationTask):
    """
    Which of several answers a causal network finds the likeliest after a prompt: the one whose tokens have the highest
    probability together. The data set has the columns `prompt`, `choices` (a list of texts, equally many in all rows,
    also as JSON), and `answer` (the right one, or its number from 0). Where a prompt is too long, its end is kept.

    Args: those of [`LanguageTask`].

    Raises:
        ValueError: when created, for a data set without such columns, or a row that does not fit them; when the network
            is loaded, for one whose answers depend on how prompts are filled up to one length.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reads_first:
            raise ValueError(f"multiple_choice needs a causal network, and '{self.model}' has an encoder")
        raw = load_raw(self.dataset)
        missing = {"prompt", "choices", "answer"} - set(raw["train"].column_names)
        if missing:
            columns = ", ".join(raw["train"].column_names)
            raise ValueError(f"dataset '{self.dataset}' has no column {min(missing)}; its columns are {columns}")
        count = next((len(choices) for row in raw["train"]["choices"][:] if (choices := _choices(row))), 0)
        for name, rows in raw.items():
            bad = {}
            for i, (row, answer) in enumerate(zip(rows["choices"][:], rows["answer"][:], strict=True)):
                choices = _choices(row)
                if not choices:
                    bad[i] = ("choices", f"{row!r:.200} is not a list of non-empty texts")
                elif len(choices) != count:
                    bad[i] = ("choices", f"there are {len(choices)}, and {count} in the first row")
                elif _number(choices, answer) is None:
                    bad[i] = ("answer", f"{answer!r:.100} is none of the choices {row!r:.200}")
            raw[name] = self._usable(rows, name, bad)
        self._set_splits(raw)

    def rows(self, split: Split, column: str) -> list:
        """A column of the data set. Raises a `ValueError` if there is none of that name."""
        if column not in (columns := self._raw[split].column_names):
            raise ValueError(f"dataset '{self.dataset}' has no column {column!r}; it has {', '.join(columns)}")
        return self._raw[split][column][:]

    def load_base_model(self) -> PreTrainedModel:
        return self._checked(super().load_base_model())

    def load_saved(self, folder: Any) -> PreTrainedModel:
        return self._checked(super().load_saved(folder))

    @cached_property
    def _arguments(self) -> set[str]:
        """What the network takes."""
        return set(inspect.signature(self._auto_class._model_mapping[type(self._config)].forward).parameters)

    @torch.no_grad()
    def _checked(self, model: PreTrainedModel) -> PreTrainedModel:
        examples = self.load_split("validation")
        ends = [end(examples, key=lambda example: len(example[0])) for end in (min, max)]
        together = self.predict(model, self.collate(ends))
        alone = torch.cat([self.predict(model, self.collate([one])) for one in ends])
        if not torch.allclose(together, alone, rtol=1e-3, atol=1e-3):
            raise ValueError(f"the answers of {type(model).__name__} depend on how prompts are filled up to one length")
        return model

    def _prepare(self, split: Split) -> list[tuple[list[int], list[list[int]], int | None]]:
        """The tokens of prompts and of choices, and the number of the right choice."""
        examples = []
        for prompt, texts, answer in zip(*(self.rows(split, c) for c in ("prompt", "choices", "answer")), strict=True):
            choices = [self.encode(text, add_special_tokens=False) for text in _choices(texts)]
            room = max(1, self.max_length - max(map(len, choices)) + 1)
            examples.append((self.encode(prompt)[-room:], choices, _number(_choices(texts), answer)))
        return examples

    def collate(self, examples: Sequence[tuple[list[int], list[list[int]], int]]) -> Batch:
        """
        `input_ids` and `attention_mask` of shape `(B, R, T)`, filled up at the left, for each choice the prompt with
        all but its last token, or one row if all choices are single tokens; the tokens of the `choices`, `(B, C, K)`,
        filled up at the left too; and `labels` of shape `(B,)`.
        """
        longest = max(len(choice) for _, choices, _ in examples for choice in choices)
        rows = [prompt + c[:-1] for prompt, choices, _ in examples for c in choices[: None if longest > 1 else 1]]
        targets = [[*[IGNORED] * (longest - len(c)), *c] for _, choices, _ in examples for c in choices]
        shape = len(examples), -1
        return {
            "input_ids": padded(rows, self._padding, left=True).unflatten(0, shape),
            "attention_mask": padded([[1] * len(row) for row in rows], 0, left=True).unflatten(0, shape),
            "choices": torch.tensor(targets).unflatten(0, shape),
            "labels": torch.tensor([answer for *_, answer in examples]),
        }

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        """The tokens of a text."""
        return self.tokenizer(text, **kwargs)["input_ids"]

    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        """The log-probability of each choice, shape `(B, C)`; the loss is of those that they have among themselves."""
        (num_examples, num_rows, length), targets = batch["input_ids"].shape, batch["choices"]  # (B, C, K)
        mask = batch["attention_mask"].flatten(0, 1).bool()  # (B R, T)
        # As attention needs it, because networks look at the values of another form, which many side by side do not
        # allow. What fills up sees itself: a row of nothing but zeros is not a number.
        own = torch.eye(length, dtype=torch.bool, device=mask.device)
        seen = (mask[:, None] & torch.ones_like(own).tril() | own)[:, None]  # (B R, 1, T, T)
        arguments = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0), "use_cache": False}
        arguments |= {"logits_to_keep": targets.shape[2]}
        arguments = {name: value for name, value in arguments.items() if name in self._arguments}
        logits = call(input_ids=batch["input_ids"].flatten(0, 1), attention_mask=seen, **arguments).logits
        logits = logits[:, -targets.shape[2] :].float().unflatten(0, (num_examples, num_rows))  # (B, R, K, V)
        chosen = logits.expand(-1, targets.shape[1], -1, -1).gather(-1, targets.clamp_min(0).unsqueeze(-1))
        likelihoods = chosen.squeeze(-1) - logits.logsumexp(-1)  # (B, C, K)
        return likelihoods.masked_fill(targets == IGNORED, 0).sum(-1)


def _choices(value: Any) -> list[str]:
    """The choices of a row; none if it does not hold a list of texts that are not empty."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return []
    return found if isinstance(found, list) and all(isinstance(text, str) and text for text in found) else []


def _number(choices: Sequence[str], answer: Any) -> int | None:
    """Which of the choices an answer is."""
    if answer in choices:
        return choices.index(answer)
    text = str(answer)
    return int(text) if text.isdecimal() and int(text) < len(choices) else None


@register_family("tabled")
@dataclass
class TabledFamily(TaskFamily):
    """
    Tasks that a column of a data set names. Each example belongs to one of them, and further columns say what the task
    is. Of several descriptions of a task, the last one is what generators are told of it while it is unseen; they are
    trained with the others, so that unseen tasks come in words of their own.

    Args:
        base (`MultipleChoiceTask`): All examples together.
        fields (`Fields` or `dict`): The columns that say what a task is, such as `{"description": {"type": "text"}}`.
        column (`str`, *optional*, defaults to `"task"`): Names the task of an example.

    Raises:
        ValueError: for a column that there is not, a task that lacks examples of a split, or one with several values
            of a field that is not a description.
    """

    takes: ClassVar[type[Task] | None] = MultipleChoiceTask
    base: MultipleChoiceTask  # type: ignore[assignment]
    fields: Fields = field(default_factory=Fields)
    column: str = "task"

    def __post_init__(self) -> None:
        self.fields = self.fields if isinstance(self.fields, Fields) else Fields(self.fields)
        tasks = {split: self.base.rows(split, self.column) for split in SPLITS}
        said = {name: self.base.rows("train", name) for name in self.fields}
        self.members = sorted(set().union(*tasks.values()))
        self._examples: dict[str, list[list[int]]] = {}
        for split, names in tasks.items():
            places = {name: [i for i, other in enumerate(names) if other == name] for name in self.members}
            if lacking := [name for name in self.members if not places[name]]:
                raise ValueError(f"task {lacking[0]!r} of dataset '{self.base.dataset}' has no {split} examples")
            self._examples[split] = list(places.values())
        # All that is said of each task.
        of_tasks = self._examples["train"]
        self.told = [{n: self._value(n, [cells[i] for i in rows]) for n, cells in said.items()} for rows in of_tasks]

    def _value(self, name: str, cells: Sequence[Any]) -> Any:
        """What the rows of a task say in one column: of descriptions a list."""
        distinct = list(dict.fromkeys(part for cell in cells for part in (cell if isinstance(cell, list) else [cell])))
        if isinstance(self.fields[name], EmbeddedField):
            return distinct
        if any(cell != cells[0] for cell in cells):
            raise ValueError(f"column {name!r} has several values for one task, {distinct[:2]!r:.100}")
        return cells[0]

    @cached_property
    def _known(self) -> torch.Tensor:
        """All ways to say what each task is, shape `(N, K, width)`."""
        return self.fields.alternatives(self.told)

    def _members(self, table: torch.Tensor) -> list[tuple[int, int]]:
        """Which task each row of a table is of, and which way to say it."""
        distances = torch.cdist(table.cpu().double(), self._known.flatten(0, 1).double())
        if len(table) and distances.amin(1).max() > MAX_DISTANCE:
            raise ConditionError(f"no task of dataset '{self.base.dataset}' has such a condition")
        return [divmod(place, self._known.shape[1]) for place in distances.argmin(1).tolist()]

    def draw(self, generator: torch.Generator) -> dict[str, Any]:
        return self.told[int(torch.randint(len(self.told), (), generator=generator))]

    def key(self, condition: Condition) -> Hashable:
        return self._members(self.fields.table([condition]))[0][0]

    def split(
        self, sizes: Mapping[str, int], seed: int, *, without: Collection[Hashable] = ()
    ) -> dict[str, list[dict[str, Any]]]:
        """As [`Family.split`]; unseen tasks in their last words."""
        found = super().split(sizes, seed, without=without)
        return {name: [self._said(one, name != "train") for one in conditions] for name, conditions in found.items()}

    def _said(self, told: Mapping[str, Any], unseen: bool) -> dict[str, Any]:
        several = {n for n, kind in self.fields.items() if isinstance(kind, EmbeddedField) and len(told[n]) > 1}
        part = slice(-1, None) if unseen else slice(None, -1)
        return {name: value[part] if name in several else value for name, value in told.items()}

    def described(self, condition: Condition) -> Condition:
        return self._said(self.told[int(str(self.key(condition)))], unseen=False)

    def num_examples(self, split: Split) -> int:
        return min(map(len, self._examples[split]))

    def batch(self, split: Split, table: torch.Tensor, indices: torch.Tensor) -> Batch:
        places = [self._examples[split][member] for member, _ in self._members(table)]
        chosen = indices.expand(len(table), -1).tolist()
        flat = [rows[i % len(rows)] for rows, own in zip(places, chosen, strict=True) for i in own]
        examples = load_batch(self.base, split, flat, table.device)
        return {name: values.unflatten(0, (len(table), -1)) for name, values in examples.items()}

    def prompted(self, model: nn.Module) -> nn.Module | None:
        texts = [name for name, kind in self.fields.items() if kind.type == "text"]
        return PromptedNetwork(model, self, texts[0]) if texts else None


class PromptedNetwork(nn.Module):
    """A network that is told in its prompt what the task is, and has no adapter for it."""

    def __init__(self, model: nn.Module, family: TabledFamily, name: str):
        super().__init__()
        self.model, self.family, self.name = model, family, name

    def forward(self, table: torch.Tensor, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """Logits of shape `(M, B, C)`."""
        told = [(self.family.told[i][self.name], way) for i, way in self.family._members(table)]
        tokens = [self.family.base.encode(f"{texts[way % len(texts)]}\n") for texts, way in told]
        batch = dict(batch)
        for name, rows in {"input_ids": tokens, "attention_mask": [[1] * len(row) for row in tokens]}.items():
            before = padded(rows, 0, left=True).to(table.device)[:, None, None]  # (M, 1, 1, T')
            batch[name] = torch.cat([before.expand(*batch[name].shape[:3], -1), batch[name]], -1)
        flat = {name: values.flatten(0, 1) for name, values in batch.items()}
        return self.family.predict(self.model, flat).unflatten(0, batch["labels"].shape)
