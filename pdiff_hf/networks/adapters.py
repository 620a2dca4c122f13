"""Networks with adapters of PEFT: networks of transformers or diffusers that hold the adapters in their own modules."""

import inspect
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import ModelMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from ..layout import ParameterLayout
from ..lora import (
    ADAPTER_CONFIG,
    check_base_unchanged,
    config_of_rank,
    find_adapters,
    plain_config,
    read_config,
)
from ..tensor_names import ADAPTER, PEFT_PREFIX, adapter_configs, adapter_names, file_name

# Beside a network that is saved whole. transformers would load an adapter in the same folder, but not all kinds rightly
# (version 5.24 draws the magnitudes of DoRA anew).
ADAPTER_FOLDER = "adapter"
# Where PEFT has put the modules that its own have replaced.
INSIDE = re.compile(r"\.(base_layer|original_module|token_adapter)(?=\.)")
# In place of the weights of a network that the Hub has: its id, revision, class and type.
REFERENCE = "reference.json"


def has_adapters(model: nn.Module | None) -> bool:
    """Whether `model` is a network of transformers or diffusers that holds adapters."""
    return isinstance(model, PreTrainedModel | ModelMixin) and bool(adapter_configs(model))


def adapter_config(path: str | os.PathLike) -> dict[str, Any]:
    """The config of an adapter of PEFT, of a folder or Hub id; empty if there is none."""
    file = find_adapter_config_file(str(path))
    return {} if file is None else read_config(Path(file))


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
    base = read_config(Path(file)).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"adapter '{path}' does not say which network it belongs to (base_model_name_or_path is empty in its "
            f"{ADAPTER_CONFIG}); give that network as --model, and the adapter to --import"
        )
    return str(base)


def widen_adapters(model: nn.Module, rank: int) -> None:
    """
    Fills up the adapters in a network with zeros to a rank, in place, which changes nothing of what it computes.

    Raises:
        ValueError: if they have a higher one, or several, or are those of embeddings.
    """
    if any(".lora_embedding_" in name for name, _ in model.named_parameters()):
        raise ValueError("adapters of embeddings have no other rank")
    wrappers: Any = getattr(model, "peft_wrapper", (model,))
    (wrapper,) = wrappers
    for config in wrapper.peft_config.values():
        of_rank = config_of_rank(plain_config(config.to_dict()), rank)
        config.r, config.lora_alpha = of_rank["r"], of_rank["lora_alpha"]
    for module in model.modules():
        for letter, axis in (("A", 0), ("B", 1)):
            for factor in getattr(module, f"lora_{letter}", {}).values():
                own = factor.weight.shape[axis]
                if own > rank:
                    raise ValueError(f"an adapter of rank {own} cannot get the rank {rank}")
                padding = (0, 0) * (factor.weight.ndim - 1 - axis) + (0, rank - own)
                factor.weight = nn.Parameter(F.pad(factor.weight.detach(), padding))


def load_adapter(model: Any, path: str | os.PathLike, name: str = "default") -> Any:
    """
    Puts the adapter of a folder or Hub id into `model`, in place, through PEFT's own loading.

    Raises:
        ValueError: if peft is not installed, or the adapter does not fit the network or works beside it (prompts).
    """
    try:
        from peft import PeftConfig, PeftModel, set_peft_model_state_dict
    except ImportError as error:
        raise ValueError(f"'{path}' is an adapter of PEFT; it needs peft: pip install peft") from error
    base = model.name_or_path if isinstance(model, PreTrainedModel) else None
    check_base_unchanged(adapter_config(path), str(path))
    try:
        with torch.random.fork_rng():  # adapters are drawn before they are loaded
            if isinstance(model, ModelMixin):
                model.add_adapter(PeftConfig.from_pretrained(str(path)), name)
                tensors = load_file(Path(path, "adapter_model.safetensors"))
                tensors = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
                left = set_peft_model_state_dict(model, tensors, name).unexpected_keys  # type: ignore[attr-defined]
                if left:
                    raise ValueError(f"the network has no {left[0]}")
                return model.eval()
            with warnings.catch_warnings():
                # Of a network with other layers, whose adapter would stay as it was drawn.
                warnings.filterwarnings("error", ".*missing adapter keys", UserWarning)
                wrapped = PeftModel.from_pretrained(model, str(path), name, torch_device="cpu")
    except Exception as error:  # what an adapter of another network makes PEFT raise has no common type
        # PEFT says in lines of its own which tensors are too large.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"adapter '{path}' does not fit {type(model).__name__} ({reason:.600})") from error
    network = without_wrapper(wrapped)
    if network is wrapped:
        kind = wrapped.active_peft_config.peft_type.value
        raise ValueError(f"adapter '{path}' is of the kind {kind}, which works beside the network and not in it")
    for config in wrapped.peft_config.values():
        config.base_model_name_or_path = config.base_model_name_or_path or base
    return network.eval()


def add_adapters(model: Any, configs: Mapping[str, dict]) -> Any:
    """
    Puts adapters of the given configurations into a network of transformers or diffusers, in place; they change nothing
    of what it computes.
    """
    from peft import PeftConfig, get_peft_model

    with torch.random.fork_rng():
        for name, values in configs.items():
            config = PeftConfig.from_peft_type(**{k: v for k, v in values.items() if k != "peft_version"})
            if isinstance(model, ModelMixin):
                model.add_adapter(config, name)
            elif hasattr(model, "peft_wrapper"):
                model.peft_wrapper[0].add_adapter(name, config)
            else:
                model = without_wrapper(get_peft_model(model, config, adapter_name=name))
    return model.eval()


def with_adapters(model: Any, layout: ParameterLayout) -> Any:
    """
    `model` with the adapters whose tensors a layout has, in place: those that were saved beside it, or new ones if the
    layout has all of their tensors. Unchanged if it has them already, or there are none.

    Raises:
        ValueError: if the layout does not have all, and they were not saved beside the network.
    """
    if not isinstance(model, PreTrainedModel | ModelMixin) or adapter_configs(model):
        return model
    if set(layout.names) <= model.state_dict().keys():
        return model
    folder = Path(getattr(model, "name_or_path", None) or getattr(model.config, "_name_or_path", "") or "")
    if (folder / ADAPTER_FOLDER).is_dir():
        return _load_beside(model, folder)
    if not layout.adapters:
        return model
    model = add_adapters(model, layout.adapters)
    missing = [name for name in adapter_names(model) if name not in layout.names]
    if missing:
        raise ValueError(
            f"the base model's adapter has tensors that are not generated, such as '{missing[0]}', and its files are "
            "missing; load the generator with PDiffPipeline.from_pretrained"
        )
    return model


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


@dataclass
class AdapterWeights:
    """
    Adapters of one network, without the network.

    Args:
        adapters (`dict`): By the names of the adapters, the configuration of each, and its tensors by the names that
            PEFT's files have for them.
        component (`str`, *optional*): What diffusers calls the network in a pipeline, `unet` or `transformer`, if it is
            one of diffusers.
    """

    adapters: dict[str, tuple[dict, dict[str, torch.Tensor]]]
    component: str | None = None

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """
        Writes a folder that `PeftModel.from_pretrained` reads, or one for each adapter with a name; for a network of
        diffusers, also the file that `load_lora_weights` reads.
        """
        for name, (config, tensors) in self.adapters.items():
            place = Path(folder) if name == "default" else Path(folder, name)
            place.mkdir(parents=True, exist_ok=True)
            settings = {"inference_mode": True} | config
            (place / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
            tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
            save_file(tensors, place / "adapter_model.safetensors", {"format": "pt"})
            base = config.get("base_model_name_or_path")
            named = f"base_model: {base}\n" if base and is_hub_id(base) else ""
            (place / "README.md").write_text(
                f"---\n{named}library_name: peft\ntags:\n- pdiff-hf\n- neural-network-weights\n---\n"
                "An adapter that was generated with pdiff_hf.\n",
                encoding="utf-8",
            )
            if self.component:
                own = {f"{self.component}.{key.removeprefix(PEFT_PREFIX)}": tensor for key, tensor in tensors.items()}
                described = {f"{self.component}.{key}": value for key, value in config.items()}
                metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(described, sort_keys=True)}
                save_file(own, place / "pytorch_lora_weights.safetensors", metadata)


def is_hub_id(name: str) -> bool:
    """Whether a name can be an id on the Hub, and is no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def adapter_weights(
    layout: ParameterLayout | None, tensors: Mapping[str, torch.Tensor], model: nn.Module | None = None
) -> AdapterWeights:
    """
    Generated adapters, or those of a network.

    Args:
        layout (`ParameterLayout`, *optional*), tensors (`Mapping[str, torch.Tensor]`): What is generated.
        model (`nn.Module`, *optional*): The base model, for what its adapters have beside the tensors of the layout,
            and for configurations that a layout of an older release lacks.
    """
    names = {} if layout is None else dict(zip(layout.names, layout.aliases, strict=True))
    configs, everything = {} if layout is None else dict(layout.adapters), dict(tensors)
    if model is not None:
        of_model, state = adapter_names(model), model.state_dict()
        names, configs = names | of_model, configs or adapter_configs(model)
        everything = {name: state[name] for name in of_model} | everything
    if not configs:
        raise ValueError("this generator is not one of adapters, or of an older release without its base model")
    found: dict[str, tuple[dict, dict[str, torch.Tensor]]] = {name: (config, {}) for name, config in configs.items()}
    for name, aliases in names.items():
        for alias in aliases:
            adapter = alias.removeprefix(ADAPTER).partition("/")[0]
            if alias.startswith(ADAPTER) and adapter in found:
                found[adapter][1][file_name(alias)] = everything[name]
    of_diffusers = isinstance(model, ModelMixin) or any(".transformer_blocks." in name for name in names)
    is_unet = any(name.startswith(("down_blocks.", "mid_block.", "up_blocks.")) for name in names)
    return AdapterWeights(found, ("unet" if is_unet else "transformer") if of_diffusers else None)


def save_adapter(model: nn.Module, folder: str | os.PathLike) -> None:
    """Writes the adapters of a network as PEFT does: those with a name in a folder of that name."""
    AdapterWeights(adapter_weights(None, {}, model).adapters).save_pretrained(folder)


def plain_network(model: Any) -> Any:
    """A network of the same weights without its adapters."""
    with torch.device("meta"):
        is_own = isinstance(model, PreTrainedModel)
        plain = type(model)(model.config) if is_own else type(model).from_config(model.config)
    state = {INSIDE.sub("", name): tensor for name, tensor in model.state_dict().items()}
    plain.load_state_dict({name: state[name] for name in plain.state_dict() if name in state}, assign=True)
    return plain


def save_network(model: Any, folder: str | os.PathLike) -> None:
    """
    Writes a network: such that `from_pretrained` loads it, and its adapters, if it has any, in a folder. Of a network
    with adapters that is on the Hub with the same weights, only where that is (see [`find_reference`]).
    """
    if not has_adapters(model):
        model.save_pretrained(folder)
        return
    reference = find_reference(model)
    if reference is None:
        plain_network(model).save_pretrained(folder)
    else:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, REFERENCE).write_text(json.dumps(reference, indent=2), encoding="utf-8")
    save_adapter(model, Path(folder, ADAPTER_FOLDER))


def load_network(folder: str | os.PathLike, model_class: Any, **kwargs: Any) -> Any:
    """What `save_network` wrote, in evaluation mode; `model_class` is the network's own, or one of the auto classes."""
    reference = Path(folder, REFERENCE)
    if reference.is_file():
        model = load_reference(json.loads(reference.read_text(encoding="utf-8")), **kwargs)
    else:
        model = model_class.from_pretrained(folder, **kwargs)
    return _load_beside(model, Path(folder))


def _load_beside(model: Any, folder: Path) -> Any:
    """Puts the adapters that were saved beside a network into it."""
    adapters = folder / ADAPTER_FOLDER
    for name, place in find_adapters(adapters).items() if adapters.is_dir() else ():
        model = load_adapter(model, place, name)
    return model.eval()


def find_reference(model: Any) -> dict[str, str] | None:
    """
    Where on the Hub a network with adapters is, without them: `id`, `revision`, `class` and `dtype`, and of a network
    of diffusers the `subfolder` of a pipeline that it is in. None unless it was loaded from there and all of its
    weights are those of the files in the Hub's cache, which are compared one at a time; a fresh head, say, is nowhere
    else.
    """
    if not isinstance(model, PreTrainedModel | ModelMixin):
        return None
    name = getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "")
    revision = getattr(model.config, "_commit_hash", None)
    if not name or not is_hub_id(name):
        return None
    try:
        cached = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns="*.safetensors"))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    folders = [cached, *(path for path in sorted(cached.iterdir()) if path.is_dir() and isinstance(model, ModelMixin))]
    state = plain_network(model).state_dict()
    folder = next((folder for folder in folders if _has_weights(folder, state)), None)
    if folder is None:
        return None
    # The revision is the commit, whatever it was asked for by.
    dtype = str(model.dtype).removeprefix("torch.")
    found = {"id": name, "revision": cached.name, "class": type(model).__name__, "dtype": dtype}
    return found if folder == cached else found | {"subfolder": folder.name}


def _has_weights(folder: Path, state: Mapping[str, torch.Tensor]) -> bool:
    """Whether the files in a folder hold all tensors of a state dict, some of which may share memory."""
    places: dict[str, bool] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in set(opened.keys()) & state.keys():
                places[key] = places.get(key) or opened.get_tensor(key).to(state[key]).equal(state[key])
    by_memory = {tensor.data_ptr() for name, tensor in state.items() if places.get(name)}
    return all(places.get(name, tensor.data_ptr() in by_memory) for name, tensor in state.items() if tensor.numel())


def load_reference(reference: Mapping[str, str], **kwargs: Any) -> PreTrainedModel | ModelMixin:
    """
    The network that `find_reference` has found, from the Hub or its cache; `kwargs` are those of `from_pretrained`,
    such as `dtype`, `device_map` or `quantization_config`.

    Raises:
        ValueError: if its class is not one of transformers or diffusers.
        OSError: if it cannot be had.
    """
    name = str(reference.get("class"))
    named: Any = getattr(transformers, name, None) or getattr(diffusers, name, None)
    if not (inspect.isclass(named) and issubclass(named, PreTrainedModel | ModelMixin)):
        raise ValueError(f"the base model's class {name!r:.100} is not a network of transformers or diffusers")
    model_class: Any = named
    settings = {"dtype": getattr(torch, reference["dtype"])} | kwargs
    if issubclass(named, ModelMixin):
        settings = {"torch_dtype": settings.pop("dtype"), "subfolder": reference.get("subfolder")} | settings
    return model_class.from_pretrained(reference["id"], revision=reference["revision"], **settings)
