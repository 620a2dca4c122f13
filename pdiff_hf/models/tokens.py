"""Parameter vectors as the autoencoder's network sees them: normalised, and in tokens of a few principal components."""

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F

from ..layout import LayoutError, ParameterLayout
from .products import AdapterProducts, Geometry, ProductRows
from .saved import SavedModel

Vectors = torch.Tensor | ProductRows
NORMALIZATIONS = ["coordinate", "tensor"]
# So many parameters of each vector are worked on at once where not all of them need to be.
BLOCK_SIZE = 2**18
# Values of a tensor in all snapshots, up to which statistics are fitted with one read; more are read in blocks.
MAX_VALUES = 2**27
MAX_TOKENS = 10**7
# How the bases of tokens are kept.
BASIS_DTYPES = {"float32": torch.float32, "int8": torch.int8}


class TokenModel(SavedModel):
    """
    A model of parameter vectors that sees them as a signal of C channels and length S, `token_shape`.

    Its buffers hold the mean of every parameter, the standard deviation of every tensor, and the bases of tokens, which
    [`fit_parameter_statistics`] sets and training leaves as they are.

    Attributes:
        products (`AdapterProducts`, *optional*): What turns the factors of adapters to products before all else.
        vector_layout (`ParameterLayout`): Of the vectors after that.
    """

    products: AdapterProducts | None

    # What is stored in them is lost in half precision: the spread of a tensor is a small part of its mean.
    _keep_in_fp32_modules = [
        "parameter_mean",
        "parameter_std",
        "token_basis",
        "token_basis_scale",
        "latent_mean",
        "latent_std",
    ]

    def _init_tokens(
        self,
        layout: ParameterLayout,
        block_out_channels: Sequence[int],
        token_size: int | None,
        token_dim: int,
        basis_dtype: str = "float32",
    ) -> None:
        """Sets `token_lengths`, how many parameters each token holds, `token_shape`, and room for their bases."""
        self.vector_layout, num_parameters = layout, layout.num_parameters
        if token_size is not None and (token_size < 1 or token_dim < 1):
            raise LayoutError(f"token_size and token_dim must be at least 1, got {token_size} and {token_dim}")
        if basis_dtype not in BASIS_DTYPES:
            raise LayoutError(f"basis_dtype must be one of {', '.join(BASIS_DTYPES)}, got {basis_dtype!r}")
        if basis_dtype == "int8" and (not block_out_channels or token_size is None or token_size > BLOCK_SIZE // 4):
            raise LayoutError(
                f"basis_dtype='int8' is for tokens of at most {BLOCK_SIZE // 4:,} parameters, got "
                f"token_size={token_size} and block_out_channels={tuple(block_out_channels)}"
            )
        pieces: tuple[int, ...] = layout.sizes
        if not block_out_channels:
            token_size, pieces = num_parameters, (num_parameters,)
        self.token_lengths: list[int] | None = None
        self.token_shape = (1, num_parameters)
        if token_size is None:
            return
        num_tokens = sum(-(-size // token_size) for size in pieces)
        if num_tokens > MAX_TOKENS:  # before a list of them is made: a config may ask for anything
            raise LayoutError(
                f"token_size={token_size} cuts {num_parameters:,} parameters into {num_tokens:,} tokens, more than "
                f"{MAX_TOKENS:,}; use larger tokens"
            )
        self.token_lengths = [min(token_size, size - start) for size in pieces for start in range(0, size, token_size)]
        self.token_shape = (token_dim, len(self.token_lengths))
        # Row i are the entries of the principal directions of its token that belong to parameter i.
        self.register_buffer("token_basis", torch.zeros(num_parameters, token_dim, dtype=BASIS_DTYPES[basis_dtype]))
        if basis_dtype == "int8":
            # Multiplies the directions of each token, which are stored as whole numbers up to 127.
            self.register_buffer("token_basis_scale", torch.zeros(len(self.token_lengths), token_dim))
        # Divides the components, so that each of them has about unit variance: together they have that of the token.
        lengths = torch.tensor(self.token_lengths)
        self.register_buffer("token_scale", (lengths.float() / token_dim).sqrt(), persistent=False)
        self.register_buffer("token_num_parameters", lengths, persistent=False)

    def _vectors(self, parameters: torch.Tensor, rows: torch.Tensor | None) -> tuple[Vectors, torch.Tensor]:
        """Parameters, `(K, D)`, as vectors with products of adapters, where these are learned; and indices of rows."""
        rows = torch.arange(len(parameters)) if rows is None else rows
        return parameters if self.products is None else ProductRows(self.products, parameters), rows

    @torch.no_grad()
    def fit_parameter_statistics(
        self, parameters: torch.Tensor, normalization: str = "coordinate", rows: torch.Tensor | None = None
    ) -> Geometry | None:
        """
        Sets everything that training leaves as it is, from snapshots: frames of adapters, mean, standard deviation, and
        bases of tokens.

        Args:
            parameters (`torch.Tensor`): Shape `(K, D)`. It may be larger than memory: one tensor at a time is read,
                and one of more than `MAX_VALUES` values in blocks of columns.
            normalization (`str`, *optional*, defaults to `"coordinate"`): `"coordinate"` takes the mean of every
                parameter over the snapshots, and for every tensor the standard deviation around it: the network need
                not learn the mean network, and explains more of what differs between snapshots. `"tensor"` takes one
                mean and standard deviation a tensor, as the published implementation does.
            rows (`torch.Tensor`, *optional*): Indices of the snapshots to take, all by default.

        Returns:
            [`Geometry`] or `None`: Of adapters that are learned as products.
        """
        vectors, rows = self._vectors(parameters, rows)
        geometry = None if self.products is None else self.products.fit(parameters, rows)
        ends = list(itertools.accumulate(self.token_lengths or ()))  # where each token ends
        for i, (start, size) in enumerate(zip(self.vector_layout.offsets, self.vector_layout.sizes, strict=True)):
            whole = vectors[rows, start : start + size] if len(rows) * size <= MAX_VALUES else None

            def read(first: int, stop: int, start: int = start, whole: torch.Tensor | None = whole) -> torch.Tensor:
                return vectors[rows, start + first : start + stop] if whole is None else whole[:, first:stop]

            mean, squares = self.parameter_mean[start : start + size], 0.0  # a view
            for first in range(0, size, BLOCK_SIZE // 4):
                part = mean[first : first + BLOCK_SIZE // 4]
                block = read(first, first + len(part)).double()
                squares += (block - part.copy_(block.mean(0))).square().sum().item()
            if normalization == "tensor":
                common = mean.double().mean().float()
                squares += len(rows) * (mean.double() - common).square().sum().item()
                mean.copy_(common)
            # A tensor that never changes, or an empty one, is left in its natural units.
            self.parameter_std[i] = math.sqrt(squares / (len(rows) * size)) if squares > 0 else 1.0
            if size and len(ends) > 1:
                tokens = slice(bisect.bisect_right(ends, start), bisect.bisect_left(ends, start + size) + 1)
                self._fit_bases(read, start, self.parameter_std[i].expand(size), tokens)
        if len(ends) == 1:
            self._fit_bases(lambda first, stop: vectors[rows, first:stop], 0, self._scale(), slice(0, 1))
        return geometry

    def _fit_bases(
        self, read: Callable[[int, int], torch.Tensor], offset: int, scale: torch.Tensor, tokens: slice
    ) -> None:
        """
        Those of some tokens, whose parameters begin at `offset` and have the standard deviations `scale`; `read(start,
        stop)` gives some of these parameters in all snapshots.
        """
        num_components, end = self.token_shape[0], offset + len(scale)
        mean, basis = self.parameter_mean[offset:end], self.token_basis[offset:end]

        def vectors(start: int, stop: int, num_tokens: int) -> torch.Tensor:
            """Normalised parameters, shape `(n, N, t)`."""
            block = (read(start, stop) - mean[start:stop]) / scale[start:stop]
            return block.view(len(block), num_tokens, -1).transpose(0, 1)

        # A token that is longer than a block comes in several.
        parts = split_into_blocks((self.token_lengths or ())[tokens], BLOCK_SIZE // 4)
        for token, group in itertools.groupby(parts, key=lambda block: block[2]):
            blocks = [(start, stop, n) for start, stop, _, n in group]
            directions: Iterable[torch.Tensor]
            if len(blocks) == 1:
                directions = [principal_directions(vectors(*blocks[0]), num_components)]
            else:
                weights = direction_weights(gram_matrix(vectors(*block) for block in blocks), num_components)
                directions = (vectors(*block).double().mT @ weights for block in blocks)
            for (start, stop, n), block in zip(blocks, directions, strict=True):  # (n, t, C)
                if basis.dtype == torch.int8:
                    block = self._quantize(block, slice(tokens.start + token, tokens.start + token + n))
                basis[start:stop] = block.reshape(-1, num_components)

    def _quantize(self, columns: torch.Tensor, tokens: slice) -> torch.Tensor:
        """
        Directions of some tokens, shape `(n, t, C)`, as whole numbers from -127 to 127; sets their scales.
        Rounding changes an entry by no more than 1 / 254 of the largest one of its direction.
        """
        scale = columns.abs().amax(1) / 127
        self.token_basis_scale[tokens] = scale.float()
        return (columns / torch.where(scale > 0, scale, 1).unsqueeze(1)).round()

    def _scale(self) -> torch.Tensor:
        """The standard deviation that belongs to every parameter, shape `(D,)`."""
        sizes = torch.tensor(self.vector_layout.sizes, device=self.parameter_std.device)
        return self.parameter_std.repeat_interleave(sizes, output_size=self.vector_layout.num_parameters)

    def normalize(self, parameters: torch.Tensor) -> torch.Tensor:
        """Natural to normalised units, shape `(N, D)`."""
        return (parameters - self.parameter_mean) / self._scale()

    def tokenize(self, parameters: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """
        Parameters in natural units, shape `(K, D)`, on any device, to what the network sees of them, shape `(N, C, S)`:
        of the rows with the indices `rows`, shape `(N,)`, or of all.
        """
        vectors, rows = self._vectors(parameters, rows)
        if self.token_lengths is None:
            whole = slice(0, self.vector_layout.num_parameters)
            return self.normalize(vectors[rows, whole].to(self.parameter_mean.device)).unsqueeze(1)
        num_models, (num_components, num_tokens) = len(rows), self.token_shape
        scale, mean = self._scale(), self.parameter_mean
        tokens = torch.zeros(num_models, num_tokens, num_components, device=mean.device)
        for start, stop, token, n in split_into_blocks(self.token_lengths, BLOCK_SIZE):
            block = (vectors[rows, start:stop].to(mean.device) - mean[start:stop]) / scale[start:stop]
            basis = self.token_basis[start:stop].view(n, -1, num_components)
            block = block.view(num_models, n, -1).transpose(0, 1)  # (N, n t) -> (n, N, t)
            tokens[:, token : token + n] += (block.float() @ basis.float()).transpose(0, 1)  # (n, N, C) -> (N, n, C)
        if self.token_basis.dtype == torch.int8:
            tokens = tokens * self.token_basis_scale
        return (tokens / self.token_scale.unsqueeze(1)).mT.contiguous()

    def detokenize(self, tokens: torch.Tensor) -> torch.Tensor:
        """The way back: tokens of shape `(N, C, S)` to parameters in natural units, shape `(N, D)`, float32."""
        tokens, scale, mean = tokens.float(), self._scale(), self.parameter_mean
        if self.token_lengths is None:
            return tokens.squeeze(1) * scale + mean
        num_models, num_components = len(tokens), self.token_shape[0]
        components = tokens.permute(2, 0, 1) * self.token_scale.float().view(-1, 1, 1)  # (S, N, C)
        if self.token_basis.dtype == torch.int8:
            components = components * self.token_basis_scale.unsqueeze(1)
        parameters = tokens.new_empty(num_models, self.vector_layout.num_parameters)
        for start, stop, token, n in split_into_blocks(self.token_lengths, BLOCK_SIZE):
            basis = self.token_basis[start:stop].view(n, -1, num_components)
            block = components[token : token + n] @ basis.float().mT  # (n, N, t)
            block = block.transpose(0, 1).reshape(num_models, -1)
            parameters[:, start:stop] = block * scale[start:stop] + mean[start:stop]
        return parameters


def split_into_blocks(token_lengths: Sequence[int], size: int) -> Iterator[tuple[int, int, int, int]]:
    """
    A vector in blocks of about `size` parameters: where each starts and stops, and the index and number of its tokens,
    which are equally long. A token of more than `size` parameters comes in several blocks.
    """
    start = token = 0
    for length, group in itertools.groupby(token_lengths):
        count = len(list(group))
        per_block = max(1, size // length)
        for first in range(0, count, per_block):
            n = min(per_block, count - first)
            stop = start + n * length
            for part in range(start, stop, size):
                yield part, min(part + size, stop), token, n
            start, token = stop, token + n


def gram_matrix(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """
    Inner products between K vectors that come in parts, so that they need not be in memory as float64 at once.

    Args:
        parts (`Iterable[torch.Tensor]`): Shape `(..., K, d)` each: some of the vectors' coordinates, for all of them.

    Returns:
        `torch.Tensor`: Shape `(..., K, K)`, float64.
    """

    def products(part: torch.Tensor) -> torch.Tensor:
        part = part.double()
        return part @ part.mT

    return functools.reduce(torch.add, map(products, parts))


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
