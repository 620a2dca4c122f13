"""Part of `posterior.py`: the tasks of a family, a zoo of their networks, and how generators are trained on it."""

import argparse
import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler
from posterior_metrics import score_tasks
from torch import nn

from pdiff_hf.evaluation.groups import training_cost
from pdiff_hf.layout import ParameterLayout
from pdiff_hf.models import DENOISER_PRESETS, ConditionEncoder, ParameterAutoencoder
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.snapshots.dataset import condition_table, load_fields, load_snapshots, parameter_matrix
from pdiff_hf.snapshots.zoo import ZooArguments, train_specialists, write_zoo
from pdiff_hf.tasks import ImageClassificationTask
from pdiff_hf.tasks.image_families import TransformedFamily
from pdiff_hf.tasks.label_groups import GroupedFamily
from pdiff_hf.tasks.task import Batch
from pdiff_hf.training import make_training_scheduler
from pdiff_hf.training.denoiser import LatentGenerator, train_denoiser
from pdiff_hf.training.loop import Loop, LoopArguments
from pdiff_hf.training.tune import GeneratedNetworks, TuneArguments, fresh_tasks, tune
from pdiff_hf.utils.seeds import derive_seed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Settings of the tasks, and of what is trained on them."""
    parser.add_argument("--family", default="transformed", choices=["transformed", "grouped"])
    parser.add_argument("--dataset", default="digits", help="As of ImageClassificationTask.")
    parser.add_argument("--image_size", type=int, default=8)
    parser.add_argument("--model", default="perceptron_mini", help="timm architecture for one channel.")
    parser.add_argument("--hidden_size", type=int, default=24, help="Of perceptron_mini.")
    parser.add_argument("--num_seen", type=int, default=192)
    parser.add_argument("--num_validation", type=int, default=32)
    parser.add_argument("--num_unseen", type=int, default=48)
    parser.add_argument("--base_steps", type=int, default=1500)
    parser.add_argument("--zoo_steps", type=int, default=400)
    parser.add_argument("--zoo_learning_rate", type=float, default=0.01)
    parser.add_argument("--latent_dim", type=int, default=160)
    parser.add_argument("--latent_scaling", default="together", choices=["each", "together"])
    parser.add_argument("--denoiser_preset", default="mlp", choices=DENOISER_PRESETS)
    parser.add_argument("--denoiser_steps", type=int, default=2000)
    parser.add_argument("--tune_steps", type=int, default=1800)
    parser.add_argument("--tune_learning_rate", type=float, default=1e-3)
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])


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


class FamilyBench:
    """
    The data of a benchmark, and how its networks are trained.

    Args:
        args (`argparse.Namespace`): Of `add_arguments`.
        clock (`Clock`): Told of every stage that ends.
    """

    def __init__(self, args: argparse.Namespace, seed: int, clock: Clock):
        self.args, self.seed, self.clock = args, seed, clock
        self.accelerator = Accelerator(cpu=True)
        model_args = {"img_size": args.image_size, "in_chans": 1} if args.model == "perceptron_mini" else {}
        model_args |= {"hidden_size": args.hidden_size} if args.model == "perceptron_mini" else {}
        base = ImageClassificationTask(
            model=args.model, dataset=args.dataset, image_size=args.image_size, model_args=model_args
        )
        self.family = TransformedFamily(base) if args.family == "transformed" else GroupedFamily(base)
        sizes = {"train": args.num_seen, "validation": args.num_validation, "test": args.num_unseen}
        self.conditions = self.family.split(sizes, derive_seed(seed, 0))
        self.tables = {name: self.family.fields.table(rows) for name, rows in self.conditions.items()}
        # What tuning must not use, by key.
        self.unseen = {self.family.key(row) for name in ("validation", "test") for row in self.conditions[name]}
        torch.manual_seed(derive_seed(seed, 1))
        model = self.family.load_base_model()
        layout = ParameterLayout.from_state_dict(model.state_dict(), [name for name, _ in model.named_parameters()])
        self.networks = NetworkRunner(model, layout)
        for split in ("train", "validation", "test"):
            self.family.pixels(split)
        self.training_scheduler = make_training_scheduler(prediction_type="v_prediction")
        self.tune_args = TuneArguments(num_steps=args.tune_steps, learning_rate=args.tune_learning_rate)
        self.per_step = training_cost(self.tune_args.num_tasks, self.tune_args.num_examples)
        self.zoo_args = ZooArguments(num_steps=args.zoo_steps, learning_rate=args.zoo_learning_rate)
        self.base_passes = training_cost(args.base_steps, 32, 32)
        self.zoo_passes = self.base_passes + training_cost(args.num_seen, args.zoo_steps, self.zoo_args.batch_size)
        # As long as the generator, or for as many passes as zoo and tuning together.
        self.opponent_args = TuneArguments(
            num_steps=args.tune_steps + self.zoo_passes // self.per_step, learning_rate=0.01, validate_every=200
        )
        self.opponent_passes = self.base_passes + self.opponent_args.num_steps * self.per_step
        clock("data")

    def loop(self, number: int) -> Loop:
        return Loop(self.accelerator, derive_seed(self.seed, number))

    def tuned(self, module: nn.Module, arguments: TuneArguments, what: str, mask=None) -> None:
        """
        Trains a module on the loss of fresh tasks, validated on the validation tasks; see [`tune`]. With
        `mask(table, generator)` it sees only a part of each condition.
        """
        mask = mask or (lambda table, _: table)
        draw = fresh_tasks(self.family, arguments, self.unseen, torch.device("cpu"))

        def batches(indices: torch.Tensor, generator: torch.Generator):
            table, batch = draw(indices, generator)
            return mask(table, generator), batch

        def validate() -> float:
            noise, table = torch.Generator().manual_seed(0), self.tables["validation"]
            seen = mask(table, torch.Generator().manual_seed(0))
            respond = lambda rows, batch: module(seen[rows], batch, noise)  # noqa: E731
            return score_tasks(self.family, respond, table, "validation", 500)[1].mean().item()

        tune(
            self.loop(2),
            module,
            batches,
            self.args.num_seen,
            arguments,
            validate=validate,
            description=what,
        )
        self.clock(what)

    def train_base(self) -> torch.Tensor:
        """One network for all tasks, from which all others start: its parameters, `(D,)`."""
        generic = GenericNetwork(self.networks, self.family.predict, self.networks.base_parameters())
        arguments = TuneArguments(num_steps=self.args.base_steps, learning_rate=0.01, num_examples=32)
        self.tuned(generic, arguments, "base model")
        self.start = generic.values.detach().clone()
        return self.start

    def oracle(self, table: torch.Tensor) -> torch.Tensor:
        """Networks that are trained on the tasks themselves, as long as those of the zoo: shape `(T, D)`."""
        specialists = train_specialists(
            self.loop(7),
            self.family,
            self.networks,
            table,
            dataclasses.replace(self.zoo_args, num_snapshots=1),
            start=self.start,
        )
        return specialists[-1]

    def collect(self, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """A specialist for each seen task: snapshots `(N, D)` and their conditions `(N, width)`, also in a folder."""
        shutil.rmtree(folder, ignore_errors=True)
        known, args = self.conditions["train"], self.zoo_args
        table = self.family.fields.table(known)
        trained = train_specialists(self.loop(3), self.family, self.networks, table, args, self.start)
        write_zoo(folder, self.family, self.networks.layout, known, args, trained, seed=3)
        # From here on it is any folder of networks with conditions.
        dataset, layout = load_snapshots(folder)
        self.clock("zoo")
        return parameter_matrix(dataset, layout), condition_table(dataset, load_fields(folder))

    def fit_autoencoder(self, snapshots: torch.Tensor) -> tuple[ParameterAutoencoder, torch.Tensor]:
        """Principal components of snapshots, and their latents."""
        latent_dim = min(self.args.latent_dim, len(snapshots) - 1)
        autoencoder = ParameterAutoencoder(
            self.networks.layout.to_dict(), latent_dim=latent_dim, block_out_channels=()
        ).eval()
        autoencoder.fit_parameter_statistics(snapshots)
        autoencoder.fit_latent_statistics(autoencoder.tokenize(snapshots), scaling=self.args.latent_scaling)
        latents = autoencoder.encode(snapshots).latents
        self.clock("autoencoder")
        return autoencoder, latents

    def encoder(self) -> ConditionEncoder:
        """An untrained one that knows the seen conditions."""
        encoder = ConditionEncoder(self.family.fields.to_dict())
        encoder.remember(self.tables["train"])
        return encoder

    def sampler(self) -> DPMSolverMultistepScheduler:
        return DPMSolverMultistepScheduler.from_config(
            self.training_scheduler.config, algorithm_type="dpmsolver++", final_sigmas_type="zero"
        )

    def fit_denoiser(
        self, latents: torch.Tensor, table: torch.Tensor | None, what: str = "denoiser"
    ) -> LatentGenerator:
        """A generator of latents `(N, L)` by weights, given conditions `(N, width)` where there are any."""
        encoder = None if table is None else self.encoder()
        denoiser, _ = train_denoiser(
            self.loop(4),
            latents,
            LoopArguments(self.args.denoiser_steps, 64, 1e-3, ema_decay=0.999, max_grad_norm=1.0),
            scheduler=self.training_scheduler,
            encoder=encoder,
            table=table,
            **DENOISER_PRESETS[self.args.denoiser_preset],
        )
        self.clock(what)
        return LatentGenerator(denoiser, encoder)

    def generated(self, generator: LatentGenerator, sampler, autoencoder: ParameterAutoencoder) -> GeneratedNetworks:
        """The networks of a generator that is to be tuned; without a sampler it is a deterministic network."""
        autoencoder.add_tuned_map()
        steps = self.args.num_inference_steps
        return GeneratedNetworks(generator, autoencoder, sampler, steps, self.networks, self.family.predict)

    def fit_latents(
        self, module: GeneratedNetworks, latents: torch.Tensor, table: torch.Tensor, what: str, mask=None
    ) -> None:
        """Trains a deterministic module on the latents of conditions."""
        optimizer = torch.optim.AdamW(module.generator.parameters(), lr=1e-3, weight_decay=0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.args.denoiser_steps)
        noise = torch.Generator().manual_seed(derive_seed(self.seed, 9))
        for _ in range(self.args.denoiser_steps):
            rows = torch.randint(len(latents), (64,), generator=noise)
            known = table[rows] if mask is None else mask(table[rows], noise)
            loss = (module.sample_latents(known, noise) - latents[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self.clock(what)


class GenericNetwork(nn.Module):
    """One network for all tasks, which is told nothing."""

    def __init__(self, networks: NetworkRunner, predict: Callable, start: torch.Tensor):
        super().__init__()
        self.values = nn.Parameter(start.clone())
        self.networks, self.predict = networks, predict

    def forward(self, table: torch.Tensor, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        return self.networks.stack(self.predict, self.values.expand(len(table), -1), batch)
