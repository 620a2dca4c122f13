"""What gets feedback from tasks too, and networks that are trained for the unseen task.

Each is tuned as hard as the generator: its learning rate is chosen on validation tasks among at least four, and beyond
the edges of those until the loss rises again. What was tried is in the report, and its cost is counted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..networks.runner import NetworkRunner
from ..snapshots.zoo import ZooArguments, train_specialists
from ..tasks.family import Family
from ..training.loop import Loop
from ..training.tune import TaskBatches, TuneArguments, tune
from ..utils.seeds import named_seed
from .groups import Group, Pending, search, training_cost
from .member_score import MemberScorer
from .report_data import Cost, Kind

ORACLE_RATES = (0.005, 0.01, 0.02, 0.04)
SEARCH_MEMBERS = 16
VALIDATION_EXAMPLES = 500


@dataclass
class Regime:
    """
    What all that is trained on the loss of tasks has in common.

    Args:
        family (`Family`), networks (`NetworkRunner`), accelerator (`Accelerator`).
        batches (`Callable`): `batches(args)` gives the tasks that training may use: fresh ones, or the seen ones alone.
        num_tasks (`int`): Of the seen tasks.
        validation (`torch.Tensor`): Conditions of the validation tasks, shape `(M, width)`.
        seed (`int`): Of all of them.

    Attributes:
        scorer (`MemberScorer`): Of the validation tasks.
        size (`int`): Parameters of a network.
    """

    family: Family
    networks: NetworkRunner
    accelerator: Accelerator
    batches: Callable[[TuneArguments], TaskBatches]
    num_tasks: int
    validation: torch.Tensor
    seed: int

    def __post_init__(self) -> None:
        table = self.validation.to(self.accelerator.device)
        self.scorer = MemberScorer(self.family, self.networks, table, VALIDATION_EXAMPLES)
        self.size = sum(tensor.numel() for tensor in self.networks.model.parameters())

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
            validate=lambda: self.scorer.loss(module),
            description=what,
            **kwargs,
        )

    def specialists(self, table: torch.Tensor, args: ZooArguments) -> torch.Tensor:
        """Networks that are trained on each of some tasks, shape `(M, D)`."""
        args = replace(args, num_snapshots=1)
        return train_specialists(self.loop("oracles"), self.family, self.networks, table, args)[-1]


def oracles(regime: Regime, args: ZooArguments, once: int, factors: Sequence[int]) -> Iterator[Pending]:
    """
    Networks that are trained on the unseen tasks themselves, for so many times as many steps as those of the seen ones.

    Args:
        once (`int`): Passes of the base model.
    """
    table = regime.validation[:SEARCH_MEMBERS]
    scorer = MemberScorer(regime.family, regime.networks, table.to(regime.accelerator.device), VALIDATION_EXAMPLES)

    def make(name: str, args: ZooArguments) -> Group:
        def loss(rate: float) -> float:
            return scorer.loss(regime.specialists(table, replace(args, learning_rate=rate)))

        rate, tried = search(lambda rates: [loss(rate) for rate in rates], ORACLE_RATES)
        each, best = training_cost(args.num_steps, args.batch_size), replace(args, learning_rate=rate)
        return Group(
            name,
            lambda _, rows: regime.specialists(rows, best),
            Kind.ORACLE,
            cost=Cost(once + len(tried) * len(table) * each, each),
            note=f"learning rate {rate:.3g} of {len(tried)}",
            tried=tried,
        )

    for factor in factors:
        name = "trained on the task" if factor == 1 else f"trained on the task, {factor} times longer"
        yield name, partial(make, name, replace(args, num_steps=factor * args.num_steps))
