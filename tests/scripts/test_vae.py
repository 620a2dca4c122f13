"""The variational autoencoder, a baseline."""

import json

import pytest
import torch
from reproduce.vae import VariationalAutoencoder

from pdiff_hf import LayoutError, ParameterAutoencoder, ParameterLayout


def test_the_divergence_of_a_variational_autoencoder():
    layout = ParameterLayout(("a", "b"), ((6,), (2, 5)), ("float32", "float32"))
    torch.manual_seed(0)
    vae = VariationalAutoencoder(layout.to_dict(), latent_dim=4, block_out_channels=(4, 4))
    parameters = torch.randn(9, 16)
    mean, log_variance = vae.posterior(vae.tokenize(parameters))
    output = vae(vae.tokenize(parameters), generator=torch.Generator().manual_seed(0))
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(output.kl, expected)
    again = vae(vae.tokenize(parameters), generator=torch.Generator().manual_seed(1))
    assert not torch.equal(again.sample, output.sample)  # it samples
    torch.testing.assert_close(vae.encode(parameters).latents, mean)  # the statistics are 0 and 1 so far


def test_the_prior_is_sampled_in_the_networks_own_latent():
    layout = ParameterLayout(("a",), ((16,),), ("float32",))
    torch.manual_seed(0)
    vae = VariationalAutoencoder(layout.to_dict(), latent_dim=4, block_out_channels=(4, 4))
    vae.fit_parameter_statistics(5 + 2 * torch.randn(20, 16))
    vae.latent_mean += 3
    vae.latent_std *= 2
    sample = vae.sample_prior(6, torch.Generator().manual_seed(0))
    own = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample, vae.decode((own - 3) / 2).sample)
    with pytest.raises(LayoutError, match="needs convolutions"):
        VariationalAutoencoder(layout.to_dict(), latent_dim=2, block_out_channels=())


def test_one_of_version_0_2_is_refused_but_by_its_own_class(tmp_path):
    layout = ParameterLayout(("a",), ((16,),), ("float32",))
    vae = VariationalAutoencoder(layout.to_dict(), latent_dim=4, block_out_channels=(4, 4))
    vae.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"variational": True}))
    with pytest.raises(ValueError, match="scripts/reproduce/vae.py"):
        ParameterAutoencoder.from_pretrained(tmp_path)
    tokens = torch.randn(3, 1, 16)
    torch.testing.assert_close(
        VariationalAutoencoder.from_pretrained(tmp_path).posterior(tokens), vae.posterior(tokens)
    )


def test_its_loss_is_that_of_the_parameters_and_of_the_latents():
    layout = ParameterLayout(("a",), ((16,),), ("float32",))
    torch.manual_seed(0)
    vae = VariationalAutoencoder(layout.to_dict(), latent_dim=4, block_out_channels=(4, 4))
    output = vae(torch.randn(3, 1, 16), 0.1, generator=torch.Generator().manual_seed(0))
    error = (output.sample - output.target).square().mean()
    torch.testing.assert_close(vae.reconstruction_loss(output), error + 2 / 16 * output.kl.mean())
