"""The trivial generators that a learned one must beat: noise, averages, Gaussians, interpolation, a kernel density.

Each is a function from the snapshots (K, D) to new parameters (n, D), reproducible through its `generator`.
`standard_baselines` lists the settings that a report runs, behind one call signature.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor

from ..models.tokens import gram_matrix
from .geometry import Matrix, chunks, mean_of

# Where networks are put: from their number and length, a float32 tensor of that shape with arbitrary values.
Room = Callable[[int, int], Tensor]


def gaussian_noise(
    snapshots: Matrix,
    tensor_sizes: Sequence[int],
    num_models: int,
    scale: float,
    generator: Generator,
    room: Room = torch.empty,
) -> Tensor:
    """Random snapshots plus Gaussian noise (paper, section 4: scales 0.001, 0.05 and 0.15).

    The unit of the noise is the standard deviation of the parameters of the tensor that it is added to, averaged over
    the snapshots (that is how p-diff normalises parameters). A constant tensor, or one of a single parameter, gets no
    noise.

    Args:
        snapshots (`torch.Tensor` or `Rows`): (K, D) float32.
        tensor_sizes (`Sequence[int]`): how many of the D parameters each tensor has, in order.
        num_models (`int`): n; every snapshot is used at most once while n <= K, and drawn with replacement beyond.
        scale (`float`): of the noise, at least 0.
        generator (`torch.Generator`): source of randomness.
        room (`Callable`, *optional*): makes the tensor for the result; in memory by default.

    Returns:
        `torch.Tensor`: (n, D) float32.
    """
    _check(snapshots, num_models, at_least=1)
    _check_scale("scale", scale)
    if sum(tensor_sizes) != snapshots.shape[1]:
        raise ValueError(
            f"`tensor_sizes` add up to {sum(tensor_sizes)}, but a snapshot has {snapshots.shape[1]} parameters"
        )
    units, start = [], 0
    for size in tensor_sizes:
        tensor, start = slice(start, start + size), start + size
        deviations = [snapshots[rows, tensor].std(1, correction=0) for rows in chunks(len(snapshots), 8 * size)]
        units.append(torch.cat(deviations).mean().expand(size))
    unit = torch.cat(units)  # (D,)
    chosen = _random_rows(len(snapshots), num_models, generator)
    samples = room(num_models, snapshots.shape[1])
    for columns in chunks(snapshots.shape[1], 8 * (len(snapshots) + num_models)):
        noise = scale * unit[columns] * _normal(num_models, len(unit[columns]), generator)
        samples[:, columns] = snapshots[chosen, columns] + noise
    return samples


def soup(snapshots: Matrix, num_models: int, k: int | None, generator: Generator, room: Room = torch.empty) -> Tensor:
    """Means of k distinct random snapshots (model soups, Wortsman et al. 2022).

    Args:
        snapshots (`torch.Tensor` or `Rows`): (K, D) float32.
        num_models (`int`): n.
        k (`int`, *optional*): snapshots in a mean; `None` is the mean of all, of which there is only one.
        generator (`torch.Generator`): source of randomness.
        room (`Callable`, *optional*): makes the tensor for the result; in memory by default.

    Returns:
        `torch.Tensor`: (n, D) float32; (1, D) for the mean of all.
    """
    _check(snapshots, num_models, at_least=1)
    if k is None:
        return mean_of(snapshots).float()[None]
    if not 1 <= k <= len(snapshots):
        raise ValueError(f"a soup of k={k} needs 1 <= k <= the {len(snapshots)} snapshots")
    rows = _distinct_rows(len(snapshots), num_models, k, generator)
    weights = torch.zeros(num_models, len(snapshots)).scatter_(1, rows, 1 / k)
    return _by_columns(snapshots, num_models, lambda part: weights @ part, room)


def diagonal_gaussian(
    snapshots: Matrix, num_models: int, temperature: float, generator: Generator, room: Room = torch.empty
) -> Tensor:
    """An independent Gaussian for each parameter, with the snapshots' mean and variance (arXiv 2506.07998).

    Args:
        snapshots (`torch.Tensor` or `Rows`): (K, D) float32, K >= 2.
        num_models (`int`): n.
        temperature (`float`): multiplies the standard deviation, at least 0.
        generator (`torch.Generator`): source of randomness.
        room (`Callable`, *optional*): makes the tensor for the result; in memory by default.

    Returns:
        `torch.Tensor`: (n, D) float32.
    """
    _check(snapshots, num_models, at_least=2)
    _check_scale("temperature", temperature)

    def sample(part: Tensor) -> Tensor:
        std, mean = torch.std_mean(part, dim=0)
        return mean + temperature * std * _normal(num_models, part.shape[1], generator)

    return _by_columns(snapshots, num_models, sample, room)


def low_rank_gaussian(
    snapshots: Matrix,
    num_models: int,
    temperature: float,
    generator: Generator,
    rank: int | None = None,
    with_diagonal: bool = False,
    room: Room = torch.empty,
) -> Tensor:
    """A Gaussian whose covariance is that of the snapshots, at most K-1 directions (SWAG, Maddox et al. 2019).

    Args:
        snapshots (`torch.Tensor` or `Rows`): (K, D) float32, K >= 2.
        num_models (`int`): n.
        temperature (`float`): multiplies the standard deviation, at least 0.
        generator (`torch.Generator`): source of randomness.
        rank (`int`, *optional*): use the deviations of the last `rank` snapshots only, 2 <= rank <= K; all by default.
        with_diagonal (`bool`, defaults to `False`): half of the covariance low-rank and half diagonal, as SWAG has it.
        room (`Callable`, *optional*): makes the tensor for the result; in memory by default.

    Returns:
        `torch.Tensor`: (n, D) float32.
    """
    _check(snapshots, num_models, at_least=2)
    _check_scale("temperature", temperature)
    rank = len(snapshots) if rank is None else rank
    if not 2 <= rank <= len(snapshots):
        raise ValueError(f"rank={rank} must be at least 2 and at most the {len(snapshots)} snapshots")
    weights = _normal(num_models, rank, generator) / math.sqrt(rank - 1)

    def sample(part: Tensor) -> Tensor:
        std, mean = torch.std_mean(part, dim=0)
        deviation = weights @ (part[-rank:] - mean)
        if with_diagonal:
            deviation = math.sqrt(0.5) * (deviation + std * _normal(num_models, part.shape[1], generator))
        return mean + temperature * deviation

    return _by_columns(snapshots, num_models, sample, room)


def interpolation(
    snapshots: Matrix,
    num_models: int,
    weight_range: tuple[float, float],
    generator: Generator,
    room: Room = torch.empty,
) -> Tensor:
    """Points a + t (b - a) on the line through two distinct random snapshots, t uniform in a range.

    Args:
        snapshots (`torch.Tensor` or `Rows`): (K, D) float32, K >= 2.
        num_models (`int`): n.
        weight_range (`tuple[float, float]`): lowest and highest t; outside [0, 1] it is an extrapolation.
        generator (`torch.Generator`): source of randomness.
        room (`Callable`, *optional*): makes the tensor for the result; in memory by default.

    Returns:
        `torch.Tensor`: (n, D) float32.
    """
    _check(snapshots, num_models, at_least=2)
    low, high = weight_range
    if not low <= high:
        raise ValueError(f"`weight_range` must go from low to high, got {weight_range}")
    first, second = _distinct_rows(len(snapshots), num_models, 2, generator).unbind(1)
    weights = low + (high - low) * torch.rand(num_models, 1, generator=generator)
    return _by_columns(snapshots, num_models, lambda part: torch.lerp(part[first], part[second], weights), room)


def latent_kde(latents: Tensor, num_models: int, bandwidth: float | None, generator: Generator) -> Tensor:
    """Samples of a Gaussian kernel density over latents (as in hyper-representations, Schürholt et al. 2022).

    Args:
        latents (`torch.Tensor`): (K, L) float32, K >= 2.
        num_models (`int`): n.
        bandwidth (`float`, *optional*): of the kernel, in standard deviations of each latent coordinate, at least 0;
            `None` is Scott's rule, K^(-1/(L+4)).
        generator (`torch.Generator`): source of randomness.

    Returns:
        `torch.Tensor`: (n, L) float32 latents, for the caller to decode.
    """
    _check(latents, num_models, at_least=2)
    count, length = latents.shape
    bandwidth = count ** (-1 / (length + 4)) if bandwidth is None else bandwidth
    _check_scale("bandwidth", bandwidth)
    centres = latents[torch.randint(count, (num_models,), generator=generator)]
    return centres + bandwidth * latents.std(0) * _normal(num_models, length, generator)


def pca_gaussian(
    snapshots: Matrix,
    num_models: int,
    num_components: int,
    temperature: float,
    generator: Generator,
    room: Room = torch.empty,
) -> Tensor:
    """A Gaussian in the first principal components of the snapshots.

    The components come from the K x K Gram matrix, so memory is O(nD). With all K-1 of them it is the distribution of
    `low_rank_gaussian`.

    Args:
        snapshots (`torch.Tensor` or `Rows`): (K, D) float32, K >= 2.
        num_models (`int`): n.
        num_components (`int`): 1 <= num_components <= K-1.
        temperature (`float`): multiplies the standard deviation, at least 0.
        generator (`torch.Generator`): source of randomness.
        room (`Callable`, *optional*): makes the tensor for the result; in memory by default.

    Returns:
        `torch.Tensor`: (n, D) float32.
    """
    _check(snapshots, num_models, at_least=2)
    _check_scale("temperature", temperature)
    count = len(snapshots)
    if not 1 <= num_components < count:
        raise ValueError(
            f"num_components={num_components} must be at least 1 and at most {count - 1} for {count} snapshots"
        )
    parts = (snapshots[:, columns] for columns in chunks(snapshots.shape[1], 8 * count))
    gram = gram_matrix(part - part.mean(0) for part in parts)
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -num_components:].float()  # (K, r), eigenvalues ascend
    # A component is centred.T @ u / sqrt(λ) and its standard deviation sqrt(λ / (K-1)): λ cancels.
    weights = temperature * _normal(num_models, num_components, generator) @ vectors.T / math.sqrt(count - 1)  # (n, K)
    return _by_columns(snapshots, num_models, lambda part: part.mean(0) + weights @ (part - part.mean(0)), room)


def _by_columns(snapshots: Matrix, num_models: int, sample: Callable[[Tensor], Tensor], room: Room) -> Tensor:
    """(n, D) from a function of the snapshots' columns, (K, d) to (n, d), so that all of (K, D) is never copied."""
    samples = room(num_models, snapshots.shape[1])
    for columns in chunks(snapshots.shape[1], 8 * (len(snapshots) + num_models)):
        samples[:, columns] = sample(snapshots[:, columns])
    return samples


@dataclass(frozen=True)
class BaselineContext:
    """What baselines are made from. `latents` and `decode` are needed by the latent ones only.

    Args:
        snapshots (`torch.Tensor` or `Rows`): (K, D) float32, the training snapshots.
        tensor_sizes (`Sequence[int]`): how many of the D parameters each tensor has, in order.
        latents (`torch.Tensor`, *optional*): (K, L) float32, the latents of the snapshots.
        decode (`Callable`, *optional*): from latents (n, L) to parameters (n, D).
        room (`Callable`, *optional*): makes the tensor for the networks of a baseline; in memory by default.
    """

    snapshots: Matrix
    tensor_sizes: Sequence[int]
    latents: Tensor | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    room: Room = torch.empty


@dataclass(frozen=True)
class Baseline:
    """One setting of one family of baselines.

    Args:
        family (`str`): what the settings of one sweep have in common.
        value (`float | str`): the setting: a scale, temperature, bandwidth or number; a word where it has none.
        sample (`Callable`): `sample(context, num_models, generator)` to parameters (n, D).
        min_snapshots (`int`, defaults to 2): how many snapshots it needs.
        needs_latents (`bool`, defaults to `False`): whether it needs the context's latents and `decode`.
    """

    family: str
    value: float | str
    sample: Callable[[BaselineContext, int, Generator], Tensor]
    min_snapshots: int = 2
    needs_latents: bool = False

    @property
    def name(self) -> str:
        return f"{self.family} {self.value}"

    def supports(self, context: BaselineContext) -> bool:
        """Whether `sample` is defined for this context."""
        has_latents = context.latents is not None and context.decode is not None
        return len(context.snapshots) >= self.min_snapshots and (has_latents or not self.needs_latents)


# One setting of each sweep, in the middle of it.
FEW = (
    "noise 0.05",
    "soup 4",
    "diagonal Gaussian 1.0",
    "low-rank Gaussian 1.0",
    "low-rank + diagonal Gaussian 1.0",
    "interpolation 0 to 1",
    "extrapolation 1 to 1.25",
    "PCA Gaussian 16",
    "latent KDE 0.25",
)


def standard_baselines(which: str = "all") -> list[Baseline]:
    """
    The baselines of a report, family by family and each family in the order of its values.

    Not every context supports each (few snapshots, no latents): ask `Baseline.supports` first.

    Args:
        which (`str`, *optional*, defaults to `"all"`): `few` for those of `FEW` alone.
    """
    if which == "few":
        return [baseline for baseline in standard_baselines() if baseline.name in FEW]
    temperatures = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    return [
        *(
            Baseline("noise", scale, partial(_sample_noise, scale=scale), min_snapshots=1)
            for scale in (0.001, 0.01, 0.02, 0.05, 0.1, 0.15, 0.3)  # the paper's are 0.001, 0.05 and 0.15
        ),
        *(Baseline("soup", k, partial(_sample, soup, k=k), min_snapshots=k) for k in (2, 4, 16)),
        *(
            Baseline("diagonal Gaussian", temperature, partial(_sample, diagonal_gaussian, temperature=temperature))
            for temperature in temperatures
        ),
        *(
            Baseline("low-rank Gaussian", temperature, partial(_sample, low_rank_gaussian, temperature=temperature))
            for temperature in temperatures
        ),
        *(
            Baseline(
                "low-rank + diagonal Gaussian",
                temperature,
                partial(_sample, low_rank_gaussian, temperature=temperature, with_diagonal=True),
            )
            for temperature in temperatures
        ),
        *(
            Baseline(family, f"{low} to {high}", partial(_sample, interpolation, weight_range=(low, high)))
            for family, low, high in (
                ("interpolation", 0, 1),
                ("extrapolation", 1, 1.25),
                ("extrapolation", 1.25, 1.5),
                ("extrapolation", 1.5, 2),
            )
        ),
        *(
            Baseline(
                "PCA Gaussian",
                num_components,
                partial(_sample, pca_gaussian, num_components=num_components, temperature=1.0),
                min_snapshots=num_components + 1,
            )
            for num_components in (4, 16, 64)
        ),
        *(
            Baseline(
                "latent KDE",
                "Scott" if bandwidth is None else bandwidth,
                partial(_sample_latent_kde, bandwidth=bandwidth),
                needs_latents=True,
            )
            for bandwidth in (0.05, 0.1, 0.25, 0.5, None)
        ),
    ]


def _sample(function: Callable, context: BaselineContext, num_models: int, generator: Generator, **setting) -> Tensor:
    return function(context.snapshots, num_models, generator=generator, room=context.room, **setting)


def _sample_noise(context: BaselineContext, num_models: int, generator: Generator, scale: float) -> Tensor:
    return gaussian_noise(context.snapshots, context.tensor_sizes, num_models, scale, generator, context.room)


def _sample_latent_kde(
    context: BaselineContext, num_models: int, generator: Generator, bandwidth: float | None
) -> Tensor:
    assert context.latents is not None and context.decode is not None  # `Baseline.supports`
    return context.decode(latent_kde(context.latents, num_models, bandwidth, generator))


def _normal(rows: int, columns: int, generator: Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator)


def _random_rows(count: int, num_models: int, generator: Generator) -> Tensor:
    """(n,) indices of rows: each at most once while there are enough of them."""
    if num_models <= count:
        return torch.randperm(count, generator=generator)[:num_models]
    return torch.randint(count, (num_models,), generator=generator)


def _distinct_rows(count: int, num_models: int, k: int, generator: Generator) -> Tensor:
    """(n, k) indices of rows, distinct within each line."""
    return torch.rand(num_models, count, generator=generator).argsort(1)[:, :k]


def _check(rows: Matrix, num_models: int, at_least: int) -> None:
    if rows.ndim != 2 or len(rows) < at_least:
        raise ValueError(f"needs a matrix of at least {at_least} rows, got shape {tuple(rows.shape)}")
    if num_models < 1:
        raise ValueError(f"`num_models` must be at least 1, got {num_models}")


def _check_scale(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be finite and at least 0, got {value}")
