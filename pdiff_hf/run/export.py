"""Writes the networks of a saved generator as files that other libraries load."""

from pathlib import Path

import torch
from safetensors.torch import save_file, save_model
from timm.models import model_entrypoint
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TimmWrapperForImageClassification

from ..layout import ParameterLayout
from ..models.condition import Condition
from ..networks.adapters import adapter_weights, has_adapters, save_adapter
from ..networks.batch_norm import RecomputedStatistics
from ..pipelines import PDiffPipeline
from ..tasks import Task
from ..tasks.task import statistics_batches
from ..tensor_names import adapter_file_names
from ..utils.files import check_writable, free_space, replacing

PACKAGE = __name__.partition(".")[0]
# Of a network that other programs load only after they have imported this package.
README = """The architecture `{architecture}` comes with pdiff_hf, which has to be imported before \
the network is loaded; without it, timm says `Unknown model ({architecture})`.

```python
import pdiff_hf
from transformers import AutoModelForImageClassification

network = AutoModelForImageClassification.from_pretrained(FOLDER)
```
"""


def write_networks(
    source: str,
    folder: Path,
    *,
    num_models: int,
    num_inference_steps: int | None = None,
    temperature: float | None = None,
    seed: int,
    only_generated: bool,
    adapters: bool = False,
    condition: Condition | None = None,
    task: Task | None = None,
) -> None:
    """
    Samples networks and writes each to a folder that `from_pretrained` loads, or, with `only_generated`, its generated
    tensors to one safetensors file. Of a generator of adapters, the adapters, for which no base model is needed.

    Args:
        source (`str`): Folder of a run or of a saved `PDiffPipeline`, or a Hub id.
        folder (`Path`): Must not hold generated networks yet.
        num_inference_steps, temperature (*optional*): By default those of the pipeline's report.
        adapters (`bool`, *optional*, defaults to `False`): Refuse a generator of anything else than adapters.
        condition (`Mapping`, *optional*): What is known of the task, for a generator with conditions.
        task (`Task`, *optional*): The statistics of batch norm are recomputed for each network on its training data.

    Raises:
        ConditionError: for a condition that the generator does not take.
        ValueError: if the folder cannot be used, or has too little space, or the generator has no base model to
            complete its networks with.
    """
    check_writable(folder)
    if any(folder.glob("network-*")):
        raise ValueError(f"'{folder}' already holds generated networks; choose another --output_dir")
    pipe = PDiffPipeline.from_pretrained(source)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(desc="sampling", leave=False)
    if task is not None and only_generated:
        raise ValueError("statistics of batch norm are those of whole networks; leave --only_generated out")
    of_adapters = has_adapters(pipe.base_model) or bool(pipe.autoencoder.layout.adapters)
    if adapters and not of_adapters:
        raise ValueError("--adapters is for a generator of adapters of PEFT, and this one generates other tensors")
    size, free = 4 * pipe.autoencoder.layout.num_parameters, free_space(folder)
    if not only_generated and not of_adapters:
        if pipe.base_model is None:
            raise ValueError("this generator has no base model to complete its networks with; use --only_generated")
        size = sum(t.numel() * t.element_size() for t in pipe.base_model.state_dict().values())
    if size * num_models > free:
        raise ValueError(
            f"{num_models} networks of {size / 1e6:.1f} MB need {size * num_models / 1e9:.1f} GB, and '{folder}' has "
            f"{free / 1e9:.1f} GB free; generate fewer, or use --only_generated"
        )
    (parameters,) = pipe(
        num_models,
        num_inference_steps=num_inference_steps,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
        condition=condition,
        output_type="pt",
        return_dict=False,
    )
    layout = pipe.autoencoder.layout
    if task is not None and pipe.base_model is not None:
        device = next(pipe.base_model.parameters()).device
        statistics = RecomputedStatistics(pipe.base_model, layout, lambda: statistics_batches(task, device))
        layout, parameters = statistics.layout, statistics(parameters)
    elif not only_generated:
        pipe.recompute_statistics(parameters, None)  # which warns where they should be
    write_parameters(pipe, layout, parameters, folder, only_generated)


def write_parameters(
    pipe: PDiffPipeline, layout: ParameterLayout, parameters: torch.Tensor, folder: Path, only_generated: bool
) -> None:
    """What `write_networks` writes of networks with parameters of shape `(N, D)`."""
    folder.mkdir(parents=True, exist_ok=True)
    names, of_adapters = adapter_file_names(layout), has_adapters(pipe.base_model) or bool(layout.adapters)
    for i, row in enumerate(tqdm(parameters, "writing")):
        # Copies, because safetensors does not write views of a larger tensor.
        state_dict = {name: tensor.clone() for name, tensor in layout.unflatten(row).items()}
        name = f"network-{i:05d}"
        with replacing(folder / (f"{name}.safetensors" if only_generated else name)) as part:
            if only_generated:
                save_file({names.get(name, name): tensor for name, tensor in state_dict.items()}, part)
            elif of_adapters:
                adapter_weights(layout, state_dict, pipe.base_model).save_pretrained(part)
            else:
                save_network(pipe.make_model(state_dict), part)
                if pipe.processor is not None:
                    pipe.processor.save_pretrained(part)


def save_network(model: PreTrainedModel, folder: Path) -> None:
    """
    Such that `from_pretrained` loads it, and timm as well if it is a network of timm. Of a network with adapters of
    PEFT, the adapters, for `PeftModel.from_pretrained`.
    """
    if has_adapters(model):
        save_adapter(model, folder)
        return
    if not isinstance(model, TimmWrapperForImageClassification):
        model.save_pretrained(folder)
        return
    # transformers reads weights under timm's own names as well as under its own; timm reads no others. Nor does it read
    # a null in the place of arguments.
    model.config.model_args = model.config.model_args or {}
    model.config.save_pretrained(folder)
    save_model(model.timm_model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    architecture = model.config.architecture
    if model_entrypoint(architecture).__module__.startswith(PACKAGE):
        (folder / "README.md").write_text(README.format(architecture=architecture), encoding="utf-8")
