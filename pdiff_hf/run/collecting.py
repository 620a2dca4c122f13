"""The stages that give snapshots: a base model, and networks that are fine-tuned from it or come from elsewhere."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..models.condition import Condition, Fields
from ..networks.adapters import without_wrapper
from ..networks.runner import NetworkRunner
from ..snapshots import (
    CollectArguments,
    SnapshotWriter,
    align_snapshots,
    collect_snapshots,
    find_hidden_units,
    import_snapshots,
    load_snapshots,
    parameter_matrix,
    train_base_model,
)
from ..snapshots.barrier import check_basins
from ..snapshots.dataset import load_fields
from ..snapshots.frozen import FrozenCheck
from ..snapshots.of_data import check_starts, fit_networks, learn_start, write_networks_of_data
from ..snapshots.zoo import ZooArguments, train_specialists, write_zoo
from ..tasks import ClassificationTask
from ..tasks.data_task import DataTask
from ..training import warn_of_rise
from ..utils.files import remove
from ..utils.seeds import named_seed
from .config import PDiffConfig
from .context import RunContext, loop_arguments
from .folder import RunError, Stage

logger = logging.getLogger(__name__)


def train_base(context: RunContext, stage: Stage) -> None:
    """The network that everything else starts from: trained, or as the task gives it."""
    c = context.config
    if PartialState().is_main_process:
        context.task.prepare_run()
    PartialState().wait_for_everyone()
    torch.manual_seed(named_seed(c.seed, "base weights"))
    model = without_wrapper(context.task.load_base_model())
    results = {}
    if c.base_epochs:
        num_examples = len(context.task.load_split("train"))  # type: ignore[arg-type]  # a map-style data set
        steps = max(1, c.base_epochs * num_examples // c.base_batch_size)
        more: dict[str, Any] = {"lr_warmup_steps": c.base_args.warmup_steps, "weight_decay": c.base_args.weight_decay}
        args = loop_arguments(c, "base", steps, **more)
        with context.loop(stage) as loop:
            if isinstance(context.task, DataTask) and context.task.start == "meta":
                losses = learn_start(loop, context.task, model, context.layout, args)
            else:
                losses = train_base_model(loop, context.task, model, args)
        warn_of_rise("base model", losses, c.base_learning_rate)
        results["losses"] = losses.tolist()
    if not PartialState().is_main_process:
        return
    model = model.to("cpu").eval()
    with context.files.replacing(stage) as folder:
        context.task.save_base_model(model, folder)
    context.finish(stage, results)


def collect(context: RunContext, stage: Stage) -> None:
    """
    Snapshots: the data set that the settings name, which stays where it is; or fine-tuning from the base model, one
    network after the other for a single task, and side by side those of a family's seen tasks, or of data.
    """
    c, fields, several = context.config, context.family.fields, len(context.conditions["train"]) > 1
    if c.snapshots is not None:
        if PartialState().is_main_process:
            context.finish(stage, {"num_snapshots": len(context.snapshots[0]), "barrier": _check_basins(context)})
        return
    if isinstance(context.task, DataTask):
        collect_of_data(context, context.task, stage)
        return
    seed = named_seed(c.seed, "collect")
    if several:
        args, table = zoo_arguments(c), context.conditions["train"]
        networks = NetworkRunner(context.base_model, context.layout)
        with context.loop(stage) as loop:
            trained = train_specialists(loop, context.family, networks, table, args)
    if not PartialState().is_main_process:
        return
    with context.files.replacing(stage) as folder:
        folder.rmdir()
        if several:
            known = [context.family.described(condition) for condition in fields.conditions(table)]
            write_zoo(folder, context.family, context.layout, known, args, trained, seed)
        else:
            with context.accelerator() as accelerator:
                collect_snapshots(
                    accelerator,
                    context.task,
                    context.base_model,
                    context.layout,
                    folder,
                    CollectArguments(
                        num_snapshots=c.num_snapshots,
                        num_runs=c.collect_args.num_runs,
                        every_n_steps=c.collect_every,
                        optimizer=c.collect_args.optimizer,
                        learning_rate=c.collect_learning_rate,
                        weight_decay=c.collect_args.weight_decay,
                        batch_size=c.collect_batch_size,
                    ),
                    seed=seed,
                )
    context.base_model.to("cpu")
    context.finish(stage, {"barrier": _check_basins(context)})


def collect_of_data(context: RunContext, task: DataTask, stage: Stage) -> None:
    """One network for each datum, held-out ones too, which no generator sees."""
    c = context.config
    networks = NetworkRunner(context.base_model, context.layout)
    more: dict[str, Any] = {"optimizer": c.collect_args.optimizer, "weight_decay": c.collect_args.weight_decay}
    args = loop_arguments(c, "collect", c.collect_steps, **more)
    signals = [task.signals(split) for split in ("train", "test")]
    with context.loop(stage) as loop:
        found = fit_networks(loop, task, networks, torch.cat(signals), args)
    if not PartialState().is_main_process:
        return
    errors = task.error(task.render_all(networks, found), torch.cat(signals))
    sizes = [len(part) for part in signals]
    conditions = [task.conditions(split) for split in ("train", "test")]
    parts = zip(found.split(sizes), conditions, errors.split(sizes), (False, True), strict=True)
    with context.files.replacing(stage) as folder:
        folder.rmdir()
        write_networks_of_data(folder, task, context.layout, list(parts), args.num_steps, named_seed(c.seed, "collect"))
    context.base_model.to("cpu")
    means = [part.mean().item() for part in errors.split(sizes)]
    logger.info("collect: the mean loss is %.3g, and %.3g for held-out data", *means)
    context.finish(stage, {"errors": means})


def zoo_arguments(config: PDiffConfig) -> ZooArguments:
    more: dict[str, Any] = {
        "num_snapshots": config.num_snapshots // config.num_tasks,
        "every_n_steps": config.collect_every,
    }
    more |= {"weight_decay": config.collect_args.weight_decay}
    return loop_arguments(config, "collect", config.collect_steps, ZooArguments, **more)


def collect_from_files(
    context: RunContext,
    paths: Sequence[str],
    align: bool = False,
    conditions: Sequence[Condition] | None = None,
    fields: Fields | None = None,
    require_same_frozen: bool = False,
) -> None:
    """
    Takes the place of the stage collect: snapshots from files, with their conditions, as `import_snapshots` reads them,
    and with `align` reordered as `align_snapshots` does. With `require_same_frozen`, networks that differ from the base
    model in tensors that are not selected are refused.

    Raises:
        RunError: if there are snapshots already.
    """
    stage = context.stages["collect"]
    if context.files.record(stage) is not None and not context.config.overwrite_output_dir:
        raise RunError(
            f"'{context.folder}' has snapshots already; choose another --output_dir, or replace them with "
            "--overwrite_output_dir"
        )
    # Errors come before the files are read.
    context.checked_fields(fields or Fields())
    if align:
        find_hidden_units(context.task, context.base_model, context.layout)
    check = FrozenCheck(context.base_model, context.layout, require_same=require_same_frozen)
    with context.resource_errors("import"), context.files.replacing(stage) as folder:
        folder.rmdir()
        adapters = import_snapshots(paths, context.layout, folder, conditions=conditions, fields=fields, check=check)
        if align:
            _align(context, folder)
    results = {
        "imported_from": [str(path) for path in paths],
        "aligned": align,
        "adapters": adapters,
        "frozen": check.report(context.task),
        "barrier": _check_basins(context, align),
    }
    context.config.imported, context.config.conditional = True, bool(context.fields)
    context.finish(stage, results)


def _align(context: RunContext, folder: Path) -> None:
    """Replaces the parameter data set `folder` by an aligned one."""
    dataset, layout = load_snapshots(folder)
    fields = load_fields(folder)
    columns = list(dataset.remove_columns("parameters"))
    aligned = align_snapshots(context.task, context.base_model, layout, parameter_matrix(dataset, layout))
    remove(folder)
    with SnapshotWriter(folder, layout, fields=fields) as writer:
        for row, known in zip(aligned, columns, strict=True):
            condition = {name: known[name] for name in fields}
            writer.write(row, seed=known["seed"], step=known["step"], condition=condition)


def _check_basins(context: RunContext, aligned: bool = False) -> dict | None:
    """
    Warns of snapshots that one generator can hardly learn; see `check_basins`, for classifiers, and `check_starts`, for
    networks that are data.
    """
    if isinstance(context.task, DataTask):
        networks = NetworkRunner(context.base_model, context.layout)
        return {"mixing": check_starts(context.task, networks, context.parameters)}
    if not isinstance(context.task, ClassificationTask) or context.family.fields:
        return None
    dataset = context.snapshots[0]
    models = NetworkRunner(context.base_model.to(PartialState().device), context.layout)
    # Data sets from elsewhere may have the parameters alone.
    seeds, steps = (
        dataset[name][:] if name in dataset.column_names else [0] * len(dataset) for name in ("seed", "step")
    )
    barrier = check_basins(context.task, models, context.parameters, seeds, steps, aligned)
    context.base_model.to("cpu")
    return barrier
