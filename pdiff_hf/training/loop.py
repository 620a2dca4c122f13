"""The loop of all trainings, placed by Accelerate; a resumed training repeats an uninterrupted one bit for bit."""

import gc
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..utils.seeds import derive_seed
from .state import Average, LoopState, latest_checkpoint

logger = logging.getLogger(__name__)

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
# The loss is looked at this often: often enough to lose little work, seldom enough not to stall a GPU at every step.
CHECK_EVERY = 10
# A training has not worked if its last losses are so many times its first.
RISE = 1.1


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what to try."""


@dataclass(frozen=True)
class LoopArguments:
    """
    Args:
        num_steps (`int`): Optimizer steps.
        batch_size (`int`): Examples in a step, over all processes and accumulation steps together.
        learning_rate (`float`): Peak learning rate.
        optimizer (`str`, *optional*, defaults to `"adamw"`): One of `OPTIMIZERS`.
        weight_decay (`float`, *optional*, defaults to 0).
        lr_scheduler (`str`, *optional*, defaults to `"cosine"`): A schedule of diffusers' `get_scheduler`.
        lr_warmup_steps (`int`, *optional*, defaults to 0).
        max_grad_norm (`float`, *optional*): Gradients are clipped to this norm.
        ema_decay (`float`, *optional*): Keep an exponential moving average of the weights, and end with it.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 0
    max_grad_norm: float | None = None
    ema_decay: float | None = None


@dataclass(frozen=True)
class Loop:
    """
    Where a training runs, what its random numbers follow from, and how it continues after a stop.

    Args:
        accelerator (`Accelerator`): With its `gradient_accumulation_steps`; what it has prepared before, it forgets.
        seed (`int`): Of the order of the examples and of the noise.
        checkpoint_dir (`str` or `os.PathLike`, *optional*): Where the last two `checkpoint-N` folders are kept.
        checkpointing_steps (`int`, *optional*): Steps between two checkpoints.
        resume (`bool`, *optional*, defaults to `False`): Go on from the latest checkpoint in `checkpoint_dir`, if any.
        callbacks (`Sequence[transformers.TrainerCallback]`, *optional*): Are told of `on_train_begin`, `on_step_end`,
            `on_log` (with `loss` and `learning_rate`, every `CHECK_EVERY` steps and after the last one), `on_save`
            (with the `checkpoint`) and `on_train_end`, on every process.
        stage (`str`, *optional*): What is trained, which callbacks get as `stage`.
    """

    accelerator: Accelerator
    seed: int
    checkpoint_dir: str | os.PathLike | None = None
    checkpointing_steps: int | None = None
    resume: bool = False
    callbacks: Sequence[TrainerCallback] = ()
    stage: str = ""

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def train(
        self,
        model: nn.Module,
        loss_function: Callable[[nn.Module, torch.Tensor, torch.Generator], torch.Tensor],
        num_examples: int,
        args: LoopArguments,
        *,
        description: str,
        after_step: Callable[[LoopState], None] | None = None,
    ) -> torch.Tensor:
        """
        Trains `model` in place.

        Which examples a step sees and which noise it draws follow from the seed and the step alone, and the batch is
        cut into equal parts for processes and accumulation steps, so that a resumed run repeats an uninterrupted one
        bit for bit, and several processes see the examples that one would see.

        Args:
            model (`nn.Module`): On return on its device, with the averaged weights if `args.ema_decay` is set.
            loss_function (`Callable`): `loss_function(model, indices, generator)` gives the mean loss of the examples
                `indices`, a scalar; it takes all its noise from `generator`, which is on the accelerator's device.
            num_examples (`int`): Indices are below this.
            args (`LoopArguments`): See there.
            description (`str`): For the progress bar and the trackers.
            after_step (`Callable`, *optional*): Called after every step, before the callbacks. What it must remember
                goes into buffers of `model`, which are part of a checkpoint.

        Returns:
            `torch.Tensor`: The loss at every step that was taken, on the CPU, shape `(args.num_steps,)` unless it ended
            early.

        Raises:
            ValueError: if the batch cannot be cut into equal parts.
            TrainingError: if the loss or a weight is no longer finite. The last checkpoint is kept, and has finite
                weights.
        """
        accelerator, num_accumulated = self.accelerator, self.accelerator.gradient_accumulation_steps
        parts = accelerator.num_processes * num_accumulated
        if args.batch_size % parts:
            raise ValueError(
                f"a batch of {args.batch_size} cannot be cut into {parts} equal parts ({accelerator.num_processes} "
                f"processes × {num_accumulated} accumulation steps)"
            )
        optimizer = make_optimizer(args.optimizer, model.parameters(), args.learning_rate, args.weight_decay)
        lr_scheduler = get_scheduler(
            args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.num_steps
        )
        self._forget()  # what was prepared before would be saved with every checkpoint
        wrapped, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
        ema = Average(model.parameters(), decay=args.ema_decay) if args.ema_decay is not None else None
        state = LoopState(description, args.num_steps, list(model.parameters()), optimizer, lr_scheduler, ema)
        state.callbacks, state.stage = self.callbacks, self.stage
        losses = torch.full((args.num_steps,), math.nan, device=accelerator.device)
        gradients = [torch.tensor(0.0)] * args.num_steps  # how large each step's is: not finite if it is not
        if self.resume and (latest := latest_checkpoint(self.checkpoint_dir)) is not None:
            state.load(accelerator, latest)
            losses[: state.step] = state.losses
            logger.info("%s: going on from step %d", description, state.step)

        wrapped.train()
        state.tell("on_train_begin")
        first_step, every = state.step, self.checkpointing_steps or 0
        batches = epoch_indices(num_examples, args.batch_size, self.seed, first_step)
        progress = tqdm(
            range(first_step, args.num_steps),
            initial=first_step,
            total=args.num_steps,
            desc=description,
            disable=not accelerator.is_local_main_process,
            leave=False,
            mininterval=1.0,
        )
        for step in progress:
            indices = next(batches).chunk(parts)
            step_loss = 0.0
            for accumulation in range(num_accumulated):
                part = accumulation * accelerator.num_processes + accelerator.process_index
                generator = torch.Generator(accelerator.device).manual_seed(derive_seed(self.seed, step, part, 1))
                with accelerator.accumulate(wrapped):
                    loss = loss_function(wrapped, indices[part], generator)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and args.max_grad_norm is not None:
                        gradients[step] = accelerator.clip_grad_norm_(state.parameters, args.max_grad_norm)
                    elif accelerator.sync_gradients:
                        gradients[step] = largest(p.grad for p in state.parameters if p.grad is not None)
                    optimizer.step()
                    if accelerator.optimizer_step_was_skipped:  # by the loss scaling of fp16, which tries larger scales
                        gradients[step] = torch.tensor(0.0)
                    if accelerator.sync_gradients:
                        lr_scheduler.step()
                    optimizer.zero_grad()
                step_loss = step_loss + loss.detach() / num_accumulated
            if ema is not None:
                ema.step(state.parameters)
            losses[step] = accelerator.reduce(step_loss, "mean")
            state.step, state.losses = step + 1, losses[: step + 1]
            last = state.step == args.num_steps
            saves = every > 0 and state.step % every == 0 and not last
            state.is_checked = state.step % CHECK_EVERY == 0 or last or saves
            if after_step is not None:
                after_step(state)
            state.tell("on_step_end")
            last, saves = last or state.should_stop, saves and not state.should_stop
            if state.is_checked or last:
                weights = largest(state.parameters) if last or saves else None  # nothing else looks at them again
                self._check_finite(state, gradients, weights, args.learning_rate)
                logs = {"loss": losses[step].item(), "learning_rate": state.learning_rate}
                progress.set_postfix(loss=f"{logs['loss']:.4g}", refresh=False)
                accelerator.log({f"{description}/loss": logs["loss"], f"{description}/lr": logs["learning_rate"]}, step)
                state.tell("on_log", logs=logs)
            if saves:
                assert self.checkpoint_dir is not None
                state.tell("on_save", checkpoint=state.save(accelerator, Path(self.checkpoint_dir)))
            if last:
                break
        if ema is not None:
            ema.copy_to(state.parameters)
        state.tell("on_train_end")
        self._forget()  # the model's optimizer takes twice its memory
        return losses[: state.step].cpu()

    def _forget(self) -> None:
        """Frees all that the accelerator has prepared."""
        gc.freeze()  # hardly anything of a training is garbage, and to look for it in all that is imported takes 0.5 s
        self.accelerator.free_memory()
        gc.unfreeze()

    def _check_finite(
        self,
        state: LoopState,
        gradients: list[torch.Tensor],
        largest_weight: torch.Tensor | None,
        learning_rate: float,
    ) -> None:
        """Raises a `TrainingError` that names the step which went wrong."""
        losses, start = state.losses, state.trusted_from
        bad = (torch.nonzero(~losses[start:].isfinite()) + start).flatten().tolist()
        if not bad and (largest_weight is None or largest_weight.isfinite()):
            return
        precision = self.accelerator.mixed_precision
        advice = f"a learning rate below {learning_rate:g}"
        advice += "" if precision == "no" else f", or another precision than {precision}"
        step = bad[0] if bad else len(losses)
        cause = next((i for i in range(start, step) if not gradients[i].isfinite()), None)
        if cause is not None:
            what = (
                f"the gradient of step {cause} is not finite, although its loss of {losses[cause]:.4g} is. Look for "
                f"what has no finite derivative in the loss (a root, a logarithm or a quotient of 0), or try {advice}"
            )
        elif bad:
            before = f" (it was {losses[step - 1]:.4g} before)" if step else ""
            what = (
                f"the loss is {losses[step]} at step {step}{before}. Try warm-up steps, gradient clipping, or {advice}"
            )
        else:
            what = f"the weights are not finite after step {step - 1}. Try {advice}"
        latest = latest_checkpoint(self.checkpoint_dir) or "not written yet"
        raise TrainingError(f"{state.description}: {what}. The last checkpoint is {latest}.")


def make_optimizer(name: str, parameters, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD with momentum 0.9, in one pass over memory a step: several times faster on a CPU."""
    extra = {"momentum": 0.9} if name == "sgd" else {}
    return OPTIMIZERS[name](parameters, lr=learning_rate, weight_decay=weight_decay, fused=True, **extra)


def epoch_indices(num_examples: int, batch_size: int, seed: int, first_step: int = 0) -> Iterator[torch.Tensor]:
    """
    Endless batches of indices, shape `(batch_size,)`: every example once an epoch, in an order that depends on the seed
    and the epoch only, so that a run can begin at any step.
    """
    position, epoch, order = first_step * batch_size, -1, torch.empty(0)
    while True:
        batch: list[int] = []
        while len(batch) < batch_size:
            if position // num_examples != epoch:
                epoch = position // num_examples
                generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
                order = torch.randperm(num_examples, generator=generator)
            start = position % num_examples
            chunk = order[start : start + batch_size - len(batch)].tolist()
            batch += chunk
            position += len(chunk)
        yield torch.tensor(batch)


def warn_of_rise(description: str, losses: torch.Tensor, learning_rate: float) -> None:
    """Says so where a training ended with losses that are higher than those at its start."""
    span = max(5, len(losses) // 40)  # what rises soon has not risen yet
    first, last = losses[:span].mean(), losses[-span:].mean()
    if len(losses) > 2 * span and last > RISE * first:
        logger.warning(
            "%s: the loss has risen from %.3g to %.3g, so that it is worse than at the start: the learning rate of %g "
            "is too high; try a third of it, or more warm-up steps",
            description,
            first,
            last,
            learning_rate,
        )


def largest(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The largest magnitude in some tensors, a scalar on their device; NaN if there is one in them."""
    # Several times faster than a norm on a CPU, and NaN stays NaN.
    extremes = [torch.stack(tensor.detach().aminmax()).float() for tensor in tensors if tensor.numel()]
    return torch.stack(extremes).abs().amax() if extremes else torch.tensor(0.0)
