"""What a selection takes and what a generator for it costs, before anything is trained."""

from collections.abc import Iterator

import torch

from ..models.products import AdapterProducts
from ..selection import select_layout
from ..training.estimate import estimate_training
from .config import PDiffConfig
from .folder import RunError
from .terminal import duration


def describe_selection(recipe: PDiffConfig, device: torch.device) -> Iterator[str]:
    """
    Lines: all parameters of the base model with those that are selected marked, and what training a generator for them
    takes on this machine, which is measured on a smaller step.

    Raises:
        ValueError: for a task, a model or a selection that cannot be used.
    """
    model = recipe.make_task().load_base_model()
    layout = select_layout(model, recipe.select, recipe.exclude)
    selected = set(layout.names)
    parameters = dict(model.named_parameters())
    width = max(map(len, parameters))
    for name, parameter in parameters.items():
        shape = " × ".join(map(str, parameter.shape))
        yield f"{'*' if name in selected else ' '} {name:{width}}  {parameter.numel():>12,}  {shape}"
    total = sum(parameter.numel() for parameter in parameters.values())
    yield ""
    yield (
        f"* selected: {layout.num_parameters:,} of {total:,} parameters, in {len(selected)} of {len(parameters)} "
        "tensors"
    )
    yield f"{recipe.num_snapshots} snapshots take {_size(4 * layout.num_parameters * recipe.num_snapshots)}"
    yield ""
    if recipe.latent_dim > layout.num_parameters:
        raise RunError(f"latent_dim is {recipe.latent_dim}, more than the {layout.num_parameters} selected parameters")
    vectors = (
        AdapterProducts(layout, recipe.autoencoder_args.adapter_frame_size).layout
        if recipe.adapter_products
        else layout
    )
    yield f"Training a generator on this machine ({device.type}, one process), as an estimate:"
    for name in ("autoencoder", "denoiser"):
        preset, steps = getattr(recipe, f"{name}_preset"), getattr(recipe, f"{name}_steps")
        cost = estimate_training(
            name,
            vectors.num_parameters,
            recipe.latent_dim,
            preset,
            token_size=recipe.autoencoder_args.token_size,
            num_steps=steps,
            batch_size=getattr(recipe, f"{name}_batch_size"),
            device=device,
        )
        yield (
            f"  {name:11}  {preset}, {steps} steps: {cost.flops / 1e12:,.1f} TFLOP, about {duration(cost.seconds)}, "
            f"{_size(cost.memory)} beside the snapshots"
        )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
