"""The training loop that the base model, the autoencoder and the denoiser share, placed by Accelerate."""

import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from ..utils.files import remove, sync
from ..utils.seeds import derive_seed

logger = logging.getLogger(__name__)

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
# The loss is looked at this often: often enough to lose little work, seldom enough not to stall a GPU at every step.
CHECK_EVERY = 10


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
        checkpointing_steps (`int`, *optional*): Save a checkpoint every so many steps.
        checkpoints_total_limit (`int`, *optional*, defaults to 2): Keep no more than this many.
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
    checkpointing_steps: int | None = None
    checkpoints_total_limit: int = 2


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


def train(
    accelerator: Accelerator,
    model: nn.Module,
    loss_function: Callable[[nn.Module, torch.Tensor, torch.Generator], torch.Tensor],
    num_examples: int,
    args: LoopArguments,
    *,
    seed: int,
    checkpoint_dir: str | os.PathLike,
    description: str,
    resume: bool = False,
    after_step: Callable[[int], bool] | None = None,
) -> torch.Tensor:
    """
    Trains `model` in place.

    Which examples a step sees and which noise it draws follow from the seed and the step alone, and the batch is cut
    into equal parts for processes and accumulation steps, so that a resumed run repeats an uninterrupted one bit for
    bit, and several processes see the examples that one would see.

    Args:
        accelerator (`Accelerator`): Made for this training, with its `gradient_accumulation_steps`.
        model (`nn.Module`): On return on its device, with the averaged weights if `args.ema_decay` is set.
        loss_function (`Callable`): `loss_function(model, indices, generator)` gives the mean loss of the examples
            `indices`, a scalar; it takes all its noise from `generator`, which is on the accelerator's device.
        num_examples (`int`): Indices are below this.
        args (`LoopArguments`): See there.
        seed (`int`): Of the order of the examples and of the noise.
        checkpoint_dir (`str` or `os.PathLike`): Where `checkpoint-N` folders are kept.
        description (`str`): For the progress bar and the trackers.
        resume (`bool`, *optional*, defaults to `False`): Go on from the latest checkpoint in `checkpoint_dir`, if any.
        after_step (`Callable`, *optional*): Called as `after_step(n)` after step n, counted from 1; True ends the
            training. What it must remember goes into buffers of `model`, which are part of a checkpoint.

    Returns:
        `torch.Tensor`: The loss at every step that was taken, shape `(args.num_steps,)` unless it ended early.

    Raises:
        ValueError: if the batch cannot be cut into equal parts.
        TrainingError: if the loss or a weight is no longer finite. The last checkpoint is kept, and has finite weights.
    """
    parts = accelerator.num_processes * accelerator.gradient_accumulation_steps
    if args.batch_size % parts:
        raise ValueError(
            f"a batch of {args.batch_size} cannot be cut into {parts} equal parts ({accelerator.num_processes} "
            f"processes × {accelerator.gradient_accumulation_steps} accumulation steps)"
        )
    checkpoint_dir = Path(checkpoint_dir)
    optimizer = make_optimizer(args.optimizer, model.parameters(), args.learning_rate, args.weight_decay)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.num_steps,
    )
    wrapped, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    ema = EMAModel(model.parameters(), decay=args.ema_decay, foreach=True) if args.ema_decay is not None else None
    losses = torch.full((args.num_steps,), math.nan)
    largest_gradients = [torch.tensor(0.0)] * args.num_steps
    precision = accelerator.mixed_precision
    hint = "" if precision == "no" else f", or another precision than {precision}"
    first_step = 0
    if resume and (latest := latest_checkpoint(checkpoint_dir)) is not None:
        first_step = _load(accelerator, latest, ema, losses)
        logger.info("%s: going on from step %d", description, first_step)

    wrapped.train()
    batches = epoch_indices(num_examples, args.batch_size, seed, first_step)
    part_size = args.batch_size // parts
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
        indices = next(batches)
        step_loss = 0.0
        for accumulation in range(accelerator.gradient_accumulation_steps):
            part = accumulation * accelerator.num_processes + accelerator.process_index
            generator = torch.Generator(accelerator.device).manual_seed(derive_seed(seed, step, part, 1))
            with accelerator.accumulate(wrapped):
                loss = loss_function(wrapped, indices[part * part_size : (part + 1) * part_size], generator)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    largest_gradients[step] = largest(p.grad for p in wrapped.parameters() if p.grad is not None)
                    if args.max_grad_norm is not None:
                        accelerator.clip_grad_norm_(wrapped.parameters(), args.max_grad_norm)
                optimizer.step()
                if accelerator.optimizer_step_was_skipped:  # by the loss scaling of fp16, which tries larger scales
                    largest_gradients[step] = torch.tensor(0.0)
                if accelerator.sync_gradients:
                    lr_scheduler.step()
                optimizer.zero_grad()
            step_loss = step_loss + loss.detach() / accelerator.gradient_accumulation_steps
        if ema is not None:
            ema.step(model.parameters())
        losses[step] = accelerator.reduce(step_loss, "mean")
        ends = after_step is not None and after_step(step + 1)
        last = ends or step == args.num_steps - 1
        saves = bool(args.checkpointing_steps) and (step + 1) % args.checkpointing_steps == 0 and not last
        if (step + 1) % CHECK_EVERY == 0 or last or saves:
            weights = largest(model.parameters()) if last or saves else None  # nothing else looks at them again
            latest = latest_checkpoint(checkpoint_dir)
            _check_finite(losses[: step + 1], largest_gradients, weights, description, args.learning_rate, hint, latest)
            progress.set_postfix(loss=f"{losses[step]:.4g}", refresh=False)
            accelerator.log(
                {f"{description}/loss": losses[step].item(), f"{description}/lr": lr_scheduler.get_last_lr()[0]}, step
            )
        if saves:
            _save(accelerator, checkpoint_dir, step + 1, ema, losses, args.checkpoints_total_limit)
        if ends:
            losses = losses[: step + 1]
            break
    if ema is not None:
        ema.copy_to(model.parameters())
    return losses


def latest_checkpoint(checkpoint_dir: str | os.PathLike) -> Path | None:
    """The `checkpoint-N` folder with the highest N."""
    checkpoints = _checkpoints(Path(checkpoint_dir))
    return checkpoints[-1] if checkpoints else None


def _checkpoints(checkpoint_dir: Path) -> list[Path]:
    found = [path for path in checkpoint_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def largest(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The largest magnitude in some tensors, a scalar on their device; NaN if there is one in them."""
    # Several times faster than a norm on a CPU, and NaN stays NaN.
    extremes = [torch.stack(tensor.detach().aminmax()).float() for tensor in tensors if tensor.numel()]
    return torch.stack(extremes).abs().amax() if extremes else torch.tensor(0.0)


def _check_finite(
    losses: torch.Tensor,
    largest_gradients: list[torch.Tensor],
    largest_weight: torch.Tensor | None,
    description: str,
    learning_rate: float,
    hint: str,
    latest: Path | None,
) -> None:
    """Raises a `TrainingError` that names the step which went wrong."""
    bad = torch.nonzero(~losses.isfinite())
    last_weights_are_bad = largest_weight is not None and not largest_weight.isfinite()
    if not len(bad) and not last_weights_are_bad:
        return
    step = int(bad[0]) if len(bad) else len(losses)
    cause = next((i for i, gradient in enumerate(largest_gradients[:step]) if not gradient.isfinite()), None)
    if cause is not None:
        what = (
            f"the gradient of step {cause} is not finite, although its loss of {losses[cause]:.4g} is. Look for what "
            "has no finite derivative in the loss (a root, a logarithm or a quotient of 0), or try a learning rate "
            f"below {learning_rate:g}{hint}"
        )
    elif len(bad):
        before = f" (it was {losses[step - 1]:.4g} before)" if step else ""
        what = (
            f"the loss is {losses[step]} at step {step}{before}. Try a learning rate below {learning_rate:g}, warm-up "
            "steps, or gradient clipping" + hint
        )
    else:
        what = f"the weights are not finite after step {step - 1}. Try a learning rate below {learning_rate:g}{hint}"
    raise TrainingError(f"{description}: {what}. The last checkpoint is {latest or 'not written yet'}.")


def _save(accelerator, checkpoint_dir: Path, step: int, ema: EMAModel | None, losses: torch.Tensor, limit: int) -> None:
    """Under a temporary name first, so that a `checkpoint-N` folder is always whole."""
    part = checkpoint_dir / f"part-{step}"
    if accelerator.is_main_process:
        remove(part)
    accelerator.wait_for_everyone()
    try:
        _write(accelerator, checkpoint_dir, part, step, ema, losses)
    except BaseException:
        if accelerator.is_main_process:
            remove(part)
        raise
    if accelerator.is_main_process:
        for old in _checkpoints(checkpoint_dir)[:-limit]:
            remove(old)
    accelerator.wait_for_everyone()


def _write(accelerator, checkpoint_dir: Path, part: Path, step: int, ema: EMAModel | None, losses) -> None:
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        # Not registered with Accelerate, which would pickle and unpickle it.
        state = {"losses": losses, "step": torch.tensor(step)}
        for i, tensor in enumerate(ema.shadow_params if ema is not None else ()):
            state[f"ema.{i}"] = tensor.contiguous()
        save_file(state, part / "loop.safetensors")
        sync(part)
        remove(checkpoint_dir / f"checkpoint-{step}")
        part.rename(checkpoint_dir / f"checkpoint-{step}")


def _load(accelerator: Accelerator, checkpoint: Path, ema: EMAModel | None, losses: torch.Tensor) -> int:
    accelerator.load_state(str(checkpoint))
    state = load_file(checkpoint / "loop.safetensors")
    step = int(state["step"])
    losses[:step] = state["losses"][:step].cpu()
    if ema is not None:
        ema.shadow_params = [state[f"ema.{i}"].to(accelerator.device) for i in range(len(ema.shadow_params))]
        ema.optimization_step = step
    return step
