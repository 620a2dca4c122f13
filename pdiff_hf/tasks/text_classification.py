"""Text classification with any transformers network on any data set of texts and labels."""

import copy
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..networks.adapters import find_base, load_adapter, load_network, save_network
from .splits import check_sizes, label_settings, make_splits
from .task import Batch, ClassificationTask, Split

FILE_TYPES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@dataclass
class TextClassificationTask(ClassificationTask):
    """
    Args:
        model (`str`): Local folder or Hub id of a transformers model, or of an adapter of PEFT. A local folder with a
            `config.json` and no weights gives that network with fresh weights. Where there is no tokenizer in it, the
            words of the training texts become the vocabulary, as many as the network has embeddings for.
        dataset (`str`): A `.csv`, `.json`, `.jsonl` or `.parquet` file, a folder of them (`train.csv`, `test.csv`), or
            the Hub id of a data set, `id:config` for one of several configs; with the columns `text` and `label`.
        max_length (`int`, *optional*, defaults to 128): Texts are cut to so many tokens.
        holdout_fraction (`float`, *optional*, defaults to 0.2): Share of the training data that becomes the validation
            split, and the test split, where the data set has none; see [`~pdiff_hf.tasks.splits.make_splits`].
        max_train_samples, max_eval_samples (`int`, *optional*): Use no more than this many examples of a split.
        adapter (`str`, *optional*): Folder or Hub id of an adapter of PEFT that the model gets.

    Raises:
        ValueError: when created, for an unknown model or data set, or one that does not fit text classification.
    """

    model: str
    dataset: str
    max_length: int = 128
    holdout_fraction: float = 0.2
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    adapter: str | None = None

    def __post_init__(self):
        if base := find_base(self.model):
            self.model, self.adapter = base, self.model
        check_sizes(self, "max_length", "max_train_samples", "max_eval_samples")
        try:
            self._config = AutoConfig.from_pretrained(self.model)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model '{self.model}' is neither a folder with a transformers config.json nor a Hub id that can be "
                f"reached: {error}"
            ) from error
        raw = {name: self._name_columns(split) for name, split in self._load_raw().items()}
        self._raw = make_splits(raw, self.dataset, self.holdout_fraction, self.max_train_samples, self.max_eval_samples)
        self.class_names: list[str] = self._raw["train"].features["label"].names
        self._splits: dict[str, TextSplit] = {}

    def _load_raw(self) -> dict[str, datasets.Dataset]:
        path, config = self.dataset, None
        suffix = os.path.splitext(path)[1]
        try:
            if os.path.isfile(path) and suffix in FILE_TYPES:
                return datasets.load_dataset(FILE_TYPES[suffix], data_files={"train": path})
            if not os.path.exists(path):
                path, _, config = path.partition(":")
            return datasets.load_dataset(path, config or None)
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise ValueError(
                f"dataset '{self.dataset}' is neither a file or folder of texts nor a Hub id that can be reached: "
                f"{error}"
            ) from error

    def _name_columns(self, split: datasets.Dataset) -> datasets.Dataset:
        if not {"text", "label"} <= set(split.features) or split.features["text"].dtype not in (
            "string",
            "large_string",
        ):
            raise ValueError(
                f"dataset '{self.dataset}' needs the columns text, of strings, and label for text classification, "
                f"got {split.features}"
            )
        split = split.select_columns(["text", "label"])
        if not isinstance(split.features["label"], datasets.ClassLabel):
            split = split.class_encode_column("label")
        return split

    def load_base_model(self) -> PreTrainedModel:
        """The network with one output a class. Fresh weights depend on torch's global seed."""
        labels = label_settings(self.class_names)
        files = os.listdir(self.model) if os.path.isdir(self.model) else ["model.safetensors"]
        if any(name.startswith("model") and ".safetensors" in name for name in files):
            model = AutoModelForSequenceClassification.from_pretrained(
                self.model, **labels, dtype=torch.float32, ignore_mismatched_sizes=True
            )
            return load_adapter(model, self.adapter) if self.adapter else model
        config = copy.deepcopy(self._config)
        for name, value in labels.items():
            setattr(config, name, value)
        return AutoModelForSequenceClassification.from_config(config)

    def save_base_model(self, model: PreTrainedModel, folder: str | os.PathLike) -> None:
        """The network and its tokenizer."""
        save_network(model, folder)
        self.tokenizer.save_pretrained(folder)

    def load_saved(self, folder: str | os.PathLike) -> PreTrainedModel:
        """What `save_base_model` wrote."""
        return load_network(folder, AutoModelForSequenceClassification)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own, or one of the words of the training texts."""
        if os.path.isdir(self.model) and not any(name.startswith("tokenizer") for name in os.listdir(self.model)):
            return self._train_tokenizer()
        return AutoTokenizer.from_pretrained(self.model)

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

    def load_split(self, split: Split) -> "TextSplit":
        """Texts as token ids."""
        if split not in self._splits:
            longest = min(self.max_length, getattr(self._config, "max_position_embeddings", self.max_length))
            self._splits[split] = TextSplit(self._raw[split], self.tokenizer, longest)
        return self._splits[split]

    def fingerprint(self, split: Split) -> str:
        """Follows all token ids and labels."""
        tokens = self.load_split(split)
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (tokens.input_ids, tokens.attention_mask, tokens.labels):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def collate(examples: Batch) -> Batch:
        """`TextSplit` returns whole batches."""
        return examples

    @staticmethod
    def loss(call: Callable, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(TextClassificationTask.predict(call, batch), batch["labels"])

    @staticmethod
    def predict(call: Callable, batch: Batch) -> torch.Tensor:
        return call(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


class TextSplit(torch.utils.data.Dataset):
    """
    Tokenized texts, in memory.

    `__getitems__(indices)` returns a batch: `input_ids` and `attention_mask` of shape `(B, T)`, where T is the length
    of its longest text, and `labels` of shape `(B,)`.
    """

    def __init__(self, raw: datasets.Dataset, tokenizer: Callable[..., Any], max_length: int):
        tokens = tokenizer(
            list(raw["text"]),
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        self.input_ids, self.attention_mask = tokens["input_ids"], tokens["attention_mask"]  # (N, T)
        self.labels = torch.as_tensor(raw["label"][:])

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
