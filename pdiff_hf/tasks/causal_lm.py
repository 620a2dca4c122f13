"""Language models: any causal network of transformers on texts, on prompts with completions, or on conversations."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..networks.adapters import load_network
from ..networks.runner import NetworkRunner
from .dataset import AdaptedTask, BadRows, empty_rows
from .labels import find_weights
from .registry import register_task
from .sources import load_raw
from .task import Batch, MeasuredTask, Split, batches, digest

# What is not predicted: prompts and padding.
IGNORED = -100
BATCH_SIZE = 16
# Name of the metric, its unit, and whether higher is better.
MEASURES = {"loss": ("loss of a token", "nats", False), "exact_match": ("exact match", "%", True)}


@dataclass
class LanguageTask(AdaptedTask):
    """
    What tasks of language models have in common.

    Args beyond those of [`AdaptedTask`]:
        max_length (`int`, *optional*, defaults to 128): Texts are cut to this many tokens, prompts at their start.
        dtype (`str`, *optional*, defaults to `"float32"`): Of the network's own weights; adapters stay in float32.

    Attributes:
        reads_first (`bool`): Whether the network has an encoder, which reads prompts, before its decoder.

    Raises:
        ValueError: when created, for a model without weights.
    """

    max_length: int = 128
    dtype: str = "float32"

    def __post_init__(self) -> None:
        self._check_sizes("max_length")
        if self.max_length < 2:
            raise ValueError("max_length must be at least 2: a token is predicted from those before it")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        super().__post_init__()
        self._config, has_weights = find_weights(self.model)
        if not has_weights:
            raise ValueError(f"model '{self.model}' has no weights; a language model is not trained from nothing here")
        self.reads_first = bool(getattr(self._config, "is_encoder_decoder", False))
        self._auto_class = AutoModelForSeq2SeqLM if self.reads_first else AutoModelForCausalLM
        self._splits: dict[str, Any] = {}

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

    @property
    def _padding(self) -> int:
        return self.tokenizer.pad_token_id or 0

    def load_base_model(self) -> PreTrainedModel:
        model = self._auto_class.from_pretrained(self.model, dtype=getattr(torch, self.dtype))
        return self._with_adapter(model.eval())

    def save_base_model(self, model: nn.Module, folder: str | os.PathLike) -> None:
        """The network and its tokenizer."""
        super().save_base_model(model, folder)
        self.tokenizer.save_pretrained(folder)

    def load_saved(self, folder: str | os.PathLike) -> PreTrainedModel:
        """What `save_base_model` wrote."""
        return load_network(folder, self._auto_class)

    def fingerprint(self, split: Split) -> str:
        """Follows all tokens, and which of them are predicted."""
        return digest(self.load_split(split))


@register_task("causal_lm")
@dataclass
class CausalLMTask(LanguageTask, MeasuredTask):
    """
    Texts that a language model continues, or prompts that it answers: also one with an encoder for the prompts.

    Args beyond those of [`LanguageTask`]:
        text_column (`str`, *optional*): Of plain texts; by default `text`. Not needed for the columns `prompt` and
            `completion`, or for `messages`, lists of `{"role": ..., "content": ...}` that the tokenizer's chat template
            makes a text of. Of these two, the completion, or the last message, is what networks are trained and
            measured on, and the rest is only read.
        measured (`str`, *optional*, defaults to `"loss"`): The metric: `loss`, the mean loss of a token in nats, of
            which exp is the perplexity; or `exact_match`, for how many percent of the examples the network's likeliest
            tokens, one after the other, are the completion.

    Raises:
        ValueError: when created, for a model without weights, a data set without such columns, or empty texts.
    """

    text_column: str | None = None
    measured: str = "loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.measured not in MEASURES:
            raise ValueError(f"measured must be {' or '.join(MEASURES)}, got {self.measured!r}")
        self.metric, self.unit, self.higher_is_better = MEASURES[self.measured]
        raw = load_raw(self.dataset)
        columns = raw["train"].column_names
        kinds: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"), (self.text_column or "text",))
        if self.text_column is not None:
            kinds = kinds[2:]
        self._columns = next((kind for kind in kinds if set(kind) <= set(columns)), ())
        if self.reads_first and len(self._columns) == 1 and self._columns[0] != "messages":
            raise ValueError(f"'{self.model}' has an encoder, which needs prompts: the columns prompt and completion")
        if not self._columns:
            raise ValueError(
                f"dataset '{self.dataset}' has no column {kinds[-1][0]}, nor messages, nor prompt and completion; its "
                f"columns are {', '.join(columns)}: choose one with text_column"
            )
        self._set_splits(self._take(raw, {name: name for name in self._columns}, self._bad))

    def _bad(self, rows: datasets.Dataset) -> BadRows:
        """Rows with nothing to predict."""
        if (name := self._columns[-1]) == "messages":
            return {i: (name, "it has no message") for i, value in enumerate(rows[name][:]) if not value}
        return empty_rows(rows, name)

    def _prepare(self, split: Split) -> list[tuple[list[int], int]]:
        return [self._encode(row) for row in self._raw[split]]

    def collate(self, examples: Sequence[tuple[list[int], int]]) -> Batch:
        """
        `input_ids`, `attention_mask` and `labels` of shape `(B, T)`, where T is the length of the longest text; labels
        are the tokens themselves where they are predicted. For a network with an encoder, the ids are those of prompts,
        and labels, and the `decoder_input_ids` before them, have the length of the longest completion.
        """
        read, more = [tokens for tokens, _ in examples], {}
        labels = [[IGNORED] * n + tokens[n:] for tokens, n in examples]
        if self.reads_first:
            start = self._config.decoder_start_token_id
            before = [[start, *tokens[n:-1]] for tokens, n in examples]
            read, labels = [tokens[:n] for tokens, n in examples], [tokens[n:] for tokens, n in examples]
            more = {"decoder_input_ids": padded(before, self._padding)}
        mask = padded([[1] * len(tokens) for tokens in read], 0)
        found = {"input_ids": padded(read, self._padding), "attention_mask": mask, "labels": padded(labels, IGNORED)}
        return found | more

    def _encode(self, row: Mapping[str, Any]) -> tuple[list[int], int]:
        """Token ids of an example, and the number of those at the start that are only read."""
        tokenizer, end = self.tokenizer, [self.tokenizer.eos_token_id]
        end = [] if end[0] is None else end
        if "messages" in row:
            return self._cut(*self._templated(row["messages"]))
        if "prompt" in row:
            prompt = tokenizer(row["prompt"] or "")["input_ids"]
            completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            return self._cut(prompt + completion + end, len(prompt))
        return self._cut(tokenizer(row[self._columns[0]])["input_ids"] + end, 0)

    def _templated(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], int]:
        """
        Token ids of a conversation, and the number of those before the last message.

        Raises:
            ValueError: for a chat template that writes the same messages otherwise where another one follows.
        """
        template = partial(self.tokenizer.apply_chat_template, tokenize=True, return_dict=False)
        whole = list(template(messages))
        if len(messages) < 2:
            return whole, 0
        prompt = list(template(messages[:-1], add_generation_prompt=True))
        read = len(os.path.commonprefix([whole, prompt]))  # an answer may lack the end of it, such as a thought's start
        if read < len(prompt) and read < len(template(messages[:-1])):
            raise ValueError(
                f"the chat template of '{self.model}' does not write the messages before the last one as it writes "
                "them alone, so that it is not known which tokens to predict; use the columns prompt and completion"
            )
        return whole, read

    def _cut(self, tokens: list[int], read: int) -> tuple[list[int], int]:
        """Tokens that are not too many: of a prompt the end is kept, and of what is predicted the start."""
        start = min(max(0, len(tokens) - self.max_length), max(0, read - 1))
        return tokens[start:][: self.max_length], read - start

    def loss(self, call: Callable, batch: Batch) -> torch.Tensor:
        """The mean over the tokens of the batch."""
        logits, tokens = self._predicted(call, batch)
        losses = F.cross_entropy(logits.float().mT, tokens, ignore_index=IGNORED, reduction="sum")
        return losses / (tokens != IGNORED).sum().clamp_min(1)

    def _predicted(self, call: Callable, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, `(B, T, V)`, and the tokens that they should predict, `(B, T)`, `IGNORED` where those are given."""
        logits = call(**{name: values for name, values in batch.items() if name != "labels"}).logits
        return (logits, batch["labels"]) if self.reads_first else (logits[:, :-1], batch["labels"][:, 1:])

    def measure(self, models: NetworkRunner, split: Split, parameters: torch.Tensor) -> torch.Tensor:
        """The mean loss of a token over the split, or the percentage of exact answers."""
        device, exact = next(models.model.parameters()).device, self.unit == "%"
        total, count = torch.zeros(len(parameters), dtype=torch.float64), 0

        def forward(call: Callable) -> torch.Tensor:
            logits, tokens = self._predicted(call, batch)
            if exact:
                right = ((logits.argmax(-1) == tokens) | (tokens == IGNORED)).all(-1)
                return (right & (tokens != IGNORED).any(-1)).float()
            return F.cross_entropy(logits.float().mT, tokens, ignore_index=IGNORED, reduction="none")

        for batch in batches(self, split, BATCH_SIZE, device):
            tokens = batch["labels"] if self.reads_first else batch["labels"][:, 1:]
            count += int(((tokens != IGNORED).any(-1) if exact else tokens != IGNORED).sum())
            for rows, values in models(forward, parameters.to(device)):
                total[rows] += values.flatten(1).double().sum(1).cpu()
        return total / max(1, count) * (100 if exact else 1)


def padded(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> torch.Tensor:
    """Tokens as a tensor of shape `(B, T)`, filled up to the longest, of at least 2, at the right or the left."""
    longest = max(2, *map(len, rows))
    filling = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([[*f, *row] if left else [*row, *f] for row, f in zip(rows, filling, strict=True)])
