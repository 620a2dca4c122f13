"""Trivial generators that get the same feedback from the task as a tuned generator, trained side by side.

`scripts/train.py` and `scripts/evaluate.py` add them to the report on a generator that was tuned on a single task. In
Python: `evaluate(pipe, task, ..., tuning=tuning, extra_groups=tuned_baselines)`.

Each is as cheap as it can be made for its networks: what they share is computed once, and the learning rates that
validation chooses among are tried in one go.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from pdiff_hf.evaluation import Cost, Group, Kind
from pdiff_hf.evaluation.baselines import diagonal_gaussian, low_rank_gaussian
from pdiff_hf.evaluation.geometry import mean_of
from pdiff_hf.evaluation.groups import named_generator, search, training_cost
from pdiff_hf.evaluation.single_task import SingleTask
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.tasks import ClassificationTask
from pdiff_hf.tasks.task import Batch, load_batch
from pdiff_hf.training.ensembles import validation_batch, validation_loss
from pdiff_hf.utils.seeds import derive_seed

GAUSSIAN_LEARNING_RATES = (0.003, 0.01, 0.03, 0.1)
NETWORK_LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
MEAN_LEARNING_RATES = (1e-4, 3e-2)  # the lowest and the highest of as many as there are networks in a step
VALIDATIONS = 5  # of what is trained, as of the generator
BEST_OF = (4, 16)
TEMPERATURES = {"few": (0.5, 1.0), "all": (0.25, 0.5, 0.75, 1.0, 1.5)}


def tuned_baselines(compared: Any) -> Iterator[Group]:
    """Those that a report on a tuned generator has; none for others."""
    if isinstance(compared, SingleTask) and compared.tuning is not None and compared.baseline_models:
        yield from TunedBaselines(compared).groups()


class TunedBaselines:
    """
    Makes trivial generators with the feedback that a generator got: batches of the training split, the same for all
    networks; the validation split selects.

    Args:
        compared (`SingleTask`): With a pipeline and how it was tuned.
    """

    def __init__(self, compared: SingleTask):
        scorer, self.context, self.seed = compared.scorer, compared.context, compared.seed
        assert isinstance(scorer.task, ClassificationTask)  # nothing else is tuned
        assert compared.pipeline is not None and compared.tuning is not None and self.context.latents is not None
        self.scorer, self.autoencoder, self.tuning = scorer, compared.pipeline.autoencoder, compared.tuning
        self.num_models, self.temperatures = compared.baseline_models, TEMPERATURES[compared.baselines]
        self.task, self.latents = scorer.task, self.context.latents
        self.mean = mean_of(self.context.snapshots).float()
        self.networks = NetworkRunner(scorer.models.model, scorer.layout)
        self.device = next(scorer.models.model.parameters()).device
        self.unseen = validation_batch(self.task, self.device)

    def groups(self) -> Iterator[Group]:
        """One setting after the other."""
        tuning, num_unseen = self.tuning, self.scorer.num_examples("validation")
        once = training_cost(tuning.num_steps, tuning.num_networks, tuning.num_examples)

        shift = self._tuned_mean() - self.mean
        cost = Cost(once + VALIDATIONS * tuning.num_networks * num_unseen)
        for sweep, sample in (("tuned mean, diagonal", diagonal_gaussian), ("tuned mean, low-rank", low_rank_gaussian)):
            for value in self.temperatures:
                noise = named_generator(self.seed, f"{sweep} {value}")
                parameters = shift + sample(self.context, self.num_models, value, noise)
                yield Group(f"{sweep} {value}", parameters, Kind.OPPONENT, sweep, value, cost)

        mean, map_ = self._tuned_gaussian()
        looks = VALIDATIONS * tuning.num_networks * len(self.unseen["labels"])
        cost, sweep = Cost(len(GAUSSIAN_LEARNING_RATES) * (once + looks)), "tuned Gaussian"
        for value in self.temperatures:
            noise = named_generator(self.seed, f"{sweep} {value}")
            latents = torch.randn(self.num_models, len(mean), generator=noise).to(mean.device)
            with torch.no_grad():
                parameters = self.autoencoder.decode(mean + value * latents @ map_).sample.cpu()
            yield Group(f"{sweep} {value}", parameters, Kind.OPPONENT, sweep, value, cost)

        start = self._swag(self.num_models, "SWAG, refined")
        for steps in sorted({max(1, round(tuning.num_steps * share)) for share in (0.1, 0.3, 1.0)}):
            parameters, tried = self._refined(start, steps)
            each = training_cost(steps, tuning.num_examples)
            yield Group(
                f"SWAG, {steps} steps",
                parameters,
                Kind.OPPONENT,
                "SWAG, refined",
                steps,
                Cost(len(tried) * self.num_models * (each + num_unseen), each),
                note=f"learning rate of {len(tried)}",
                tried=tried,
            )

        candidates = self._swag(max(BEST_OF) * self.num_models, "best of SWAG")
        accuracy = self.scorer.score("validation", candidates).values.view(self.num_models, -1)
        for count in BEST_OF:
            chosen = accuracy[:, :count].nan_to_num(-math.inf).argmax(1) + torch.arange(self.num_models) * max(BEST_OF)
            cost = Cost(0, count * num_unseen)
            yield Group(f"SWAG, best of {count}", candidates[chosen], Kind.OPPONENT, "SWAG, best of", count, cost)

    def _swag(self, num_models: int, name: str) -> Tensor:
        return low_rank_gaussian(self.context, num_models, 1.0, named_generator(self.seed, name), with_diagonal=True)

    def _tuned_mean(self) -> Tensor:
        """
        The mean of the snapshots, `(D,)`, fine-tuned with as many passes as the generator: on as many examples a step,
        with as many learning rates as the generator has networks. Validation chooses one, and after how many steps.
        """
        low, high = (math.log10(rate) for rate in MEAN_LEARNING_RATES)
        rates = torch.logspace(low, high, self.tuning.num_networks)
        every = self.tuning.num_steps / VALIDATIONS
        looks = [max(1, round(every * (i + 1))) for i in range(VALIDATIONS)]
        rows = torch.cat([*self._refine(self.mean.expand(len(rates), -1), rates, looks).values()])
        return rows[self.scorer.score("validation", rows).values.nan_to_num(-math.inf).argmax()]

    def _refined(self, start: Tensor, steps: int) -> tuple[Tensor, dict[str, float]]:
        """
        Networks `(n, D)` after some steps, with the learning rate that is best on validation data, and the negative
        validation score of each rate.
        """
        found: dict[float, Tensor] = {}

        def losses(rates: Sequence[float]) -> list[float]:
            each = torch.tensor(rates).repeat_interleave(len(start))
            rows = self._refine(start.repeat(len(rates), 1), each, [steps])[steps]
            found.update(zip(rates, rows.unflatten(0, (len(rates), -1)), strict=True))  # (R n, D) -> R of (n, D)
            values = self.scorer.score("validation", rows).values.view(len(rates), -1).nanmean(1)
            return [-value if math.isfinite(value) else math.inf for value in values.tolist()]

        rate, tried = search(losses, NETWORK_LEARNING_RATES, factor=3)
        return found[rate], tried

    def _tuned_gaussian(self) -> tuple[Tensor, Tensor]:
        """
        Mean `(L,)` and linear map `(L, L)` of a Gaussian over the generator's own latents, at first that of the
        snapshots', tuned on the generator's objective. Validation chooses the learning rate, and after how many steps.
        """
        device = self.autoencoder.device
        latents, objective, count = self.latents.to(device), self.tuning.objective, self.tuning.num_networks
        values, vectors = torch.linalg.eigh(latents.double().T.cov())
        start = [latents.mean(0), (vectors * values.clamp_min(0).sqrt() @ vectors.T).float()]
        rates = torch.tensor(GAUSSIAN_LEARNING_RATES)
        best: tuple[float, list[Tensor]] = (math.inf, start)

        def sample(parts: Sequence[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
            noise = randn_tensor((count, latents.shape[1]), generator=generator, device=device)
            mean, map_ = parts  # (R, L) and (R, L, L)
            return noise, (mean.unsqueeze(1) + noise @ map_).flatten(0, 1)  # (R N, L)

        def loss(parts: Sequence[Tensor], batch: Batch, generator: torch.Generator) -> Tensor:
            noise, sampled = sample(parts, generator)
            before = start[0] + noise @ start[1]
            logits = self._logits(self.autoencoder.decode(sampled).sample, batch)
            rows = zip(logits.unflatten(0, (-1, count)), sampled.unflatten(0, (-1, count)), strict=True)
            return torch.stack([objective(each, batch["labels"], z, before) for each, z in rows]).sum()

        wide, num_steps = [part.expand(len(rates), *part.shape) for part in start], self.tuning.num_steps
        for step, parts in self._descend(wide, rates, loss, num_steps):
            if step % max(1, num_steps // VALIDATIONS) and step != num_steps:
                continue
            _, sampled = sample(parts, named_generator(self.seed, "tuned Gaussian validation"))
            with torch.no_grad():
                logits = self._logits(self.autoencoder.decode(sampled).sample, self.unseen)
            for i, each in enumerate(logits.unflatten(0, (-1, count))):
                value = validation_loss(each, self.unseen["labels"]).item()
                if value < best[0]:
                    best = value, [part[i].clone() for part in parts]
        mean, map_ = best[1]
        return mean, map_

    def _logits(self, parameters: Tensor, batch: Batch) -> Tensor:
        """Shape `(N, B, C)`."""
        return self.networks.stack(self.task.predict, parameters, batch, shared=True)

    def _descend(
        self, start: Sequence[Tensor], rates: Tensor, loss: Callable[..., Tensor], num_steps: int
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """
        Adam from R starts with a learning rate for each, which falls as a cosine.

        Args:
            start (`Sequence[torch.Tensor]`): Each of shape `(R, ...)`.
            rates (`torch.Tensor`): Shape `(R,)`.
            loss (`Callable`): `loss(values, batch, generator)`, the sum over the starts.

        Yields:
            `tuple`: After every step its number, from 1, and the values.
        """
        # Adam does not see the scale of a gradient: with steps of 1, what is added to a start may have any scale.
        moved = [torch.zeros_like(part, device=self.device).requires_grad_() for part in start]
        scales = [rates.to(self.device).view(-1, *[1] * (part.ndim - 1)) for part in start]
        start = [part.to(self.device) for part in start]
        optimizer = torch.optim.Adam(moved, lr=1.0, eps=1e-12)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        for step in range(1, num_steps + 1):
            generator = torch.Generator(self.device).manual_seed(derive_seed(self.seed, step))
            shape, count = (self.tuning.num_examples,), len(self.task.load_split("train"))
            chosen = torch.randint(count, shape, generator=generator, device=self.device)
            batch = load_batch(self.task, "train", chosen.tolist(), self.device)
            values = [part + scale * move for part, scale, move in zip(start, scales, moved, strict=True)]
            optimizer.zero_grad()
            loss(values, batch, generator).backward()
            optimizer.step()
            schedule.step()
            yield step, [p + s * m.detach() for p, s, m in zip(start, scales, moved, strict=True)]

    def _refine(self, start: Tensor, rates: Tensor, steps: Sequence[int]) -> dict[int, Tensor]:
        """Networks `(R, D)` after some numbers of steps on the training split, of which the largest ends it."""

        def loss(values: Sequence[Tensor], batch: Batch, generator: torch.Generator) -> Tensor:
            logits = self._logits(values[0], batch)
            labels = batch["labels"].expand(len(logits), -1)
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / labels.shape[1]

        path = self._descend([start], rates, loss, max(steps))
        return {step: parts[0].cpu() for step, parts in path if step in steps}
