"""What a selection takes and what a generator for it costs, before anything is trained: counted, and timed briefly."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pdiff_hf.layout import ParameterLayout
from pdiff_hf.models import DENOISER_PRESETS, LatentDenoiser, ParameterAutoencoder, autoencoder_architecture
from pdiff_hf.models.products import AdapterProducts
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.folder import RunError
from pdiff_hf.run.terminal import duration
from pdiff_hf.selection import select_layout

# A measured step has about so many operations: enough to time, few enough to wait for.
MEASURED_FLOPS = {"cpu": 40e9, "cuda": 4e12}
# Shorter vectors are not measured: what a step costs beside its operations would count too much.
SHORTEST_MEASURED = 2048


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


@dataclass(frozen=True)
class TrainingCost:
    """
    Args:
        flops (`int`): Operations of the convolutions and fully-connected layers in all steps.
        memory (`int`): Bytes that weights, gradients, optimizer state, activations and fixed tensors take in a step.
        seconds (`float`): The whole training, at the speed at which a smaller step was measured; not a number on the
            device `meta`, where none is.
    """

    flops: int
    memory: int
    seconds: float


def estimate_training(
    network: str,
    num_parameters: int,
    latent_dim: int,
    preset: str,
    *,
    token_size: int | None = None,
    num_steps: int = 1,
    batch_size: int = 1,
    device: torch.device,
) -> TrainingCost:
    """
    Cost of training the `network` called `autoencoder`, for vectors of `num_parameters` and after its bases are fitted,
    or `denoiser`, for latents of `latent_dim`.
    """
    if preset == "pca":  # nothing is trained
        return TrainingCost(0, 4 * num_parameters * latent_dim, 0.0)
    is_denoiser = network == "denoiser"
    length = latent_dim if is_denoiser else num_parameters

    def build(length: int) -> nn.Module:
        if is_denoiser:
            return LatentDenoiser(length, **DENOISER_PRESETS[preset])
        layout = ParameterLayout(("parameters",), ((length,),), ("float32",))
        architecture = autoencoder_architecture(preset, length, token_size)
        return ParameterAutoencoder(layout.to_dict(), min(latent_dim, length), **architecture)

    def loss(model: Any, batch_size: int) -> torch.Tensor:
        if is_denoiser:
            sample = torch.zeros(batch_size, model.config.latent_dim, device=model.device)
            return model(sample, torch.zeros(batch_size, device=model.device)).sample.square().mean()
        return model.reconstruction_loss(model(torch.zeros(batch_size, *model.token_shape, device=model.device)))

    def count(length: int, batch_size: int) -> tuple[int, int, int]:
        """Operations of one training step, bytes that it keeps beside the weights, and bytes of these."""
        with torch.device("meta"):
            model = build(length)
        weights = {id(parameter) for parameter in model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in weights:
                storage = tensor.untyped_storage()
                kept[storage._cdata] = storage.nbytes()
            return tensor

        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss(model, batch_size).backward()
        trained, fixed = (sum(t.nbytes for t in tensors) for tensors in (model.parameters(), model.buffers()))
        return counter.get_total_flops(), sum(kept.values()) + fixed, trained

    flops, activations, weights = count(length, batch_size)
    # Of each weight itself, its gradient, the optimizer's two, and the average of a denoiser's.
    memory = activations + (5 if is_denoiser else 4) * weights
    if device.type == "meta":
        return TrainingCost(flops * num_steps, memory, math.nan)
    budget = MEASURED_FLOPS[device.type if device.type in MEASURED_FLOPS else "cpu"]
    # The length first, as operations and weights grow with it alike; the cost of using weights does not with the batch.
    small_length = min(length, max(SHORTEST_MEASURED, int(length * budget / flops)))
    small_batch = max(1, min(batch_size, int(batch_size * budget / count(small_length, batch_size)[0])))
    model, times = build(small_length).to(device), []
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):  # the first one warms up
        start = time.perf_counter()
        loss(model, small_batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    seconds = min(times[1:]) * flops / count(small_length, small_batch)[0]
    return TrainingCost(flops * num_steps, memory, seconds * num_steps)
