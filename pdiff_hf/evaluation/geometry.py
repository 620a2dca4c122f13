"""Where networks lie among the snapshots: distances, coverage, and how much of their variance is explained.

Snapshots may be long and lie in a file, so matrices are read in parts of about 64 MiB and never copied as a whole.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..models.tokens import direction_weights

CHUNK_BYTES = 64 * 2**20
CACHE_BYTES = 2**21  # of a processor: what is gone through several times is four times as fast


def chunks(length: int, bytes_each: int, size: int | None = None) -> Iterator[slice]:
    """Slices of `range(length)`: items of `bytes_each` bytes in `size` (`CHUNK_BYTES`) bytes; at least one item."""
    step = max(1, (size or CHUNK_BYTES) // bytes_each)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


class Rows:
    """
    Some rows of a matrix, which are copied only where they are read: `rows[i]`, `rows[indices]`, `rows[:, columns]`.

    Args:
        matrix (`torch.Tensor`): Shape `(K, D)`.
        chosen (`torch.Tensor`): bool of shape `(K,)`.
    """

    def __init__(self, matrix: Tensor, chosen: Tensor):
        self.matrix, self.index = matrix, chosen.nonzero().flatten()

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.index), self.matrix.shape[1]))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int | slice | Tensor | tuple) -> Tensor:
        if isinstance(key, tuple):
            rows, columns = key
            return self.matrix[self.index[rows], columns]
        return self.matrix[self.index[key]]


Matrix = Tensor | Rows


def mean_of(matrix: Matrix) -> Tensor:
    """The mean of the rows, float64 of shape `(D,)`."""
    mean = torch.empty(matrix.shape[1], dtype=torch.float64)
    for columns in chunks(matrix.shape[1], 8 * len(matrix)):
        mean[columns] = matrix[:, columns].double().mean(0)
    return mean


class Yardstick:
    """
    The snapshots, as what the distances of networks are measured by.

    A large distance to the nearest snapshot is not novelty by itself: compare the distance to the mean beside it. How
    well a set of networks covers the snapshots is told by balls that reach to the k-th nearest neighbour in a set.

    Args:
        snapshots (`torch.Tensor` or `Rows`): Shape `(K, D)`, K at least 2.
        k (`int`, *optional*, defaults to 5): Which neighbour is the radius of a ball; a set of no more than k points
            has its k lowered to one less than its size.

    Raises:
        ValueError: for fewer than two snapshots.
    """

    def __init__(self, snapshots: Matrix, k: int = 5):
        if len(snapshots) < 2:
            raise ValueError(f"needs at least 2 snapshots, got shape {tuple(snapshots.shape)}")
        self.snapshots, self.k = snapshots, k
        table = pairwise_distances(snapshots, snapshots).fill_diagonal_(math.inf)
        self.nearest_index = table.argmin(1)
        self.nearest = exact_distances(snapshots, snapshots, self.nearest_index)
        self.radii = table.kthvalue(self._k(len(snapshots)), dim=1).values
        self.mean = mean_of(snapshots)
        self.to_mean = self._to_mean(snapshots)

    def _k(self, size: int) -> int:
        return min(self.k, size - 1)

    def place(self, parameters: Tensor | None = None) -> dict[str, Tensor | float]:
        """
        Where networks lie among the snapshots.

        Args:
            parameters (`torch.Tensor`, *optional*): Shape `(N, D)`. By default the snapshots themselves, none of which
                is compared with itself, and which have no coverage.

        Returns:
            `dict`: for each network, float64 of shape `(N,)` but for the index:
                - `nearest`: L2 distance to the nearest snapshot, and `nearest_index`, which one that is.
                - `nearest_relative`: the same over the median distance of a snapshot to its nearest other one.
                - `to_mean`: distance to the mean of the snapshots.
                - `to_mean_relative`: the same over the root mean square of the snapshots' own.

            and as numbers: `precision`, the share of networks inside a ball of the snapshots, and `recall`, the share
            of snapshots inside a ball of the networks (Kynkäänniemi et al. 2019), nan for one network; `density`, the
            mean number of balls around a network, divided by k and not bounded by 1, and `coverage`, the share of balls
            with a network in them (Naeem et al. 2020). A ball includes its surface.
        """
        if parameters is None:
            nearest, index, to_mean = self.nearest, self.nearest_index, self.to_mean
            covering = dict.fromkeys(("precision", "recall", "density", "coverage"), math.nan)
        else:
            between = pairwise_distances(self.snapshots, parameters)  # (K, N)
            index = between.argmin(0)
            nearest = exact_distances(parameters, self.snapshots, index)
            to_mean = self._to_mean(parameters)
            covering = self._coverage(between, parameters)
        return {
            "nearest": nearest,
            "nearest_index": index,
            "nearest_relative": nearest / self.nearest.quantile(0.5),  # `median` would take the lower of two
            "to_mean": to_mean,
            "to_mean_relative": to_mean / self.to_mean.square().mean().sqrt(),
            **covering,
        }

    def _to_mean(self, matrix: Matrix) -> Tensor:
        """`(N,)`."""
        return exact_distances(matrix, self.mean[None], torch.zeros(len(matrix), dtype=torch.long))

    def _coverage(self, between: Tensor, parameters: Tensor) -> dict[str, float]:
        inside = between <= self.radii[:, None]
        recall = math.nan
        if len(parameters) > 1:
            own = pairwise_distances(parameters, parameters).fill_diagonal_(math.inf)
            radii = own.kthvalue(self._k(len(parameters)), dim=1).values
            recall = (between <= radii).any(1).double().mean().item()
        return {
            "precision": inside.any(0).double().mean().item(),
            "recall": recall,
            "density": inside.sum(0).double().mean().item() / self._k(len(self.snapshots)),
            "coverage": inside.any(1).double().mean().item(),
        }


def pairwise_distances(a: Matrix, b: Matrix) -> Tensor:
    """L2 distances between the rows of `(N, D)` and `(K, D)`: float64 of shape `(N, K)`."""
    squared = torch.zeros(len(a), len(b), dtype=torch.float64)
    for columns in chunks(a.shape[1], 16 * (len(a) + len(b)), CACHE_BYTES):
        # |x|² + |y|² - 2xy cancels where points are far from 0 and near to each other.
        rows = b[:, columns].double()
        centre = rows.mean(0)
        x, y = a[:, columns] - centre, rows - centre
        squared += x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return squared.clamp(min=0).sqrt()


def exact_distances(a: Matrix, b: Matrix, index: Tensor) -> Tensor:
    """
    Distance of row i of `a` to row `index[i]` of `b`, `(N,)`. What is left of the cancellation in
    [`pairwise_distances`] would hide an exact copy (distance 0), so this takes the differences themselves.
    """
    squared = torch.zeros(len(a), dtype=torch.float64)
    for columns in chunks(a.shape[1], 24 * len(a)):
        squared += (a[:, columns].double() - b[index, columns]).square().sum(1)
    return squared.sqrt()


def pca_r2_score(train: Matrix, parameters: Matrix, num_components: int) -> float:
    """
    Share of the variance of `parameters` around the mean of `train` along the first principal components of `train`.

    That is what the best linear autoencoder with a latent of that length explains, the control for a learned one.

    Args:
        train (`torch.Tensor` or `Rows`): Shape `(K, D)`, K >= 2.
        parameters (`torch.Tensor` or `Rows`): Shape `(N, D)`, `train` itself or other networks.
        num_components (`int`): At least 1; K - 1 are all that there are.

    Returns:
        `float`: between 0 and 1; nan where every row equals the mean.
    """
    gram = torch.zeros(len(train), len(train), dtype=torch.float64)
    cross = torch.zeros(len(parameters), len(train), dtype=torch.float64)
    total = 0.0
    for columns in chunks(train.shape[1], 16 * (len(train) + len(parameters))):
        centred = train[:, columns].double()
        mean = centred.mean(0)
        centred = centred - mean
        rows = centred if parameters is train else parameters[:, columns] - mean
        gram += centred @ centred.T
        cross += rows @ centred.T
        total += rows.square().sum().item()
    explained = (cross @ direction_weights(gram, num_components)).square().sum().item()
    return explained / total if total > 0 else math.nan
