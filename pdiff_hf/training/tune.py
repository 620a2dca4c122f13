"""Tunes whatever gives a network for a task on the loss of those networks, instead of on parameters."""

import copy
import math
import os
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import SchedulerMixin
from torch import nn

from ..models import ParameterAutoencoder
from ..networks.stacked import StackedNetworks
from ..tasks.family import Family
from ..tasks.task import Batch, ClassificationTask, take
from ..utils.devices import to_device
from ..utils.seeds import derive_seed
from .denoiser import LatentGenerator
from .loop import LoopArguments, train

# Conditions of shape `(T, width)`, or None, and examples of shape `(T, B, ...)`, for indices of tasks.
TaskBatches = Callable[[torch.Tensor, torch.Generator], tuple[torch.Tensor | None, Batch]]


@dataclass(frozen=True)
class TuneArguments:
    """
    Args:
        num_steps (`int`, *optional*, defaults to 1200).
        learning_rate (`float`, *optional*, defaults to 3e-4): Peak of AdamW's; it falls as a cosine.
        num_tasks (`int`, *optional*, defaults to 32): In a step, each with a network of its own.
        num_examples (`int`, *optional*, defaults to 128): Of each task in a step.
        ema_decay (`float`, *optional*, defaults to 0.99): Of the averaged weights, which are validated and kept.
        validate_every (`int`, *optional*, defaults to 100): Steps between two looks at the validation tasks.
        patience (`int`, *optional*, defaults to 5): End after so many looks without a lower loss.
        max_grad_norm (`float`, *optional*, defaults to 1).
        checkpointing_steps (`int`, *optional*): Save a checkpoint every so many steps.
    """

    num_steps: int = 1200
    learning_rate: float = 3e-4
    num_tasks: int = 32
    num_examples: int = 128
    ema_decay: float = 0.99
    validate_every: int = 100
    patience: int = 5
    max_grad_norm: float | None = 1.0
    checkpointing_steps: int | None = None


def denoise(
    generator: LatentGenerator,
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    noise: torch.Tensor,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Noise to latents, both of shape `(N, L)`. Only the last step of the sampler has gradients."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    latents = noise * scheduler.init_noise_sigma
    for i, timestep in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(torch.is_grad_enabled() and i == len(scheduler.timesteps) - 1):
            prediction = generator(scheduler.scale_model_input(latents, timestep), timestep, table)
            latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents


class GeneratedNetworks(nn.Module):
    """
    A generator of latents, followed by the networks that they are decoded to. Only the last step of the sampler has
    gradients, so that memory does not grow with the number of steps.

    Args:
        generator (`LatentGenerator`): The part that is trained.
        autoencoder (`ParameterAutoencoder`): Frozen, but for its `tuned_map` where it has one.
        scheduler (`SchedulerMixin`): Of the sampler; None for a deterministic network, which gets no noise.
        num_inference_steps (`int`): Of the sampler.
        networks (`StackedNetworks`), predict (`Callable`): What the parameters are used in.
    """

    def __init__(
        self,
        generator: LatentGenerator,
        autoencoder: ParameterAutoencoder,
        scheduler: SchedulerMixin | None,
        num_inference_steps: int,
        networks: StackedNetworks,
        predict: Callable,
    ):
        super().__init__()
        self.generator = generator
        if generator.encoder is not None:
            generator.denoiser.null_condition.requires_grad_(False)  # it takes no part
        # As a list, it is no part of this module: frozen, and not in its checkpoints.
        self._frozen = [autoencoder.eval().requires_grad_(False)]
        if autoencoder.config.tuned_map:
            self.map_weight = autoencoder.map_weight.requires_grad_(True)
        self.networks, self.predict = networks, predict
        self.scheduler, self.num_inference_steps = scheduler, num_inference_steps

    @property
    def autoencoder(self) -> ParameterAutoencoder:
        return self._frozen[0]

    def sample_latents(
        self, table: torch.Tensor | None, generator: torch.Generator, num_networks: int | None = None
    ) -> torch.Tensor:
        """Latents for T conditions, shape `(T, L)`; without conditions, of `num_networks` (1 by default)."""
        device = next(self.generator.parameters()).device
        if table is not None:
            num_networks = len(table)
        shape = (num_networks or 1, self.autoencoder.config.latent_dim)
        if self.scheduler is None:
            return self.generator(torch.zeros(shape, device=device), 0, table)
        noise = torch.randn(shape, generator=generator, device=device)
        return denoise(self.generator, self.scheduler, self.num_inference_steps, noise, table)

    def sample_parameters(
        self, table: torch.Tensor | None, generator: torch.Generator, num_networks: int | None = None
    ) -> torch.Tensor:
        """Parameters for T conditions, shape `(T, D)`; without conditions, of `num_networks`."""
        return self.autoencoder.decode(self.sample_latents(table, generator, num_networks)).sample

    def forward(self, table: torch.Tensor | None, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """The logits of one network for each task on its batch, shape `(T, B, C)`."""
        parameters = self.sample_parameters(table, generator, len(batch["labels"]))
        return self.networks(self.predict, parameters, batch)


def fresh_tasks(
    family: Family, args: TuneArguments, without: Collection[Hashable], device: torch.device
) -> TaskBatches:
    """New tasks of the family at every step, except those with the keys `without`."""

    def draw(indices: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, Batch]:
        conditions = family.conditions(len(indices), generator.initial_seed(), without=without)
        table = family.fields.table(conditions).to(device)
        return table, _examples(family, table, args, generator)

    return draw


def seen_tasks(
    family: Family, args: TuneArguments, table: torch.Tensor, device: torch.device, condition_noise: float = 0.0
) -> TaskBatches:
    """
    The tasks of `table`, shape `(T, width)`, over and over. With `condition_noise` the conditions that come with their
    examples are moved at random by so many standard deviations, which keeps the answers smooth between seen tasks.
    """

    def draw(indices: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, Batch]:
        rows = table[indices].to(device)
        batch = _examples(family, rows, args, generator)
        if condition_noise:
            noise = torch.randn(rows.shape, generator=generator, device=device)
            rows = family.fields.perturb(rows, condition_noise * noise)
        return rows, batch

    return draw


def _examples(family: Family, table: torch.Tensor, args: TuneArguments, generator: torch.Generator) -> Batch:
    shape = (len(table), args.num_examples)
    indices = torch.randint(family.num_examples("train"), shape, generator=generator, device=generator.device)
    return family.batch("train", table, indices.cpu())


def single_task(task: ClassificationTask, args: TuneArguments, device: torch.device) -> TaskBatches:
    """One task, and one batch for all networks of a step: for a generator without conditions."""
    split = task.load_split("train")

    def draw(indices: torch.Tensor, generator: torch.Generator) -> tuple[None, Batch]:
        size = (args.num_examples,)
        chosen = torch.randint(len(split), size, generator=generator, device=generator.device).tolist()
        return None, to_device(task.collate(take(split, chosen)), device)

    return draw


class _Tuned(nn.Module):
    """What is tuned, its averaged weights, the best of those so far, and how they were validated."""

    best_loss: torch.Tensor
    num_worse: torch.Tensor

    def __init__(self, model: nn.Module, extra_loss: Callable[[torch.Generator], torch.Tensor] | None):
        super().__init__()
        self.model, self.extra_loss = model, extra_loss
        state = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
        self.names = list(state)
        for kind in ("average", "best"):
            for i, value in enumerate(state.values()):
                self.register_buffer(f"{kind}_{i}", value.clone())
        self.register_buffer("best_loss", torch.tensor(math.inf))
        self.register_buffer("num_worse", torch.tensor(0))
        # They are the same on every process, and not to be sent at every step.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers(recurse=False)]

    def kept(self, kind: str) -> dict[str, torch.Tensor]:
        return {name: getattr(self, f"{kind}_{i}") for i, name in enumerate(self.names)}

    def forward(self, table: torch.Tensor | None, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """The mean loss over tasks and examples, a scalar, plus the other one."""
        loss = self.model(table, batch, generator)
        if loss.ndim:  # logits
            loss = F.cross_entropy(loss.flatten(0, 1), batch["labels"].flatten())
        return loss if self.extra_loss is None else loss + self.extra_loss(generator)


def tune(
    accelerator: Accelerator,
    model: nn.Module,
    batches: TaskBatches,
    num_tasks: int,
    args: TuneArguments,
    *,
    validate: Callable[[], float] | None = None,
    extra_loss: Callable[[torch.Generator], torch.Tensor] | None = None,
    seed: int,
    checkpoint_dir: str | os.PathLike,
    description: str = "tuning",
    resume: bool = False,
) -> dict[str, list[float]]:
    """
    Trains `model` in place on the loss of the networks that it gives, and leaves it with averaged weights: those with
    the lowest validation loss, or the last ones where nothing is validated.

    Args:
        model (`nn.Module`): `model(table, batch, generator)` gives the logits of T networks on their batches,
            `(T, B, C)`, such as a [`GeneratedNetworks`], or a loss of its own, such as [`TunedEnsembles`].
        batches (`TaskBatches`): [`fresh_tasks`], [`seen_tasks`] or [`single_task`].
        num_tasks (`int`): Indices of tasks are below this.
        validate (`Callable`, *optional*): The validation loss of `model` as it is.
        extra_loss (`Callable`, *optional*): Another loss of `model`, which is added.

    Returns:
        `dict`: `losses` at every step, and the validation losses with the steps after which they were taken.
    """
    model.to(accelerator.device)
    tuned = _Tuned(model, extra_loss)
    parameters = dict(model.named_parameters())
    history: dict[str, list[float]] = {"steps": [], "validation_losses": []}

    def loss_function(wrapped, indices, generator):
        torch.manual_seed(derive_seed(generator.initial_seed(), 1))  # of what a network draws by chance
        table, batch = batches(indices, generator)
        return wrapped(table, batch, generator)

    @torch.no_grad()
    def swap_average() -> None:
        for name, average in tuned.kept("average").items():
            value = parameters[name].clone()
            parameters[name].copy_(average)
            average.copy_(value)

    @torch.no_grad()
    def after_step(step: int) -> bool:
        # The average of few steps must not remember the start for long.
        decay = min(args.ema_decay, (1 + step) / (10 + step))
        for name, average in tuned.kept("average").items():
            average.lerp_(parameters[name], 1 - decay)
        if validate is None or (step % args.validate_every and step != args.num_steps):
            return False
        swap_average()
        loss = validate()
        swap_average()
        history["steps"].append(step)
        history["validation_losses"].append(loss)
        if loss < tuned.best_loss:
            tuned.best_loss.fill_(loss)
            tuned.num_worse.zero_()
            for best, average in zip(tuned.kept("best").values(), tuned.kept("average").values(), strict=True):
                best.copy_(average)
        else:
            tuned.num_worse += 1
        return int(tuned.num_worse) >= args.patience

    losses = train(
        accelerator,
        tuned,
        loss_function,
        num_tasks,
        LoopArguments(
            args.num_steps,
            args.num_tasks,
            args.learning_rate,
            max_grad_norm=args.max_grad_norm,
            checkpointing_steps=args.checkpointing_steps,
        ),
        seed=seed,
        checkpoint_dir=checkpoint_dir,
        description=description,
        resume=resume,
        after_step=after_step,
    )
    with torch.no_grad():
        for name, value in tuned.kept("average" if validate is None else "best").items():
            parameters[name].copy_(value)
    model.eval()
    return {"losses": losses.tolist()} | history
