"""Principal components of few long vectors, from the inner products between them."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F


def gram_matrix(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """
    Inner products between K vectors that come in parts, so that they need not be in memory as float64 at once.

    Args:
        parts (`Iterable[torch.Tensor]`): Shape `(..., K, d)` each: some of the vectors' coordinates, for all of them.

    Returns:
        `torch.Tensor`: Shape `(..., K, K)`, float64.
    """
    gram = 0
    for part in parts:
        part = part.double()
        gram = gram + part @ part.mT
    return gram


def direction_weights(gram: torch.Tensor, num_components: int) -> torch.Tensor:
    """
    What turns K centred vectors into their orthonormal principal directions.

    K vectors span no more than K directions, so those of the d×d covariance follow from the K×K Gram matrix X Xᵀ: for
    its eigenvectors u and eigenvalues λ, they are Xᵀ u / √λ.

    Args:
        gram (`torch.Tensor`): Shape `(..., K, K)`, of [`gram_matrix`].
        num_components (`int`): r.

    Returns:
        `torch.Tensor`: Shape `(..., K, r)`, the largest direction first: the columns of `x.mT @ weights` are the
        directions. Columns are zero where there is no such direction.
    """
    values, vectors = torch.linalg.eigh(gram)  # ascending
    values, vectors = values.flip(-1)[..., :num_components], vectors.flip(-1)[..., :num_components]
    # Eigenvalues that are zero but for rounding have no direction.
    smallest = values[..., :1].clamp_min(torch.finfo(values.dtype).tiny) * gram.shape[-1] * 1e-14
    weights = vectors * torch.where(values > smallest, values.clamp_min(smallest).rsqrt(), 0).unsqueeze(-2)
    return F.pad(weights, (0, num_components - weights.shape[-1]))


def principal_directions(vectors: torch.Tensor, num_components: int) -> torch.Tensor:
    """The first `num_components` directions of K centred vectors, `(..., K, d)`, as columns: `(..., d, r)`, float64."""
    vectors = vectors.double()
    if vectors.shape[-1] > vectors.shape[-2]:
        return vectors.mT @ direction_weights(gram_matrix([vectors]), num_components)
    directions = torch.linalg.eigh(vectors.mT @ vectors).eigenvectors.flip(-1)[..., :num_components]
    return F.pad(directions, (0, num_components - directions.shape[-1]))
