"""Autoencoder and denoiser: shapes for any size, statistics, determinism, saving, and what they refuse."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pdiff_hf import LatentDenoiser, LayoutError, ParameterAutoencoder, ParameterLayout
from pdiff_hf.models import AUTOENCODER_PRESETS, DENOISER_PRESETS, autoencoder_architecture, encode_in_batches


def make_layout(*sizes: int) -> ParameterLayout:
    names = tuple(f"layer.{i}" for i in range(len(sizes)))
    return ParameterLayout(names, tuple((size,) for size in sizes), ("float32",) * len(sizes))


def make_autoencoder(*sizes: int, latent_dim: int = 4, **arguments) -> ParameterAutoencoder:
    torch.manual_seed(0)
    layout = make_layout(*sizes).to_dict()
    arguments = {"latent_dim": latent_dim, "block_out_channels": (4, 6, 6, 8, 4)} | arguments
    return ParameterAutoencoder(layout, **arguments).eval()


@pytest.mark.parametrize(("sizes", "latent_dim"), [((1,), 1), ((7,), 3), ((30, 1, 33), 5), ((100, 28), 128)])
@pytest.mark.parametrize("num_models", [1, 3])
def test_shapes_for_any_length(sizes, latent_dim, num_models):
    autoencoder = make_autoencoder(*sizes, latent_dim=latent_dim)
    parameters = torch.randn(num_models, sum(sizes))
    latents = autoencoder.encode(parameters).latents
    assert latents.shape == (num_models, latent_dim)
    assert autoencoder.decode(latents).sample.shape == parameters.shape
    tokens = autoencoder.tokenize(parameters)
    output = autoencoder(tokens, 0.1, 0.1, generator=torch.Generator().manual_seed(0))
    assert output.sample.shape == output.target.shape == tokens.shape == (num_models, *autoencoder.token_shape)
    denoiser = LatentDenoiser(latent_dim, block_out_channels=(4, 4, 4, 4, 4), bottleneck_dim=8, embedding_dim=16)
    assert denoiser(latents, 3).sample.shape == latents.shape


def test_statistics_make_latents_standard_and_normalised_parameters_unit():
    scale = torch.tensor([100.0] * 20 + [1e-3] * 30)
    parameters = 5 * scale + scale * torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    parameters[:, 20] = 7.0  # one coordinate of a tensor that never changes
    autoencoder = make_autoencoder(20, 30)
    autoencoder.fit_parameter_statistics(parameters)
    normalized = autoencoder.normalize(parameters)
    torch.testing.assert_close(normalized.mean(0), torch.zeros(50), atol=1e-2, rtol=0)
    for piece in normalized.split((20, 30), dim=1):
        assert piece.square().mean().sqrt().item() == pytest.approx(1, abs=1e-2)
    autoencoder.fit_latent_statistics(autoencoder.tokenize(parameters))
    latents = autoencoder.encode(parameters).latents
    torch.testing.assert_close(latents.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(0, correction=0), torch.ones(4), atol=1e-4, rtol=0)


def test_constant_tensors_stay_finite_and_come_back():
    parameters = torch.cat([torch.full((8, 5), 3.0), torch.randn(8, 4)], dim=1)
    autoencoder = make_autoencoder(5, 4)
    autoencoder.fit_parameter_statistics(parameters)
    autoencoder.fit_latent_statistics(autoencoder.tokenize(parameters))
    assert autoencoder.parameter_std[0] == 1
    assert autoencoder.decode(autoencoder.encode(parameters).latents).sample.isfinite().all()


def test_noise_reaches_the_input_and_the_latent_but_not_the_target():
    autoencoder = make_autoencoder(40)
    tokens = torch.randn(2, 1, 40)
    clean = autoencoder(tokens)
    torch.testing.assert_close(clean.target, tokens)
    for noise in ({"parameter_noise": 0.5}, {"latent_noise": 0.5}):
        noisy = autoencoder(tokens, **noise, generator=torch.Generator().manual_seed(1))
        again = autoencoder(tokens, **noise, generator=torch.Generator().manual_seed(1))
        assert torch.equal(noisy.sample, again.sample) and torch.equal(noisy.target, clean.target)
        assert not torch.allclose(noisy.sample, clean.sample)


def test_the_autoencoder_learns():
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 60, generator=generator)
    parameters = 2 + torch.randn(80, 3, generator=generator) @ directions
    autoencoder = make_autoencoder(60, latent_dim=8).train()
    autoencoder.fit_parameter_statistics(parameters)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=3e-3)
    for _ in range(150):
        loss = autoencoder.reconstruction_loss(autoencoder(autoencoder.tokenize(parameters)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.15  # 1 is the mean of the snapshots


def correlated(num_models: int, *sizes: int) -> torch.Tensor:
    """Vectors of several tensors of different scales, all moved by a few factors."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.cat([torch.full((size,), 10.0**-i) for i, size in enumerate(sizes)])
    factors = torch.randn(num_models, 5, generator=generator) @ torch.randn(5, sum(sizes), generator=generator)
    return scale * (3 + factors)


@pytest.mark.parametrize("token_size", [1, 4, 16, 1000])
def test_tokens_keep_what_their_components_span(token_size):
    parameters = correlated(20, 33, 1, 0, 50)
    autoencoder = ParameterAutoencoder(
        make_layout(33, 1, 0, 50).to_dict(),
        latent_dim=4,
        block_out_channels=(8,),
        norm_num_groups=None,
        token_size=token_size,
        token_dim=5,
    )
    autoencoder.fit_parameter_statistics(parameters)
    tokens = autoencoder.tokenize(parameters)
    # Tokens end where tensors end.
    num_tokens = sum(-(-size // token_size) for size in (33, 1, 50))
    assert tokens.shape == (20, 5, num_tokens)
    torch.testing.assert_close(autoencoder.detokenize(tokens), parameters, rtol=1e-4, atol=1e-5)  # rank 5
    # The squared error of tokens is that of the parameters in normalised units.
    other = tokens + 0.1 * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
    other = autoencoder.tokenize(autoencoder.detokenize(other))  # within the span, where the rank is below 5
    output = autoencoder(tokens)
    output.sample, output.target = other, tokens
    error = autoencoder.normalize(autoencoder.detokenize(other)) - autoencoder.normalize(parameters)
    torch.testing.assert_close(autoencoder.reconstruction_loss(output), error.square().mean(), rtol=1e-3, atol=1e-6)


def test_bases_are_the_same_however_the_vector_is_read(monkeypatch):
    parameters = correlated(9, 100, 40)

    def fit(latent_dim=5, **arguments):
        autoencoder = ParameterAutoencoder(make_layout(100, 40).to_dict(), latent_dim=latent_dim, **arguments)
        autoencoder.fit_parameter_statistics(parameters)
        return autoencoder

    tokens = {"block_out_channels": (4,), "token_size": 16, "token_dim": 3}
    whole = fit(**tokens), fit(block_out_channels=())
    monkeypatch.setattr("pdiff_hf.models.tokens.BLOCK_SIZE", 4 * 20)
    for autoencoder, expected in zip((fit(**tokens), fit(block_out_channels=())), whole, strict=True):
        got = autoencoder.tokenize(parameters)
        # The sign of a principal direction is free.
        torch.testing.assert_close(got.abs(), expected.tokenize(parameters).abs(), rtol=1e-4, atol=1e-4)
        reconstructed = autoencoder.detokenize(got)
        torch.testing.assert_close(
            reconstructed, expected.detokenize(expected.tokenize(parameters)), rtol=1e-4, atol=1e-4
        )


class Reads(TorchDispatchMode):
    """Counts the values that are copied from a tensor by indices."""

    def __init__(self, tensor):
        super().__init__()
        self.storage, self.count = tensor.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.index.Tensor and args[0].untyped_storage().data_ptr() == self.storage:
            self.count += output.numel()
        return output


@pytest.mark.parametrize("normalization", ["coordinate", "tensor"])
def test_snapshots_are_read_once(normalization, monkeypatch):
    """What is larger than `MAX_VALUES` is read in blocks, twice, and gives the same bits."""
    parameters, rows, reads = correlated(9, 100, 40), torch.arange(1, 9), []
    autoencoders = [make_autoencoder(100, 40, token_size=16, token_dim=3) for _ in range(2)]
    for autoencoder, most in zip(autoencoders, (2**27, 8 * 99), strict=True):
        monkeypatch.setattr("pdiff_hf.models.tokens.MAX_VALUES", most)
        with Reads(parameters) as counted:
            autoencoder.fit_parameter_statistics(parameters, normalization, rows)
        reads.append(counted.count)
    assert reads == [8 * 140, 8 * (2 * 100 + 40)]
    for name, expected in autoencoders[1].state_dict().items():
        assert torch.equal(autoencoders[0].state_dict()[name], expected), name


@pytest.mark.parametrize("architecture", [{"token_size": 16, "token_dim": 3}, {"block_out_channels": ()}, {}])
def test_snapshots_are_chosen_by_index(architecture):
    """The rest of the file may hold anything: it is not looked at."""
    parameters, rows = correlated(80, 100, 40), torch.arange(0, 80, 8)
    parameters = torch.where(torch.isin(torch.arange(80), rows).unsqueeze(1), parameters, torch.nan)
    chosen, whole = (make_autoencoder(100, 40, **architecture) for _ in range(2))
    chosen.fit_parameter_statistics(parameters, rows=rows)
    whole.fit_parameter_statistics(parameters[rows].clone())
    for name, tensor in whole.state_dict().items():
        assert torch.equal(chosen.state_dict()[name], tensor), name
    assert torch.equal(chosen.tokenize(parameters, rows), whole.tokenize(parameters[rows]))
    with torch.no_grad():
        assert torch.equal(encode_in_batches(chosen, parameters[rows]), whole.encode(parameters[rows]).latents)
        many = correlated(150, 100, 40)
        expected = torch.cat([whole.encode(batch).latents for batch in many.split(64)])
        assert torch.equal(encode_in_batches(whole, many), expected)


def test_without_convolutions_it_is_principal_component_analysis():
    parameters = correlated(12, 60, 30) + 0.1 * torch.randn(12, 90, generator=torch.Generator().manual_seed(2))
    autoencoder = ParameterAutoencoder(make_layout(60, 30).to_dict(), latent_dim=7, block_out_channels=())
    autoencoder.fit_parameter_statistics(parameters)
    assert not list(autoencoder.parameters())
    autoencoder.fit_latent_statistics(autoencoder.tokenize(parameters))
    normalized = autoencoder.normalize(parameters).double()
    u, s, vh = torch.linalg.svd(normalized, full_matrices=False)
    expected = u[:, :7] * s[:7] @ vh[:7]
    latents = autoencoder.encode(parameters).latents
    decoded = autoencoder.decode(latents).sample
    torch.testing.assert_close(autoencoder.normalize(decoded), expected.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents.std(0, correction=0), torch.ones(7), rtol=1e-4, atol=1e-4)
    # 11 directions are all that 12 snapshots differ in.
    exact = ParameterAutoencoder(make_layout(60, 30).to_dict(), latent_dim=20, block_out_channels=())
    exact.fit_parameter_statistics(parameters)
    torch.testing.assert_close(exact.detokenize(exact.tokenize(parameters)), parameters, rtol=1e-5, atol=1e-5)


def test_one_mean_a_tensor_or_one_a_parameter():
    parameters = correlated(20, 33, 50)
    autoencoder = make_autoencoder(33, 50)
    autoencoder.fit_parameter_statistics(parameters, "tensor")
    for piece, part in zip(parameters.split((33, 50), 1), autoencoder.parameter_mean.split((33, 50)), strict=True):
        torch.testing.assert_close(part, piece.mean().expand_as(part))
    normalized = autoencoder.normalize(parameters)
    for piece in normalized.split((33, 50), dim=1):
        assert piece.square().mean().sqrt().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("token_size", [None, 8])
def test_save_and_load_keep_every_bit_and_statistics_stay_float32(token_size, tmp_path):
    autoencoder = make_autoencoder(30, 3, token_size=token_size)
    autoencoder.fit_parameter_statistics(torch.randn(10, 33))
    autoencoder.fit_latent_statistics(autoencoder.tokenize(torch.randn(10, 33)))
    autoencoder.save_pretrained(tmp_path)
    loaded = ParameterAutoencoder.from_pretrained(tmp_path)
    assert loaded.layout == autoencoder.layout
    for name, tensor in autoencoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    half = ParameterAutoencoder.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.encoder[0].weight.dtype == torch.bfloat16
    assert torch.equal(half.parameter_mean, autoencoder.parameter_mean)
    for network in (half, loaded.to(torch.bfloat16), copy.deepcopy(autoencoder).double()):
        for name in ("parameter_mean", "parameter_std", "latent_mean", "latent_std"):
            assert torch.equal(getattr(network, name), getattr(autoencoder, name)), name
        latents = network.encode(torch.randn(2, 33)).latents
        assert network.decode(latents).sample.dtype == torch.float32

    denoiser = LatentDenoiser(8, block_out_channels=(4, 4), bottleneck_dim=8, embedding_dim=16)
    torch.nn.init.normal_(denoiser.conv_out.weight)
    denoiser.save_pretrained(tmp_path / "denoiser")
    loaded = LatentDenoiser.from_pretrained(tmp_path / "denoiser").eval()
    sample = torch.randn(2, 8)
    assert torch.equal(loaded(sample, 5).sample, denoiser.eval()(sample, 5).sample)


def test_denoiser_timesteps_one_for_all_or_one_each():
    torch.manual_seed(0)
    denoiser = LatentDenoiser(8, block_out_channels=(4, 4), bottleneck_dim=8, embedding_dim=16).eval()
    torch.nn.init.normal_(denoiser.conv_out.weight)
    sample = torch.randn(3, 8)
    same = denoiser(sample, 7).sample
    assert torch.equal(same, denoiser(sample, torch.tensor([7]), return_dict=False)[0])
    torch.testing.assert_close(same, denoiser(sample, torch.tensor([7, 7, 7])).sample)
    with pytest.raises(ValueError, match="timestep must be one, or one for each of 3 latents, got 2"):
        denoiser(sample, torch.tensor([7, 8]))
    assert not torch.allclose(same, denoiser(sample, torch.tensor([7, 500, 7])).sample)


def test_every_latent_coordinate_reaches_every_prediction():
    torch.manual_seed(0)
    denoiser = LatentDenoiser(128, **DENOISER_PRESETS["small"]).eval()
    torch.nn.init.normal_(denoiser.conv_out.weight)
    sample = torch.randn(1, 128, requires_grad=True)
    gradient = torch.stack(
        [torch.autograd.grad(denoiser(sample, 10).sample[0, i], sample)[0][0].abs() for i in (0, 63, 127)]
    )
    assert (gradient > 0).all()


def test_paper_presets_have_the_published_widths():
    autoencoder = ParameterAutoencoder(make_layout(2048).to_dict(), **AUTOENCODER_PRESETS["paper"])
    convolutions = [m for m in autoencoder.encoder if isinstance(m, torch.nn.Conv1d)]
    assert [m.out_channels for m in convolutions] == [64, 128, 256, 256, 32]
    assert all(m.kernel_size == (7,) and m.stride == (2,) for m in convolutions)
    assert max(b.conv.out_channels for b in LatentDenoiser(128, **DENOISER_PRESETS["paper"]).down_blocks) == 512


def test_errors():
    with pytest.raises(LayoutError, match="latent_dim must lie between 1 and the 10 .* got 11"):
        make_autoencoder(10, latent_dim=11)
    with pytest.raises(LayoutError, match="latent_dim .* got 0"):
        make_autoencoder(10, latent_dim=0)
    with pytest.raises(LayoutError, match="token_size and token_dim must be at least 1, got 0 and 32"):
        make_autoencoder(10, token_size=0)
    with pytest.raises(
        LayoutError, match="token_size=1 cuts 1,000,000,000,000 parameters into 1,000,000,000,000 tokens"
    ):
        ParameterAutoencoder(make_layout(10**12).to_dict(), latent_dim=2, token_size=1)
    with pytest.raises(LayoutError, match="kernel_size must be odd"):
        ParameterAutoencoder(make_layout(10).to_dict(), latent_dim=2, kernel_size=4)
    denoiser = LatentDenoiser(8, block_out_channels=(4, 4), bottleneck_dim=8, embedding_dim=16)
    with pytest.raises(ValueError, match=r"\(N, 8\), got \(2, 7\)"):
        denoiser(torch.zeros(2, 7), 0)
    with pytest.raises(ValueError, match="no condition_dim"):
        denoiser(torch.zeros(2, 8), 0, torch.zeros(2, 4))


def test_bases_of_whole_numbers_explain_as_much_in_a_quarter_of_the_memory(tmp_path):
    directions = torch.randn(6, 3000, generator=torch.Generator().manual_seed(0))
    parameters = torch.randn(20, 6, generator=torch.Generator().manual_seed(1)) @ directions
    arguments = {"block_out_channels": (8,), "token_size": 1024, "token_dim": 6, "norm_num_groups": None}
    plain = make_autoencoder(2000, 1000, **arguments)
    small = make_autoencoder(2000, 1000, basis_dtype="int8", **arguments)
    for autoencoder in (plain, small):
        autoencoder.fit_parameter_statistics(parameters)
    assert small.token_basis.dtype == torch.int8 and small.token_basis.abs().amax() == 127
    assert 4 * small.token_basis.nbytes == plain.token_basis.nbytes
    lost = [
        (autoencoder.detokenize(autoencoder.tokenize(parameters)) - parameters).square().sum() / parameters.var(0).sum()
        for autoencoder in (plain, small)
    ]
    assert lost[0] < 1e-9 and lost[1] < 20 * 1e-3
    small.save_pretrained(tmp_path)
    loaded = ParameterAutoencoder.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.token_basis.dtype == torch.int8 and torch.equal(loaded.token_basis, small.token_basis)
    assert loaded.token_basis_scale.dtype == torch.float32 and loaded.dtype == torch.bfloat16
    latents = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    same = ParameterAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(same.decode(latents).sample, small.decode(latents).sample)


def test_a_large_network_has_bases_of_whole_numbers_and_of_no_more_directions_than_there_are():
    assert "basis_dtype" not in autoencoder_architecture("tokens", 2**22 - 1, num_snapshots=8)
    assert autoencoder_architecture("tokens", 2**22)["token_dim"] == 32
    large = autoencoder_architecture("tokens", 86_000_000, num_snapshots=24)
    assert (large["basis_dtype"], large["token_dim"], large["token_size"]) == ("int8", 23, 2**15)
    assert autoencoder_architecture("tokens", 86_000_000, num_snapshots=200)["token_dim"] == 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"basis_dtype": "int4", "token_size": 8}, "one of float32, int8"),
        ({"basis_dtype": "int8"}, "token_size=None"),
        ({"basis_dtype": "int8", "token_size": 2**17}, "at most 65,536"),
        ({"basis_dtype": "int8", "block_out_channels": ()}, "int8"),
    ],
)
def test_bases_that_cannot_be_are_refused(settings, message):
    with pytest.raises(LayoutError, match=message):
        make_autoencoder(30, **settings)
