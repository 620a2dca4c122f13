"""What a generator is compared with at equal feedback. Of a family: one network for all tasks, told of the condition or
not, a combination of basis networks, and hypernetworks. Of data: the same generator of data in the place of networks.
Of a single task: `tuned_baselines`.

`scripts/train.py` adds them to a report; but for a single task, `--baselines few` leaves them out. In Python:

    PDiffTrainer(task=family, args=args, extra_groups=opponents).train()

Each is tuned as hard as the generator: its learning rate is chosen on validation tasks among at least four, and beyond
the edges of those until the loss rises again. What was tried is in the report, and its cost is counted.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from pdiff_hf import LatentDenoiser, ParameterAutoencoder, PDiffPipeline
from pdiff_hf.evaluation import Cost, Group, Kind
from pdiff_hf.evaluation.groups import Pending, search, training_cost
from pdiff_hf.evaluation.members import Members
from pdiff_hf.evaluation.opponents import Regime
from pdiff_hf.evaluation.sets import Sets
from pdiff_hf.evaluation.single_task import SingleTask
from pdiff_hf.layout import ParameterLayout
from pdiff_hf.models import ConditionEncoder, encode_in_batches
from pdiff_hf.models.condition import Fields
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.context import RunContext
from pdiff_hf.run.evaluating import untuned_pipeline
from pdiff_hf.run.learning import learn_denoiser, regressed_latents, seen_encoder
from pdiff_hf.run.tuning import generated_networks, tune_arguments
from pdiff_hf.scripts.tuned_baselines import tuned_baselines
from pdiff_hf.tasks.data_task import DataTask
from pdiff_hf.tasks.family import Family
from pdiff_hf.tasks.task import Batch
from pdiff_hf.training import Loop, make_sampling_scheduler
from pdiff_hf.training.denoiser import LatentGenerator
from pdiff_hf.training.tune import GeneratedNetworks, TuneArguments
from pdiff_hf.utils.seeds import named_seed

NETWORK_RATES = (0.001, 0.003, 0.01, 0.03)
HYPERNETWORK_FACTORS = (0.3, 1.0, 3.0, 10.0)  # of the rate that the generator was tuned with
SEARCH_SHARE = 4  # a search takes a quarter of the steps; the two best rates then get all
VALIDATIONS = 5
WIDER = 4
NUM_BASIS = 16


def wanted_opponents(config: PDiffConfig) -> Callable | None:
    """[`opponents`], if the report of a run has some."""
    wanted = config.baselines == "all"
    if not config.has_family and not config.is_of_data:
        wanted = config.tunes or (wanted and config.is_of_data is None)  # of a class of your own, a run finds out
    return opponents if wanted else None


def opponents(context: RunContext, compared: SingleTask | Members | Sets) -> Iterator[Group | Pending]:
    """What gets the feedback that the generator got: for a run's report."""
    if isinstance(compared, SingleTask):
        yield from tuned_baselines(compared)
    elif isinstance(compared, Members):
        yield from opponents_of_members(context, compared)
    else:
        train = compared.signals["train"]
        pipe = generator_of_data(context, compared.task, train.flatten(1))
        pipe.set_progress_bar_config(disable=True)
        told, found = compared.sample(pipe)
        outputs = found.unflatten(1, train.shape[1:])
        yield Group("denoiser on the data", outputs, Kind.OPPONENT, classes=compared.classes(told))


def generator_of_data(context: RunContext, task: DataTask, data: torch.Tensor) -> PDiffPipeline:
    """
    The same denoiser, for the same conditions, on as many principal components of the training data themselves, shape
    `(N, d)`, as a latent is long.
    """
    c, length = context.config, data.shape[1]
    layout = ParameterLayout(("data",), ((length,),), ("float32",))
    size = min(c.latent_dim, length)
    autoencoder = ParameterAutoencoder(layout.to_dict(), latent_dim=size, block_out_channels=())
    autoencoder.fit_parameter_statistics(data)
    autoencoder.fit_latent_statistics(autoencoder.tokenize(data), scaling="together")
    with context.accelerator() as accelerator:
        loop = Loop(accelerator, named_seed(c.seed, "denoiser of data"))
        latents = encode_in_batches(autoencoder, data)
        encoder, table = seen_encoder(context, latents)
        if context.fields:  # of the data themselves: equal ones have one network together
            table = context.fields.alternatives(task.conditions("train"))
        denoiser, scheduler, _ = learn_denoiser(loop, latents, c, encoder, table)
    sampler = make_sampling_scheduler(scheduler)
    return PDiffPipeline(autoencoder, denoiser, sampler, condition_encoder=encoder, **c.sampling)


def opponents_of_members(context: RunContext, compared: Members) -> Iterator[Pending]:
    """Shared networks at the generator's number of passes, and hypernetworks, for the report on a family."""
    c, args, spent, regime = context.config, tune_arguments(context), compared.spent, compared.regime
    a_step = training_cost(args.num_tasks, args.num_examples)
    longer = replace(args, num_steps=max(1, (spent.generator - spent.base) // a_step))
    yield from shared_networks(regime, longer, spent.base)
    untuned = untuned_pipeline(context)
    if c.tune_args.map:
        untuned.autoencoder.add_tuned_map()
    parameters, table = context.known_snapshots()
    latents = encode_in_batches(untuned.autoencoder, parameters)
    if c.num_regressed:  # the hypernetwork learns what the denoiser has learned
        regressed, conditions = regressed_latents(context)
        latents, table = torch.cat([latents, regressed]), torch.cat([table, conditions])
    generated = generated_networks(context, untuned, regime.networks)
    args = replace(args, num_steps=max(1, args.num_steps))
    yield from hypernetworks(regime, generated, latents, table, args, c.denoiser_steps, spent.snapshots)


def best(
    regime: Regime,
    name: str,
    make: Callable[[], nn.Module],
    args: TuneArguments,
    rates: Sequence[float],
    once: int,
    size: int | None = None,
) -> Group:
    """
    The opponent that is best on validation tasks: each learning rate gets a share of the steps, and then the two
    best rates all of them, as do higher ones while the highest is the best.

    Args:
        make (`Callable`): The module before it is trained.
        once (`int`): Passes before all of that.
        size (`int`, *optional*): Parameters that a prediction goes through; by default those of the module.
    """
    fitted: dict[str, tuple[float, nn.Module]] = {}

    def train(rate: float, num_steps: int) -> float:
        nonlocal once
        torch.manual_seed(named_seed(regime.seed, f"{name} weights"))
        module, every = make(), max(1, num_steps // VALIDATIONS)
        of_rate = replace(args, learning_rate=rate, num_steps=num_steps, validate_every=every)
        once += training_cost(len(regime.fit(module, of_rate, name)["losses"]), args.num_tasks, args.num_examples)
        loss = regime.scorer.loss(module)
        if num_steps == args.num_steps:
            fitted[f"{rate:.3g}"] = loss, module
        return loss

    short = max(1, args.num_steps // SEARCH_SHARE)
    _, tried = search(lambda some: [train(rate, short) for rate in some], rates)
    for rate in sorted(tried, key=lambda rate: tried[rate] if math.isfinite(tried[rate]) else math.inf)[:2]:
        train(float(rate), args.num_steps)

    def in_full() -> str:
        return min(fitted, key=lambda rate: fitted[rate][0] if math.isfinite(fitted[rate][0]) else math.inf)

    while float(best := in_full()) >= max(map(float, (*tried, *fitted))):  # a share of the steps likes lower rates
        train(2 * float(best), args.num_steps)
    module = fitted[best][1]
    return Group(
        name,
        module,
        Kind.OPPONENT,
        cost=Cost(once),
        size=size or sum(p.numel() for p in module.parameters()),
        note=f"learning rate {best} of {len(tried)}",
        tried=tried | {f"{rate} in full": loss for rate, (loss, _) in fitted.items()},
    )


def shared_networks(regime: Regime, args: TuneArguments, once: int) -> Iterator[Pending]:
    """
    One network for all tasks: without the condition, with the condition as input, and with FiLM, the latter two also
    four times wider, and a learned combination of a few networks.

    Args:
        args (`TuneArguments`): As the generator was tuned, but for as many passes as it took in all.
        once (`int`): Passes of the base model. A wider network does not start from it, and gets these passes too.
    """
    family, networks = regime.family, regime.networks
    example = family.batch("train", regime.validation[:1].cpu(), torch.arange(1))
    image = {"image_shape": example["pixel_values"].shape[2:]} if "pixel_values" in example else None
    wide = wider_network(family, WIDER)
    longer = replace(args, num_steps=args.num_steps + once // training_cost(args.num_tasks, args.num_examples))

    def shared(name: str, model: nn.Module, names: Sequence[str] | None = None, **told: Any) -> Pending:
        make = partial(ConditionedNetwork, model, family.predict, names, **told)
        if model is wide:
            return name, partial(best, regime, name, make, longer, NETWORK_RATES, 0)
        return name, partial(best, regime, name, make, args, NETWORK_RATES, once)

    narrow = networks.model, networks.layout.names
    yield shared("one network for all tasks", *narrow)
    yield shared("one network, FiLM", *narrow, fields=family.fields, film=True)
    if image:
        yield shared("one network, condition as input", *narrow, fields=family.fields, **image)
    if wide is not None:
        name = f"one network {WIDER} times wider"
        if image:
            yield shared(f"{name}, condition as input", wide, fields=family.fields, **image)
        yield shared(f"{name}, FiLM", wide, fields=family.fields, film=True)
    make = partial(BasisNetworks, networks, family.predict, networks.base_parameters(), family.fields)
    name = "basis networks"
    yield name, partial(best, regime, name, make, args, NETWORK_RATES, once, regime.size)


def hypernetworks(
    regime: Regime,
    generated: GeneratedNetworks,
    latents: torch.Tensor,
    table: torch.Tensor,
    args: TuneArguments,
    num_steps: int,
    once: int,
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
    """
    device = regime.accelerator.device
    fitted = cache(lambda: _fit_hypernetwork(regime, generated, latents.to(device), table.to(device), num_steps))
    rates = [factor * args.learning_rate for factor in HYPERNETWORK_FACTORS]
    name = "hypernetwork by weights"
    yield name, lambda: Group("hypernetwork by weights", copy.deepcopy(fitted()), cost=Cost(once))
    name = "hypernetwork"
    yield name, partial(best, regime, name, lambda: copy.deepcopy(fitted()), args, rates, once, regime.size)


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
