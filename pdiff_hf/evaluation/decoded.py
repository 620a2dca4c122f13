"""The networks that a pipeline decodes latents to, also those on the way through the reverse process."""

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.autoencoder import LARGE
from ..models.condition import Condition
from ..pipelines import PDiffPipeline
from .groups import named_generator
from .score import CHUNK_BYTES

NUM_TRAJECTORIES = 5  # the paper's figure 5b has as many
MAX_TRAJECTORY_STEPS = 20  # of a longer process so many are scored


def room_for(count: int, num_parameters: int, folder: Path) -> Tensor:
    """
    A float32 tensor `(count, num_parameters)` with arbitrary values. A large one lies in a file in `folder` that goes
    when the tensor does, so that it takes no memory that could not be given back.
    """
    size = 4 * count * num_parameters
    if size <= CHUNK_BYTES // 2:
        return torch.empty(count, num_parameters)
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and would end the process later
        memory = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(memory, dtype=torch.float32).view(count, num_parameters)


def sample(
    pipeline: PDiffPipeline,
    count: int,
    seed: int,
    conditions: Sequence[Condition] | Tensor | None = None,
    output_type: str = "latent",
    name: str = "generated",
    **how: Any,
) -> Tensor:
    """What a report is about: latents, or parameters with `"pt"`, of `count` networks, or of each condition as many."""
    how |= {"generator": named_generator(seed, name), "condition": conditions}
    return pipeline(count, output_type=output_type, return_dict=False, **how)[0]


def decode(pipeline: PDiffPipeline, latents: Tensor, folder: Path) -> Tensor:
    """Latents of shape `(N, L)` to parameters of shape `(N, D)`; a large result lies in a file in `folder`."""
    parameters, start = room_for(len(latents), pipeline.autoencoder.layout.num_parameters, folder), 0
    for block in pipeline.decode_in_blocks(latents):
        parameters[start : start + len(block)] = block
        start += len(block)
    return parameters


def reverse_process(
    score: Callable[[Tensor], Tensor],
    pipeline: PDiffPipeline,
    folder: Path,
    seed: int,
    conditions: Sequence[Condition] | None = None,
) -> dict[str, Any]:
    """
    Test scores of the networks that the noisy latents of several samples decode to along the way (paper, figure 5b):
    `steps` that were taken, and `scores`, a row a sample and a column a step.

    Args:
        score (`Callable`): From parameters of shape `(N, D)`, one network for each sample or for several steps of them,
            to scores of shape `(N,)`.
        conditions (`Sequence[Condition]`, *optional*): One for each sample; by default there are some samples without
            any, or one if networks are large.
    """
    num_parameters = pipeline.autoencoder.layout.num_parameters
    count = len(conditions) if conditions else NUM_TRAJECTORIES if num_parameters < LARGE else 1
    generator = named_generator(seed, "trajectories")
    noise = torch.randn(count, pipeline.denoiser.config.latent_dim, generator=generator)
    along = [noise * pipeline.scheduler.init_noise_sigma * pipeline.config.temperature]

    def keep(pipe, step, timestep, tensors):
        along.append(tensors["latents"].cpu())
        return tensors

    num_models = 1 if conditions else count
    how: dict[str, Any] = {
        "condition": conditions,
        "latents": noise,
        "output_type": "latent",
        "callback_on_step_end": keep,
    }
    pipeline(num_models, generator=generator, **how)
    last = len(along) - 1
    steps = torch.linspace(0, last, min(last, MAX_TRAJECTORY_STEPS) + 1).round().int().tolist()
    at_once = count if conditions else max(1, CHUNK_BYTES // (4 * num_parameters))
    shown = torch.cat([along[step] for step in steps]).split(at_once)
    scores = [score(decode(pipeline, latents, folder)) for latents in shown]
    return {"steps": steps, "scores": torch.cat(scores).view(-1, count).T.tolist()}
