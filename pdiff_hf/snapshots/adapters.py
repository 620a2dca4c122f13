"""
Adapters as files: what each does to its base model, in the terms of one layout and without the base model.

A LoRA adapter adds `scaling · B A` to a weight. The scaling (`lora_alpha`, `use_rslora`, `alpha_pattern`) is folded
into B, a smaller rank is filled up with zeros, and a module without an adapter has factors of zeros: the effects are
the same.
"""

import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open

from ..layout import LayoutError
from ..lora import ADAPTER_CONFIG, FACTOR, a_module, check_same_effects, factor_module, is_lora, read_config, scaling
from ..tensor_names import ADAPTER, match_names, plain_name

logger = logging.getLogger(__name__)

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# As `save_lora_weights` of diffusers' pipelines calls its file.
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
# What diffusers and kohya put before the names of a pipeline's network.
_NETWORKS = re.compile(r"^(?:(unet|transformer)\.|lora_unet_|lora_transformer_)")
# How else factors are called: by kohya, and by earlier releases of diffusers.
_OTHER_NAMES = (
    (re.compile(r"\.processor\.(to_[a-z]+)_lora\.(down|up)\b"), r".\1.lora_\2"),
    (re.compile(r"\.lora\.(down|up)\b"), r".lora_\1"),
    (re.compile(r"\.to_out\.lora_"), ".to_out.0.lora_"),
    (re.compile(r"\.lora_(linear_layer\.)?down\b"), ".lora_A"),
    (re.compile(r"\.lora_(linear_layer\.)?up\b"), ".lora_B"),
)
_ALPHA = re.compile(r"(.*)\.alpha")


@dataclass
class AdapterFile:
    """
    What the file of an adapter says of itself: nothing, if it has neither.

    Args:
        config (`dict`, *optional*): Of PEFT.
        alphas (`dict`, *optional*): Of kohya, by modules.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    def scaling(self, module: str, rank: int) -> float:
        """What the product BA of a module of that rank is multiplied by."""
        return self.alphas.get(module, rank) / rank if self.alphas else scaling(self.config, module, rank)


@dataclass
class Notes:
    """What was done to adapters so that they fit one layout: for each, the files."""

    done: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    left_out: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    copies: dict[str, str] = field(default_factory=dict)
    base_models: Counter = field(default_factory=Counter)

    def report(self) -> dict[str, Any]:
        """For the record of an import; empty if nothing was done. Warns of what may make other networks."""
        done = {kind: sorted(files) for kind, files in self.done.items()}
        counts = [len(done.get(kind, ())) for kind in ("scaled", "padded", "modules_absent")]
        if any(counts):
            logger.info(
                "adapters: %d with another scaling, which is folded into B; %d of a smaller rank, filled up with "
                "zeros; %d without some of the modules, where they do nothing",
                *counts,
            )
        if unknown := done.get("scaling_unknown"):
            logger.warning(
                f"{len(unknown)} adapters (such as '{unknown[0]}') have no {ADAPTER_CONFIG}, which says how their "
                "factors are scaled; they are taken to be scaled as the base model's adapter"
            )
        if renamed := done.get("renamed"):
            logger.warning(
                f"{len(renamed)} networks (such as '{renamed[0]}') have other names for their tensors, which are taken "
                "in the order of their layers: all have the shapes of the base model's"
            )
        for copy, first in self.copies.items():
            logger.warning(f"'{copy}' is left out: it equals '{first}' in every parameter")
        for name, files in sorted(self.left_out.items())[:3]:
            logger.warning(
                f"tensor '{name}' of {len(files)} adapters (such as '{min(files)}') is not used: the base model has no "
                "such tensor among those that are selected or stay as they are. With it they may be other networks"
            )
        several = len({Path(name).name for name in self.base_models}) > 1
        if several:
            bases = ", ".join(f"'{name}' ({count})" for name, count in self.base_models.most_common(4))
            logger.warning(f"the adapters were trained for different base models, {bases}, and are used with one")
        left_out = {name: sorted(files) for name, files in self.left_out.items()}
        base_models = dict(self.base_models) if several else {}
        found = done | {"left_out": left_out, "copies": self.copies, "base_models": base_models}
        return {name: value for name, value in found.items() if value}


def is_adapter(names: Iterable[str]) -> bool:
    """Whether tensors are those of the file of a LoRA adapter, whoever has written it."""
    names = [_peft_name(name) for name in names if not _ALPHA.fullmatch(name)]
    # In networks, the name of the adapter comes after the letter.
    factors = [name for name in names if (m := FACTOR.fullmatch(name)) and m["rest"] in (None, ".weight")]
    return len(factors) > len(names) / 2


def describe_file(file: Path, tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> tuple[dict, AdapterFile]:
    """
    The file of an adapter: by the names in it, what PEFT would call the tensors; and how they are scaled.

    Args:
        names (`Iterable[str]`): Of the factors of a layout, which tell what is meant by kohya's names of modules, in
            which dots are underscores.
    """
    modules = {m.replace(".", "_"): m for name in names if (m := factor_module(name))}
    renamed, description = {}, AdapterFile(_config_of(file))
    for name in tensors:
        if alpha := _ALPHA.fullmatch(name):
            description.alphas = {**description.alphas, _module(alpha[1], modules): float(tensors[name])}
        elif match := FACTOR.fullmatch(_peft_name(name)):
            rest = f".{match['kind']}{match['letter']}{match['rest'] or ''}"
            renamed[name] = _module(match["module"], modules) + rest
        else:
            renamed[name] = _NETWORKS.sub("", name)
    return renamed, description


def _config_of(file: Path) -> dict[str, Any]:
    """The configuration beside the file of an adapter, or in it; empty if there is none."""
    if has_config(file):
        return read_config(file.with_name(ADAPTER_CONFIG))
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, framework="pt") as opened:
        saved = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    return {_NETWORKS.sub("", key): value for key, value in saved.items() if _NETWORKS.match(key)}


def has_config(file: Path) -> bool:
    """Whether a file is one that PEFT has written into a folder of its own."""
    return file.name in ADAPTER_FILES and file.with_name(ADAPTER_CONFIG).is_file()


def _peft_name(name: str) -> str:
    for pattern, replacement in _OTHER_NAMES:
        name = pattern.sub(replacement, name)
    return name


def _module(name: str, modules: Mapping[str, str]) -> str:
    short = _NETWORKS.sub("", name)
    return modules.get(short, short)


def match_tensors(keys: Iterable[str], names: Sequence[str], aliases: Sequence[Sequence[str]]) -> dict[str, str]:
    """
    For each of the names of a network's tensors that a file has, by itself or by one of its aliases, the name in the
    file; those in the files of adapters begin with `adapter:NAME/`.
    """
    keys = list(keys)
    matched = match_names(names, keys)
    in_files = {(_split(key)[0], plain_name(_split(key)[1])): key for key in keys if key.startswith(ADAPTER)}
    theirs = {adapter for adapter, _ in in_files}
    ours = {_split(alias)[0] for others in aliases for alias in others if alias.startswith(ADAPTER)} or {"default"}
    # What an adapter is called is up to who loads it.
    called = dict(zip(ours, theirs, strict=True)) if len(ours) == len(theirs) == 1 else {name: name for name in ours}
    shared = {}
    for name, others in zip(names, aliases, strict=True):
        if name in matched:
            continue
        of_adapters = [_split(alias) for alias in others if alias.startswith(ADAPTER)]
        for adapter, own in of_adapters or [("default", without_adapter(name))]:
            if key := in_files.get((called.get(adapter, adapter), plain_name(own))):
                matched[name] = key
            elif of_adapters and not theirs:  # the file of another kind of adapter, without its folder
                shared[own] = name
        shared |= {alias: name for alias in others if not alias.startswith(ADAPTER)}
    found = match_names([alias for alias, name in shared.items() if name not in matched], keys)
    return {shared[alias]: key for alias, key in found.items()} | matched


def without_adapter(name: str) -> str:
    """What PEFT's files call a factor of a network: without the name of the adapter."""
    match = FACTOR.fullmatch(name)
    if match is None or match["rest"] is None:
        return name
    weight = ".weight" if match["rest"].endswith(".weight") else ""
    return f"{match['module']}.{match['kind']}{match['letter']}{weight}"


def _split(name: str) -> tuple[str, str]:
    """The adapter and the name in its file, of a name in the terms of `adapter_names`."""
    adapter, _, file_name = name.removeprefix(ADAPTER).partition("/")
    return adapter, file_name


class AdapterReader:
    """
    Reads the tensors of adapters as a network with adapters of its own has them.

    Args:
        names, shapes, aliases: Of the network's tensors.
        adapters (`Mapping[str, dict]`): The configurations of its adapters; if empty, those of the first adapter that
            is read.
    """

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
        aliases: Sequence[Sequence[str]],
        adapters: Mapping[str, dict],
    ):
        self.shapes = dict(zip(names, shapes, strict=True))
        self.names, self.aliases, self.adapters = names, aliases, dict(adapters)
        self.ranks = {module: self.shapes[name][0] for name in names if (module := a_module(name))}

    def read(
        self, tensors: Mapping[str, torch.Tensor], files: Mapping[str, AdapterFile], what: str, notes: Notes
    ) -> dict[str, torch.Tensor]:
        """
        Those of the tensors that a file or network has, with what they do in this one. Tensors of another shape that
        cannot be made to fit stay as they are.

        Args:
            files (`Mapping[str, AdapterFile]`): What the adapters among them say of themselves, by their names.
            what (`str`): What the file is called in notes.

        Raises:
            LayoutError: for an adapter that does other things with its factors.
        """
        matched = match_tensors(tensors, self.names, self.aliases)
        self.adapters = self.adapters or {n: dict(file.config) for n, file in files.items() if file.config}
        adapter_of = {name: _split(key)[0] for name, key in matched.items() if key.startswith(ADAPTER)}
        for adapter in dict.fromkeys(adapter_of.values()):
            own, theirs = self._config(adapter), files.get(adapter, AdapterFile()).config
            if own and theirs:
                check_same_effects(theirs, own, "its adapter", "the base model's adapter")
        read = {}
        for name, key in matched.items():
            adapter, tensor = adapter_of.get(name, ""), tensors[key]
            file, match = files.get(adapter), FACTOR.fullmatch(name)
            if file is not None and match is not None:
                tensor = self._fitted(tensor, name, match["letter"], file, self._config(adapter), what, notes)
            read[name] = tensor
        present = {factor_module(name) for name in adapter_of} - {None}
        for name in self.names if present else ():
            if name not in read and factor_module(name) and factor_module(name) not in present:
                read[name] = torch.zeros(self.shapes[name])
                notes.done["modules_absent"].add(what)
        return read

    def unused(self, tensors: Iterable[str], *others: "AdapterReader") -> list[str]:
        """What the files of adapters hold that neither this network nor others have a place for."""
        keys = [key for key in tensors if key.startswith(ADAPTER)]
        used = {key for r in (self, *others) for key in match_tensors(keys, r.names, r.aliases).values()}
        return [_split(key)[1] for key in keys if key not in used]

    def _config(self, adapter: str) -> Mapping[str, Any]:
        """Of the network's adapter of that name, or of its only one."""
        only = next(iter(self.adapters.values())) if len(self.adapters) == 1 else {}
        return self.adapters.get(adapter, only)

    def _fitted(
        self,
        tensor: torch.Tensor,
        name: str,
        letter: str,
        file: AdapterFile,
        own: Mapping[str, Any],
        what: str,
        notes: Notes,
    ) -> torch.Tensor:
        """The factor `name` of an adapter, scaled as this network's adapter scales it, and of its rank."""
        module, shape, dim = str(factor_module(name)), self.shapes[name], "AB".index(letter)
        rank = tensor.shape[dim] if tensor.ndim > dim else self.ranks.get(module, 1)
        if not file.config and not file.alphas:
            notes.done["scaling_unknown"].add(what)
        elif own and letter == "B":
            ratio = file.scaling(module, rank) / scaling(own, module, self.ranks.get(module, rank))
            if ratio != 1:
                tensor = tensor.float() * ratio
                notes.done["scaled"].add(what)
        is_smaller = len(shape) > dim and rank < shape[dim] and is_lora(file.config)
        if is_smaller and (*tensor.shape[:dim], shape[dim], *tensor.shape[dim + 1 :]) == shape:
            if file.config.get("target_parameters"):
                raise LayoutError(f"tensor '{name}' belongs to experts, whose ranks must be the same")
            notes.done["padded"].add(what)
            return F.pad(tensor, [0, 0] * (tensor.ndim - 1 - dim) + [0, shape[dim] - rank])
        return tensor
