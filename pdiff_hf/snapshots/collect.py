"""Snapshots by fine-tuning (paper, sections 2.3 and 3.1): train the network, then save one at each further step."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from ..layout import ParameterLayout
from ..networks.cropping import CroppedConvolutions
from ..networks.prefix_cache import PrefixCache
from ..networks.runner import Forward, NetworkRunner
from ..tasks import ClassificationTask, Task, accuracies, take
from ..training.loop import Loop, LoopArguments, TrainingError, epoch_indices, largest, make_optimizer
from ..utils.devices import seed_global, to_device
from ..utils.seeds import derive_seed
from .dataset import SnapshotWriter

# Snapshots wait in memory, up to this size, to be scored together in one pass over the validation data.
SCORE_BUFFER = 256 * 2**20


@dataclass(frozen=True)
class CollectArguments:
    """
    Args:
        num_snapshots (`int`, *optional*, defaults to 300): K, over all runs together.
        num_runs (`int`, *optional*, defaults to 1): How many times to start again from the base model, each time with
            another order of the data. A divisor of `num_snapshots`.
        every_n_steps (`int`, *optional*, defaults to 1): Steps between two snapshots.
        optimizer (`str`, *optional*, defaults to `"adamw"`): `adamw`, `adam` or `sgd`.
        learning_rate (`float`, *optional*, defaults to 0.03): Constant (paper, Table 5b).
        weight_decay (`float`, *optional*, defaults to 5e-4).
        batch_size (`int`, *optional*, defaults to 128).
    """

    num_snapshots: int = 300
    num_runs: int = 1
    every_n_steps: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 0.03
    weight_decay: float = 5e-4
    batch_size: int = 128


def train_base_model(loop: Loop, task: Task, model: nn.Module, args: LoopArguments) -> torch.Tensor:
    """Trains all parameters of `model` in place on the task's training split; see [`~pdiff_hf.training.Loop.train`]."""
    split = task.load_split("train")

    def loss_function(model, indices, generator):
        # What a task or a network draws by chance, such as dropout, follows from the step, as the examples do.
        seed_global(generator.initial_seed(), generator.device)
        batch = to_device(task.augment(task.collate(take(split, indices.tolist()))), loop.device)
        with CroppedConvolutions():
            return task.loss(model, batch)

    return loop.train(model, loss_function, len(split), args, description="base model")


def collect_snapshots(
    accelerator: Accelerator,
    task: Task,
    model: nn.Module,
    layout: ParameterLayout,
    folder: str | os.PathLike,
    args: CollectArguments,
    *,
    seed: int,
) -> None:
    """
    Fine-tunes the tensors of `layout` and writes snapshots to the parameter data set `folder`, for classification with
    the column `validation_accuracy` in percent; the column `seed` differs between runs. Everything else stays as it
    is: the other parameters, and the statistics of batch norm, because the network is in eval mode; but layers whose
    statistics the layout has are in training mode, where they follow the data. `model` is left as it was. Where
    examples come up several times, what is computed from them before the trained tensors are used is computed once and
    kept, if it fits into memory and the data are the same each time.

    Raises:
        TrainingError: if the loss or a parameter is no longer finite.
    """
    split = task.load_split("train")
    changing = {name for name in model.state_dict() if name in layout.names or name.endswith("num_batches_tracked")}
    original = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in changing}
    trained = {name: parameter for name, parameter in model.named_parameters() if name in layout.names}
    required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    model.to(accelerator.device).eval()
    models = NetworkRunner(model, layout)
    normalizing = [module for name, module in model.named_modules() if f"{name}.running_mean" in layout.names]

    def loss_of(indices: torch.Tensor) -> Forward:
        batch = to_device(task.augment(task.collate(take(split, indices.tolist()))), accelerator.device)
        return lambda call: task.loss(call, batch)

    cache, example = None, task.collate(take(split, [0]))
    if task.augment(example) is example and args.num_snapshots * args.every_n_steps * args.batch_size >= 2 * len(split):
        cache = PrefixCache.build(models, loss_of, len(split), args.batch_size)
    num_buffered = max(1, min(args.num_snapshots, SCORE_BUFFER // (4 * layout.num_parameters)))
    progress = tqdm(
        _schedule(len(split), args, seed),
        "snapshots",
        args.num_snapshots * args.every_n_steps,
        disable=not accelerator.is_local_main_process,
        leave=False,
        mininterval=1.0,
    )
    try:
        metrics = ("validation_accuracy",) if isinstance(task, ClassificationTask) else ()
        with SnapshotWriter(folder, layout, metrics=metrics) as writer:
            buffer: list[dict[str, Any]] = []
            num_taken = 0
            for run_seed, step, indices in progress:
                if step == 1:
                    model.load_state_dict(original, strict=False)
                    optimizer = make_optimizer(args.optimizer, trained.values(), args.learning_rate, args.weight_decay)
                seed_global(derive_seed(run_seed, step), accelerator.device)
                loss_function = loss_of(indices)
                for module in normalizing:
                    module.train()
                with cache.replay(indices) if cache else CroppedConvolutions():
                    loss = loss_function(model)
                for module in normalizing:
                    module.eval()
                if not torch.isfinite(loss):
                    raise TrainingError(
                        f"snapshots: the loss is {loss.item()} at step {step}; the learning rate of "
                        f"{args.learning_rate:g} is too high for these tensors"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if not torch.isfinite(largest(trained.values())):
                    raise TrainingError(
                        f"snapshots: the trained tensors are not finite after step {step}, whose loss of "
                        f"{loss.item():.4g} is; the learning rate of {args.learning_rate:g} is too high for them, or "
                        "the loss has no finite gradient"
                    )
                if step % args.every_n_steps:
                    continue
                buffer.append({"parameters": layout.flatten(model.state_dict()), "step": step, "seed": run_seed})
                num_taken += 1
                if len(buffer) == num_buffered or num_taken == args.num_snapshots:
                    columns: list[dict[str, Any]] = [{}] * len(buffer)
                    if isinstance(task, ClassificationTask):
                        scores = accuracies(
                            task, models, "validation", torch.stack([row["parameters"] for row in buffer])
                        )
                        columns = [{metric: score} for metric in metrics for score in scores.tolist()]
                    for row, scored in zip(buffer, columns, strict=True):
                        writer.write(**row, **scored)
                    buffer.clear()
    finally:
        model.load_state_dict(original, strict=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required_grad[name])


def _schedule(num_examples: int, args: CollectArguments, seed: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Every training step of every run: the run's seed, the number of the step from 1, and indices of examples."""
    steps_per_run = args.num_snapshots // args.num_runs * args.every_n_steps
    for run in range(args.num_runs):
        run_seed = derive_seed(seed, run) if args.num_runs > 1 else seed
        indices = epoch_indices(num_examples, args.batch_size, run_seed)
        for step in range(1, steps_per_run + 1):
            yield run_seed, step, next(indices)
