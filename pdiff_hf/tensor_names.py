"""The names that a tensor has elsewhere: in modules that share it, in wrappers, and in the files of PEFT."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .layout import LayoutError, ParameterLayout
from .lora import plain_config

# Modules that wrappers put around others, anywhere in a network: torch.compile, FSDP, activation checkpointing.
INNER_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What wrappers put around a whole network: data parallelism and EMA, PEFT, transformers (timm), Lightning.
OUTER_WRAPPERS = (("base_model", "model"), ("module",), ("timm_model",), ("model",))
# What PEFT puts before the names of a network's modules, in the network and in its files.
PEFT_PREFIX = "base_model.model."
# Aliases with this prefix, followed by `ADAPTER/NAME`, are names in the files of PEFT.
ADAPTER = "adapter:"


def plain_name(name: str) -> str:
    """`name` without the prefixes of wrappers, of any number and in any order."""
    parts = [part for part in name.split(".") if part not in INNER_WRAPPERS]
    while wrapper := next((w for w in OUTER_WRAPPERS if tuple(parts[: len(w)]) == w and len(parts) > len(w)), None):
        parts = parts[len(wrapper) :]
    return ".".join(parts)


def match_names(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """
    For each of `names` the one of `others` that is the same name: an equal one, or the only one that is equal without
    the prefixes of wrappers.

    Raises:
        LayoutError: if `others` has several such names for one of `names`.
    """
    names, others = list(names), list(others)
    known = set(others)
    matched = {name: name for name in names if name in known}
    ambiguous = Counter(map(plain_name, names))
    by_plain_name: dict[str, list[str]] = {}
    for other in others:
        by_plain_name.setdefault(plain_name(other), []).append(other)
    for name in names:
        candidates = by_plain_name.get(plain_name(name), [])
        if name in matched or not candidates or ambiguous[plain_name(name)] > 1:
            continue
        if len(candidates) > 1:
            raise LayoutError(f"both '{candidates[0]}' and '{candidates[1]}' could be tensor '{name}'")
        matched[name] = candidates[0]
    return matched


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers under all their names."""
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def tied_names(model: nn.Module, selected: Iterable[str] = ()) -> dict[str, str]:
    """
    For each further name of a parameter or buffer that has several, the first one, by which layouts call it.

    Raises:
        LayoutError: if one of the `selected` tensors shares a part of its memory with another one, such as a row or the
            transpose of it, which other values could not reach.
    """
    tensors, by_storage = named_tensors(model), dict[int, list[str]]()
    tied: dict[str, str] = {}
    partly: list[tuple[str, str]] = []
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or not tensor.numel():
            continue
        others = by_storage.setdefault(tensor.untyped_storage()._cdata, [])
        place = (*_geometry(tensor), tensor.dtype)
        if same := [other for other in others if (*_geometry(tensors[other]), tensors[other].dtype) == place]:
            tied[name] = same[0]
        else:
            partly += [(other, name) for other in others if _overlap(tensors[other], tensor)]
            others.append(name)
    wanted = {tied.get(name, name) for name in selected}
    if found := next((pair for pair in partly if wanted & set(pair)), None):
        raise LayoutError(
            f"'{found[0]}' and '{found[1]}' share a part of their memory, and are not the same tensor; leave both out "
            "of the selection"
        )
    return tied


def _geometry(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def _overlap(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the places in memory between the first and the last one that each uses meet; in bytes."""
    ends = []
    for one in (tensor, other):
        start = int(one.storage_offset())
        last = start + sum((size - 1) * stride for size, stride in zip(one.shape, one.stride(), strict=True))
        ends.append((start * one.element_size(), (last + 1) * one.element_size()))
    (first, end), (other_first, other_end) = ends
    return first < other_end and other_first < end


def adapter_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """
    What PEFT calls the tensors of its adapters in its files, by their names in the network: `adapter:NAME/FILE_NAME`
    with the name of the adapter, and the name in the file without PEFT's prefix. Empty for a network without adapters.
    """
    wrapper, adapters = _peft(model)
    if not adapters:
        return {}
    from peft import get_peft_model_state_dict

    def place(tensor: torch.Tensor) -> tuple:
        return (tensor.untyped_storage()._cdata, *_geometry(tensor))

    names: dict[str, tuple[str, ...]] = {}
    own = model.state_dict()
    by_memory = {place(tensor): name for name, tensor in reversed(own.items())}
    for adapter in adapters:
        # Embeddings that PEFT saves along have their own names.
        saved = get_peft_model_state_dict(wrapper, adapter_name=adapter, save_embedding_layers=False)
        for file_name, tensor in saved.items():
            found = by_memory.get(place(tensor))
            if found is None:  # PEFT copies the embeddings of prompts
                equal = [n for n, other in own.items() if other.shape == tensor.shape and other.equal(tensor)]
                found = equal[0] if len(equal) == 1 else None
            if found is not None:
                names[found] = (*names.get(found, ()), f"{ADAPTER}{adapter}/{file_name.removeprefix(PEFT_PREFIX)}")
    return names


def adapter_configs(model: nn.Module) -> dict[str, dict]:
    """The configurations of a network's adapters of PEFT as JSON has them, by the adapters' names."""
    return {name: plain_config(config.to_dict()) for name, config in _peft(model)[1].items()}


def _peft(model: nn.Module) -> tuple[nn.Module, Mapping[str, Any]]:
    """What knows the adapters of a network, see `without_wrapper` in networks/adapters.py, and their configurations."""
    (wrapper,) = getattr(model, "peft_wrapper", (model,))
    adapters = getattr(wrapper, "peft_config", None)
    return wrapper, adapters if isinstance(adapters, Mapping) else {}


def file_name(alias: str) -> str:
    """The name in PEFT's files, with PEFT's prefix, that an alias stands for."""
    name = alias.partition("/")[2]
    return name if name.startswith("base_model.") else PEFT_PREFIX + name


def adapter_file_names(layout: ParameterLayout) -> dict[str, str]:
    """By the names of a layout, what PEFT calls the tensors of an adapter in its files, with PEFT's prefix."""
    return {
        name: file_name(alias)
        for name, aliases in zip(layout.names, layout.aliases, strict=True)
        for alias in aliases
        if alias.startswith(ADAPTER)
    }
