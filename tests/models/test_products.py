"""LoRA adapters as products: there and back, what is learned of them, gradients, and what is refused."""

import pytest
import torch

from pdiff_hf import ParameterAutoencoder
from pdiff_hf.layout import LayoutError, ParameterLayout
from pdiff_hf.models.products import AdapterProducts, find_factors

A, B = "query.lora_A.default.weight", "query.lora_B.default.weight"
WIDE_A, WIDE_B = "conv.lora_A.weight", "conv.lora_B.weight"
LAYOUT = ParameterLayout(
    (A, "bias", B, WIDE_A, WIDE_B),
    ((2, 5), (3,), (6, 2), (2, 3, 2, 2), (4, 2, 1, 1)),  # the second one is of a convolution of 2×2 pixels
    ("float32",) * 5,
)


@pytest.fixture
def parameters():
    return torch.randn(30, LAYOUT.num_parameters, generator=torch.Generator().manual_seed(0))


def mixed(parameters: torch.Tensor) -> torch.Tensor:
    """The same networks with other factors: (B M⁻¹)(M A)."""
    tensors = dict(LAYOUT.unflatten(parameters))
    mix = torch.randn(len(parameters), 2, 2, generator=torch.Generator().manual_seed(1)) + 3 * torch.eye(2)
    tensors[A], tensors[B] = mix @ tensors[A], tensors[B] @ mix.inverse()
    return LAYOUT.flatten(tensors)


def test_products_of_linear_layers_and_convolutions(parameters):
    products = AdapterProducts(LAYOUT)
    assert products.layout.names == ("query.lora_BA.default.weight", "bias", "conv.lora_BA.weight")
    assert products.layout.shapes == ((6, 5), (3,), (4, 3, 2, 2))
    given, found = LAYOUT.unflatten(parameters), products.layout.unflatten(products.expand(parameters))
    torch.testing.assert_close(found["query.lora_BA.default.weight"], given[B] @ given[A])
    wide = torch.einsum("nor,nrihw->noihw", given[WIDE_B].flatten(2), given[WIDE_A])
    torch.testing.assert_close(found["conv.lora_BA.weight"], wide)
    assert torch.equal(found["bias"], given["bias"])


def test_factors_of_a_product_have_that_product(parameters):
    products = AdapterProducts(LAYOUT)
    expanded = products.expand(parameters)
    back = products.contract(expanded)
    assert back.shape == parameters.shape
    torch.testing.assert_close(products.expand(back), expanded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(products.contract(expanded[3]), back[3])
    torch.testing.assert_close(products.expand(mixed(parameters)), expanded, rtol=1e-3, atol=1e-3)


def test_of_a_full_matrix_the_nearest_one_of_the_rank_is_taken():
    products = AdapterProducts(LAYOUT)
    full = torch.randn(4, products.layout.num_parameters, generator=torch.Generator().manual_seed(2))
    near = products.layout.unflatten(products.expand(products.contract(full)))
    for name, rows in products.layout.unflatten(full).items():
        if name != "bias":
            u, s, v = torch.linalg.svd(rows.flatten(2), full_matrices=False)
            expected = u[..., :2] * s[:, None, :2] @ v[:, :2]
            torch.testing.assert_close(near[name].flatten(2), expected, rtol=1e-4, atol=1e-4)


def test_gradients_move_a_product_towards_what_is_asked():
    products = AdapterProducts(LAYOUT)
    wanted = products.expand(torch.randn(1, LAYOUT.num_parameters, generator=torch.Generator().manual_seed(3)))
    vector = (0.1 * torch.randn(wanted.shape, generator=torch.Generator().manual_seed(4))).requires_grad_()
    optimizer = torch.optim.Adam([vector], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (products.expand(products.contract(vector)) - wanted).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.01 * wanted.square().mean()


def test_an_autoencoder_of_products_sees_the_network_and_not_its_factors(parameters, tmp_path):
    autoencoder = ParameterAutoencoder(
        LAYOUT.to_dict(), latent_dim=29, block_out_channels=(), adapter_products=True
    ).eval()
    autoencoder.fit_parameter_statistics(parameters, rows=torch.arange(30))
    autoencoder.fit_latent_statistics(autoencoder.tokenize(parameters))
    latents = autoencoder.encode(parameters).latents
    torch.testing.assert_close(autoencoder.encode(mixed(parameters)).latents, latents, rtol=1e-2, atol=1e-3)
    decoded = autoencoder.decode(latents).sample
    products = AdapterProducts(LAYOUT)
    torch.testing.assert_close(products.expand(decoded), products.expand(parameters), rtol=1e-3, atol=1e-3)
    autoencoder.save_pretrained(tmp_path)
    assert torch.equal(ParameterAutoencoder.from_pretrained(tmp_path).eval().decode(latents).sample, decoded)


def test_vectors_without_factors_are_refused():
    layout = ParameterLayout((A, "bias"), ((2, 5), (3,)), ("float32", "float32"))
    assert find_factors(layout) == {}
    with pytest.raises(LayoutError, match="lora_A and lora_B .* selected tensors 'query.lora_A"):
        AdapterProducts(layout)
    layout = ParameterLayout((A, B), ((2, 5), (6, 3)), ("float32", "float32"))
    with pytest.raises(LayoutError, match="have no product"):
        AdapterProducts(layout)
