"""What gets feedback from tasks too: networks that are trained for the unseen task, or for all tasks together.

Each is tuned as hard as the generator: its learning rate is chosen on validation tasks among at least four, and beyond
the edges of those until the loss rises again. What was tried is in the report, and its cost is counted.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..models import ConditionEncoder, LatentDenoiser
from ..models.condition import Fields
from ..networks.runner import NetworkRunner
from ..snapshots.zoo import ZooArguments, train_specialists
from ..tasks.family import Family
from ..tasks.task import Batch
from ..training.denoiser import LatentGenerator
from ..training.loop import Loop
from ..training.tune import GeneratedNetworks, TaskBatches, TuneArguments, tune
from ..utils.seeds import named_seed
from .groups import Cost, Group, Kind, search, training_cost
from .score import MemberScorer

ORACLE_RATES = (0.005, 0.01, 0.02, 0.04)
NETWORK_RATES = (0.001, 0.003, 0.01, 0.03)
SEARCH_SHARE = 4  # a search takes a quarter of the steps; the two best rates then get all
SEARCH_MEMBERS = 16
VALIDATIONS = 5
VALIDATION_EXAMPLES = 500
WIDER = 4
NUM_BASIS = 16


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
    """

    family: Family
    networks: NetworkRunner
    accelerator: Accelerator
    batches: Callable[[TuneArguments], TaskBatches]
    num_tasks: int
    validation: torch.Tensor
    seed: int
    scorer: MemberScorer = field(init=False)

    def __post_init__(self) -> None:
        table = self.validation.to(self.accelerator.device)
        self.scorer = MemberScorer(self.family, self.networks, table, VALIDATION_EXAMPLES)

    def validate(self, module: nn.Module) -> float:
        """The mean loss of `module(table, batch, generator)` on the validation tasks, always with the same noise."""
        return self.scorer.score("validation", module).losses.mean().item()

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

    def specialists(self, table: torch.Tensor, args: ZooArguments) -> torch.Tensor:
        """Networks that are trained on each of some tasks, shape `(M, D)`."""
        args = replace(args, num_snapshots=1)
        return train_specialists(self.loop("oracles"), self.family, self.networks, table, args)[-1]

    def fit_best(
        self, make: Callable[[], nn.Module], args: TuneArguments, what: str, rates: Sequence[float]
    ) -> tuple[nn.Module, dict[str, float], int]:
        """
        The best of some modules on validation tasks: each learning rate gets a share of the steps, and then the two
        best rates all of them.

        Returns:
            `tuple`: The module, the validation loss of each setting, and the passes that all of it took.
        """
        spent, fitted = 0, dict[str, tuple[float, nn.Module]]()

        def train(rate: float, num_steps: int) -> float:
            nonlocal spent
            torch.manual_seed(named_seed(self.seed, f"{what} weights"))
            module = make()
            every = max(1, num_steps // VALIDATIONS)
            history = self.fit(
                module, replace(args, learning_rate=rate, num_steps=num_steps, validate_every=every), what
            )
            spent += training_cost(len(history["losses"]), args.num_tasks, args.num_examples)
            loss = self.validate(module)
            if num_steps == args.num_steps:
                fitted[f"{rate:.3g} in full"] = loss, module
            return loss

        short = max(1, args.num_steps // SEARCH_SHARE)
        _, tried = search(lambda some: [train(rate, short) for rate in some], rates)
        best = sorted(tried, key=lambda rate: tried[rate] if math.isfinite(tried[rate]) else math.inf)[:2]
        for rate in best:
            train(float(rate), args.num_steps)
        loss = {name: value for name, (value, _) in fitted.items()}
        return fitted[min(loss, key=lambda name: loss[name])][1], tried | loss, spent


# A group of that name, of which the work begins when it is asked for.
Pending = tuple[str, Callable[[], Group]]


def oracles(regime: Regime, args: ZooArguments, once: int, factors: Sequence[int], size: int) -> Iterator[Pending]:
    """
    Networks that are trained on the unseen tasks themselves, for so many times as many steps as those of the seen ones.

    Args:
        once (`int`): Passes of the base model.
        size (`int`): Parameters of a network.
    """
    table = regime.validation[:SEARCH_MEMBERS]
    scorer = MemberScorer(regime.family, regime.networks, table.to(regime.accelerator.device), VALIDATION_EXAMPLES)
    for factor in factors:
        longer = replace(args, num_steps=factor * args.num_steps)
        name = "trained on the task" if factor == 1 else f"trained on the task, {factor} times longer"

        def make(name: str = name, longer: ZooArguments = longer) -> Group:
            def loss(rate: float) -> float:
                networks = regime.specialists(table, replace(longer, learning_rate=rate))
                return scorer.score("validation", networks).losses.mean().item()

            rate, tried = search(lambda rates: [loss(rate) for rate in rates], ORACLE_RATES)
            each = training_cost(longer.num_steps, longer.batch_size)
            best = replace(longer, learning_rate=rate)
            return Group(
                name,
                lambda _, rows: regime.specialists(rows, best),
                Kind.ORACLE,
                cost=Cost(once + len(tried) * len(table) * each, each),
                size=size,
                note=f"learning rate {rate:.3g} of {len(tried)}",
                tried=tried,
            )

        yield name, make


def shared_networks(regime: Regime, args: TuneArguments, once: int, size: int) -> Iterator[Pending]:
    """
    One network for all tasks: without the condition, with the condition as input, and with FiLM, the latter two also
    four times wider, and a learned combination of a few networks.

    Args:
        args (`TuneArguments`): As the generator was tuned, but for as many passes as it took in all.
        once (`int`): Passes of the base model.
        size (`int`): Parameters of a network.
    """
    family, start = regime.family, regime.networks.base_parameters()
    model, fields, names = regime.networks.model, family.fields, regime.networks.layout.names
    example = family.batch("train", regime.validation[:1].cpu(), torch.arange(1))
    wide = wider_network(family, WIDER)
    makers: dict[str, Callable[[], nn.Module]] = {
        "one network for all tasks": lambda: ConditionedNetwork(model, family.predict, names),
        "one network, FiLM": lambda: ConditionedNetwork(model, family.predict, names, fields, film=True),
    }
    if "pixel_values" in example:
        shape = example["pixel_values"].shape[2:]
        makers["one network, condition as input"] = lambda: ConditionedNetwork(
            model, family.predict, names, fields, image_shape=shape
        )
        if wide is not None:
            makers["one network 4 times wider, condition as input"] = lambda: ConditionedNetwork(
                wide, family.predict, None, fields, image_shape=shape
            )
    if wide is not None:
        makers["one network 4 times wider, FiLM"] = lambda: ConditionedNetwork(
            wide, family.predict, None, fields, film=True
        )
    makers["basis networks"] = lambda: BasisNetworks(regime.networks, family.predict, start, fields)
    for name, maker in makers.items():

        def make(name: str = name, maker: Callable[[], nn.Module] = maker) -> Group:
            more = 0
            if "wider" in name:  # it does not start from the base model, whose passes it gets too
                more = once // training_cost(args.num_tasks, args.num_examples)
            longer = replace(args, num_steps=args.num_steps + more)
            module, tried, spent = regime.fit_best(maker, longer, name, NETWORK_RATES)
            of_one = size if isinstance(module, BasisNetworks) else sum(p.numel() for p in module.parameters())
            return Group(
                name,
                module,
                Kind.OPPONENT,
                cost=Cost((0 if more else once) + spent),
                size=of_one,
                note=_best(tried),
                tried=tried,
            )

        yield name, make


def _best(tried: dict[str, float]) -> str:
    full = {name: loss for name, loss in tried.items() if name.endswith("in full")}
    rate = min(full, key=lambda name: full[name]).removesuffix(" in full")
    return f"learning rate {rate} of {len(tried) - len(full)}"


def hypernetworks(
    regime: Regime,
    generated: GeneratedNetworks,
    latents: torch.Tensor,
    table: torch.Tensor,
    args: TuneArguments,
    num_steps: int,
    once: int,
    size: int,
) -> Iterator[Pending]:
    """
    A deterministic network with the generator's own architecture, from conditions to latents: by weights, and then by
    the loss of tasks.

    Args:
        generated (`GeneratedNetworks`): The generator before it was tuned, whose decoder is used.
        latents (`torch.Tensor`), table (`torch.Tensor`): Of the snapshots, shape `(K, L)`, and their conditions.
        args (`TuneArguments`): As the generator was tuned.
        num_steps (`int`): Of training by weights.
        once (`int`): Passes that the snapshots took.
        size (`int`): Parameters of a network.
    """
    device = regime.accelerator.device
    latents, table = latents.to(device), table.to(device)
    state: dict[str, nn.Module] = {}

    def by_weights() -> nn.Module:
        if not state:
            state["module"] = _fit_hypernetwork(regime, generated, latents, table, num_steps)
        return copy.deepcopy(state["module"])

    def tuned() -> Group:
        rates = [factor * args.learning_rate for factor in (0.3, 1.0, 3.0, 10.0)]
        module, tried, spent = regime.fit_best(by_weights, args, "hypernetwork", rates)
        cost = Cost(once + spent)
        return Group("hypernetwork", module, Kind.OPPONENT, cost=cost, size=size, note=_best(tried), tried=tried)

    yield (
        "hypernetwork by weights",
        lambda: Group("hypernetwork by weights", by_weights(), Kind.BASELINE, cost=Cost(once), size=size),
    )
    yield "hypernetwork", tuned


def _fit_hypernetwork(
    regime: Regime, generated: GeneratedNetworks, latents: torch.Tensor, table: torch.Tensor, num_steps: int
) -> nn.Module:
    torch.manual_seed(named_seed(regime.seed, "hypernetwork weights"))
    denoiser, seen = generated.generator.denoiser, generated.generator.encoder
    assert seen is not None
    encoder = ConditionEncoder(seen.config.fields, seen.config.embedding_dim)
    encoder.remember(seen.seen.cpu())
    settings = {key: value for key, value in denoiser.config.items() if not key.startswith("_")}
    module = GeneratedNetworks(
        LatentGenerator(LatentDenoiser(**settings), encoder),
        copy.deepcopy(generated.autoencoder),
        None,
        generated.num_inference_steps,
        regime.networks,
        regime.family.predict,
    ).to(latents.device)
    optimizer = torch.optim.AdamW(module.generator.parameters(), lr=1e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    noise = torch.Generator().manual_seed(named_seed(regime.seed, "hypernetwork"))
    for _ in range(num_steps):
        rows = torch.randint(len(latents), (64,), generator=noise)
        answers = module.sample_latents(table[rows], torch.Generator(latents.device))
        loss = (answers - latents[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return module


# What is trained


def wider_network(family: Family, factor: int) -> nn.Module | None:
    """The family's network with so many times as many hidden units; None where that cannot be said of it."""
    task = getattr(family, "base", None)
    arguments = getattr(task, "model_args", None) or {}
    if not is_dataclass(task) or isinstance(task, type) or "hidden_size" not in arguments:
        return None
    arguments = arguments | {"hidden_size": factor * arguments["hidden_size"]}
    return replace(task, model_args=arguments).load_base_model()  # type: ignore[attr-defined]  # of tasks


class ConditionedNetwork(nn.Module):
    """
    One network for all tasks, on examples of shape `(M, B, ...)`.

    Args:
        network (`nn.Module`): Copied.
        predict (`Callable`): `predict(call, batch)` of the family.
        names (`Sequence[str]`, *optional*): Its tensors that are trained; all by default.
        fields (`Fields`, *optional*): Of the condition that it is told; none by default.
        image_shape (`Sequence[int]`, *optional*): The condition is an input beside the image: a learned image of it is
            added, which a linear layer sees as it would see image and condition side by side.
        film (`bool`, *optional*): Or it scales and shifts the outputs of all layers but the last (FiLM, arXiv
            1709.07871).
    """

    def __init__(
        self,
        network: nn.Module,
        predict: Callable,
        names: Sequence[str] | None = None,
        fields: Fields | None = None,
        image_shape: Sequence[int] = (),
        film: bool = False,
    ):
        super().__init__()
        self.network, self.predict, self.fields = copy.deepcopy(network), predict, fields
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(names is None or name in names)
        if fields is not None and image_shape:
            self.image = _zeroed(fields.num_features, math.prod(image_shape))
        self.layers = dict[str, Any]()
        if fields is not None and film:
            modules = self.network.named_modules()
            found: dict[str, Any] = {n: m for n, m in modules if isinstance(m, nn.Linear | nn.Conv2d)}
            self.layers = dict(list(found.items())[:-1])
            self.film = nn.ModuleList(
                nn.Sequential(nn.Linear(fields.num_features, 64), nn.ReLU(), _zeroed(64, 2 * layer.weight.shape[0]))
                for layer in self.layers.values()
            )

    def forward(self, table: torch.Tensor, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """Logits of shape `(M, B, C)`."""
        num_members, num_examples = batch["labels"].shape
        flat = {name: values.flatten(0, 1) for name, values in batch.items()}  # (M, B, ...) -> (M B, ...)
        handles = []
        if self.fields is not None:
            features = self.fields.features(table)
            if hasattr(self, "image"):
                shift = self.image(features).repeat_interleave(num_examples, 0)
                flat["pixel_values"] = flat["pixel_values"] + shift.view_as(flat["pixel_values"])
            for layer, film in zip(self.layers.values(), getattr(self, "film", ()), strict=True):
                scale, shift = film(features).repeat_interleave(num_examples, 0).chunk(2, dim=1)  # (M B, C) each
                handles.append(layer.register_forward_hook(_modulate(scale, shift, isinstance(layer, nn.Conv2d))))
        try:
            return self.predict(self.network, flat).unflatten(0, (num_members, num_examples))
        finally:
            for handle in handles:
                handle.remove()


def _modulate(scale: torch.Tensor, shift: torch.Tensor, is_convolution: bool) -> Callable:
    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        middle = (1,) * (output.ndim - 2)  # between the examples and the channels, or behind them
        shape = (*scale.shape, *middle) if is_convolution else (len(scale), *middle, scale.shape[1])
        return output * (1 + scale.view(shape)) + shift.view(shape)

    return hook


def _zeroed(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class BasisNetworks(nn.Module):
    """
    Subspace-configurable networks (arXiv 2305.13536): a small network gives the weights with which a few learned basis
    networks are added.
    """

    def __init__(
        self,
        networks: NetworkRunner,
        predict: Callable,
        start: torch.Tensor,
        fields: Fields,
        num_basis: int = NUM_BASIS,
    ):
        super().__init__()
        self.basis = nn.Parameter(start.repeat(num_basis, 1))  # (K, D)
        with torch.no_grad():  # they must differ for their weights to have gradients
            self.basis.add_(0.3 * start.std() * torch.randn(self.basis.shape))
        self.coefficients = nn.Sequential(nn.Linear(fields.num_features, 128), nn.ReLU(), nn.Linear(128, num_basis))
        self.fields, self.networks, self.predict = fields, networks, predict

    def sample_parameters(self, table: torch.Tensor, *_: Any) -> torch.Tensor:
        """Parameters for M conditions, shape `(M, D)`."""
        return self.coefficients(self.fields.features(table)).softmax(1) @ self.basis

    def forward(self, table: torch.Tensor, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        return self.networks.stack(self.predict, self.sample_parameters(table), batch)
