"""One adapter that has room for many: the form in which a data set of adapters has them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..layout import ParameterLayout
from ..lora import (
    ADAPTER_CONFIG,
    FACTOR,
    a_module,
    check_base_unchanged,
    check_same_effects,
    factor_module,
    is_lora,
    read_config,
)
from ..networks.adapters import AdapterWeights
from ..tensor_names import ADAPTER, PEFT_PREFIX
from .adapters import Notes
from .readers import adapter_reader, open_network


def adapter_layout(paths: Sequence[str | os.PathLike]) -> ParameterLayout:
    """
    The layout of LoRA adapters, without their base model: that of one adapter which has room for all, with the modules
    of all, the largest of their ranks, and a scaling of 1 (`r = lora_alpha`).

    Args:
        paths (`Sequence`): Folders of adapters of PEFT.

    Raises:
        ValueError: for adapters that are different networks with the same tensors, that belong to a base model with
            other weights, or that are not of LoRA.
    """
    folders = [Path(path) for path in paths]
    configs = _read_configs(folders)
    if not is_lora(configs[0]) or configs[0].get("target_parameters"):
        raise ValueError(
            f"'{folders[0]}' is not a LoRA adapter of modules: its layout is that of its base model with it"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for folder in folders:
        with open_network(folder) as tensors:
            for key in tensors:
                name, shape = key.partition("/")[2], tuple(tensors.shape(key))
                if ".lora_" in name:
                    shapes[name] = max(shapes.get(name, shape), shape)  # which differ in the rank alone
    rank = max(shape[0] for name, shape in shapes.items() if a_module(name))
    for name, shape in shapes.items():
        if (match := FACTOR.fullmatch(name)) and (dim := "AB".index(match["letter"])) < len(shape):
            shapes[name] = (*shape[:dim], rank, *shape[dim + 1 :])
    modules = dict.fromkeys(str(factor_module(name)) for name in shapes if factor_module(name))
    # In networks, the name of the adapter comes before `.weight`, which the parameters of PEFT's own layers lack.
    ends = [".weight" if name.endswith((".weight", ".lora_magnitude_vector")) else "" for name in shapes]
    names = [f"{name.removesuffix('.weight')}.default{end}" for name, end in zip(shapes, ends, strict=True)]
    return ParameterLayout(
        tuple(names),
        tuple(shapes.values()),
        ("float32",) * len(names),
        tuple((f"{ADAPTER}default/{name}",) for name in shapes),
        {"default": _canonical_config(configs, list(modules), rank)},
    )


def _read_configs(folders: Sequence[Path]) -> list[dict[str, Any]]:
    configs = [read_config(folder / ADAPTER_CONFIG) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        check_base_unchanged(config, str(folder))
        check_same_effects(config, configs[0], f"adapter '{folder}'", f"'{folders[0]}'")
    return configs


def canonical_adapter(folders: Sequence[Path], target: Path) -> Path:
    """
    Writes an adapter of [`adapter_layout`] that does what the first of several does, with all that the first has beside
    its factors.

    Args:
        folders (`Sequence[Path]`): Of adapters of PEFT.
        target (`Path`): Where it is written, if it is not the first folder, as it is for other methods than LoRA.

    Returns:
        `Path`: The adapter's folder.

    Raises:
        ValueError: as [`adapter_layout`] does.
    """
    configs = _read_configs(folders)
    if not is_lora(configs[0]) or configs[0].get("target_parameters"):
        return folders[0]
    layout = adapter_layout(folders)
    with open_network(folders[0]) as tensors:
        read = adapter_reader(layout).read(tensors, tensors.files, str(folders[0]), Notes())
        whole = {alias.partition("/")[2]: read.get(n) for n, (alias,) in zip(layout.names, layout.aliases, strict=True)}
        whole |= {n: tensors[key] for key in tensors if whole.get(n := key.partition("/")[2]) is None}
    kept = {PEFT_PREFIX + name: tensor for name, tensor in whole.items() if tensor is not None}
    AdapterWeights({"default": (layout.adapters["default"], kept)}).save_pretrained(target)
    return target


def _canonical_config(configs: Sequence[Mapping[str, Any]], modules: Sequence[str], rank: int) -> dict[str, Any]:
    """The configuration of a LoRA adapter of all `modules` with one rank and a scaling of 1."""
    narrowing = {"exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"}
    left_out = narrowing | {"use_rslora", "init_lora_weights", "loftq_config", "eva_config", "corda_config"}
    config = {name: value for name, value in configs[0].items() if name not in left_out}
    targets: list[str] = list(modules)
    if all(isinstance(c.get("target_modules"), list) and not any(c.get(name) for name in narrowing) for c in configs):
        targets = sorted({name for c in configs for name in c["target_modules"]})
    own = sorted({name for c in configs for name in c.get("modules_to_save") or ()})
    config |= {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "lora_dropout": 0.0}
    return config | ({"modules_to_save": own} if own else {})
