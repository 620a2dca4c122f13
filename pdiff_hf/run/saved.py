"""Evaluates a generator from elsewhere: a saved pipeline, or networks that anything has written as state dicts."""

import contextlib
import os
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from ..evaluation.report import Report
from ..evaluation.score import make_scorer
from ..evaluation.single_task import evaluate_task
from ..layout import LayoutError, ParameterLayout
from ..networks.adapters import with_adapters, without_wrapper
from ..pipelines import PDiffPipeline
from ..snapshots import load_snapshots, parameter_matrix, read_networks
from ..tasks import Task
from ..tasks.labels import LabelledTask
from ..utils import names
from ..utils.errors import resource_errors
from ..utils.files import check_writable, remove
from .config import PDiffConfig
from .saved_families import evaluate_saved_family
from .task import make_task
from .tuning import load_tuning


def evaluate_saved(source: str, recipe: PDiffConfig) -> Report:
    """
    Writes the report on the generator `source` and its figures to `recipe.output_dir`. A second call scores only what
    is new.

    Args:
        source (`str`): Folder or Hub id of a saved `PDiffPipeline`, or a folder of networks as
            [`~pdiff_hf.snapshots.read_networks`] reads it. With a `family`, see [`evaluate_saved_family`].
        recipe (`PDiffConfig`): Its `snapshots`, its task (`dataset`, `model`, ...) and its section for the evaluation.
            `model` may be `None` for a pipeline that carries its base model.

    Returns:
        `Report`: What came out.

    Raises:
        ValueError: for everything that can be seen to be wrong before any work is done.
        ResourceError: where disk or memory run out.
    """
    if recipe.snapshots is None:
        raise ValueError("--snapshots is needed: the snapshots that the networks were made from")
    if recipe.dataset is None and ":" not in recipe.task:
        raise ValueError("--dataset is needed: the data set that the networks were made for")
    if recipe.family is not None:
        return evaluate_saved_family(source, recipe)
    snapshots, layout = load_snapshots(recipe.snapshots)
    folder = source if os.path.exists(source) else download(source)
    inside = names.generator_folder(Path(folder))
    folder = str(inside) if (inside / PDiffPipeline.config_name).is_file() else folder
    pipeline = _load_pipeline(folder, layout) if Path(folder, PDiffPipeline.config_name).is_file() else None
    if pipeline is not None:
        pipeline.register_to_config(**recipe.sampling)
        if pipeline.config.base_model_reference:
            pipeline.load_base_model()
    carried = None if pipeline is None else pipeline.base_model
    if recipe.model is None and carried is None:
        raise ValueError(f"--model is needed: '{source}' does not carry the network that its tensors belong to")
    name = recipe.model or str(Path(folder, names.BASE_MODEL))
    config = recipe.changed(model=name)
    config.soft |= {"model"}  # it says where the network is, whether or not the task's class takes it
    task = make_task(config)
    model = _load_model(task, name, layout) if carried is None else carried
    layout.check_fits(model.state_dict())
    if isinstance(task, LabelledTask):
        task.align(model.config)
    device = PartialState().device
    output = Path(recipe.output_dir or "outputs/evaluation")
    check_writable(output)
    part = output / ".report.part"
    remove(part)
    with resource_errors("evaluation", output, "what is scored is kept; go on with the same command"):
        report = evaluate_task(
            make_scorer(task, model.to(device), layout, output / names.SCORES, recipe.recomputes_statistics),
            parameter_matrix(snapshots, layout),
            read_networks(folder, layout) if pipeline is None else pipeline.to(device),
            part,
            num_models=recipe.num_models,
            tuning=None if pipeline is None else load_tuning(Path(folder)),
            baseline_models=recipe.baseline_models,
            baselines=recipe.baselines,
            seed=recipe.seed,
        )
    for path in part.iterdir():
        path.replace(output / path.name)
    part.rmdir()
    return report


def download(source: str) -> str:
    """The folder of a pipeline on the Hub, with what says how it was tuned."""
    folder = PDiffPipeline.download(source)
    with contextlib.suppress(EntryNotFoundError):  # how it was tuned, which is no component of a pipeline
        hf_hub_download(source, names.TUNING, revision=Path(folder).name)
    return folder


def _load_pipeline(folder: str, layout: ParameterLayout) -> PDiffPipeline:
    try:
        pipeline = PDiffPipeline.from_pretrained(folder)
    except OSError as error:
        raise ValueError(f"the pipeline in '{folder}' cannot be loaded: {error}") from error
    if pipeline.autoencoder.layout != layout:
        raise LayoutError("the pipeline generates other tensors than the snapshots hold; it was not made from them")
    return pipeline


def _load_model(task: Task, name: str, layout: ParameterLayout) -> nn.Module:
    """The network with its trained weights; without them if all of its tensors are replaced anyway."""
    torch.manual_seed(0)
    model = with_adapters(without_wrapper(task.load_base_model()), layout)
    frozen = [tensor for tensor in model.state_dict() if tensor not in layout.names]
    if not frozen:
        return model
    try:
        return with_adapters(without_wrapper(task.load_saved(name)), layout)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model must be a folder or Hub id with the weights of the base model, because '{frozen[0]}' and "
            f"{len(frozen) - 1} more of its tensors are not generated; '{name}' has none: {error}"
        ) from error
