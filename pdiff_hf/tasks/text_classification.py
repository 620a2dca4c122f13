"""Text classification with any transformers network on any data set of texts and labels."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .dataset import empty_rows
from .labels import LabelledTask, bad_labels, find_weights, without_unlabelled_test
from .registry import register_task
from .sources import load_raw
from .task import Batch, Split, Tensors, digest

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@register_task("text_classification")
@dataclass
class TextClassificationTask(LabelledTask):
    """
    Args beyond those of [`LabelledTask`]:
        model (`str`): Local folder or Hub id of a transformers model. A local folder with a `config.json` and no
            weights gives that network with fresh weights. Where there is no tokenizer in it, the words of the training
            texts become the vocabulary, as many as the network has embeddings for.
        max_length (`int`, *optional*, defaults to 128): Texts are cut to this many tokens.
        text_column (`str`, *optional*): By default `text`.

    Raises:
        ValueError: when created, for an unknown model or data set, or one that does not fit text classification.
    """

    auto_model = AutoModelForSequenceClassification
    max_length: int = 128
    text_column: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sizes("max_length")
        config, has_weights = find_weights(self.model)
        raw = load_raw(self.dataset)
        features = raw["train"].features
        names = {self._choose_text(features): "text", (label := self._choose_label(features)): "label"}
        raw = without_unlabelled_test(raw, self.dataset, label)
        raw = self._take(raw, names, partial(empty_rows, column="text"), bad_labels)
        self._set_labels(raw, config, has_weights)

    def _choose_text(self, features: Mapping[str, Any]) -> str:
        texts = [name for name, feature in features.items() if getattr(feature, "dtype", "").endswith("string")]
        name = self.text_column or "text"
        if name not in texts:
            raise ValueError(
                f"dataset '{self.dataset}' has no column {name} of strings; its columns of strings are "
                f"{', '.join(texts) or 'none'}: choose one with text_column"
            )
        return name

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
        ids, mask = tokenize(self._raw[split]["text"], self.tokenizer)
        return TextSplit(input_ids=ids, attention_mask=mask, labels=self._labels(split))

    def fingerprint(self, split: Split) -> str:
        """Follows all token ids and labels."""
        return digest(*self.load_split(split).parts.values())

    def predict(self, call: Callable, batch: Batch) -> torch.Tensor:
        return call(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def tokenize(texts: Iterable[str], tokenizer: Callable[..., Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of texts, each of shape `(N, T)`, where T is the length of the longest."""
    tokens = tokenizer(list(texts), padding=True, padding_side="right", truncation=True, return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"]


class TextSplit(Tensors):
    """
    Tokenized texts, in memory.

    `__getitems__(indices)` returns a batch: `input_ids` and `attention_mask` of shape `(B, T)`, where T is the length
    of its longest text, and `labels` of shape `(B,)`.
    """

    def __getitem__(self, index: Any) -> Batch:
        batch = super().__getitem__(index)
        longest = int(batch["attention_mask"].sum(1).max())
        return {name: part if name == "labels" else part[:, :longest] for name, part in batch.items()}
