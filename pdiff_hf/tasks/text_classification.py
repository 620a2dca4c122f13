"""Text classification with any transformers network on any data set of texts and labels."""

import copy
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..networks.adapters import load_network
from .dataset import take_columns
from .labels import LabelledTask, bad_labels, find_weights, name_classes, without_unlabelled_test
from .registry import register_task
from .sources import load_raw
from .task import Batch, Split

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@register_task("text_classification")
@dataclass
class TextClassificationTask(LabelledTask):
    """
    Args beyond those of [`LabelledTask`]:
        model (`str`): Local folder or Hub id of a transformers model. A local folder with a `config.json` and no
            weights gives that network with fresh weights. Where there is no tokenizer in it, the words of the training
            texts become the vocabulary, as many as the network has embeddings for.
        max_length (`int`, *optional*, defaults to 128): Texts are cut to so many tokens.
        text_column (`str`, *optional*): By default `text`.

    Raises:
        ValueError: when created, for an unknown model or data set, or one that does not fit text classification.
    """

    max_length: int = 128
    text_column: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sizes("max_length")
        config, self._has_weights = find_weights(self.model)
        raw = load_raw(self.dataset)
        features = raw["train"].features
        names = {self._choose_text(features): "text", self._choose_label(features): "label"}
        raw = without_unlabelled_test({name: take_columns(rows, names) for name, rows in raw.items()}, self.dataset)
        for name, rows in raw.items():
            empty = {i: ("text", "it is empty") for i, text in enumerate(rows["text"][:]) if not (text or "").strip()}
            raw[name] = self._usable(rows, name, {**empty, **bad_labels(rows)})
        self._set_labels(raw, config, self._has_weights)

    def _choose_text(self, features: Mapping[str, Any]) -> str:
        texts = [name for name, feature in features.items() if getattr(feature, "dtype", "").endswith("string")]
        name = self.text_column or "text"
        if name not in texts:
            raise ValueError(
                f"dataset '{self.dataset}' has no column {name} of strings; its columns of strings are "
                f"{', '.join(texts) or 'none'}: choose one with text_column"
            )
        return name

    def load_base_model(self) -> PreTrainedModel:
        """The network with one output a class. Fresh weights depend on torch's global seed."""
        if self._has_weights:
            return self._load_network(AutoModelForSequenceClassification.from_pretrained)
        config = copy.deepcopy(self._config)
        name_classes(config, self.class_names)
        return AutoModelForSequenceClassification.from_config(config)

    def save_base_model(self, model: nn.Module, folder: str | os.PathLike) -> None:
        """The network and its tokenizer."""
        super().save_base_model(model, folder)
        self.tokenizer.save_pretrained(folder)

    def load_saved(self, folder: str | os.PathLike) -> PreTrainedModel:
        """What `save_base_model` wrote."""
        return load_network(folder, AutoModelForSequenceClassification)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own, or one of the words of the training texts; it cuts texts to `max_length`."""
        if os.path.isdir(self.model) and not any(name.startswith("tokenizer") for name in os.listdir(self.model)):
            tokenizer = self._train_tokenizer()
        else:
            tokenizer = AutoTokenizer.from_pretrained(self.model)
        tokenizer.model_max_length = min(
            self.max_length, getattr(self._config, "max_position_embeddings", self.max_length)
        )
        return tokenizer

    @property
    def processor(self) -> PreTrainedTokenizerBase:  # type: ignore[override]
        """The tokenizer."""
        return self.tokenizer

    def _train_tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(WordLevel(unk_token="[UNK]"))
        tokenizer.normalizer = BertNormalizer()
        tokenizer.pre_tokenizer = BertPreTokenizer()
        trainer = WordLevelTrainer(
            vocab_size=self._config.vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False
        )
        tokenizer.train_from_iterator(self._raw["train"]["text"], trainer)
        ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="[PAD]",
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
        )

    def _prepare(self, split: Split) -> "TextSplit":
        """Texts as token ids."""
        return TextSplit(self._raw[split]["text"], self._labels(split), self.tokenizer)

    def fingerprint(self, split: Split) -> str:
        """Follows all token ids and labels."""
        tokens = self.load_split(split)
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (tokens.input_ids, tokens.attention_mask, tokens.labels):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def loss(self, call: Callable, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(self.predict(call, batch), batch["labels"])

    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        return call(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def tokenize(texts: Iterable[str], tokenizer: Callable[..., Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of texts, each of shape `(N, T)`, where T is the length of the longest."""
    tokens = tokenizer(list(texts), padding=True, padding_side="right", truncation=True, return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"]


class TextSplit(torch.utils.data.Dataset):
    """
    Tokenized texts, in memory.

    `__getitems__(indices)` returns a batch: `input_ids` and `attention_mask` of shape `(B, T)`, where T is the length
    of its longest text, and `labels` of shape `(B,)`.
    """

    def __init__(self, texts: Iterable[str], labels: torch.Tensor, tokenizer: Callable[..., Any]) -> None:
        self.input_ids, self.attention_mask = tokenize(texts, tokenizer)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        mask = self.attention_mask[indices]
        longest = int(mask.sum(1).max())
        return {
            "input_ids": self.input_ids[indices, :longest],
            "attention_mask": mask[:, :longest],
            "labels": self.labels[indices],
        }
