"""Tunes whatever gives a network for a task on the loss of those networks, instead of on parameters."""

import copy
import logging
import math
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from torch import nn

from ..models import ParameterAutoencoder
from ..networks.runner import NetworkRunner
from ..tasks.family import Family
from ..tasks.task import Batch, ClassificationTask, load_batch
from ..utils.devices import seed_global
from ..utils.seeds import derive_seed
from .denoiser import LatentGenerator
from .loop import Loop, LoopArguments
from .state import LoopState

logger = logging.getLogger(__name__)

# Conditions of shape `(T, width)`, or None, and examples of shape `(T, B, ...)`, for indices of tasks.
TaskBatches = Callable[[torch.Tensor, torch.Generator], tuple[torch.Tensor | None, Batch]]
ExtraLoss = Callable[[torch.Generator], torch.Tensor]
# Gradients are clipped to this norm.
MAX_GRAD_NORM = 1.0
# The learning rate rises for this share of the steps.
WARM_UP = 0.05
# A loss has jumped if it has risen by so much of the first one, on average over so many steps.
JUMP, WINDOW = 0.25, 10


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
        patience (`int`, *optional*, defaults to 5): Looks without a lower loss after which tuning ends.
    """

    num_steps: int = 1200
    learning_rate: float = 3e-4
    num_tasks: int = 32
    num_examples: int = 128
    ema_decay: float = 0.99
    validate_every: int = 100
    patience: int = 5


class GeneratedNetworks(nn.Module):
    """
    A generator of latents, followed by the networks that they are decoded to. Only the last step of the sampler has
    gradients, so that memory does not grow with the number of steps.

    Args:
        generator (`LatentGenerator`): The part that is trained.
        autoencoder (`ParameterAutoencoder`): Frozen, but for its `tuned_map` where it has one.
        scheduler (`SchedulerMixin`): Of the sampler; None for a deterministic network, which gets no noise.
        num_inference_steps (`int`): Of the sampler.
        networks (`NetworkRunner`), predict (`Callable`): What the parameters are used in.
    """

    def __init__(
        self,
        generator: LatentGenerator,
        autoencoder: ParameterAutoencoder,
        scheduler: SchedulerMixin | None,
        num_inference_steps: int,
        networks: NetworkRunner,
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

    def denoise(
        self, noise: torch.Tensor, table: torch.Tensor | None = None, generator: LatentGenerator | None = None
    ) -> torch.Tensor:
        """Noise to latents, both of shape `(N, L)`, by this generator of latents or another one."""
        assert self.scheduler is not None
        scheduler, generator = copy.copy(self.scheduler), generator or self.generator
        scheduler.set_timesteps(self.num_inference_steps, device=noise.device)  # makes all anew that steps change
        latents, condition = noise * scheduler.init_noise_sigma, generator.encode(table)
        for i, timestep in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i == len(scheduler.timesteps) - 1):
                noisy = scheduler.scale_model_input(latents, timestep)
                prediction = generator.denoiser(noisy, timestep, condition).sample
                latents = scheduler.step(prediction, timestep, latents).prev_sample
        return latents

    def sample_latents(
        self, table: torch.Tensor | None, generator: torch.Generator, num_networks: int | None = None
    ) -> torch.Tensor:
        """Latents for T conditions, shape `(T, L)`; without conditions, of `num_networks` (1 by default)."""
        device = next(self.generator.parameters()).device
        shape = (len(table) if table is not None else num_networks or 1, self.autoencoder.config.latent_dim)
        if self.scheduler is None:
            return self.generator(torch.zeros(shape, device=device), 0, table)
        return self.denoise(torch.randn(shape, generator=generator, device=device), table)

    def sample_parameters(
        self, table: torch.Tensor | None, generator: torch.Generator, num_networks: int | None = None
    ) -> torch.Tensor:
        """Parameters for T conditions, shape `(T, D)`; without conditions, of `num_networks`."""
        return self.autoencoder.decode(self.sample_latents(table, generator, num_networks)).sample

    def forward(self, table: torch.Tensor | None, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """The logits of one network for each task on its batch, shape `(T, B, C)`."""
        parameters = self.sample_parameters(table, generator, len(batch["labels"]))
        return self.networks.stack(self.predict, parameters, batch)


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
    The tasks of `table`, shape `(T, width)`, over and over; or `(T, K, width)` with K ways to say what each is, of
    which each step draws one. With `condition_noise` the conditions that come with their examples are moved at random
    by so many standard deviations, which keeps the answers smooth between seen tasks.
    """

    def draw(indices: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, Batch]:
        rows = table[indices].to(device)
        if rows.ndim > 2:
            ways = torch.randint(rows.shape[1], indices.shape, generator=generator, device=generator.device)
            rows = rows[torch.arange(len(rows), device=device), ways.to(device)]
        batch = _examples(family, rows, args, generator)
        if condition_noise:
            noise = torch.randn(rows.shape, generator=generator, device=device)
            rows = family.fields.perturb(rows, condition_noise * noise)
        return rows, batch

    return draw


def _examples(family: Family, table: torch.Tensor, args: TuneArguments, generator: torch.Generator) -> Batch:
    shape = (len(table), args.num_examples)
    indices = torch.randint(family.num_examples("train"), shape, generator=generator, device=generator.device)
    return family.training_batch(table, indices.cpu(), generator)


def single_task(task: ClassificationTask, args: TuneArguments, device: torch.device) -> TaskBatches:
    """One task, and one batch for all networks of a step: for a generator without conditions."""

    def draw(indices: torch.Tensor, generator: torch.Generator) -> tuple[None, Batch]:
        size, count = (args.num_examples,), len(task.load_split("train"))
        chosen = torch.randint(count, size, generator=generator, device=generator.device).tolist()
        return None, load_batch(task, "train", chosen, device)

    return draw


class _Tuned(nn.Module):
    """What is tuned, the best of its averaged weights so far, and how they were validated: all part of a checkpoint."""

    validation_losses: torch.Tensor
    num_looks: torch.Tensor
    restarted: torch.Tensor

    def __init__(self, model: nn.Module, args: "TuneArguments", extra_loss: ExtraLoss | None):
        super().__init__()
        self.model, self.extra_loss = model, extra_loss
        self.tuned = {name: value for name, value in model.named_parameters() if value.requires_grad}
        for i, value in enumerate(self.tuned.values()):
            self.register_buffer(f"best_{i}", value.detach().clone())
        self.look_steps = [*range(0, args.num_steps, args.validate_every), args.num_steps]
        self.register_buffer("validation_losses", torch.full((len(self.look_steps),), math.nan))
        self.register_buffer("num_looks", torch.tensor(0))
        self.register_buffer("restarted", torch.zeros(args.num_steps + 1, dtype=torch.bool))
        # They are the same on every process, and not to be sent at every step.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers(recurse=False)]

    @property
    def best_look(self) -> int:
        return int(self.validation_losses.nan_to_num(math.inf).argmin())  # the first of several

    @torch.no_grad()
    def look(self, loss: float) -> None:
        """Takes note of a validation loss of the weights as they are now, and of the weights if it is the lowest."""
        self.validation_losses[self.num_looks] = loss
        if self.best_look == self.num_looks:
            for i, value in enumerate(self.tuned.values()):
                getattr(self, f"best_{i}").copy_(value)
        self.num_looks += 1

    @torch.no_grad()
    def restore_best(self) -> None:
        for i, value in enumerate(self.tuned.values()):
            value.copy_(getattr(self, f"best_{i}"))

    def history(self) -> dict[str, list]:
        looks = range(int(self.num_looks))
        return {
            "steps": [self.look_steps[i] for i in looks],
            "validation_losses": _numbers(self.validation_losses[: len(looks)]),
            "restarts": self.restarted.nonzero().flatten().tolist(),
        }

    def forward(self, table: torch.Tensor | None, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """The mean loss over tasks and examples, a scalar, plus the other one."""
        loss = self.model(table, batch, generator)
        if loss.ndim:  # logits
            loss = F.cross_entropy(loss.flatten(0, 1), batch["labels"].flatten())
        return loss if self.extra_loss is None else loss + self.extra_loss(generator)


def tune(
    loop: Loop,
    model: nn.Module,
    batches: TaskBatches,
    num_tasks: int,
    args: TuneArguments,
    *,
    validate: Callable[[], float] | None = None,
    extra_loss: ExtraLoss | None = None,
    description: str = "tuning",
) -> dict[str, list]:
    """
    Trains `model` in place on the loss of the networks that it gives, and leaves it with averaged weights: those with
    the lowest validation loss, or the last ones where nothing is validated.

    With validation it cannot do harm: the weights before tuning are among those that it chooses from, and where the
    loss jumps, tuning goes on from the best weights so far at half the learning rate. A warning says so, and where no
    weights were better than those before.

    Args:
        loop (`Loop`): Where the training runs.
        model (`nn.Module`): `model(table, batch, generator)` gives the logits of T networks on their batches,
            `(T, B, C)`, such as a [`GeneratedNetworks`], or a loss of its own, such as [`TunedEnsembles`].
        batches (`TaskBatches`): [`fresh_tasks`], [`seen_tasks`] or [`single_task`].
        num_tasks (`int`): Indices of tasks are below this.
        validate (`Callable`, *optional*): The validation loss of `model` as it is.
        extra_loss (`Callable`, *optional*): Another loss of `model`, which is added.

    Returns:
        `dict`: `losses` at every step (None where they are not finite); the `validation_losses` with the `steps` after
        which they were taken, from 0; and `restarts`, the steps after which the loss had jumped.
    """
    model.to(loop.device)
    tuned = _Tuned(model, args, extra_loss)

    def loss_function(wrapped, indices, generator):
        seed_global(derive_seed(generator.initial_seed(), 1), generator.device)  # of what a network draws by chance
        table, batch = batches(indices, generator)
        return wrapped(table, batch, generator)

    def after_step(state: LoopState) -> None:
        assert validate is not None
        jumped = state.is_checked and has_jumped(state.losses[state.trusted_from :])
        if state.step % args.validate_every == 0 or state.step == args.num_steps:
            with state.averaged_weights():
                loss = validate()
                tuned.look(loss)
            first, lowest = tuned.validation_losses[0], tuned.validation_losses[tuned.best_look]
            jumped = jumped or not loss <= lowest + JUMP * first
            state.should_stop = int(tuned.num_looks) - 1 - tuned.best_look >= args.patience
        if jumped and state.step < args.num_steps:
            tuned.restarted[state.step] = True
            tuned.restore_best()
            state.restart()
            logger.warning(
                "%s: the loss has jumped to %.4g at step %d: going on from the weights of step %d at a learning rate "
                "of %.2g",
                description,
                state.losses[-1],
                state.step,
                tuned.look_steps[tuned.best_look],
                state.learning_rate,
            )

    if validate is not None:
        tuned.look(validate())
    losses = loop.train(
        tuned,
        loss_function,
        num_tasks,
        LoopArguments(
            args.num_steps,
            args.num_tasks,
            args.learning_rate,
            lr_warmup_steps=round(WARM_UP * args.num_steps),
            max_grad_norm=MAX_GRAD_NORM,
            ema_decay=args.ema_decay,
        ),
        description=description,
        after_step=None if validate is None else after_step,
    )
    if validate is not None:
        tuned.restore_best()
        if tuned.best_look == 0:
            logger.warning(
                "%s brought nothing: of %d validation losses the lowest is %.4g, before the first step. The weights "
                "stay as they were; try a learning rate below %g, or more steps",
                description,
                int(tuned.num_looks),
                tuned.validation_losses[0],
                args.learning_rate,
            )
    model.eval()
    return {"losses": _numbers(losses)} | tuned.history()


def has_jumped(losses: torch.Tensor) -> bool:
    """
    Whether the mean of the last `WINDOW` losses lies above the lowest one before by more than `JUMP` times the first
    losses, and by more than chance explains; or is not finite.
    """
    recent, before, first = losses[-WINDOW:].mean(), losses[: max(3, len(losses) - WINDOW)], losses[:3].mean()
    lowest = before.unfold(0, min(WINDOW, len(before)), 1).mean(1).amin().minimum(first)
    # The standard error of a mean follows from differences between neighbours, whose median a few jumps do not move;
    # the lowest of many means and one more may well be eight apart.
    change = losses.diff()
    error = (change - change.median()).abs().median() / WINDOW**0.5 if len(change) else 0.0
    return not bool(recent <= lowest + JUMP * first + 8 * error)


def _numbers(values: torch.Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
