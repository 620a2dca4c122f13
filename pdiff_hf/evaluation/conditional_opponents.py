"""What a conditional generator must face: networks that are trained for conditions, or for the unseen tasks."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..models import ConditionEncoder, LatentDenoiser
from ..networks.runner import NetworkRunner
from ..snapshots.zoo import ZooArguments, train_specialists
from ..tasks.family import Family
from ..training.denoiser import LatentGenerator
from ..training.loop import Loop
from ..training.tune import GeneratedNetworks, TaskBatches, TuneArguments, tune
from ..utils.seeds import named_seed
from .conditional import ConditionalAudit, Cost, score_tasks
from .conditional_baselines import BasisNetworks, GenericNetwork

# Learning rate of networks that start from the base model, and steps between two looks at the validation tasks.
LEARNING_RATE = 0.01
VALIDATE_EVERY = 200
VALIDATION_EXAMPLES = 500


@dataclass
class Regime:
    """
    What all that is trained on the loss of tasks has in common.

    Args:
        family (`Family`), networks (`NetworkRunner`), accelerator (`Accelerator`).
        batches (`Callable`): `batches(args)` gives the tasks that training may use: fresh ones, or the seen ones alone.
        num_tasks (`int`): Of the seen tasks.
        validation (`torch.Tensor`): Conditions of the validation tasks, shape `(T, width)`.
        seed (`int`): Of all of them.
    """

    family: Family
    networks: NetworkRunner
    accelerator: Accelerator
    batches: Callable[[TuneArguments], TaskBatches]
    num_tasks: int
    validation: torch.Tensor
    seed: int

    def validate(self, module: nn.Module) -> float:
        """The mean loss of `module(table, batch, generator)` on the validation tasks, always with the same noise."""
        device = self.accelerator.device
        noise, table = torch.Generator(device).manual_seed(0), self.validation.to(device)

        def respond(rows: torch.Tensor, batch: Any) -> torch.Tensor:
            return module(table[rows.to(device)], batch, noise)

        _, loss = score_tasks(self.family, respond, table, "validation", VALIDATION_EXAMPLES)
        return loss.mean().item()

    def loop(self, what: str) -> Loop:
        """Without checkpoints."""
        return Loop(self.accelerator, named_seed(self.seed, what))

    def fit(
        self, module: nn.Module, args: TuneArguments, what: str, loop: Loop | None = None, **kwargs: Any
    ) -> dict[str, list]:
        """Tunes `module` in place; see [`~pdiff_hf.training.tune.tune`], which gets `kwargs`."""
        return tune(
            loop or self.loop(what),
            module,
            self.batches(args),
            self.num_tasks,
            args,
            validate=lambda: self.validate(module),
            description=what,
            **kwargs,
        )


def add_oracles(
    audit: ConditionalAudit, regime: Regime, args: ZooArguments, cost: Cost, factors: tuple[int, ...]
) -> None:
    """
    Adds networks that are trained on the unseen tasks themselves, for so many times as long as those of the seen ones.
    """
    for factor in factors:
        longer = replace(args, num_steps=factor * args.num_steps, num_snapshots=1)

        def train(_, table: torch.Tensor, longer: ZooArguments = longer) -> torch.Tensor:
            return train_specialists(regime.loop("oracles"), regime.family, regime.networks, table, longer)[-1]

        name = "trained on the task" if factor == 1 else f"trained on the task, {factor} times longer"
        audit.add(name, "oracle", train, Cost(cost.once, longer.num_steps * longer.batch_size))


def add_generic(audit: ConditionalAudit, regime: Regime, args: TuneArguments, once: int) -> None:
    """
    Adds the base model trained on for all tasks, alone and with the condition as a further input, and a learned
    combination of a few networks.

    Args:
        args (`TuneArguments`): As the generator was tuned, but for as many passes as it took in all.
        once (`int`): Passes of the base model.
    """
    args = replace(args, learning_rate=LEARNING_RATE, validate_every=VALIDATE_EVERY)
    start, fields = regime.networks.base_parameters(), regime.family.fields
    predict = regime.family.predict
    cost = Cost(once + args.num_steps * args.num_tasks * args.num_examples)
    example = regime.family.batch("train", regime.validation[:1].cpu(), torch.arange(1))

    def fitted(make: Callable[[], nn.Module], what: str) -> Callable[[], tuple[nn.Module, Cost]]:
        def train() -> tuple[nn.Module, Cost]:
            torch.manual_seed(named_seed(regime.seed, f"{what} weights"))
            module = make()
            regime.fit(module, args, what)
            return module, cost

        return train

    def generic(with_condition: bool) -> nn.Module:
        shape = example["pixel_values"].shape[2:] if with_condition else ()
        return GenericNetwork(regime.networks, predict, start, fields if with_condition else None, shape)

    audit.add_trained("generic network", fitted(lambda: generic(False), "generic network"))
    if "pixel_values" in example:
        name = "generic network with condition"
        audit.add_trained(name, fitted(lambda: generic(True), name))
    audit.add_trained(
        "basis networks", fitted(lambda: BasisNetworks(regime.networks, predict, start, fields), "basis networks")
    )


def add_hypernetwork(
    audit: ConditionalAudit,
    regime: Regime,
    generated: GeneratedNetworks,
    latents: torch.Tensor,
    table: torch.Tensor,
    args: TuneArguments,
    num_steps: int,
    once: int,
) -> None:
    """
    Adds a deterministic network with the generator's own architecture, from conditions to latents: by weights, and then
    by the loss of tasks.

    Args:
        generated (`GeneratedNetworks`): The generator before it was tuned, whose decoder is used.
        latents (`torch.Tensor`), table (`torch.Tensor`): Of the snapshots, shape `(K, L)`, and their conditions.
        args (`TuneArguments`): As the generator was tuned.
        num_steps (`int`): Of training by weights.
        once (`int`): Passes that the snapshots took.
    """
    device = regime.accelerator.device
    latents, table = latents.to(device), table.to(device)
    state: dict[str, Any] = {}

    def by_weights() -> tuple[nn.Module, Cost]:
        torch.manual_seed(named_seed(regime.seed, "hypernetwork weights"))
        denoiser = generated.generator.denoiser
        seen = generated.generator.encoder
        assert seen is not None
        encoder = ConditionEncoder(seen.config.fields, seen.config.embedding_dim)
        encoder.remember(seen.seen.cpu())
        settings = {key: value for key, value in denoiser.config.items() if not key.startswith("_")}
        decoder = copy.deepcopy(generated.autoencoder)
        module = GeneratedNetworks(
            LatentGenerator(LatentDenoiser(**settings), encoder),
            decoder,
            None,
            generated.num_inference_steps,
            regime.networks,
            regime.family.predict,
        ).to(device)
        optimizer = torch.optim.AdamW(module.generator.parameters(), lr=1e-3, weight_decay=0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        noise = torch.Generator().manual_seed(named_seed(regime.seed, "hypernetwork"))
        for _ in range(num_steps):
            rows = torch.randint(len(latents), (64,), generator=noise)
            answers = module.sample_latents(table[rows], torch.Generator(device))
            loss = (answers - latents[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        state["module"] = module
        return module, Cost(once)

    def by_task_loss() -> tuple[nn.Module, Cost]:
        module = state["module"] if state else by_weights()[0]
        history = regime.fit(module, args, "hypernetwork")
        return module, Cost(once + len(history["losses"]) * args.num_tasks * args.num_examples)

    audit.add_trained("hypernetwork by weights", by_weights)
    audit.add_trained("hypernetwork", by_task_loss)
