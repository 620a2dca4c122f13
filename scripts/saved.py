"""Reports on generators from elsewhere: saved pipelines, and networks that anything has made."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from pdiff_hf.evaluation import Report, evaluate
from pdiff_hf.evaluation.groups import ExtraGroups
from pdiff_hf.evaluation.score import Scorer
from pdiff_hf.layout import LayoutError, ParameterLayout
from pdiff_hf.models.products import AdapterProducts, find_factors
from pdiff_hf.networks.adapters import with_adapters, without_wrapper
from pdiff_hf.pipelines import PDiffPipeline
from pdiff_hf.run.collecting import zoo_arguments
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.tuning import load_tuning
from pdiff_hf.snapshots import load_snapshots, parameter_matrix, read_networks
from pdiff_hf.snapshots.conditions import read_conditions
from pdiff_hf.snapshots.dataset import condition_table, load_fields
from pdiff_hf.snapshots.files import beside
from pdiff_hf.tasks.data_task import DataTask
from pdiff_hf.tasks.family import Family
from pdiff_hf.tasks.labels import LabelledTask
from pdiff_hf.utils import names
from pdiff_hf.utils.errors import resource_errors
from pdiff_hf.utils.files import check_writable, remove


def evaluate_saved(source: str, config: PDiffConfig, extra_groups: ExtraGroups = ()) -> Report:
    """
    Writes the report on the generator `source` and its figures to `config.output_dir`. For a single task, a second call
    scores only what is new. For a family it is about unseen tasks; with the seed and the numbers of tasks of a run they
    are the unseen ones of that run, and with others its generator may have been tuned on them.

    Args:
        source (`str`): Folder or Hub id of a run or of a saved `PDiffPipeline`, or a folder of networks as
            [`~pdiff_hf.snapshots.read_networks`] reads it. For a family, a pipeline with conditions, or a table of
            networks with their conditions as [`~pdiff_hf.snapshots.conditions.read_conditions`] reads it: then its
            tasks are the unseen ones, and each of them needs as many networks.
        config (`PDiffConfig`): Its `snapshots`, its task (`dataset`, `model`, ...), its `family`, and its section for
            the evaluation. `model` may be `None` for a pipeline that carries its base model.
        extra_groups: As for [`~pdiff_hf.evaluate`].

    Returns:
        `Report`: What came out.

    Raises:
        ValueError: for everything that can be seen to be wrong before any work is done.
        ResourceError: where disk or memory run out.
    """
    if config.snapshots is None:
        raise ValueError("--snapshots is needed: the snapshots that the networks were made from")
    if config.dataset is None and ":" not in config.task:
        raise ValueError("--dataset is needed: the data set that the networks were made for")
    dataset, layout = load_snapshots(config.snapshots)
    snapshots, device = parameter_matrix(dataset, layout), PartialState().device
    is_here = Path(source).exists() or source.endswith(".csv")  # no repository has that name
    folder = Path(source if is_here else PDiffPipeline.download(source))
    inside = names.generator_folder(folder)
    folder = inside if (inside / PDiffPipeline.config_name).is_file() else folder
    pipeline = _load_pipeline(folder, layout, config) if (folder / PDiffPipeline.config_name).is_file() else None
    carried = None if pipeline is None else pipeline.base_model
    if config.model is None and carried is None:
        raise ValueError(f"--model is needed: '{source}' does not carry the network that its tensors belong to")
    name = config.model or str(folder / names.BASE_MODEL)
    config = config.changed(model=name)
    config.soft |= {"model"}  # it says where the network is, whether or not the task's class takes it
    task = config.make_task()
    family, output = config.make_family(task), Path(config.output_dir or "outputs/evaluation")
    model = (_load_model(family, name, layout) if carried is None else carried).to(device)
    layout.check_fits(model.state_dict())
    generator: PDiffPipeline | torch.Tensor | None = None if pipeline is None else pipeline.to(device)
    options: dict[str, Any] = {}
    if family.fields:
        found = load_fields(str(config.snapshots))
        if found != family.fields:
            raise ValueError(
                f"the snapshots have conditions with the fields {found}, and the family has {family.fields}"
            )
        if pipeline is not None and pipeline.condition_encoder is None:
            raise ValueError(f"the generator '{source}' has no conditions; leave --family out")
        sets: dict[str, Any] = {"validation": config.num_validation_tasks, "test": config.num_test_tasks}
        sets |= dict.fromkeys(family.test_sets, config.num_test_tasks)
        if pipeline is None:
            if folder.suffix != ".csv":
                raise ValueError(f"'{source}' is neither a saved pipeline nor a table of networks (.csv)")
            generator, sets["test"] = _read_table(str(folder), family, layout)
            sets = {name: sets[name] for name in ("validation", "test")}
            if find_factors(layout):
                options["products"] = AdapterProducts(layout, config.autoencoder_args.adapter_frame_size)
                options["products"].fit(snapshots, torch.arange(len(snapshots)))
        options |= {"conditions": condition_table(dataset, family.fields), "sets": sets, "zoo": zoo_arguments(config)}
    elif isinstance(task, DataTask):
        options["conditions"] = condition_table(dataset, load_fields(str(config.snapshots)))
        if "heldout" in dataset.column_names:
            options["heldout"] = torch.tensor(dataset["heldout"][:]) > 0
    else:
        if isinstance(task, LabelledTask):
            task.align(model.config)
        options["scorer"] = Scorer(task, model, layout, output / names.SCORES, config.recomputes_statistics)
        options["tuning"] = None if pipeline is None else load_tuning(folder)
        options["baseline_models"] = config.baseline_models
    if generator is None:
        generator = read_networks(folder, layout)
    check_writable(output)
    part = output / ".report.part"
    remove(part)
    go_on = "start again" if family.fields else "what is scored is kept; go on"
    with resource_errors("evaluation", output, f"{go_on} with the same command"):
        report = evaluate(
            generator,
            family,
            snapshots=snapshots,
            base_model=model,
            layout=layout,
            num_models=config.num_models,
            baselines=config.baselines,
            extra_groups=extra_groups,
            folder=part,
            seed=config.seed,
            **options,
        )
    for path in part.iterdir():
        path.replace(output / path.name)
    part.rmdir()
    return report


def _load_pipeline(folder: Path, layout: ParameterLayout, config: PDiffConfig) -> PDiffPipeline:
    try:
        pipeline = PDiffPipeline.from_pretrained(str(folder))
    except OSError as error:
        raise ValueError(f"the pipeline in '{folder}' cannot be loaded: {error}") from error
    if pipeline.autoencoder.layout != layout:
        raise LayoutError("the pipeline generates other tensors than the snapshots hold; it was not made from them")
    pipeline.register_to_config(**config.sampling)
    if pipeline.config.base_model_reference:
        pipeline.load_base_model()
    return pipeline


def _load_model(family: Family, name: str, layout: ParameterLayout) -> nn.Module:
    """The network with its trained weights; without them for a single task that replaces all of its tensors anyway."""
    torch.manual_seed(0)
    model = with_adapters(without_wrapper(family.load_base_model()), layout)
    frozen = [tensor for tensor in model.state_dict() if tensor not in layout.names]
    if not frozen and not family.fields:
        return model
    try:
        return with_adapters(without_wrapper(family.load_saved(name)), layout)
    except (OSError, ValueError) as error:
        why = "it is compared too"
        if frozen:
            why = f"'{frozen[0]}' and {len(frozen) - 1} more of its tensors are not generated"
        raise ValueError(
            f"--model must be a folder or Hub id with the weights of the base model, because {why}; '{name}' has none: "
            f"{error}"
        ) from error


def _read_table(path: str, family: Family, layout: ParameterLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The networks of a table, shape `(T, n, D)`, and their conditions, shape `(T, width)`."""
    found, _ = read_conditions(path, family.fields)
    table = family.fields.table(found.values())
    if not family.fields.known(table).all():
        raise ValueError(f"'{path}': every network needs all fields, because they say which task it is judged by")
    rows = [read_networks(beside(path, name), layout) for name in found]
    parameters = torch.cat(rows)
    conditions = torch.cat([row.expand(len(own), -1) for row, own in zip(table, rows, strict=True)])
    tasks, inverse, counts = conditions.unique(dim=0, return_inverse=True, return_counts=True)
    if counts.min() != counts.max():
        raise ValueError(
            f"'{path}': every task needs as many networks, and there are from {int(counts.min())} to "
            f"{int(counts.max())}"
        )
    return parameters[inverse.argsort(stable=True)].unflatten(0, (len(tasks), -1)), tasks
