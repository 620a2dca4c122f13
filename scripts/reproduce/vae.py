"""The variational autoencoder of the paper's appendix B.2, a baseline."""

from dataclasses import dataclass
from typing import Any

import torch

from pdiff_hf import LayoutError, ParameterAutoencoder
from pdiff_hf.models.autoencoder import ParameterAutoencoderOutput


@dataclass
class VariationalOutput(ParameterAutoencoderOutput):
    """
    Args:
        kl (`torch.Tensor`): The divergence of each posterior from the prior N(0, I), in nats, shape `(N,)`.
    """

    kl: torch.Tensor = None  # type: ignore[assignment]  # always given


class VariationalAutoencoder(ParameterAutoencoder):
    """
    The encoder gives the mean and the log-variance of a latent; `forward` samples from them, and `encode` returns the
    mean. The loss is the negative evidence lower bound of a decoder with unit variance in normalised units (times
    2 / D, plus a constant).
    """

    def _init_networks(self, num_outputs: int) -> None:
        if not self.config.block_out_channels:
            raise LayoutError("a variational autoencoder needs convolutions, got block_out_channels=()")
        super()._init_networks(2 * num_outputs)

    def posterior(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mean and log-variance, `(N, L)` each, for tokens of shape `(N, C, S)`."""
        return super()._encode(tokens).chunk(2, dim=1)

    def _encode(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.posterior(tokens)[0]

    def forward(
        self,
        tokens: torch.Tensor,
        parameter_noise: float = 0.0,
        latent_noise: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> VariationalOutput:
        """`latent_noise` is not looked at."""
        mean, log_variance = self.posterior(self._with_noise(tokens, parameter_noise, generator))
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).float().sum(1)  # (N, L) -> (N,)
        sample = self._decode(mean + (0.5 * log_variance).exp() * noise).float()
        return VariationalOutput(sample=sample, target=tokens, kl=kl)

    def reconstruction_loss(self, output: Any) -> torch.Tensor:
        return super().reconstruction_loss(output) + 2 / self.layout.num_parameters * output.kl.mean()

    @torch.no_grad()
    def sample_prior(self, num_models: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Parameters, shape `(num_models, D)`, from the prior N(0, I) of the network's own latent."""
        latents = torch.randn(num_models, self.config.latent_dim, generator=generator).to(self.device)
        return self.with_factors(self.detokenize(self._decode(latents)))
