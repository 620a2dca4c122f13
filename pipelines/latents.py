"""Work in the space of latents: networks to latents and back, directions, edits, and inversion."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, SupportsIndex

import torch
from torch import nn

from pdiff_hf.models import ParameterAutoencoder
from pdiff_hf.models.autoencoder import encode_in_batches
from pdiff_hf.networks.adapters import adapter_weights
from pdiff_hf.networks.posterior import LossFunction
from pdiff_hf.pipelines.networks import NetworkMixin, require, whole_number
from pdiff_hf.utils.memory import InParts, in_blocks


class LatentMixin(NetworkMixin):
    """For a pipeline whose networks have latents of shape `(N, L)`."""

    autoencoder: ParameterAutoencoder
    condition_encoder: Any  # a `ConditionEncoder`, or None

    def encode(
        self, networks: str | PathLike | Sequence[str | PathLike] | Mapping[str, torch.Tensor] | torch.Tensor
    ) -> torch.Tensor:
        """
        Latents of networks, shape `(N, L)`, on the CPU.

        Args:
            networks: Files, folders or Hub ids of networks or adapters, as
                [`~pdiff_hf.snapshots.files.import_snapshots`] reads them, for which no base model is needed; a state
                dict; or parameters, shape `(N, D)`.

        Raises:
            SnapshotError: for a file that cannot be read; names the file.
            LayoutError: for networks that do not have the generated tensors.
        """
        layout = self.autoencoder.layout
        if isinstance(networks, Mapping):
            networks = layout.flatten(networks).view(-1, layout.num_parameters)
        if not isinstance(networks, torch.Tensor):
            from pdiff_hf.snapshots import read_networks

            paths = [networks] if isinstance(networks, str | PathLike) else networks
            networks = torch.cat([read_networks(path, layout) for path in paths])
        is_whole = networks.ndim == 2 and networks.shape[1] == layout.num_parameters
        require(is_whole, f"parameters must have shape (N, {layout.num_parameters}), got {tuple(networks.shape)}")
        return encode_in_batches(self.autoencoder, networks)

    @torch.no_grad()
    def decode(
        self,
        latents: torch.Tensor,
        output_type: str = "state_dict",
        *,
        rank: SupportsIndex | None = None,
        batch_norm_data: Iterable[Mapping[str, Any]] | None = None,
    ) -> Any:
        """
        Networks of latents, shape `(N, L)`: what the call returns for an `output_type`, which see.

        Args:
            rank (`int`, *optional*): Of adapters that are learned as products; by default that of the snapshots. Twice
                that keeps almost all of a combination of adapters.
        """
        if rank is None and output_type == "adapter":
            rank = self.autoencoder.config.adapter_rank
        rank = None if rank is None else whole_number("rank", rank)
        layout = self.autoencoder.layout_of_rank(rank)
        require(
            rank is None or output_type in ("state_dict", "pt", "adapter"),
            f"rank is for adapters without their base model, not for output_type={output_type!r}",
        )
        output: Any = self.decode_latents(latents, rank)
        require(
            bool(output.isfinite().all()),
            "the generated parameters are not finite: do the settings of the scheduler belong to this denoiser, and is "
            "the precision high enough?",
        )
        if output_type == "pt":
            return output
        if output_type == "model":
            layout, output = self.recompute_statistics(output, batch_norm_data)
        # Memory of their own, so that a file of one network does not hold all of them.
        output = [{name: part.clone() for name, part in layout.unflatten(row).items()} for row in output]
        if output_type == "model":
            output = [self.make_model(state_dict) for state_dict in output]
        if output_type == "adapter":
            output = [adapter_weights(layout, state_dict, self.base_model) for state_dict in output]
        return output

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, rank: int | None = None) -> torch.Tensor:
        """Latents of shape `(N, L)` to parameters of shape `(N, D)`, on the CPU."""
        parameters = torch.empty(len(latents), self.autoencoder.layout_of_rank(rank).num_parameters)
        start = 0
        for block in self.decode_in_blocks(latents, rank):
            parameters[start : start + len(block)] = block
            start += len(block)
        return parameters

    @torch.no_grad()
    def decode_in_blocks(self, latents: torch.Tensor, rank: int | None = None) -> Iterator[torch.Tensor]:
        """Parameters of consecutive networks, for latents of shape `(N, L)`, a few at a time."""

        def decode(rows: torch.Tensor) -> torch.Tensor:
            return self.autoencoder.decode(rows, rank).sample

        num_parameters = self.autoencoder.layout_of_rank(rank).num_parameters
        yield from in_blocks(decode, latents.to(self._execution_device), num_parameters, InParts("networks"))

    def direction(
        self,
        labels: str | Mapping[str, Any] | Sequence[float] | torch.Tensor,
        latents: torch.Tensor | None = None,
        *,
        num_samples: SupportsIndex = 256,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """
        The direction in which latents move on average, by least squares, when a label grows by 1; shape `(L,)`
        (weights2weights, arXiv 2406.09413, has the normal of a classifier, which is the same where latents are white).

        Args:
            labels: The name of a field of numbers; the value of a field of words, as `{"mood": "angry"}`, which counts
                1 and any other 0; or numbers, one for each of `latents`, such as scores of the networks.
            latents (`torch.Tensor`, *optional*): Shape `(N, L)`, with their own labels. For a field, by default,
                networks that the generator samples for conditions that it has seen.
            num_samples (`int`, *optional*, defaults to 256): How many it samples.

        Raises:
            ValueError: for labels that are all the same, or do not belong to the latents or the generator's fields.
        """
        if latents is not None:
            is_own = not isinstance(labels, str | Mapping)
            require(is_own, "latents of your own need labels of your own: one number for each")
            values = torch.as_tensor(labels, dtype=torch.float64)
        else:
            latents, values = self._labelled_samples(labels, whole_number("num_samples", num_samples), generator)
        shape = tuple(values.shape)
        require(shape == latents.shape[:1], f"labels must be {len(latents)} numbers, one for each latent, got {shape}")
        values = values - values.mean()
        differ = bool(values.isfinite().all() and values.square().sum() > 0)
        require(differ, "labels must be finite, and not all the same")
        moves = latents.double() - latents.double().mean(0)
        return (values @ moves / values.square().sum()).float()

    def _labelled_samples(
        self, labels: Any, num_samples: int, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents that are sampled for seen conditions, and the values of a field there."""
        encoder = self.condition_encoder
        if encoder is None:
            raise ValueError("this generator has no fields; give latents, and a number for each of them")
        is_value = isinstance(labels, Mapping) and len(labels) == 1
        name, wanted = next(iter(labels.items())) if is_value else (labels, None)
        is_known = isinstance(name, str) and name in encoder.fields
        require(
            is_known, f"{labels!r:.100} is not one of the generator's fields, which are {', '.join(encoder.fields)}"
        )
        seen = encoder.seen[encoder.seen_known.all(1)]
        require(len(seen) > 1, "the generator has seen fewer than two conditions whose fields are all known")
        chosen = torch.randint(len(seen), (num_samples,), generator=generator)
        conditions = encoder.fields.conditions(seen[chosen].cpu())
        is_number = wanted is not None or isinstance(conditions[0][name], int | float)
        require(is_number, f"'{name}' is not a field of numbers; ask for one of its values: {{'{name}': ...}}")
        values = [float(c[name]) if wanted is None else float(c[name] == wanted) for c in conditions]
        (latents,) = self(
            1, condition=conditions, generator=generator, guidance_scale=1.0, output_type="latent", return_dict=False
        )
        return latents, torch.tensor(values, dtype=torch.float64)

    def edit(self, latents: torch.Tensor, direction: torch.Tensor, scale: float | torch.Tensor = 1.0) -> torch.Tensor:
        """
        Latents, shape `(N, L)`, moved along a direction, shape `(L,)`. With the difference of two latents as the
        direction, scales from 0 to 1 lie between the two networks.
        """
        length = self.autoencoder.config.latent_dim
        require(
            latents.shape[-1] == length and direction.shape == (length,),
            f"latents and a direction must have length {length}, got {tuple(latents.shape)}, {tuple(direction.shape)}",
        )
        scales = torch.as_tensor(scale, dtype=latents.dtype, device=latents.device).reshape(-1, 1)
        return latents + scales * direction.to(latents)

    def invert(
        self,
        loss_fn: LossFunction,
        latents: torch.Tensor,
        *,
        num_steps: SupportsIndex = 100,
        learning_rate: float = 0.05,
        prior_weight: float = 1.0,
    ) -> torch.Tensor:
        """
        The latents of networks that are right on given examples: gradient descent (Adam) on `loss_fn` through the
        decoder, with a Gaussian prior that has the training latents' mean 0 and variance 1.

        Args:
            loss_fn (`Callable`): Of parameters `(N, D)`, the negative log-likelihood for each network, shape `(N,)`;
                [`example_loss`] makes one of labelled examples.
            latents (`torch.Tensor`): Where to begin, shape `(N, L)`, such as latents that the generator samples.
            prior_weight (`float`, *optional*, defaults to 1): Factor of -log p(z), |z|²/2.

        Returns:
            `torch.Tensor`: Shape `(N, L)`; for each network the state with the lowest loss on the way.
        """
        steps = whole_number("num_steps", num_steps)
        device = self._execution_device
        moving = nn.Parameter(latents.detach().to(device, torch.float32).clone())
        optimizer = torch.optim.Adam([moving], lr=learning_rate)
        best, lowest = moving.detach().clone(), torch.full((len(moving),), torch.inf, device=device)
        for step in range(steps + 1):
            with torch.enable_grad():
                loss = loss_fn(self.autoencoder.decode(moving).sample) + prior_weight * moving.square().sum(1) / 2
                better = loss.detach() < lowest
                best[better], lowest[better] = moving.detach()[better], loss.detach()[better]
                if step < steps:
                    optimizer.zero_grad()
                    loss.sum().backward()
                    optimizer.step()
        is_finite = bool(lowest.isfinite().all())
        require(is_finite, "the loss is not finite for some of the networks; begin elsewhere")
        return best.cpu()
