"""Language models: any causal network of transformers on texts, on prompts with completions, or on conversations."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..networks.adapters import find_base, load_adapter, load_network
from ..networks.runner import NetworkRunner
from ..utils.devices import to_device
from .dataset import DatasetTask, make_splits
from .labels import find_weights
from .registry import register_task
from .sources import load_raw
from .task import Batch, MeasuredTask, Split, take

# What is not predicted: prompts and padding.
IGNORED = -100
BATCH_SIZE = 16


@register_task("causal_lm")
@dataclass
class CausalLMTask(DatasetTask, MeasuredTask):
    """
    Args beyond those of [`DatasetTask`]:
        max_length (`int`, *optional*, defaults to 128): Texts are cut to so many tokens.
        text_column (`str`, *optional*): Of plain texts; by default `text`. Not needed for the columns `prompt` and
            `completion`, or for `messages`, lists of `{"role": ..., "content": ...}` that the tokenizer's chat template
            makes a text of. Of these two, the completion, or the last message, is what networks are trained and
            measured on, and the rest is only read.
        adapter (`str`, *optional*): Folder or Hub id of an adapter of PEFT that the model gets. Where `model` is one,
            it becomes the adapter, and `model` the network that it belongs to.

    The metric is the mean loss of a token in nats; exp of it is the perplexity.

    Raises:
        ValueError: when created, for a model without weights, a data set without such columns, or empty texts.
    """

    max_length: int = 128
    text_column: str | None = None
    adapter: str | None = None

    metric = "loss of a token"
    unit = "nats"
    higher_is_better = False

    def __post_init__(self) -> None:
        self._check_sizes("max_length")
        if base := find_base(self.model):
            self.model, self.adapter = base, self.adapter or self.model
        if not find_weights(self.model)[1]:
            raise ValueError(f"model '{self.model}' has no weights; a language model is not trained from nothing here")
        raw = load_raw(self.dataset)
        columns = raw["train"].column_names
        kinds: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"), (self.text_column or "text",))
        if self.text_column is not None:
            kinds = kinds[2:]
        self._columns = next((kind for kind in kinds if set(kind) <= set(columns)), ())
        if not self._columns:
            raise ValueError(
                f"dataset '{self.dataset}' has no column {kinds[-1][0]}, nor messages, nor prompt and completion; its "
                f"columns are {', '.join(columns)}: choose one with text_column"
            )
        raw = {name: self._usable(rows, name, self._bad(rows)) for name, rows in raw.items()}
        self._splits: dict[str, Any] = {}
        self._raw = make_splits(
            {name: rows.select_columns(list(self._columns)) for name, rows in raw.items()},
            self.dataset,
            self.validation_fraction,
            self.max_train_samples,
            self.max_eval_samples,
        )

    def _bad(self, rows: datasets.Dataset) -> dict[int, tuple[str, str]]:
        """Rows with nothing to predict."""
        name = self._columns[-1]
        values = enumerate(rows[name][:])
        if name == "messages":
            return {i: (name, "it has no message") for i, value in values if not value}
        return {i: (name, "it is empty") for i, value in values if not str(value or "").strip()}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model)
        except (OSError, ValueError) as error:
            raise ValueError(f"model '{self.model}' has no tokenizer that can be loaded: {error}") from error
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        return tokenizer

    def load_base_model(self) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        return load_adapter(model, self.adapter) if self.adapter else model.eval()

    def save_base_model(self, model: nn.Module, folder: str | os.PathLike) -> None:
        """The network and its tokenizer."""
        super().save_base_model(model, folder)
        self.tokenizer.save_pretrained(folder)

    def load_saved(self, folder: str | os.PathLike) -> PreTrainedModel:
        """What `save_base_model` wrote."""
        return load_network(folder, AutoModelForCausalLM)

    def _prepare(self, split: Split) -> "TokenSplit":
        return TokenSplit([self._encode(row) for row in self._raw[split]], self.tokenizer.pad_token_id or 0)

    def _encode(self, row: Mapping[str, Any]) -> tuple[list[int], int]:
        """Token ids of an example, and the number of those at the start that are only read."""
        tokenizer, end = self.tokenizer, [self.tokenizer.eos_token_id]
        end = [] if end[0] is None else end
        if "messages" in row:
            messages = row["messages"]
            whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
            prompt = tokenizer.apply_chat_template(
                messages[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
            )
            read = len(prompt) if messages[:-1] else 0
            return list(whole)[: self.max_length], read
        if "prompt" in row:
            prompt = tokenizer(row["prompt"] or "")["input_ids"]
            completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            return (prompt + completion + end)[: self.max_length], len(prompt)
        return (tokenizer(row[self._columns[0]])["input_ids"] + end)[: self.max_length], 0

    def fingerprint(self, split: Split) -> str:
        """Follows all tokens, and which of them are predicted."""
        examples = self.load_split(split)
        digest = hashlib.blake2b(repr(examples.examples).encode(), digest_size=16)
        return digest.hexdigest()

    def loss(self, call: Callable, batch: Batch) -> torch.Tensor:
        """The mean over the tokens of the batch."""
        losses = self.token_losses(call, batch)
        return losses.sum() / (batch["labels"][:, 1:] != IGNORED).sum().clamp_min(1)

    def token_losses(self, call: Callable, batch: Batch) -> torch.Tensor:
        """The loss of each token that is predicted from those before it, shape `(B, T - 1)`; 0 for those only read."""
        logits = call(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        return F.cross_entropy(logits.float().mT, labels, ignore_index=IGNORED, reduction="none")

    def measure(self, models: NetworkRunner, split: Split, parameters: torch.Tensor) -> torch.Tensor:
        """The mean loss of a token over the split."""
        device = next(models.model.parameters()).device
        examples, count = self.load_split(split), 0
        total = torch.zeros(len(parameters), dtype=torch.float64)
        for indices in torch.arange(len(examples)).split(BATCH_SIZE):
            batch = to_device(take(examples, indices.tolist()), device)
            count += int((batch["labels"][:, 1:] != IGNORED).sum())

            def forward(call: Callable, batch: Batch = batch) -> torch.Tensor:
                return self.token_losses(call, batch)

            for rows, losses in models(forward, parameters.to(device)):
                total[rows] += losses.flatten(1).double().sum(1).cpu()
        return total / max(1, count)


class TokenSplit(torch.utils.data.Dataset):
    """
    Tokenized examples, in memory.

    `__getitems__(indices)` returns a batch: `input_ids`, `attention_mask` and `labels` of shape `(B, T)`, where T is
    the length of its longest text; labels are the tokens themselves where they are predicted.
    """

    def __init__(self, examples: Sequence[tuple[list[int], int]], pad_token_id: int):
        self.examples, self.pad_token_id = list(examples), pad_token_id

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = [self.examples[i] for i in indices]
        longest = max(2, *(len(ids) for ids, _ in chosen))
        shape = (len(chosen), longest)
        ids, mask = torch.full(shape, self.pad_token_id), torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED)
        for row, (tokens, read) in enumerate(chosen):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            labels[row, read : len(tokens)] = ids[row, read : len(tokens)]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
