"""Networks with adapters of PEFT: networks of transformers that hold the adapters in their own modules."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from ..utils.errors import first_line

ADAPTER_CONFIG = "adapter_config.json"
# Beside a network that is saved whole. transformers would load an adapter in the same folder, but not all kinds rightly
# (version 5.24 draws the magnitudes of DoRA anew).
ADAPTER_FOLDER = "adapter"


def has_adapters(model: nn.Module) -> bool:
    """Whether `model` is a network of transformers with adapters."""
    return hasattr(model, "peft_wrapper")


def find_base(path: str) -> str | None:
    """
    The network that an adapter belongs to, a folder or Hub id; None if `path` is not the folder or Hub id of an
    adapter.

    Raises:
        ValueError: if the adapter does not say which network it belongs to.
    """
    if not os.path.isdir(path) and path.count("/") != 1:
        return None
    try:
        file = find_adapter_config_file(path)
    except (OSError, ValueError):  # nothing there, or no connection: whoever loads the network says so
        return None
    if file is None:
        return None
    try:
        base = json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{file}' is not the config of an adapter of PEFT ({first_line(error)})") from error
    if not base:
        raise ValueError(
            f"adapter '{path}' does not say which network it belongs to (base_model_name_or_path is empty in its "
            f"{ADAPTER_CONFIG}); give that network as --model, and the adapter to --import"
        )
    return str(base)


def load_adapter(model: PreTrainedModel, path: str | os.PathLike, name: str = "default") -> PreTrainedModel:
    """
    Puts the adapter of a folder or Hub id into `model`, in place, through PEFT's own loading.

    Raises:
        ValueError: if peft is not installed, or the adapter does not fit the network or works beside it (prompts).
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(f"'{path}' is an adapter of PEFT; it needs peft: pip install peft") from error
    base = model.name_or_path
    try:
        with torch.random.fork_rng():  # adapters are drawn before they are loaded
            wrapped = PeftModel.from_pretrained(model, str(path), name, torch_device="cpu")
    except Exception as error:  # what an adapter of another network makes PEFT raise has no common type
        raise ValueError(f"adapter '{path}' does not fit {type(model).__name__} ({first_line(error)})") from error
    network = without_wrapper(wrapped)
    if network is wrapped:
        kind = wrapped.active_peft_config.peft_type.value
        raise ValueError(f"adapter '{path}' is of the kind {kind}, which works beside the network and not in it")
    for config in wrapped.peft_config.values():
        config.base_model_name_or_path = config.base_model_name_or_path or base
    return network.eval()


def without_wrapper(model: nn.Module) -> nn.Module:
    """
    The network of transformers in a `PeftModel`, which holds its adapters itself and can be saved with a pipeline; any
    other network as it is. One whose adapter works beside it (prompts) keeps its wrapper.
    """
    base_model = getattr(model, "base_model", None)
    inner = getattr(base_model, "model", None)
    if has_adapters(model) or not hasattr(model, "peft_config") or not isinstance(inner, PreTrainedModel):
        return model
    if isinstance(base_model, PreTrainedModel):  # not a tuner of PEFT: the adapter is beside the network
        return model
    inner.peft_wrapper = (model,)  # which knows how to save the adapters; a tuple, so that it is no part of the network
    return inner


def save_adapter(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Writes the adapters of a network as PEFT does: those with a name in a folder of that name."""
    # Embeddings are those of the base model.
    model.peft_wrapper[0].save_pretrained(str(folder), save_embedding_layers=False)


def save_network(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Writes a network whole: such that `from_pretrained` loads it, and its adapters, if it has any, in a folder."""
    if not has_adapters(model):
        model.save_pretrained(folder)
        return
    from peft import get_base_model_state_dict

    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.load_state_dict(get_base_model_state_dict(model.peft_wrapper[0]), assign=True)
    plain.save_pretrained(folder)
    save_adapter(model, Path(folder, ADAPTER_FOLDER))


def load_network(folder: str | os.PathLike, model_class: Any) -> PreTrainedModel:
    """What `save_network` wrote, in evaluation mode; `model_class` is the network's own, or one of the auto classes."""
    model = model_class.from_pretrained(folder)
    adapters = Path(folder, ADAPTER_FOLDER)
    if (adapters / ADAPTER_CONFIG).is_file():
        model = load_adapter(model, adapters)
    for config in sorted(adapters.glob(f"*/{ADAPTER_CONFIG}")):
        model = load_adapter(model, config.parent, config.parent.name)
    return model.eval()
