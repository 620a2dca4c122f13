"""LoRA adapters as the products BA of their factors."""

import re

import torch
import torch.nn.functional as F

from ..layout import LayoutError, ParameterLayout, some_names

# As PEFT names the factors of linear layers, convolutions and embeddings: `layer.lora_A.default.weight`.
FACTOR = re.compile(r"(.*\blora_(?:embedding_)?)A(\b.*)")


def find_factors(layout: ParameterLayout) -> dict[str, str]:
    """The names of the factors A of adapters in a layout, with those of the factors B that belong to them."""
    found = {name: FACTOR.sub(r"\1B\2", name) for name in layout.names if FACTOR.fullmatch(name)}
    return {a: b for a, b in found.items() if b in layout.names}


class AdapterProducts:
    """
    From the factors A, shape `(r, i)`, and B, shape `(o, r)`, of each adapter in a vector to their product BA, shape
    `(o, i)`, and back. All other tensors stay as they are.

    Networks depend on products alone: (B M⁻¹)(M A) is the same network for every invertible M, so means and distances
    of factors say little. Products need as many values as the weights that they are added to.

    Args:
        layout (`ParameterLayout`): Of vectors of D parameters, with factors.

    Attributes:
        layout (`ParameterLayout`): Of vectors with products, D' values: each product in the place of its A.

    Raises:
        LayoutError: if there are no factors.
    """

    def __init__(self, layout: ParameterLayout):
        self.factors = layout
        self.pairs = find_factors(layout)
        if not self.pairs:
            raise LayoutError(
                "products are of the factors lora_A and lora_B of adapters, and there are none among the selected "
                f"tensors {some_names(layout.names)}; select both, or leave adapter_products out"
            )
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        self.ranks = {a: shapes[a][0] for a in self.pairs}
        for a, b in self.pairs.items():
            if len(shapes[b]) < 2 or shapes[b][1] != shapes[a][0]:
                raise LayoutError(f"'{a}' of shape {shapes[a]} and '{b}' of shape {shapes[b]} have no product")
        kept = [name for name in layout.names if name not in self.pairs.values()]
        self.layout = ParameterLayout(
            tuple(FACTOR.sub(r"\1BA\2", name) if name in self.pairs else name for name in kept),
            tuple((shapes[self.pairs[n]][0], *shapes[n][1:]) if n in self.pairs else shapes[n] for n in kept),
            ("float32",) * len(kept),
        )

    def expand(self, parameters: torch.Tensor) -> torch.Tensor:
        """Vectors with factors, shape `(..., D)`, to vectors with products, shape `(..., D')`."""
        pieces = dict(zip(self.factors.names, parameters.split(self.factors.sizes, -1), strict=True))
        for a, b in self.pairs.items():
            rank = self.ranks[a]
            product = pieces.pop(b).unflatten(-1, (-1, rank)) @ pieces[a].unflatten(-1, (rank, -1))
            pieces[a] = product.flatten(-2)
        return torch.cat(list(pieces.values()), -1)

    def contract(self, products: torch.Tensor) -> torch.Tensor:
        """
        Vectors with products, shape `(..., D')`, to vectors with the factors, shape `(..., D)`, whose products are
        nearest to them in the Frobenius norm: one of the factors has the first r singular vectors.
        """
        kept = [name for name in self.factors.names if name not in self.pairs.values()]
        pieces = dict(zip(kept, products.split(self.layout.sizes, -1), strict=True))
        shapes = dict(zip(self.factors.names, self.factors.shapes, strict=True))
        for a, b in self.pairs.items():
            product = pieces[a].unflatten(-1, (shapes[b][0], -1))
            factors = _factors(product, self.ranks[a])
            pieces[b], pieces[a] = (factor.flatten(-2) for factor in factors)
        return torch.cat([pieces[name] for name in self.factors.names], -1)


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
