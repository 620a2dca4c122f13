"""What `posterior.py` compares: the tasks of a family, a zoo of their networks, and priors that are trained on it."""

import argparse
import copy
import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler
from masked_conditions import Masked, MaskedConditions, mask_some
from safetensors.torch import load_file, save_file
from torch import nn

from pdiff_hf.evaluation.closed_forms import mean_networks
from pdiff_hf.evaluation.groups import training_cost
from pdiff_hf.evaluation.member_score import MemberScorer
from pdiff_hf.evaluation.opponents import Regime
from pdiff_hf.layout import ParameterLayout
from pdiff_hf.models import DENOISER_PRESETS, ConditionEncoder, LatentDenoiser, ParameterAutoencoder
from pdiff_hf.models.kernel_ridge import KernelRidge
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.snapshots.dataset import condition_table, load_fields, load_snapshots, parameter_matrix
from pdiff_hf.snapshots.zoo import ZooArguments, train_specialists, write_zoo
from pdiff_hf.tasks import ImageClassificationTask, make_family
from pdiff_hf.tasks.task import Batch
from pdiff_hf.training import make_training_scheduler
from pdiff_hf.training.denoiser import LatentGenerator, train_denoiser
from pdiff_hf.training.loop import Loop, LoopArguments
from pdiff_hf.training.tune import GeneratedNetworks, TuneArguments, fresh_tasks
from pdiff_hf.utils.seeds import derive_seed

NUM_CANDIDATES = 2048
# A generator of a zoo without conditions is tuned on sets of so many networks, for so many seen tasks in a step.
SET_SIZE, SET_TASKS, SET_LEARNING_RATE = 128, 4, 1e-3
CONTEXTS, NUM_CONTEXT, NUM_QUERIES = (1, 3, 6, 10, 20, 50), 50, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Settings of the tasks, and of what is trained on them."""
    parser.add_argument("--family", default="transformed", choices=["transformed", "grouped"])
    parser.add_argument("--dataset", default="digits", help="As of ImageClassificationTask.")
    parser.add_argument("--model", default="perceptron_mini", help="timm architecture for one channel.")
    parser.add_argument("--latent_scaling", default="together", choices=["each", "together"])
    parser.add_argument("--denoiser_preset", default="mlp", choices=DENOISER_PRESETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set_steps", type=int, default=600, help="Of tuning a generator without conditions.")
    parser.add_argument(
        "--zoo_sharpness", type=float, nargs="*", default=[], help="Also tune on likelihood^(1 / this)."
    )
    numbers = {"image_size": 8, "hidden_size": 24, "num_seen": 192, "num_validation": 32, "num_unseen": 48}
    numbers |= {"base_steps": 1500, "zoo_steps": 400, "latent_dim": 160, "denoiser_steps": 2000, "tune_steps": 1800}
    numbers |= {"num_inference_steps": 10, "zoo_learning_rate": 0.01, "tune_learning_rate": 1e-3}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="(default: %(default)s)")


class Clock:
    """CPU seconds of the stages."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.process_time()

    def __call__(self, what: str) -> None:
        now = time.process_time()
        self.seconds[what] = round(now - self.last, 1)
        self.last = now
        print(f"{what}: {self.seconds[what]} s", flush=True)


class Priors:
    """
    The data of a benchmark, and everything that is trained for one seed. What is in a folder already is read instead of
    trained again.

    Args:
        args (`argparse.Namespace`): Of `add_arguments`.
        folder (`Path`): Where what is trained is kept.
        clock (`Clock`): Told of every stage that ends.
    """

    def __init__(self, args: argparse.Namespace, seed: int, folder: Path, clock: Clock):
        self.args, self.seed, self.folder, self.clock = args, seed, folder, clock
        folder.mkdir(parents=True, exist_ok=True)
        self._make_tasks()
        self._count_passes()
        clock("data")
        # One network for all tasks, from which all others start; and trained for as many passes as a generator took.
        base = self.kept("base", self._generic(self.networks.base_parameters()), self._tune(self.base_args))
        self.start = base.values.detach().clone()
        self.generic = self.kept("generic", self._generic(self.start), self._tune(self.opponent_args))
        self.snapshots, self.table = self._collect()
        self.autoencoder, self.latents = self._fit_autoencoder()
        # The generator by weights, then tuned on the loss of its networks; the same without noise; the same without
        # noise and with conditions of which parts are unknown.
        by_weights = self._by_weights("denoiser", self._encoder())
        self.by_weights, self.tuned = self._generated(by_weights), self._generated(by_weights)
        self.kept("tuned", self.tuned, self._tune(self.tune_args))
        self.hypernetwork = self._deterministic("hypernetwork", self._encoder())
        self.deterministic = self._deterministic("deterministic", MaskedConditions(self.family.fields))
        # The zoo without its conditions: by weights, and tuned on what sets of its networks are good for.
        zoo = self._by_weights("zoo_denoiser", None)
        self.zoo = {"by weights": self._generated(zoo)}
        for sharpness in (*args.zoo_sharpness, None):
            name = "predictive" if sharpness is None else f"sharpness {1 / sharpness:g}"
            train = functools.partial(self._tune_on_sets, sharpness=sharpness)
            self.zoo[name] = self.kept(f"zoo_{name.replace(' ', '_')}", self._generated(zoo), train)
        self.ridge = self.fit_ridge(torch.ones(self.family.fields.width, dtype=torch.bool))
        clock("kernel ridge")

    def _make_tasks(self) -> None:
        args = self.args
        model_args = {"img_size": args.image_size, "in_chans": 1, "hidden_size": args.hidden_size}
        model_args = model_args if args.model == "perceptron_mini" else {}
        base = ImageClassificationTask(
            model=args.model, dataset=args.dataset, image_size=args.image_size, model_args=model_args
        )
        self.family = make_family(args.family, base)
        sizes = {"train": args.num_seen, "validation": args.num_validation, "test": args.num_unseen}
        self.conditions = self.family.split(sizes, derive_seed(self.seed, 0))
        self.tables = {name: self.family.fields.table(rows) for name, rows in self.conditions.items()}
        torch.manual_seed(derive_seed(self.seed, 1))
        model = self.family.load_base_model()
        layout = ParameterLayout.from_state_dict(model.state_dict(), [name for name, _ in model.named_parameters()])
        self.networks = NetworkRunner(model, layout)
        # What tuning must not use, by key.
        unseen = {self.family.key(row) for name in ("validation", "test") for row in self.conditions[name]}
        self.regime = Regime(
            self.family,
            self.networks,
            Accelerator(cpu=True),
            lambda arguments: fresh_tasks(self.family, arguments, unseen, torch.device("cpu")),
            args.num_seen,
            self.tables["validation"],
            self.seed,
        )
        self.scheduler = make_training_scheduler(prediction_type="v_prediction")
        self.sampler = DPMSolverMultistepScheduler.from_config(
            self.scheduler.config, algorithm_type="dpmsolver++", final_sigmas_type="zero"
        )

    def _count_passes(self) -> None:
        args = self.args
        self.base_args = TuneArguments(num_steps=args.base_steps, learning_rate=0.01, num_examples=32)
        self.tune_args = TuneArguments(num_steps=args.tune_steps, learning_rate=args.tune_learning_rate)
        self.zoo_args = ZooArguments(num_steps=args.zoo_steps, learning_rate=args.zoo_learning_rate)
        per_step = training_cost(self.tune_args.num_tasks, self.tune_args.num_examples)
        self.base_passes = training_cost(args.base_steps, 32, 32)
        self.zoo_passes = self.base_passes + training_cost(args.num_seen, args.zoo_steps, self.zoo_args.batch_size)
        self.tuned_passes = self.zoo_passes + args.tune_steps * per_step
        steps = args.tune_steps + self.zoo_passes // per_step
        self.opponent_args = TuneArguments(num_steps=steps, learning_rate=0.01, validate_every=200)
        self.opponent_passes = self.base_passes + steps * per_step

    def kept(self, name: str, module: nn.Module, train: Callable) -> nn.Module:
        """A module as the folder has it, or after `train(module, name)`."""
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            module.load_state_dict(load_file(path))
        else:
            train(module, name)
            self.clock(name)
            save_file({key: value.contiguous() for key, value in module.state_dict().items()}, path)
        return module.eval()

    def _loop(self, number: int) -> Loop:
        return Loop(self.regime.accelerator, derive_seed(self.seed, number))

    def _tune(self, args: TuneArguments) -> Callable[[nn.Module, str], object]:
        """How a module is trained on the loss of fresh tasks."""
        return lambda module, name: self.regime.fit(module, args, name, self._loop(2))

    def _generic(self, start: torch.Tensor) -> "GenericNetwork":
        return GenericNetwork(self.networks, self.family.predict, start)

    def oracle(self, table: torch.Tensor) -> torch.Tensor:
        """Networks that are trained on the tasks themselves, as long as those of the zoo: shape `(T, D)`."""
        args = dataclasses.replace(self.zoo_args, num_snapshots=1)
        return train_specialists(self._loop(7), self.family, self.networks, table, args, self.start)[-1]

    def _collect(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A specialist for each seen task: snapshots `(N, D)` and their conditions `(N, width)`, also in a folder."""
        folder, known = self.folder / "zoo", self.conditions["train"]
        shutil.rmtree(folder, ignore_errors=True)
        rows = self.tables["train"]
        trained = train_specialists(self._loop(3), self.family, self.networks, rows, self.zoo_args, self.start)
        write_zoo(folder, self.family, self.networks.layout, known, self.zoo_args, trained, seed=3)
        # From here on it is any folder of networks with conditions.
        dataset, layout = load_snapshots(folder)
        self.clock("zoo")
        return parameter_matrix(dataset, layout), condition_table(dataset, load_fields(folder))

    def _fit_autoencoder(self) -> tuple[ParameterAutoencoder, torch.Tensor]:
        """Principal components of snapshots, and their latents."""
        latent_dim = min(self.args.latent_dim, len(self.snapshots) - 1)
        layout = self.networks.layout.to_dict()
        autoencoder = ParameterAutoencoder(layout, latent_dim=latent_dim, block_out_channels=()).eval()
        autoencoder.fit_parameter_statistics(self.snapshots)
        autoencoder.fit_latent_statistics(autoencoder.tokenize(self.snapshots), scaling=self.args.latent_scaling)
        return autoencoder, autoencoder.encode(self.snapshots).latents

    def _encoder(self) -> ConditionEncoder:
        """An untrained one that knows the seen conditions."""
        encoder = ConditionEncoder(self.family.fields.to_dict())
        encoder.remember(self.tables["train"])
        return encoder

    def _new_generator(self, encoder: nn.Module | None) -> LatentGenerator:
        torch.manual_seed(derive_seed(self.seed, 23))
        width, preset = self.latents.shape[1], DENOISER_PRESETS[self.args.denoiser_preset]
        return LatentGenerator(LatentDenoiser(width, condition_dim=None if encoder is None else 128, **preset), encoder)

    def _by_weights(self, name: str, encoder: ConditionEncoder | None) -> LatentGenerator:
        """A generator of latents by weights, given conditions where there is an encoder."""

        def train(generator: LatentGenerator, _: str) -> None:
            known = None if encoder is None else self._encoder()
            denoiser, _ = train_denoiser(
                self._loop(4),
                self.latents,
                LoopArguments(self.args.denoiser_steps, 64, 1e-3, ema_decay=0.999, max_grad_norm=1.0),
                scheduler=self.scheduler,
                encoder=known,
                table=None if encoder is None else self.table,
                **DENOISER_PRESETS[self.args.denoiser_preset],
            )
            generator.load_state_dict(LatentGenerator(denoiser, known).state_dict())

        return self.kept(name, self._new_generator(encoder), train)

    def _generated(self, generator: LatentGenerator, is_random: bool = True) -> GeneratedNetworks:
        """The networks of a generator that is to be tuned, or, without noise, of a deterministic network."""
        autoencoder = copy.deepcopy(self.autoencoder)
        autoencoder.add_tuned_map()
        steps, sampler = self.args.num_inference_steps, self.sampler if is_random else None
        generator = copy.deepcopy(generator)
        return GeneratedNetworks(generator, autoencoder, sampler, steps, self.networks, self.family.predict)

    def _deterministic(self, name: str, encoder: nn.Module) -> GeneratedNetworks:
        """A network from conditions to latents, by weights and then by the loss of tasks."""

        def train(module: GeneratedNetworks, name: str) -> None:
            optimizer = torch.optim.AdamW(module.generator.parameters(), lr=1e-3, weight_decay=0)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.args.denoiser_steps)
            noise = torch.Generator().manual_seed(derive_seed(self.seed, 9))
            for _ in range(self.args.denoiser_steps):
                rows = torch.randint(len(self.latents), (64,), generator=noise)
                known = mask(self.table[rows], noise)
                loss = (module.sample_latents(known, noise) - self.latents[rows]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            self._tune(self.tune_args)(Masked(module) if is_masked else module, name)

        is_masked = isinstance(encoder, MaskedConditions)
        mask = mask_some if is_masked else lambda table, noise: table
        return self.kept(name, self._generated(self._new_generator(encoder), is_random=False), train)

    def _tune_on_sets(self, module: GeneratedNetworks, name: str, sharpness: float | None) -> None:
        """
        Tunes a generator without conditions on seen tasks, so that sets of its networks have some for each: on
        −s log mean exp(log-likelihood / s) over a set with s = `sharpness`; or, without it, on the loss of the
        prediction for other examples of the set weighted by the likelihood of a few.
        """
        family, table, steps = self.family, self.tables["train"], self.args.set_steps
        parameters = [value for value in module.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=SET_LEARNING_RATE, weight_decay=0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        noise = torch.Generator().manual_seed(derive_seed(self.seed, 22))
        shape = (SET_TASKS, NUM_CONTEXT + NUM_QUERIES)
        for _ in range(steps):
            rows = torch.randint(len(table), (SET_TASKS,), generator=noise)
            indices = torch.randint(family.num_examples("train"), shape, generator=noise)
            batch = {key: values.flatten(0, 1) for key, values in family.batch("train", table[rows], indices).items()}
            networks = module.sample_parameters(None, noise, SET_SIZE)  # (P, D)
            batch = {key: values.expand(SET_SIZE, *values.shape) for key, values in batch.items()}
            logits = self.networks.stack(family.predict, networks, batch)  # (P, T B, K)
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

    def fit_ridge(self, known: torch.Tensor) -> KernelRidge:
        """Kernel ridge regression on some columns of a table, bool of shape `(width,)`, tuned on validation tasks."""
        validation = self.tables["validation"]
        seen, _, means = mean_networks(self.snapshots, self.table)
        scorer = MemberScorer(self.family, self.networks, validation, 300)

        def loss(ridge: KernelRidge) -> float:
            return scorer.score("validation", ridge(validation * known)).losses.mean().item()

        return KernelRidge.tuned(self.family.fields, seen * known, means, loss)

    @torch.no_grad()
    def networks_for(self, module: GeneratedNetworks, table: torch.Tensor | None, num: int, seed: int) -> torch.Tensor:
        """One network of a module for each row of a table, or `num` without conditions: shape `(N, D)`."""
        noise = torch.Generator().manual_seed(derive_seed(self.seed, 20, seed))
        parts = [None] * (num // 256) if table is None else table.split(256)
        return torch.cat([module.sample_parameters(part, noise, 256) for part in parts])

    def draw(self, known: torch.Tensor, num: int, seed: int, of_seen: bool = False) -> torch.Tensor:
        """
        Complete conditions that agree with a row of a table, `(width,)`, NaN where it is unknown: shape `(num, width)`.
        The rest is drawn from the family, without its test sets, or from one of the seen tasks.
        """
        family, generator = self.family, torch.Generator().manual_seed(derive_seed(self.seed, 21, seed))
        if of_seen:
            rows = self.table[torch.randint(len(self.table), (num,), generator=generator)]
        else:
            rows = family.fields.table([family.draw(generator) for _ in range(num)])
        return torch.where(known.isnan(), rows, known)

    def fine_tune(
        self, start: torch.Tensor, examples: dict, num_examples: int, learning_rate: float, steps: list[int]
    ) -> dict[int, torch.Tensor]:
        """Networks `(T, D)`, each fine-tuned on the first examples of its own task, after these numbers of steps."""
        batch = {name: values[:, :num_examples] for name, values in examples.items()}
        values = start.clone().requires_grad_()
        optimizer = torch.optim.AdamW([values], lr=learning_rate, weight_decay=0)
        found = {0: start}
        for step in range(1, max(steps) + 1):
            logits = self.networks.stack(self.family.predict, values, batch)
            loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()) * len(start)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step in steps:
                found[step] = values.detach().clone()
        return found


class GenericNetwork(nn.Module):
    """One network for all tasks, which is told nothing."""

    def __init__(self, networks: NetworkRunner, predict: Callable, start: torch.Tensor):
        super().__init__()
        self.values = nn.Parameter(start.clone())
        self.networks, self.predict = networks, predict

    def forward(self, table: torch.Tensor, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        return self.networks.stack(self.predict, self.values.expand(len(table), -1), batch)
