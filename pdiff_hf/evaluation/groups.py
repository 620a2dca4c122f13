"""Groups of networks that a report compares: what they are, and what a pipeline and trivial generators make."""

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.autoencoder import LARGE
from ..models.condition import Condition
from ..models.products import expanded
from ..pipelines import PDiffPipeline
from ..utils.files import free_space
from ..utils.memory import InParts
from ..utils.seeds import derive_seed
from .baselines import Baseline, BaselineContext, standard_baselines
from .geometry import Rows, mean_of, pca_r2_score
from .score import CHUNK_BYTES

NUM_TRAJECTORIES = 5  # the paper's figure 5b has as many
MAX_TRAJECTORY_STEPS = 20  # of a longer process so many are scored
BLOCK_NUMBERS = 2**26  # that are encoded or decoded at once


class Kind(str, Enum):  # noqa: UP042  # StrEnum needs Python 3.11
    """What a group of networks is to the generator whose report it stands in."""

    GENERATED = "generated"  # what the generator gives
    SNAPSHOTS = "snapshots"  # what it was made from; for an unseen task, the nearest of them
    BASELINE = "baseline"  # free: needs the snapshots or the base model, and no feedback
    OPPONENT = "opponent"  # trained on feedback from tasks, as the generator was
    ORACLE = "oracle"  # trained on the unseen task itself
    VARIANT = "variant"  # the generator otherwise: before tuning, at another temperature
    CONTROL = "control"  # shows where something is lost: reconstructions, shuffled conditions


@dataclass(frozen=True)
class Cost:
    """
    Passes of one example through one network: forward counts 1 and backward 2, so that a training step on one example
    costs 3.

    Args:
        once (`int`): Before the first network or unseen task, with what validation took to choose among settings.
        each (`int`): For each network, or each unseen task.
    """

    once: int = 0
    each: int = 0


def training_cost(*numbers: int) -> int:
    """Of training: three passes for each of the product of `numbers`, such as steps, networks and examples."""
    return 3 * math.prod(numbers)


@dataclass(frozen=True)
class Group:
    """
    Networks that are reported together.

    Args:
        name (`str`): Unique.
        networks: For a single task, parameters of shape `(N, D)`. For members of a family, a function
            `networks(name of the set, table)` to parameters of shape `(M, D)` or `(M, n, D)`, or an `nn.Module` that
            answers itself: `module(table, batch, generator)` gives logits of shape `(M, B, C)`.
        kind (`Kind`, *optional*): A baseline by default.
        sweep (`str`, *optional*): What settings of one sweep have in common, such as `noise`; by default the name.
        value (`float | str`, *optional*): The setting in its sweep.
        cost (`Cost`, *optional*): Of feedback from tasks.
        size (`int`, *optional*): Parameters that one prediction goes through.
        note (`str`, *optional*): What was chosen on validation data.
        tried (`Mapping`, *optional*): Validation losses of what was tried, by setting.
        vote (`bool`, *optional*, defaults to `False`): Whether the networks of a member answer together, by the mean
            of their probabilities.
    """

    name: str
    networks: Any
    kind: Kind = Kind.BASELINE
    sweep: str | None = None
    value: float | str | None = None
    cost: Cost | None = None
    size: int | None = None
    note: str = ""
    tried: Mapping[str, float] | None = None
    vote: bool = False


@dataclass(frozen=True)
class Reconstruction:
    """
    What the autoencoder makes of the snapshots.

    Args:
        parameters (`torch.Tensor`): Shape `(n, D)`: of the held-out snapshots, or of all if none is held out.
        rows (`torch.Tensor`): int64 of shape `(n,)`, which snapshots these are.
        explained (`dict`): Shares of the variance around the mean of the seen snapshots: `r2_train` and `r2_heldout`
            of the autoencoder, `linear_r2_train` and `linear_r2_heldout` of as many principal components.
    """

    parameters: Tensor
    rows: Tensor
    explained: dict[str, float | None]


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


@torch.no_grad()
def encode(pipeline: PDiffPipeline, parameters: Tensor | Rows) -> Tensor:
    """Parameters of shape `(N, D)` to latents of shape `(N, L)`, on the CPU."""
    autoencoder, in_parts = pipeline.autoencoder, InParts("networks")

    def encode_rows(rows: Tensor) -> Tensor:
        return autoencoder.encode(rows.to(autoencoder.device)).latents.cpu()

    return torch.cat([in_parts(encode_rows, parameters[rows]) for rows in _blocks(*parameters.shape)])


def decode(pipeline: PDiffPipeline, latents: Tensor, folder: Path) -> Tensor:
    """Latents of shape `(N, L)` to parameters of shape `(N, D)`; a large result lies in a file in `folder`."""
    parameters = room_for(len(latents), pipeline.autoencoder.layout.num_parameters, folder)
    for rows in _blocks(*parameters.shape):
        parameters[rows] = pipeline.decode_latents(latents[rows])
    return parameters


def _blocks(count: int, num_parameters: int) -> Iterator[slice]:
    # The bits of the first 256 are those that the pipeline gives; then its blocks begin anew. Of longer networks, the
    # step is a multiple of what the pipeline decodes at once.
    step = 16 * (2**22 // num_parameters)
    if 256 * num_parameters <= BLOCK_NUMBERS:
        step = 256
    elif not step:
        step = max(1, BLOCK_NUMBERS // num_parameters)  # it decodes them one by one
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def reconstruct(
    pipeline: PDiffPipeline, snapshots: Tensor, latents: Tensor, heldout: Tensor, folder: Path
) -> Reconstruction:
    """
    Decodes the latents of all snapshots, and keeps those of the held-out ones.

    Args:
        snapshots (`torch.Tensor`): Shape `(K, D)`.
        latents (`torch.Tensor`): Shape `(K, L)`.
        heldout (`torch.Tensor`): bool of shape `(K,)`.
        folder (`Path`): For what is too large for memory.
    """
    products = pipeline.autoencoder.products
    compared = expanded(snapshots, products)
    seen = Rows(compared, ~heldout)
    mean, length = mean_of(seen), pipeline.autoencoder.config.latent_dim
    rows = heldout.nonzero().flatten() if heldout.any() else torch.arange(len(snapshots))
    kept = room_for(len(rows), snapshots.shape[1], folder)
    place = torch.full((len(snapshots),), -1)
    place[rows] = torch.arange(len(rows))
    error, total = torch.zeros(2, len(snapshots), dtype=torch.float64)
    for block in _blocks(*snapshots.shape):
        for i, decoded in zip(range(block.start, block.stop), pipeline.decode_latents(latents[block]), strict=True):
            if place[i] >= 0:
                kept[place[i]] = decoded
            error[i] = (compared[i] - expanded(decoded, products)).double().square().sum()
            total[i] = (compared[i] - mean).square().sum()

    def share(which: Tensor) -> float:
        return (1 - error[which].sum() / total[which].sum()).item()  # nan or infinite where nothing varies

    explained: dict[str, float | None] = {
        "r2_train": share(~heldout),
        "r2_heldout": share(heldout) if heldout.any() else None,
        "linear_r2_train": pca_r2_score(seen, seen, length),
        "linear_r2_heldout": pca_r2_score(seen, Rows(compared, heldout), length) if heldout.any() else None,
    }
    return Reconstruction(kept, rows, explained)


def sample_baselines(
    context: BaselineContext, num_models: int, seed: int, which: str = "all", folder: Path = Path()
) -> Iterator[Group]:
    """
    `num_models` networks of every standard baseline that `context` supports, one group at a time.

    Args:
        folder (`Path`, *optional*): Where `context.room` puts what is large; it need not exist yet.

    Raises:
        ValueError: if those of one baseline would take more than half of the free space there, before any is made.
    """
    needed = 4 * num_models * context.snapshots.shape[1]
    free = free_space(folder)
    if needed > free / 2:
        raise ValueError(
            f"{num_models} networks of a baseline need {needed:,} bytes, more than half of the {free:,} bytes that are "
            f"free for '{folder}'; use --baseline_models {num_models * free // 2 // needed} at most"
        )
    return (
        # The seed follows from the name, so that a new baseline leaves the networks (and scores) of the others alone.
        Group(
            baseline.name,
            baseline.sample(context, num_models, named_generator(seed, baseline.name)),
            sweep=baseline.family,
            value=baseline.value,
        )
        for baseline in supported_baselines(context, which)
    )


def supported_baselines(context: BaselineContext, which: str = "all") -> list[Baseline]:
    """The standard baselines (`all` or `few`) that a context has all that is needed for."""
    return [baseline for baseline in standard_baselines(which) if baseline.supports(context)]


def reverse_process(
    score: Callable[[Tensor], Tensor],
    pipeline: PDiffPipeline,
    folder: Path,
    seed: int,
    conditions: Sequence[Condition] | None = None,
) -> dict:
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

    pipeline(
        1 if conditions else count,
        generator=generator,
        condition=conditions,
        latents=noise,
        output_type="latent",
        callback_on_step_end=keep,
    )
    last = len(along) - 1
    steps = torch.linspace(0, last, min(last, MAX_TRAJECTORY_STEPS) + 1).round().int().tolist()
    at_once = count if conditions else max(1, CHUNK_BYTES // (4 * num_parameters))
    shown = torch.cat([along[step] for step in steps]).split(at_once)
    scores = [score(decode(pipeline, latents, folder)) for latents in shown]
    return {"steps": steps, "scores": torch.cat(scores).view(-1, count).T.tolist()}


def named_generator(seed: int, name: str) -> torch.Generator:
    """A source of randomness of its own for everything that has a name."""
    return torch.Generator().manual_seed(derive_seed(seed, *name.encode()))


def search(
    losses: Callable[[Sequence[float]], Sequence[float]], values: Sequence[float], factor: float = 2.0, most: int = 6
) -> tuple[float, dict[str, float]]:
    """
    Tries settings, at least four of them, and goes on beyond an edge until the loss rises again.

    Args:
        losses (`Callable`): The validation losses of some settings, which are tried together.
        values (`Sequence[float]`): In a row of rising ones.
        factor (`float`, *optional*, defaults to 2): From one to the next beyond an edge.
        most (`int`, *optional*, defaults to 6): So many are added at most.

    Returns:
        `tuple`: The best setting, and the loss of each that was tried.
    """
    tried = dict(zip(values, losses(values), strict=True))

    def rank(value: float) -> float:
        return tried[value] if math.isfinite(tried[value]) else math.inf

    for _ in range(most):
        best = min(tried, key=rank)
        if best == max(tried):
            new = best * factor
        elif best == min(tried):
            new = best / factor
        else:
            break
        tried[new] = losses([new])[0]
    return min(tried, key=rank), {f"{value:.3g}": tried[value] for value in sorted(tried)}
