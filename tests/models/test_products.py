"""LoRA adapters as products: there and back, what is learned of them, gradients, and what is refused."""

import pytest
import torch

from pdiff_hf import ParameterAutoencoder
from pdiff_hf.layout import LayoutError, ParameterLayout
from pdiff_hf.models.products import AdapterProducts, find_factors, smallest_frame

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
    lowest = products.layout_of_rank(1).unflatten(products.contract(full, 1))
    products.most = 1
    for name, rows in LAYOUT.unflatten(products.contract(full)).items():
        filled = [max(0, size - own) for size, own in zip(rows.shape, lowest[name].shape, strict=True)]
        padding = [side for more in reversed(filled) for side in (0, more)]
        torch.testing.assert_close(rows, torch.nn.functional.pad(lowest[name], padding))


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


# --------------------------------------------------------------------------------------------------------- frames

BIG_A, BIG_B = "big.lora_A.default.weight", "big.lora_B.default.weight"
NAMES = (A, "bias", B, BIG_A, BIG_B)


def big_layout(rank: int = 2) -> ParameterLayout:
    return ParameterLayout(NAMES, ((rank, 5), (3,), (6, rank), (rank, 40), (30, rank)), ("float32",) * 5)


def in_a_subspace(count: int, dimension: int, rank: int = 2) -> torch.Tensor:
    """Adapters whose large factors lie in subspaces of some dimensions, on each side."""
    layout, generator = big_layout(rank), torch.Generator().manual_seed(5)
    tensors = layout.unflatten(torch.randn(count, layout.num_parameters, generator=generator))
    left, right = torch.randn(30, dimension, generator=generator), torch.randn(dimension, 40, generator=generator)
    tensors[BIG_B] = left @ torch.randn(count, dimension, rank, generator=generator)
    tensors[BIG_A] = torch.randn(count, rank, dimension, generator=generator) @ right
    return layout.flatten(tensors)


def fitted(rows: torch.Tensor, frame_size: int | None, rank: int = 2):
    products = AdapterProducts(big_layout(rank), frame_size)
    return products, products.fit(rows, torch.arange(len(rows)))


def test_frames_that_hold_everything_change_nothing():
    rows = in_a_subspace(12, 7)
    whole, _ = fitted(rows, None)
    products, geometry = fitted(rows, 8)
    assert products.layout.shapes == ((6, 5), (3,), (8, 8)) and products.frame_left.dtype == torch.bfloat16
    assert geometry.energy > 1 - 1e-4  # rounding to bfloat16 turns the bases a little
    factors = {name: tensor.double() for name, tensor in big_layout().unflatten(rows).items()}
    pairs = torch.cat([(factors[b] @ factors[a]).flatten(1) for a, b in ((A, B), (BIG_A, BIG_B))], 1)
    gram = pairs @ pairs.mT
    # Sums of float32 products: what is lost is a part of the norms, not of inner products that are nearly 0.
    torch.testing.assert_close(geometry.gram, gram, rtol=0, atol=1e-7 * gram.diagonal().max().item())
    cores = products.expand(rows)
    back = products.contract(cores)
    error = (whole.expand(back) - whole.expand(rows)).norm() / whole.expand(rows).norm()
    assert error < 0.01
    torch.testing.assert_close(products.expand(back), cores, rtol=1e-3, atol=1e-3)
    frame = products.frame(BIG_A, 1)
    torch.testing.assert_close(frame.mT @ frame, torch.diag((torch.arange(8) < 7).float()), rtol=0, atol=2e-3)


def test_frames_keep_the_directions_with_the_most_energy():
    rows, generator = in_a_subspace(12, 4), torch.Generator().manual_seed(6)
    rows = rows + 0.01 * torch.randn(rows.shape, generator=generator)
    _, four = fitted(rows, 4)
    _, two = fitted(rows, 2)
    assert four.energy > 0.99 > two.energy > 0.2
    sizes = [smallest_frame(big_layout(), rows, torch.arange(12), energy, 8) for energy in (0.9, 0.99, 1.0)]
    assert sizes == [4, 4, 8]


def test_equal_effects_have_equal_cores():
    rows = in_a_subspace(12, 7)
    layout = big_layout()
    products, _ = fitted(rows, 8)
    expected = products.expand(rows)
    mix = torch.randn(12, 2, 2, generator=torch.Generator().manual_seed(1)) + 3 * torch.eye(2)
    tensors = layout.unflatten(rows.clone())
    for a, b in ((A, B), (BIG_A, BIG_B)):
        tensors[a], tensors[b] = mix @ tensors[a], tensors[b] @ mix.inverse()
    scale = expected.abs().max()
    assert (products.expand(layout.flatten(tensors)) - expected).abs().max() / scale < 1e-6
    padded = AdapterProducts(big_layout(3), 8)  # a smaller rank, filled up with zeros
    padded.load_state_dict(products.state_dict())
    wide = {
        name: torch.nn.functional.pad(tensor, (0, 0, 0, 1) if "_A" in name else (0, 1) if "_B" in name else (0, 0))
        for name, tensor in layout.unflatten(rows).items()
    }
    assert (padded.expand(big_layout(3).flatten(wide)) - expected).abs().max() / scale < 1e-6


@pytest.mark.parametrize("preset", ["pca", "tokens"])
@pytest.mark.parametrize("frame_size", [None, 8])
def test_an_autoencoder_of_cores_is_that_of_products(preset, frame_size, tmp_path):
    rows = in_a_subspace(12, 7)
    settings = {"block_out_channels": ()} if preset == "pca" else {"block_out_channels": (4,), "token_size": 32}
    autoencoder = ParameterAutoencoder(
        big_layout().to_dict(), latent_dim=6, adapter_products=True, adapter_frame_size=frame_size, **settings
    ).eval()
    geometry = autoencoder.fit_parameter_statistics(rows)
    assert geometry is not None and geometry.energy > 0.99
    autoencoder.fit_latent_statistics(autoencoder.tokenize(rows))
    latents = autoencoder.encode(rows).latents
    if preset == "pca":
        # The same from explicit products, of each tensor over its own standard deviation; signs are free.
        whole = AdapterProducts(big_layout())
        plain = whole.layout.unflatten(whole.expand(rows))
        sizes = {name: tensor.double().flatten(1) for name, tensor in plain.items()}
        centred = {name: tensor - tensor.mean(0) for name, tensor in sizes.items()}
        if frame_size is None:
            scaled = torch.cat([t / t.square().mean().sqrt() for t in centred.values()], 1)
            u, s, _ = torch.linalg.svd(scaled, full_matrices=False)
            expected = (u * s)[:, :6]
            expected = expected / expected.std(0, correction=0)
            torch.testing.assert_close(latents.abs(), expected.abs().float(), rtol=0, atol=1e-5)
    autoencoder.save_pretrained(tmp_path)
    again = ParameterAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(again.encode(rows).latents, latents)
    if frame_size:
        assert again.products.frame_left.dtype == torch.bfloat16
    assert torch.equal(again.decode(latents).sample, autoencoder.decode(latents).sample)
    wider = again.layout_of_rank(5)
    assert wider.shapes == big_layout(5).shapes
    assert again.decode(latents, rank=5).sample.shape == (12, wider.num_parameters)


def test_adapters_that_share_nothing_are_reported(caplog):
    generator = torch.Generator().manual_seed(0)
    layout = ParameterLayout((BIG_A, BIG_B), ((2, 400), (300, 2)), ("float32",) * 2)
    apart = torch.randn(24, layout.num_parameters, generator=generator)
    products = AdapterProducts(layout, 8)
    report = products.fit(apart, torch.arange(24)).report()
    assert abs(report["heldout_r2"]) < 0.02 and report["energy"] < 0.5
    assert "almost nothing in common" in caplog.text and "the frames keep" in caplog.text
    shared = torch.randn(3, layout.num_parameters, generator=generator)
    together = torch.randn(24, 3, generator=generator) @ shared
    together[5] = together[4]
    caplog.clear()
    report = AdapterProducts(layout).fit(together, torch.arange(24)).report()
    assert report["heldout_r2"] > 0.9 and report["energy"] == 1 and report["copies"] == 1
    assert "adapters 4 and 5 do the same" in caplog.text and "in common" not in caplog.text


@pytest.mark.parametrize("kind", ["lora_E", "lora_diag"])
def test_factors_with_something_between_them_have_no_product(kind):
    names = ("q.lora_A.default", "q.lora_B.default", f"q.{kind}.default")
    layout = ParameterLayout(names, ((2, 5), (6, 2), (2, 1)), ("float32",) * 3)
    with pytest.raises(LayoutError, match=f"{kind}.default' stands between"):
        AdapterProducts(layout)
    experts = ParameterLayout((A, B), ((2, 5), (6, 2)), ("float32",) * 2, (), {"default": {"target_parameters": ["w"]}})
    with pytest.raises(LayoutError, match="those of experts"):
        AdapterProducts(experts)
