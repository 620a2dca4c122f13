"""What a configuration of PEFT says about its adapter, without PEFT and without the network it belongs to."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .layout import LayoutError

ADAPTER_CONFIG = "adapter_config.json"
# As PEFT names the factors of linear layers, convolutions and embeddings, in networks (`layer.lora_A.default.weight`)
# and in its files (`layer.lora_A.weight`).
FACTOR = re.compile(r"(?P<module>.*)\.(?P<kind>lora_(?:embedding_)?)(?P<letter>[AB])(?P<rest>\..*)?")
# What of a configuration is folded into the factor B: adapters that differ in nothing else do the same.
FOLDED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
# What says which tensors there are, where they come from or how they were trained, and not what they do.
_NO_EFFECT = {
    *("base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
    *("init_lora_weights", "init_weights", "lora_dropout", "rank_dropout", "module_dropout", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config", "velora_config", "runtime_config", "megatron_core"),
    *("ensure_weight_tying", "fan_in_fan_out", "qalora_group_size"),
    *("total_step", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"),
}
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_config(file: Path) -> dict[str, Any]:
    """
    The configuration of an adapter in a file of PEFT.

    Raises:
        ValueError: if it is not one.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config.get("peft_type", "LORA"), str):
            raise TypeError("peft_type is not a name")
    except (ValueError, AttributeError, TypeError, OSError) as error:
        raise ValueError(f"'{file}' is not the config of an adapter of PEFT ({error})") from error
    return config


def find_adapters(folder: Path) -> dict[str, Path]:
    """The folders of PEFT's adapters in the folder of a network, by their names."""
    folders = {"default": folder} | {child.name: child for child in sorted(folder.iterdir())}
    return {name: child for name, child in folders.items() if (child / ADAPTER_CONFIG).is_file()}


def factor_module(name: str) -> str | None:
    """The module that a factor of LoRA is added to, without PEFT's prefix; None for any other tensor."""
    match = FACTOR.fullmatch(name)
    return None if match is None else match["module"].removeprefix("base_model.model.")


def a_module(name: str) -> str | None:
    """The module of a factor A, whose first dimension is the rank; None for any other tensor."""
    match = FACTOR.fullmatch(name)
    return factor_module(name) if match and match["letter"] == "A" else None


def is_lora(config: Mapping[str, Any]) -> bool:
    return config.get("peft_type", "LORA") == "LORA"


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies the product BA of a module by."""
    if not is_lora(config):
        return 1.0
    patterns = config.get("alpha_pattern") or {}
    # The first pattern that is the end of the module's name, as in PEFT's `get_pattern_key`.
    key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = config.get("lora_alpha", 8) if key is None else patterns[key]
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def config_of_rank(config: dict[str, Any], rank: int) -> dict[str, Any]:
    """The configuration of an adapter of another rank and the same scaling."""
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise LayoutError("adapters with a rank_pattern or alpha_pattern have no other rank; import them from files")
    alpha, own = config.get("lora_alpha", 8), config.get("r", 8)
    alpha *= math.sqrt(rank / own) if config.get("use_rslora") else rank / own
    return config | {"r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha}


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON has it, without what only one release of PEFT knows."""
    plain = {}
    for name, value in config.items():
        value = sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        if value is not None and name not in ("auto_mapping", "runtime_config", "peft_version"):
            plain[name] = value
    return plain


def different_effects(config: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The settings by which the same tensors are another adapter, apart from what can be folded into them."""
    config, other = ({"peft_type": "LORA"} | dict(one) for one in (config, other))
    ignored = _NO_EFFECT | (FOLDED if is_lora(config) and is_lora(other) else set())
    return [
        name
        for name in dict.fromkeys((*config, *other))
        if name not in ignored and (config.get(name) or None) != (other.get(name) or None)
    ]


def check_same_effects(config: Mapping[str, Any], other: Mapping[str, Any], what: str, other_what: str) -> None:
    """Raises a `LayoutError` for adapters, called `what` and `other_what`, whose equal tensors are other networks."""
    for name in different_effects(config, other)[:1]:
        raise LayoutError(
            f"{what} has {name}={config.get(name)!r}, and {other_what} {name}={other.get(name)!r}; such adapters are "
            "different networks with the same tensors, so import them apart"
        )


def check_base_unchanged(config: Mapping[str, Any], what: str) -> None:
    """
    Raises a `ValueError` for an adapter that is right only beside a base model whose weights lack what was taken out of
    them when the adapter was made.
    """
    start = config.get("init_lora_weights")
    how = f"init_lora_weights={start}" if str(start).lower().startswith(_CHANGE_THE_BASE) else ""
    if how := "kasa_config" if config.get("kasa_config") else how:
        raise ValueError(
            f"adapter '{what}' belongs to a base model whose weights its {how} has changed, so that beside the plain "
            "one it is another network. Save it as plain LoRA, which PEFT does with "
            "save_pretrained(FOLDER, path_initial_model_for_weight_conversion=THE_ADAPTER_BEFORE_TRAINING)"
        )
