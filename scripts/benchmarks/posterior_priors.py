"""What `posterior.py` compares: sets of candidates, and what is trained for them."""

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from masked_conditions import MaskedConditions
from posterior_bench import FamilyBench, GenericNetwork
from posterior_metrics import score_tasks
from safetensors.torch import load_file, save_file
from torch import nn

from pdiff_hf.models import DENOISER_PRESETS, ConditionEncoder, LatentDenoiser
from pdiff_hf.models.kernel_ridge import KernelRidge
from pdiff_hf.training.denoiser import LatentGenerator
from pdiff_hf.training.tune import GeneratedNetworks
from pdiff_hf.utils.seeds import derive_seed

NUM_CANDIDATES = 2048
# A generator of a zoo without conditions is tuned on sets of so many networks, for so many seen tasks in a step.
SET_SIZE, SET_TASKS, SET_LEARNING_RATE = 128, 4, 1e-3
CONTEXTS, NUM_CONTEXT, NUM_QUERIES = (1, 3, 6, 10, 20, 50), 50, 32


class Priors:
    """
    Everything that is trained for one seed. What is in a folder already is read instead of trained again.

    Args:
        bench (`FamilyBench`): Data and training.
        folder (`Path`): Where what is trained is kept.
    """

    def __init__(self, bench: FamilyBench, folder: Path):
        self.bench, self.folder = bench, folder
        args, family, networks = bench.args, bench.family, bench.networks
        folder.mkdir(parents=True, exist_ok=True)
        base = GenericNetwork(networks, family.predict, networks.base_parameters())
        self._kept("base", base, lambda: base.values.data.copy_(bench.train_base()))
        bench.start = base.values.detach().clone()
        self.snapshots, self.table = bench.collect(folder / "zoo")
        autoencoder, latents = bench.fit_autoencoder(self.snapshots)
        sampler = bench.sampler()

        def new_denoiser(condition_dim: int | None) -> LatentDenoiser:
            torch.manual_seed(derive_seed(bench.seed, 23))
            return LatentDenoiser(
                latents.shape[1], condition_dim=condition_dim, **DENOISER_PRESETS[args.denoiser_preset]
            )

        def by_weights(name: str, encoder: ConditionEncoder | None) -> LatentGenerator:
            generator = LatentGenerator(new_denoiser(None if encoder is None else 128), encoder)

            def train() -> None:
                trained = bench.fit_denoiser(latents, None if encoder is None else self.table, name)
                generator.load_state_dict(trained.state_dict())

            return self._kept(name, generator, train)

        def generated(generator: LatentGenerator, sampler=sampler) -> GeneratedNetworks:
            return bench.generated(copy.deepcopy(generator), sampler, copy.deepcopy(autoencoder))

        # The generator by weights, then tuned on the loss of its networks; the same without noise; the same without
        # noise and with conditions of which parts are unknown.
        generator = by_weights("denoiser", bench.encoder())
        self.by_weights, self.tuned = generated(generator), generated(generator)
        self._kept("tuned", self.tuned, lambda: bench.tuned(self.tuned, bench.tune_args, "tuning"))
        self.hypernetwork = generated(LatentGenerator(new_denoiser(128), bench.encoder()), None)
        fit = bench.fit_latents

        def train_hypernetwork() -> None:
            fit(self.hypernetwork, latents, self.table, "hypernetwork by weights")
            bench.tuned(self.hypernetwork, bench.tune_args, "hypernetwork")

        self._kept("hypernetwork", self.hypernetwork, train_hypernetwork)
        masked = LatentGenerator(new_denoiser(128), MaskedConditions(family.fields))
        self.deterministic = generated(masked, None)

        def train_deterministic() -> None:
            fit(self.deterministic, latents, self.table, "deterministic network by weights", mask_some)
            bench.tuned(self.deterministic, bench.tune_args, "deterministic network", mask=mask_some)

        self._kept("deterministic", self.deterministic, train_deterministic)
        self.generic = GenericNetwork(networks, family.predict, bench.start)
        self._kept("generic", self.generic, lambda: bench.tuned(self.generic, bench.opponent_args, "generic network"))

        # The zoo without its conditions: by weights, and tuned on what sets of its networks are good for.
        zoo = by_weights("zoo_denoiser", None)
        self.zoo: dict[str, GeneratedNetworks] = {"by weights": generated(zoo)}
        variants = {f"sharpness {1 / number:g}": number for number in args.zoo_sharpness}
        for name, sharpness in (variants | {"predictive": None}).items():
            module = self.zoo[name] = generated(zoo)
            train = functools.partial(tune_on_sets, bench, module, sharpness)
            self._kept(f"zoo_{name.replace(' ', '_')}", module, train)
        self.ridge = self.fit_ridge(torch.ones(family.fields.width, dtype=torch.bool))
        bench.clock("kernel ridge")

    def _kept(self, name: str, module: nn.Module, train: Callable[[], object]) -> nn.Module:
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            module.load_state_dict(load_file(path))
        else:
            train()
            save_file({key: value.contiguous() for key, value in module.state_dict().items()}, path)
        return module.eval()

    def fit_ridge(self, known: torch.Tensor) -> KernelRidge:
        """Kernel ridge regression on some columns of a table, bool of shape `(width,)`, tuned on validation tasks."""
        bench = self.bench
        validation = bench.tables["validation"]
        seen, inverse = self.table.unique(dim=0, return_inverse=True)
        counts = torch.bincount(inverse).unsqueeze(1)
        means = torch.zeros(len(seen), self.snapshots.shape[1]).index_add_(0, inverse, self.snapshots) / counts

        def loss(ridge: KernelRidge) -> float:
            parameters = ridge(validation * known)
            respond = lambda rows, batch: bench.networks.stack(bench.family.predict, parameters[rows], batch)  # noqa: E731
            return score_tasks(bench.family, respond, validation, "validation", 300)[1].mean().item()

        return KernelRidge.tuned(bench.family.fields, seen * known, means, loss)

    @torch.no_grad()
    def networks_for(self, module: GeneratedNetworks, table: torch.Tensor | None, num: int, seed: int) -> torch.Tensor:
        """One network of a module for each row of a table, or `num` without conditions: shape `(N, D)`."""
        noise = torch.Generator().manual_seed(derive_seed(self.bench.seed, 20, seed))
        parts = [None] * (num // 256) if table is None else table.split(256)
        return torch.cat([module.sample_parameters(part, noise, 256) for part in parts])

    def draw(self, known: torch.Tensor, num: int, seed: int, of_seen: bool = False) -> torch.Tensor:
        """
        Complete conditions that agree with a row of a table, `(width,)`, NaN where it is unknown: shape `(num, width)`.
        The rest is drawn from the family, without its test sets, or from one of the seen tasks.
        """
        family, generator = self.bench.family, torch.Generator().manual_seed(derive_seed(self.bench.seed, 21, seed))
        if of_seen:
            rows = self.table[torch.randint(len(self.table), (num,), generator=generator)]
        else:
            rows = family.fields.table([family.draw(generator) for _ in range(num)])
        return torch.where(known.isnan(), rows, known)


def mask_some(table: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A table in which a random part of each row is unknown, from nothing to everything."""
    share = torch.rand(len(table), 1, generator=generator)
    return torch.where(torch.rand(table.shape, generator=generator) < share, torch.nan, table)


def tune_on_sets(bench: FamilyBench, module: GeneratedNetworks, sharpness: float | None) -> None:
    """
    Tunes a generator without conditions on seen tasks, so that sets of its networks have some for each: on
    −s log mean exp(log-likelihood / s) over a set with s = `sharpness`; or, without it, on the loss of the prediction
    for other examples of the set weighted by the likelihood of a few.
    """
    family, table = bench.family, bench.tables["train"]
    parameters = [value for value in module.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=SET_LEARNING_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, bench.args.set_steps)
    noise = torch.Generator().manual_seed(derive_seed(bench.seed, 22))
    for _ in range(bench.args.set_steps):
        rows = torch.randint(len(table), (SET_TASKS,), generator=noise)
        shape = (SET_TASKS, NUM_CONTEXT + NUM_QUERIES)
        indices = torch.randint(family.num_examples("train"), shape, generator=noise)
        batch = {name: values.flatten(0, 1) for name, values in family.batch("train", table[rows], indices).items()}
        networks = module.sample_parameters(None, noise, SET_SIZE)  # (P, D)
        batch = {name: values.expand(SET_SIZE, *values.shape) for name, values in batch.items()}
        logits = bench.networks.stack(family.predict, networks, batch)  # (P, T B, K)
        log_probs = -F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
        log_probs = log_probs.unflatten(1, shape)  # (P, T, B)
        if sharpness is not None:
            total = log_probs[..., -NUM_QUERIES:].sum(2) / sharpness
            loss = -(total.logsumexp(0) - math.log(SET_SIZE)).mean() * sharpness / NUM_QUERIES
        else:
            log_weights = log_probs.cumsum(2)[..., [n - 1 for n in CONTEXTS]].log_softmax(0)  # (P, T, n)
            queries = log_probs[..., None, NUM_CONTEXT:]  # (P, T, 1, Q)
            loss = -(log_weights.unsqueeze(-1) + queries).logsumexp(0).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    bench.clock(f"tuning on sets, {'predictive' if sharpness is None else f'sharpness {1 / sharpness:g}'}")


def fine_tune(
    bench: FamilyBench, start: torch.Tensor, examples: dict, num_examples: int, learning_rate: float, steps: list[int]
) -> dict[int, torch.Tensor]:
    """Networks `(T, D)`, each fine-tuned on the first examples of its own task, after these numbers of steps."""
    batch = {name: values[:, :num_examples] for name, values in examples.items()}
    values = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([values], lr=learning_rate, weight_decay=0)
    found = {0: start}
    for step in range(1, max(steps) + 1):
        logits = bench.networks.stack(bench.family.predict, values, batch)
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()) * len(start)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in steps:
            found[step] = values.detach().clone()
    return found
