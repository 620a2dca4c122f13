"""One adapter that has room for many: the form in which a data set of adapters has them."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..layout import ParameterLayout
from ..lora import FACTOR, a_module, check_base_unchanged, different_effects, factor_module, is_lora
from ..tensor_names import ADAPTER, PEFT_PREFIX
from .adapters import ADAPTER_CONFIG, ADAPTER_FILES, Notes, read_config
from .readers import adapter_reader, open_tensors


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
        with open_tensors(folder) as tensors:
            for key in tensors:
                name, shape = key.partition("/")[2], tuple(tensors.shape(key))
                if ".lora_" in name:
                    shapes[name] = max(shapes.get(name, shape), shape)  # which differ in the rank alone
    rank = max(shape[0] for name, shape in shapes.items() if a_module(name))
    for name, shape in shapes.items():
        if (match := FACTOR.fullmatch(name)) and (dim := "AB".index(match["letter"])) < len(shape):
            shapes[name] = (*shape[:dim], rank, *shape[dim + 1 :])
    modules = dict.fromkeys(str(factor_module(name)) for name in shapes if factor_module(name))
    names = [f"{n.removesuffix('.weight')}.default" + (".weight" if _is_module(n) else "") for n in shapes]
    return ParameterLayout(
        tuple(names),
        tuple(shapes.values()),
        ("float32",) * len(names),
        tuple((f"{ADAPTER}default/{name}",) for name in shapes),
        {"default": _canonical_config(configs, list(modules), rank)},
    )


def _is_module(name: str) -> bool:
    """Whether a tensor of a file is the weight of a module in the network, whose name comes before it there."""
    return name.endswith((".weight", ".lora_magnitude_vector"))


def _read_configs(folders: Sequence[Path]) -> list[dict[str, Any]]:
    configs = [read_config(folder / ADAPTER_CONFIG) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        check_base_unchanged(config, str(folder))
        if different := different_effects(configs[0], config):
            name = different[0]
            raise ValueError(
                f"adapter '{folder}' has {name}={config.get(name)!r}, and '{folders[0]}' "
                f"{name}={configs[0].get(name)!r}; adapters of one data set must do the same with their tensors"
            )
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
    with open_tensors(folders[0]) as tensors:
        read = adapter_reader(layout).read(tensors, tensors.files, str(folders[0]), Notes())
        whole = {alias.partition("/")[2]: read.get(n) for n, (alias,) in zip(layout.names, layout.aliases, strict=True)}
        whole |= {n: tensors[key] for key in tensors if whole.get(n := key.partition("/")[2]) is None}
    target.mkdir(parents=True, exist_ok=True)
    config = json.dumps(layout.adapters["default"], indent=2, sort_keys=True)
    (target / ADAPTER_CONFIG).write_text(config, encoding="utf-8")
    kept = {PEFT_PREFIX + name: tensor.contiguous() for name, tensor in whole.items() if tensor is not None}
    save_file(kept, target / ADAPTER_FILES[0], {"format": "pt"})
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
