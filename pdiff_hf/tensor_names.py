"""The names that a tensor has elsewhere: in modules that share it, in wrappers, and in the files of PEFT."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class View:
    """
    Where a tensor lies in the memory of another one.

    Args:
        source (`str`): Name of the other tensor, which holds all values of this one.
        shape, stride (`tuple[int, ...]`): Of this tensor.
        offset (`int`): Of its first value in the memory of `source`.
        order (`tuple[int, ...]`, *optional*): The dimensions of `source` as they follow each other in memory, the
            slowest first; empty if both tensors are one and the same, None if they share a part of their memory and
            neither holds the values of the other.
    """

    source: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    order: tuple[int, ...] | None


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers under all their names."""
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def shared_tensors(model: nn.Module) -> dict[str, View]:
    """
    Where a network shares memory between tensors: for each name of a parameter or buffer that lies in the memory of
    another, where it lies. Of several that hold the same values, the first parameter is the source of the others.
    """
    tensors = named_tensors(model)
    by_storage: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.layout == torch.strided and tensor.numel():
            by_storage.setdefault(tensor.untyped_storage()._cdata, []).append(name)
    views: dict[str, View] = {}
    for names in by_storage.values():
        sources: list[str] = []
        for name in sorted(names, key=lambda name: -tensors[name].numel()):  # stable
            tensor = tensors[name]
            overlapping = [source for source in sources if _overlap(tensors[source], tensor)]
            if not overlapping:
                sources.append(name)
                continue
            source = overlapping[0]
            if _geometry(tensor) == _geometry(tensors[source]):
                order: tuple[int, ...] | None = ()
            else:
                (first, last), (own_first, own_last) = _extent(tensors[source]), _extent(tensor)
                fits = first <= own_first and own_last <= last and tensor.dtype == tensors[source].dtype
                order = _memory_order(tensors[source]) if fits else None
            if isinstance(tensor, nn.Parameter) and not isinstance(tensors[source], nn.Parameter):
                order = None  # what is generated cannot be put into the buffer
            offset = int(tensor.storage_offset() - tensors[source].storage_offset())
            views[name] = View(source, *_geometry(tensor)[:2], offset, order)
    return views


def other_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The other names of each tensor that has several, by the name that layouts call it by."""
    tied: dict[str, tuple[str, ...]] = {}
    for name, view in shared_tensors(model).items():
        if view.order == ():
            tied[view.source] = (*tied.get(view.source, ()), name)
    return tied


def _geometry(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The first and the last place in memory that a tensor uses."""
    length = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset()), int(tensor.storage_offset() + length)


def _memory_order(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions of a tensor, the slowest first, or None if it has gaps or uses a place twice."""
    stride = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: (-stride[dim], -tensor.shape[dim]))
    return tuple(order) if tensor.permute(order).is_contiguous() else None


def _overlap(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    (first, last), (other_first, other_last) = _extent(tensor), _extent(other)
    if last < other_first or other_last < first:
        return False
    if _memory_order(tensor) is not None or _memory_order(other) is not None:
        return True
    used = torch.zeros(max(last, other_last) + 1, dtype=torch.bool)
    used.as_strided(*_geometry(tensor)).fill_(True)
    return bool(used.as_strided(*_geometry(other)).any())


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
