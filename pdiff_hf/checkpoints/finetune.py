"""Snapshots by fine-tuning (paper, sections 2.3 and 3.1): train the network, then save one at each further step."""

import os
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from tqdm.auto import tqdm

from ..batched import BatchedModels
from ..loop import LoopArguments, TrainingError, epoch_indices, make_optimizer, train
from ..parameters import ParameterLayout
from ..tasks import Task, accuracy, take
from .dataset import SnapshotWriter

# Snapshots wait in memory, up to this size, to be scored together in one pass over the validation data.
SCORE_BUFFER = 256 * 2**20


@dataclass(frozen=True)
class CollectArguments:
    """
    Args:
        num_snapshots (`int`, *optional*, defaults to 300): K.
        optimizer (`str`, *optional*, defaults to `"adamw"`): `adamw`, `adam` or `sgd`.
        learning_rate (`float`, *optional*, defaults to 0.03): Constant (paper, Table 5b).
        weight_decay (`float`, *optional*, defaults to 5e-4).
        batch_size (`int`, *optional*, defaults to 128).
    """

    num_snapshots: int = 300
    optimizer: str = "adamw"
    learning_rate: float = 0.03
    weight_decay: float = 5e-4
    batch_size: int = 128


def train_base_model(
    accelerator: Accelerator,
    task: Task,
    model: nn.Module,
    args: LoopArguments,
    *,
    seed: int,
    checkpoint_dir: str | os.PathLike,
    resume: bool = False,
) -> torch.Tensor:
    """Trains all parameters of `model` in place on the task's training split; see [`~pdiff_hf.loop.train`]."""
    split = task.load_split("train")

    def loss_function(model, indices, generator):
        batch = send_to_device(task.collate(take(split, indices.tolist())), accelerator.device)
        return task.loss(model, batch)

    return train(
        accelerator,
        model,
        loss_function,
        len(split),
        args,
        seed=seed,
        checkpoint_dir=checkpoint_dir,
        description="base model",
        resume=resume,
    )


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
    Fine-tunes the tensors of `layout` and writes a snapshot after each step to the parameter data set `folder`, with
    the column `validation_accuracy` in percent. Everything else stays as it is: the other parameters, and the
    statistics of batch norm, because the network is in eval mode throughout. `model` is left as it was.

    Raises:
        TrainingError: if the loss or a parameter is no longer finite.
    """
    split = task.load_split("train")
    original = layout.flatten(model.state_dict()).clone()
    trained = {name: parameter for name, parameter in model.named_parameters() if name in layout.names}
    required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    model.to(accelerator.device).eval()
    models = BatchedModels(model, layout)
    optimizer = make_optimizer(args.optimizer, trained.values(), args.learning_rate, args.weight_decay)
    num_buffered = max(1, min(args.num_snapshots, SCORE_BUFFER // (4 * layout.num_parameters)))
    steps = zip(range(args.num_snapshots), epoch_indices(len(split), args.batch_size, seed), strict=False)
    progress = tqdm(
        steps, "snapshots", args.num_snapshots, disable=not accelerator.is_local_main_process, mininterval=1.0
    )
    try:
        with SnapshotWriter(folder, layout, metrics=("validation_accuracy",)) as writer:
            buffer: list[torch.Tensor] = []
            for step, indices in progress:
                batch = send_to_device(task.collate(take(split, indices.tolist())), accelerator.device)
                loss = task.loss(model, batch)
                if not torch.isfinite(loss):
                    raise TrainingError(
                        f"snapshots: the loss is {loss.item()} at step {step}; the learning rate of "
                        f"{args.learning_rate:g} is too high for these tensors"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                buffer.append(layout.flatten(model.state_dict()))
                if len(buffer) == num_buffered or step + 1 == args.num_snapshots:
                    scores = accuracy(task, models, "validation", torch.stack(buffer))
                    for i, (parameters, score) in enumerate(zip(buffer, scores.tolist(), strict=True)):
                        row = step + 1 - len(buffer) + i
                        writer.write(parameters, step=row + 1, seed=seed, validation_accuracy=score)
                    buffer.clear()
    finally:
        model.load_state_dict(layout.unflatten(original), strict=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required_grad[name])
