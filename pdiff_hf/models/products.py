"""LoRA adapters as the products BA of their factors, or as what these are between frames that all of them share."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..layout import LayoutError, ParameterLayout, some_names
from ..lora import FACTOR, config_of_rank

logger = logging.getLogger(__name__)

# What AdaLoRA and KaSA put between the two factors.
_OTHER_FACTORS = ("lora_E", "lora_diag")
# Adapters of whose energy frames hold less are other adapters; and those of which the others explain less than this
# share no geometry, so that there is nothing to learn but each of them.
MIN_ENERGY, MIN_HELDOUT = 0.85, 0.05


def find_factors(layout: ParameterLayout) -> dict[str, str]:
    """The names of the factors A of adapters in a layout, with those of the factors B that belong to them."""
    factors = [m for name in layout.names if (m := FACTOR.fullmatch(name)) and m["letter"] == "A"]
    found = {m.string: f"{m['module']}.{m['kind']}B{m['rest'] or ''}" for m in factors}
    return {a: b for a, b in found.items() if b in layout.names}


@dataclass(frozen=True)
class Geometry:
    """
    What a set of adapters looks like by the inner products of their products BA.

    Args:
        gram (`torch.Tensor`): Inner products, shape `(K, K)`, float64.
        energy (`float`): The part of their squared norms that frames keep; 1 without frames.
    """

    gram: torch.Tensor
    energy: float

    @property
    def heldout(self) -> float:
        """
        R² of adapters that are predicted by the nearest point of the affine hull of all others, over their mean: 0 for
        adapters that are orthogonal to each other.
        """
        count = len(self.gram)
        ones = torch.ones(count, 1, dtype=torch.float64)
        scale = self.gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        bordered = torch.cat([torch.cat([self.gram / scale, ones], 1), torch.cat([ones, torch.zeros(1, 1)], 0).mT])
        bordered[range(count), range(count)] += 1e-9
        # The squared distance to the affine hull of the others.
        left = (1 / torch.linalg.inv(bordered).diagonal()[:-1]).clamp_min(0)
        centred = self.gram / scale - (self.gram / scale).mean(0)
        centred = centred - centred.mean(1, keepdim=True)
        whole = centred.diagonal() * (count / (count - 1)) ** 2  # from the mean of the others
        return float(1 - left.sum() / whole.sum().clamp_min(1e-300))

    def report(self) -> dict[str, Any]:
        """Numbers for a record; warns where a generator could hardly learn anything of them."""
        norms = self.gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        cosines = (self.gram / norms / norms.unsqueeze(1)).tril(-1)
        copies = torch.nonzero(cosines > 1 - 1e-6).tolist()
        if copies:
            more = f", as do {len(copies) - 1} other pairs" if len(copies) > 1 else ""
            logger.warning("adapters %d and %d do the same, with other factors%s", *reversed(copies[0]), more)
        if self.energy < MIN_ENERGY:
            logger.warning(
                "the frames keep %.0f%% of the adapters; with larger ones (adapter_frame_size) they are nearer to what "
                "they were",
                100 * self.energy,
            )
        if len(self.gram) > 2 and self.heldout < MIN_HELDOUT:
            logger.warning(
                "these adapters have almost nothing in common: of one that is left out, the others explain %.0f%% "
                "(R²). Trained from different initialisations that hardly moved, they share no directions, and a "
                "generator cannot learn from them; train them from one initialisation, or for longer",
                100 * max(0.0, self.heldout),
            )
        found = {"energy": self.energy, "copies": len(copies)}
        if len(self.gram) > 2:
            apart = cosines[cosines != 0]
            found |= {"heldout_r2": self.heldout, "mean_cosine": float(apart.mean()) if len(apart) else 0.0}
        return found


class AdapterProducts(nn.Module):
    """
    From the factors A, shape `(r, i)`, and B, shape `(o, r)`, of each adapter in a vector to their product BA, shape
    `(o, i)`, and back. All other tensors stay as they are.

    Networks depend on products alone: (B M⁻¹)(M A) is the same network for every invertible M, so means and distances
    of factors say little. Products need as many values as the weights that they are added to. With frames, orthonormal
    bases Q_B of the columns of all products and Q_A of their rows, an adapter is its core Q_Bᵀ B A Q_A instead: the
    coordinates of its projection onto the products of two bases, with the same distances where the bases hold all. The
    products themselves are then never made.

    Args:
        layout (`ParameterLayout`): Of vectors of D parameters, with factors.
        frame_size (`int`, *optional*): Most vectors in a basis. A side of at most this many is left as it is; None for
            products without frames.

    Attributes:
        layout (`ParameterLayout`): Of vectors with products, D' values: each product in the place of its A.
        most (`int`, *optional*): Factors of a higher rank get zeros beyond this one.

    Raises:
        LayoutError: if there are no factors, or others between them (AdaLoRA, KaSA), or products of several experts.
    """

    def __init__(self, layout: ParameterLayout, frame_size: int | None = None):
        super().__init__()
        self.factors, self.frame_size = layout, frame_size
        self.most: int | None = None
        self.pairs = find_factors(layout)
        if not self.pairs:
            raise LayoutError(
                "products are of the factors lora_A and lora_B of adapters, and there are none among the selected "
                f"tensors {some_names(layout.names)}; select both, or leave adapter_products out"
            )
        other = [name for name in layout.names if any(f".{kind}." in f"{name}." for kind in _OTHER_FACTORS)]
        if other or any(config.get("target_parameters") for config in layout.adapters.values()):
            what = f"'{other[0]}' stands between the two factors" if other else "these adapters are those of experts"
            raise LayoutError(f"{what}, so that BA is not what is added to a weight; leave adapter_products out")
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        self.ranks = {a: shapes[a][0] for a in self.pairs}
        for a, b in self.pairs.items():
            if len(shapes[b]) < 2 or shapes[b][1] != shapes[a][0] or len(shapes[b]) > 2 and max(shapes[b][2:]) > 1:
                raise LayoutError(f"'{a}' of shape {shapes[a]} and '{b}' of shape {shapes[b]} have no product")
        # For each product its number of rows and columns, and how many of each frames keep; None for all.
        self.sides = {a: (shapes[b][0], math.prod(shapes[a][1:])) for a, b in self.pairs.items()}
        self.kept = {
            a: tuple(frame_size if frame_size and size > frame_size else None for size in sides)
            for a, sides in self.sides.items()
        }
        self.has_frames = any(size for sizes in self.kept.values() for size in sizes)
        self._places: dict[tuple[str, int], slice] = {}  # of each frame in the buffer of its side
        for side, name in enumerate(("frame_left", "frame_right")):
            size = 0
            for a, sides in self.sides.items():
                start, size = size, size + sides[side] * (self.kept[a][side] or 0)
                self._places[a, side] = slice(start, size)
            if size:
                self.register_buffer(name, torch.zeros(size, dtype=torch.bfloat16))
        # Where tensors lie in vectors with factors, and the names of those that vectors with products have too.
        starts = zip(layout.names, layout.offsets, layout.sizes, strict=True)
        self.places = {name: slice(start, start + size) for name, start, size in starts}
        self.names = [name for name in layout.names if name not in self.pairs.values()]
        cores = {
            a: (left or self.sides[a][0], *(shapes[a][1:] if right is None else (right,)))
            for a, (left, right) in self.kept.items()
        }
        self.layout = ParameterLayout(
            tuple(FACTOR.sub(r"\g<module>.\g<kind>BA\g<rest>", name) if name in cores else name for name in self.names),
            tuple(cores.get(name, shapes[name]) for name in self.names),
            ("float32",) * len(self.names),
        )
        self._orthonormal: dict[tuple, torch.Tensor] = {}

    def layout_of_rank(self, rank: int | None) -> ParameterLayout:
        """The layout of adapters of another rank, with the configuration that PEFT needs for them."""
        if rank is None:
            return self.factors
        layout = self.factors
        axes = dict.fromkeys(self.pairs, 0) | dict.fromkeys(self.pairs.values(), 1)  # that of the rank
        shapes = tuple(
            shape if name not in axes else (*shape[: axes[name]], rank, *shape[axes[name] + 1 :])
            for name, shape in zip(layout.names, layout.shapes, strict=True)
        )
        adapters = {name: config_of_rank(config, rank) for name, config in layout.adapters.items()}
        return ParameterLayout(layout.names, shapes, layout.dtypes, layout.aliases, adapters)

    def frame(self, a: str, side: int) -> torch.Tensor | None:
        """
        The orthonormal basis of the columns (`side` 0) or rows (1) of a product as columns, float32 of shape `(d, f)`;
        None where all are kept.
        """
        if self.kept[a][side] is None:
            return None
        stored = self._stored(a, side)
        key = (a, side, stored.data_ptr(), stored._version, stored.device)
        if key not in self._orthonormal:
            # Rounding to bfloat16 has changed angles by some thousandths.
            values, vectors = torch.linalg.eigh((stored.float().mT @ stored.float()).double())
            scale = torch.where(values > 1e-3, values.clamp_min(1e-3).rsqrt(), 0)
            self._orthonormal[key] = ((vectors * scale) @ vectors.mT).float()
        return stored.float() @ self._orthonormal[key]

    def _stored(self, a: str, side: int) -> torch.Tensor:
        buffer: Any = self.frame_right if side else self.frame_left
        return buffer[self._places[a, side]].view(self.sides[a][side], -1)

    def _product(self, a: str, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The core, or product, of factors B, `(..., o r)`, and A, `(..., r i)`, flat."""
        rank = self.ranks[a]
        b, right = left.unflatten(-1, (-1, rank)), right.unflatten(-1, (rank, -1))
        q_b, q_a = self.frame(a, 0), self.frame(a, 1)
        b = b if q_b is None else q_b.to(b).mT @ b
        right = right if q_a is None else right @ q_a.to(right)
        return (b @ right).flatten(-2)

    def expand(self, parameters: torch.Tensor) -> torch.Tensor:
        """Vectors with factors, shape `(..., D)`, to vectors with products, shape `(..., D')`."""
        pieces = dict(zip(self.factors.names, parameters.split(self.factors.sizes, -1), strict=True))
        for a, b in self.pairs.items():
            pieces[a] = self._product(a, pieces.pop(b), pieces[a])
        return torch.cat(list(pieces.values()), -1)

    def contract(self, products: torch.Tensor, rank: int | None = None) -> torch.Tensor:
        """
        Vectors with products, shape `(..., D')`, to vectors with the factors, shape `(..., D)`, whose products are
        nearest to them in the Frobenius norm: one of the factors has the first r singular vectors. With another `rank`,
        to vectors of [`layout_of_rank`].
        """
        pieces = dict(zip(self.names, products.split(self.layout.sizes, -1), strict=True))
        for a, b in self.pairs.items():
            rows = self.kept[a][0] or self.sides[a][0]
            size = rank or self.ranks[a]
            kept = min(size, self.most or size)
            left, right = _factors(pieces[a].unflatten(-1, (rows, -1)), kept)
            left, right = F.pad(left, (0, size - kept)), F.pad(right, (0, 0, 0, size - kept))
            q_b, q_a = self.frame(a, 0), self.frame(a, 1)
            left = left if q_b is None else q_b.to(left) @ left
            right = right if q_a is None else right @ q_a.to(right).mT
            pieces[b], pieces[a] = left.flatten(-2), right.flatten(-2)
        return torch.cat([pieces[name] for name in self.factors.names], -1)

    @torch.no_grad()
    def fit(self, parameters: torch.Tensor, rows: torch.Tensor) -> Geometry:
        """
        Sets the frames from snapshots, one module at a time: those in which the snapshots have the most energy. With
        G_B, the inner products of all columns of all B, and G_A, of all rows of all A, the inner products of adapters
        are sums over r×r blocks, and those of the columns of products with weights from A follow from both.

        Args:
            parameters (`torch.Tensor`): Shape `(K, D)`; it may be mapped from a file, of which one tensor at a time is
                read.
            rows (`torch.Tensor`): Indices of the snapshots to take, shape `(N,)`.
        """
        count = len(rows)
        gram = torch.zeros(count, count, dtype=torch.float64)
        kept = whole = 0.0
        for a, b in self.pairs.items():
            (num_rows, num_columns), rank = self.sides[a], self.ranks[a]
            left = parameters[:, self.places[b]][rows].unflatten(1, (num_rows, rank))
            right = parameters[:, self.places[a]][rows].unflatten(1, (rank, num_columns))
            columns = left.float().transpose(0, 1).reshape(num_rows, -1)  # (o, N r)
            lines = right.float().reshape(-1, num_columns)  # (N r, i)
            of_left, of_right = columns.mT @ columns, lines @ lines.mT  # (N r, N r)
            products = of_left.double() * of_right.double()
            here = products.unflatten(0, (count, -1)).unflatten(2, (count, -1)).sum((1, 3))
            gram += here
            energy = here.diagonal().sum().item()
            whole += energy
            for side, (vectors, own, other) in enumerate(((columns, of_left, of_right), (lines.mT, of_right, of_left))):
                if number := self.kept[a][side]:
                    stored = self._stored(a, side)
                    stored.copy_(_leading_directions(vectors, own, other, count, number))
            self._orthonormal.clear()
            if self.kept[a] == (None, None):
                kept += energy
            else:
                for start in range(0, count, 16):
                    part = slice(start, start + 16)
                    cores = self._product(a, left[part].flatten(1), right[part].flatten(1))
                    kept += cores.double().square().sum().item()
        return Geometry(gram, min(1.0, kept / whole) if whole else 1.0)


def smallest_frame(
    layout: ParameterLayout, parameters: torch.Tensor, rows: torch.Tensor, energy: float, most: int
) -> int:
    """The smallest power of two, or `most`, whose frames keep that part of the energy; see [`AdapterProducts.fit`]."""
    sizes = [2**i for i in range(2, max(2, most.bit_length())) if 2**i < most]
    return next((n for n in sizes if AdapterProducts(layout, n).fit(parameters, rows).energy >= energy), most)


def _leading_directions(
    vectors: torch.Tensor, own: torch.Tensor, other: torch.Tensor, count: int, number: int
) -> torch.Tensor:
    """
    The directions in which the products of factors have the most energy, as columns: `(d, number)`.

    Args:
        vectors (`torch.Tensor`): One of the factors of all adapters side by side, shape `(d, N r)`.
        own (`torch.Tensor`): Their inner products, shape `(N r, N r)`.
        other (`torch.Tensor`): Those of the other factors.
    """
    rank = len(own) // count
    blocks = other.unflatten(0, (count, rank)).unflatten(2, (count, rank)).double()
    blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (N, r, r), of each adapter with itself
    values, basis = torch.linalg.eigh(blocks)
    roots = (basis * values.clamp_min(0).sqrt().unsqueeze(1)) @ basis.mT  # (N, r, r)
    between = own.double().unflatten(0, (count, rank)).unflatten(2, (count, rank))
    weighted = torch.einsum("nab,nbmc->namc", roots, between)
    weighted = torch.einsum("namc,mcd->namd", weighted, roots).flatten(2).flatten(0, 1)
    values, weights = (x.flip(-1)[..., :number] for x in torch.linalg.eigh((weighted + weighted.mT) / 2))
    good = values > values[:1].clamp_min(torch.finfo(values.dtype).tiny) * 1e-7  # float32
    weights = torch.einsum("nab,nbf->naf", roots, weights.unflatten(0, (count, rank))).flatten(0, 1)
    directions = vectors @ (weights * torch.where(good, values.clamp_min(1e-300).rsqrt(), 0)).float()
    # What rounding has left of orthogonality, where energies differ by many orders of magnitude.
    directions = torch.where(good, torch.linalg.qr(directions)[0], 0)
    return F.pad(directions, (0, number - directions.shape[1]))


class ProductRows:
    """
    Vectors with products, shape `(K, D')`, which are made where they are looked at: `rows[indices, start:stop]`.

    Args:
        parameters (`torch.Tensor`): Vectors with factors, shape `(K, D)`; it may be mapped from a file.
    """

    def __init__(self, products: AdapterProducts, parameters: torch.Tensor):
        self.products, self.parameters = products, parameters
        self._last: tuple[Any, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, key: tuple[torch.Tensor, slice]) -> torch.Tensor:
        rows, columns = key
        layout, found = self.products.layout, []
        for name, offset, size in zip(self.products.names, layout.offsets, layout.sizes, strict=True):
            start, stop = max(columns.start, offset), min(columns.stop, offset + size)
            if start < stop:
                found.append(self._tensor(name, rows)[:, start - offset : stop - offset])
        return torch.cat(found, 1)

    def _tensor(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        if self._last is not None and self._last[0][0] == name and self._last[0][1] is rows:
            return self._last[1]
        tensor = self._read(name, rows)
        if name in self.products.pairs:
            tensor = self.products._product(name, self._read(self.products.pairs[name], rows), tensor)
        self._last = (name, rows), tensor
        return tensor

    def _read(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return self.parameters[:, self.products.places[name]][rows]


def _factors(product: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    B, `(..., o, r)`, and A, `(..., r, i)`, of the best approximation of rank r of `product`, `(..., o, i)`.

    Those of the approximation P = U S Vᵀ are B = P V and A = Vᵀ. With V as a constant, gradients would keep the network
    in the span of V. For a change dP that of A is therefore S⁻¹ Uᵀ dP (1 - V Vᵀ), so that B A changes along all
    directions in which matrices of rank r can: by dP V Vᵀ + U Uᵀ dP (1 - V Vᵀ).
    """
    if product.shape[-2] < product.shape[-1]:
        a, b = _factors(product.mT, rank)
        return b.mT, a.mT
    with torch.no_grad():
        gram = product.double().mT @ product.double()
        values, vectors = (x.flip(-1)[..., :rank] for x in torch.linalg.eigh(gram))  # (..., r), (..., i, r)
        vectors = F.pad(vectors, (0, rank - vectors.shape[-1])).to(product.dtype)
    b, a = product @ vectors, vectors.mT
    if product.requires_grad:
        smallest = values[..., :1].clamp_min(torch.finfo(values.dtype).tiny) * 1e-10
        scale = torch.where(values > smallest, values.clamp_min(smallest).reciprocal(), 0).to(product.dtype)
        scale = F.pad(scale, (0, rank - scale.shape[-1])).unsqueeze(-1)
        change = scale * (b.detach().mT @ (product - b @ a))
        a = a + change - change.detach()
    return b, a


def expanded(parameters: torch.Tensor, products: AdapterProducts | None) -> torch.Tensor:
    """Vectors with products, where there are any."""
    return parameters if products is None else products.expand(parameters)


def contracted(vectors: torch.Tensor, products: AdapterProducts | None) -> torch.Tensor:
    """The way back."""
    return vectors if products is None else products.contract(vectors)
