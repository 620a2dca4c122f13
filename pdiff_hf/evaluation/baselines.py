"""The trivial generators that a learned one must beat: noise, averages, Gaussians, interpolation, a kernel density.

Each is a function `sample(context, num_models, setting, generator)` from K snapshots to new parameters, float32 of
shape `(n, D)`, reproducible through its source of randomness `generator`. `standard_baselines` lists the settings that
a report runs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from ..models.tokens import gram_matrix
from .geometry import Matrix, chunks


@dataclass(frozen=True)
class BaselineContext:
    """
    What baselines are made from.

    Args:
        snapshots (`torch.Tensor` or `Rows`): Shape `(K, D)`, those that generators see, K at least 2.
        tensor_sizes (`Sequence[int]`, *optional*): How many of the D parameters each tensor has, in order; for noise.
        latents (`torch.Tensor`, *optional*), decode (`Callable`, *optional*): Those of the snapshots, shape `(K, L)`,
            and what gives the parameters of latents; for what is drawn in the space of latents.
        room (`Callable`, *optional*): From numbers of networks and parameters, a float32 tensor of that shape with
            arbitrary values, for the result; in memory by default.
    """

    snapshots: Matrix
    tensor_sizes: Sequence[int] = ()
    latents: Tensor | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    room: Callable[[int, int], Tensor] = torch.empty

    def by_columns(self, num_models: int, sample: Callable[[Tensor], Tensor]) -> Tensor:
        """`(n, D)` from a function of the snapshots' columns, `(K, d)` to `(n, d)`, so that they are never copied."""
        samples = self.room(num_models, self.snapshots.shape[1])
        for columns in chunks(samples.shape[1], 8 * (len(self.snapshots) + num_models)):
            samples[:, columns] = sample(self.snapshots[:, columns])
        return samples


def gaussian_noise(context: BaselineContext, num_models: int, scale: float, generator: Generator) -> Tensor:
    """
    Random snapshots plus Gaussian noise (paper, section 4: scales 0.001, 0.05 and 0.15). Every snapshot is used at most
    once while there are enough of them, and drawn with replacement beyond.

    The unit of the noise is the standard deviation of the parameters of the tensor that it is added to, averaged over
    the snapshots (that is how p-diff normalises parameters). A constant tensor, or one of a single parameter, gets no
    noise.
    """
    snapshots, count = context.snapshots, len(context.snapshots)
    units, start = [], 0
    for size in context.tensor_sizes:
        tensor, start = slice(start, start + size), start + size
        deviations = [snapshots[rows, tensor].std(1, correction=0) for rows in chunks(count, 8 * size)]
        units.append(torch.cat(deviations).mean().expand(size))
    unit = torch.cat(units)  # (D,)
    if num_models <= count:
        chosen = torch.randperm(count, generator=generator)[:num_models]
    else:
        chosen = torch.randint(count, (num_models,), generator=generator)
    samples = context.room(num_models, len(unit))
    for columns in chunks(len(unit), 8 * (count + num_models)):
        noise = scale * unit[columns] * _normal(num_models, len(unit[columns]), generator)
        samples[:, columns] = snapshots[chosen, columns] + noise
    return samples


def soup(context: BaselineContext, num_models: int, k: int, generator: Generator) -> Tensor:
    """Means of k distinct random snapshots (model soups, Wortsman et al. 2022)."""
    rows = _distinct_rows(len(context.snapshots), num_models, k, generator)
    weights = torch.zeros(num_models, len(context.snapshots)).scatter_(1, rows, 1 / k)
    return context.by_columns(num_models, lambda part: weights @ part)


def diagonal_gaussian(context: BaselineContext, num_models: int, temperature: float, generator: Generator) -> Tensor:
    """
    An independent Gaussian for each parameter, with the snapshots' mean and variance (arXiv 2506.07998); `temperature`
    multiplies the standard deviation.
    """

    def sample(part: Tensor) -> Tensor:
        std, mean = torch.std_mean(part, dim=0)
        return mean + temperature * std * _normal(num_models, part.shape[1], generator)

    return context.by_columns(num_models, sample)


def low_rank_gaussian(
    context: BaselineContext, num_models: int, temperature: float, generator: Generator, with_diagonal: bool = False
) -> Tensor:
    """
    A Gaussian whose covariance is that of the snapshots, K - 1 directions; or half of that and half diagonal, as SWAG
    has it (Maddox et al. 2019). `temperature` multiplies the standard deviation.
    """
    count = len(context.snapshots)
    weights = _normal(num_models, count, generator) / math.sqrt(count - 1)

    def sample(part: Tensor) -> Tensor:
        std, mean = torch.std_mean(part, dim=0)
        deviation = weights @ (part - mean)
        if with_diagonal:
            deviation = math.sqrt(0.5) * (deviation + std * _normal(num_models, part.shape[1], generator))
        return mean + temperature * deviation

    return context.by_columns(num_models, sample)


def interpolation(context: BaselineContext, num_models: int, weights: str, generator: Generator) -> Tensor:
    """
    Points a + t (b - a) on the line through two distinct random snapshots, t uniform in a range such as `0 to 1`;
    outside [0, 1] it is an extrapolation.
    """
    low, high = map(float, weights.split(" to "))
    first, second = _distinct_rows(len(context.snapshots), num_models, 2, generator).unbind(1)
    t = low + (high - low) * torch.rand(num_models, 1, generator=generator)
    return context.by_columns(num_models, lambda part: torch.lerp(part[first], part[second], t))


def pca_gaussian(context: BaselineContext, num_models: int, num_components: int, generator: Generator) -> Tensor:
    """
    A Gaussian in the first principal components of the snapshots, fewer than K. These come from the K x K Gram matrix,
    so memory is O(nD). With K - 1 of them it is the distribution of [`low_rank_gaussian`].
    """
    snapshots, count = context.snapshots, len(context.snapshots)
    parts = (snapshots[:, columns] for columns in chunks(snapshots.shape[1], 8 * count))
    gram = gram_matrix(part - part.mean(0) for part in parts)
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -num_components:].float()  # (K, r), eigenvalues ascend
    # A component is centred.T @ u / sqrt(λ) and its standard deviation sqrt(λ / (K-1)): λ cancels.
    weights = _normal(num_models, num_components, generator) @ vectors.T / math.sqrt(count - 1)  # (n, K)
    return context.by_columns(num_models, lambda part: part.mean(0) + weights @ (part - part.mean(0)))


def latent_kde(latents: Tensor, num_models: int, bandwidth: float | None, generator: Generator) -> Tensor:
    """
    Samples of a Gaussian kernel density over latents (as in hyper-representations, Schürholt et al. 2022).

    Args:
        latents (`torch.Tensor`): Shape `(K, L)`, K at least 2.
        num_models (`int`): n.
        bandwidth (`float`, *optional*): Of the kernel, in standard deviations of each latent coordinate; `None` is
            Scott's rule, K^(-1/(L+4)).
        generator (`torch.Generator`): Source of randomness.

    Returns:
        `torch.Tensor`: Shape `(n, L)`, latents for the caller to decode.
    """
    count, length = latents.shape
    bandwidth = count ** (-1 / (length + 4)) if bandwidth is None else bandwidth
    centres = latents[torch.randint(count, (num_models,), generator=generator)]
    return centres + bandwidth * latents.std(0) * _normal(num_models, length, generator)


def _decoded_kde(context: BaselineContext, num_models: int, bandwidth: float | str, generator: Generator) -> Tensor:
    assert context.latents is not None and context.decode is not None  # `Baseline.supports`
    width = None if bandwidth == "Scott" else float(bandwidth)
    return context.decode(latent_kde(context.latents, num_models, width, generator))


@dataclass(frozen=True)
class Baseline:
    """
    One setting of one sweep of baselines.

    Args:
        sweep (`str`): What the settings of one sweep have in common.
        value (`float | str`): The setting: a scale, temperature, bandwidth or number; words where it has none.
        function (`Callable`): `function(context, num_models, value, generator)` gives parameters, `(n, D)`.
        min_snapshots (`int`, *optional*, defaults to 2): How many snapshots it needs.
    """

    sweep: str
    value: float | str
    function: Callable[[BaselineContext, int, Any, Generator], Tensor]
    min_snapshots: int = 2

    @property
    def name(self) -> str:
        return f"{self.sweep} {self.value}"

    def supports(self, context: BaselineContext) -> bool:
        """Whether `sample` is defined for this context."""
        has_latents = context.latents is not None or self.function is not _decoded_kde
        return len(context.snapshots) >= self.min_snapshots and has_latents

    def sample(self, context: BaselineContext, num_models: int, generator: Generator) -> Tensor:
        """Parameters of shape `(n, D)`."""
        return self.function(context, num_models, self.value, generator)


TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
# Of each sweep its function, its settings, and the one in the middle, which stands for the sweep where there are few.
SWEEPS: dict[str, tuple[Callable[..., Tensor], Sequence[float | str], float | str]] = {
    "noise": (gaussian_noise, (0.001, 0.01, 0.02, 0.05, 0.1, 0.15, 0.3), 0.05),
    "soup": (soup, (2, 4, 16), 4),
    "diagonal Gaussian": (diagonal_gaussian, TEMPERATURES, 1.0),
    "low-rank Gaussian": (low_rank_gaussian, TEMPERATURES, 1.0),
    "low-rank + diagonal Gaussian": (partial(low_rank_gaussian, with_diagonal=True), TEMPERATURES, 1.0),
    "interpolation": (interpolation, ("0 to 1",), "0 to 1"),
    "extrapolation": (interpolation, ("1 to 1.25", "1.25 to 1.5", "1.5 to 2"), "1 to 1.25"),
    "PCA Gaussian": (pca_gaussian, (4, 16, 64), 16),
    "latent KDE": (_decoded_kde, (0.05, 0.1, 0.25, 0.5, "Scott"), 0.25),
}


def standard_baselines(which: str = "all") -> list[Baseline]:
    """
    The baselines of a report, `all` or `few`, one of each sweep, sweep by sweep. Not every context supports each (few
    snapshots, no latents): ask `Baseline.supports` first.
    """
    found = []
    for sweep, (function, values, middle) in SWEEPS.items():
        for value in values if which == "all" else (middle,):
            more = {"soup": 0, "PCA Gaussian": 1}.get(sweep)
            least = 2 if more is None else int(value) + more
            found.append(Baseline(sweep, value, function, least))
    return found


def _normal(rows: int, columns: int, generator: Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator)


def _distinct_rows(count: int, num_models: int, k: int, generator: Generator) -> Tensor:
    """`(n, k)` indices of rows, distinct within each line."""
    return torch.rand(num_models, count, generator=generator).argsort(1)[:, :k]
