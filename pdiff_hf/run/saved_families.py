"""Evaluates a generator from elsewhere on a family of tasks: a saved pipeline, or a table of networks."""

import os
from pathlib import Path

import torch
from accelerate import PartialState

from ..evaluation.members import evaluate_members
from ..evaluation.report import Report
from ..layout import LayoutError
from ..models.products import AdapterProducts, find_factors
from ..networks.adapters import with_adapters, without_wrapper
from ..networks.runner import NetworkRunner
from ..pipelines import PDiffPipeline
from ..snapshots import load_snapshots, parameter_matrix, read_networks
from ..snapshots.conditions import read_conditions
from ..snapshots.dataset import condition_table, load_fields
from ..snapshots.files import beside
from ..tasks.family import Family
from ..utils import names
from ..utils.errors import resource_errors
from ..utils.files import check_writable, remove
from ..utils.seeds import named_seed
from .collecting import zoo_arguments
from .config import PDiffConfig
from .task import make_family, make_task


def evaluate_saved_family(source: str, recipe: PDiffConfig) -> Report:
    """
    Writes the report on the generator `source` on unseen tasks to `recipe.output_dir`. With the seed and the numbers of
    tasks of a run they are the unseen ones of that run; with others its generator may have been tuned on them.

    Args:
        source (`str`): Folder or Hub id of a saved `PDiffPipeline` with conditions, or a table of networks with their
            conditions as [`~pdiff_hf.snapshots.conditions.read_conditions`] reads it: then its tasks are the unseen
            ones, and each of them needs as many networks.
        recipe (`PDiffConfig`): Its `family` and task, its `snapshots` with conditions, which are the seen tasks, and
            `model`, the base model.

    Returns:
        `Report`: What came out.

    Raises:
        ValueError: for everything that can be seen to be wrong before any work is done.
        ResourceError: where disk or memory run out.
    """
    assert recipe.snapshots is not None  # evaluate_saved has checked it
    dataset, layout = load_snapshots(recipe.snapshots)
    fields = load_fields(recipe.snapshots)
    pipeline = None
    if not source.endswith(".csv"):
        pipeline = PDiffPipeline.from_pretrained(source)
        pipeline.register_to_config(**recipe.sampling)
        if pipeline.condition_encoder is None:
            raise ValueError(f"the generator '{source}' has no conditions; leave --family out")
        if pipeline.autoencoder.layout != layout:
            raise LayoutError("the pipeline generates other tensors than the snapshots hold; it was not made from them")
    model_name = recipe.model
    if model_name is None and pipeline is not None and pipeline.base_model is not None and os.path.isdir(source):
        model_name = str(Path(pipeline.config._name_or_path, names.BASE_MODEL))
    if model_name is None:
        raise ValueError("--model is needed: the folder of the base model that the networks were fine-tuned from")
    family = make_family(recipe, make_task(recipe.changed(model=model_name)))
    if fields != family.fields:
        raise ValueError(f"the snapshots have conditions with the fields {fields}, and the family has {family.fields}")
    fields = family.fields  # in its order
    model = with_adapters(without_wrapper(family.load_saved(model_name)), layout).to(PartialState().device)
    layout.check_fits(model.state_dict())
    networks = NetworkRunner(model, layout)

    table = condition_table(dataset, fields)
    known = fields.known(table).all(1)
    table, parameters = table[known], parameter_matrix(dataset, layout)[known]
    products = None if pipeline is None else pipeline.autoencoder.products
    if products is None and find_factors(layout):
        products = AdapterProducts(layout, recipe.autoencoder_args.adapter_frame_size)
        products.fit(parameters, torch.arange(len(parameters)))
    sizes = {"validation": recipe.num_validation_tasks, "test": recipe.num_test_tasks}
    sizes |= dict.fromkeys(family.test_sets, recipe.num_test_tasks)
    keys = [family.key(condition) for condition in fields.conditions(table)]
    found = family.split(sizes, named_seed(recipe.seed, "tasks"), without=keys)
    sets = {name: fields.table(rows) for name, rows in found.items() if name != "validation"}
    validation = fields.table(found["validation"])
    generator: PDiffPipeline | torch.Tensor
    if pipeline is not None:
        generator = pipeline.to(PartialState().device)
    else:
        generator, given = _read_table(source, family, networks)
        sets = {"test": given}
    output = Path(recipe.output_dir or "outputs/evaluation")
    check_writable(output)
    part = output / ".report.part"
    remove(part)
    with resource_errors("evaluation", output, "start again with the same command"):
        report = evaluate_members(
            family,
            networks,
            generator,
            parameters,
            table,
            part,
            sets=sets,
            validation=validation,
            num_models=recipe.num_models,
            zoo=zoo_arguments(recipe),
            products=products,
            seed=recipe.seed,
        )
    for path in part.iterdir():
        path.replace(output / path.name)
    part.rmdir()
    return report


def _read_table(path: str, family: Family, networks: NetworkRunner) -> tuple[torch.Tensor, torch.Tensor]:
    """The networks of a table, shape `(T, n, D)`, and their conditions, shape `(T, width)`."""
    found, _ = read_conditions(path, family.fields)
    table = family.fields.table(found.values())
    if not family.fields.known(table).all():
        raise ValueError(f"'{path}': every network needs all fields, because they say which task it is judged by")
    rows = [read_networks(beside(path, name), networks.layout) for name in found]
    parameters = torch.cat(rows)
    conditions = torch.cat([row.expand(len(own), -1) for row, own in zip(table, rows, strict=True)])
    tasks, inverse, counts = conditions.unique(dim=0, return_inverse=True, return_counts=True)
    if counts.min() != counts.max():
        raise ValueError(
            f"'{path}': every task needs as many networks, and there are from {int(counts.min())} to "
            f"{int(counts.max())}"
        )
    return parameters[inverse.argsort(stable=True)].unflatten(0, (len(tasks), -1)), tasks
