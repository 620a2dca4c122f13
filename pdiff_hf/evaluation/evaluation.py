"""Evaluates generated networks: groups of networks, scored, compared, and put into one report."""

import itertools
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor, nn

from ..layout import ParameterLayout
from ..models.condition import Condition
from ..networks.runner import NetworkRunner
from ..pipelines import PDiffPipeline
from ..tasks import Task
from ..tasks.data_task import DataTask
from ..tasks.family import Family, as_family
from .groups import Group, Pending
from .members import Members
from .report import Report
from .saving import sampling_of, save_report
from .score import Scorer, make_scorer
from .sets import evaluate_sets
from .single_task import SingleTask


def evaluate(
    generator: PDiffPipeline | Tensor,
    task: Task | Family,
    *,
    snapshots: Tensor,
    conditions: Sequence[Condition] | Tensor | None = None,
    base_model: nn.Module | None = None,
    layout: ParameterLayout | None = None,
    num_models: int | None = None,
    baselines: str = "few",
    scorer: Scorer | None = None,
    extra_groups: Iterable[Group | Pending] = (),
    losses: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    settings: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    outputs: Mapping[str, float] | None = None,
    folder: str | os.PathLike | None = None,
    seed: int = 0,
    **options: Any,
) -> Report:
    """
    Compares generated networks with the snapshots that their generator was made from, with free alternatives, and with
    opponents that get as much feedback; on a task, or on unseen members of a family.

    Args:
        generator (`PDiffPipeline` or `torch.Tensor`): A pipeline, sampled as its config says, or the parameters of
            generated networks: of a task shape `(N, D)`, of a family `(M, D)` or `(M, n, D)` for its `test` members.
        task (`Task` or `Family`): What the networks are for.
        snapshots (`torch.Tensor`): Parameters, shape `(K, D)`, K at least 2.
        conditions (`Sequence[Condition]` or `torch.Tensor`, *optional*): Of the snapshots, for a family, or their table
            of shape `(K, width)`.
        base_model (`nn.Module`, *optional*): By default the pipeline's.
        layout (`ParameterLayout`, *optional*): Which of its tensors are generated; by default the pipeline's.
        num_models (`int`, *optional*): Networks to sample: by default 200 for a task, 1000 if they are data, and 4 for
            each member.
        baselines (`str`, *optional*, defaults to `"few"`): Or `all`, which takes much longer. Networks that are data
            have the same ones in either case.
        scorer (`Scorer`, *optional*): For a single task, one that keeps scores; with it come base model and layout.
        extra_groups (`Iterable[Group | Pending]`, *optional*): Further groups, each made when it is asked for.
        losses (`Mapping`, *optional*): The loss at every step, by panel and curve, for a figure.
        settings (`Mapping`, *optional*): To be kept in the report.
        warnings (`Sequence[str]`, *optional*): What else a reader has to know.
        outputs (`Mapping`, *optional*): How reconstructions compute, to stand beside what they explain.
        folder (`str` or `os.PathLike`, *optional*): Receives the report and its figures.
        seed (`int`, *optional*, defaults to 0): Of everything that is drawn.
        options: `untuned`, the generator before it was tuned, and the others of [`SingleTask`], [`Members`] or
            [`evaluate_sets`].

    Returns:
        `Report`: What came out. Numbers in it may be missing; nothing in it is nan.

    Raises:
        ValueError: if base model, layout or conditions are missing or do not fit.
    """
    family = as_family(task)
    pipeline = generator if isinstance(generator, PDiffPipeline) else None
    if scorer is not None:
        base_model, layout = scorer.models.model, scorer.layout
    base_model = base_model if base_model is not None or pipeline is None else pipeline.base_model
    layout = layout if layout is not None or pipeline is None else pipeline.autoencoder.layout
    if base_model is None or layout is None:
        raise ValueError(
            f"{'base_model' if base_model is None else 'layout'} is needed: the networks differ from it in some tensors"
        )
    one = None if family.fields else family.task({})
    if isinstance(one, DataTask):
        given = {"scorer": scorer, "extra_groups": list(extra_groups)}
        if unused := [name for name, value in given.items() if value]:
            raise ValueError(f"{' and '.join(unused)} cannot be used with networks that are data, compared as sets")
        table = one.fields.table(conditions) if isinstance(conditions, Sequence) else conditions
        options |= {"table": table, "num_models": num_models or 1000, "losses": losses, "settings": settings}
        networks = NetworkRunner(base_model, layout)
        return evaluate_sets(one, networks, snapshots, generator, folder, seed=seed, warnings=warnings, **options)
    options |= {"baselines": baselines, "seed": seed} | ({} if num_models is None else {"num_models": num_models})
    with tempfile.TemporaryDirectory() as temporary:
        compared: SingleTask | Members
        if family.fields:
            if conditions is None:
                raise ValueError("conditions is needed: a family has members, and snapshots are of some of them")
            table = conditions if isinstance(conditions, Tensor) else family.fields.table(conditions)
            networks = NetworkRunner(base_model, layout)
            where = None if folder is None else Path(folder)
            compared = Members(family, networks, generator, snapshots, table, where, **options)
        else:
            scorer = scorer or make_scorer(family.task({}), base_model, layout)
            compared = SingleTask(scorer, generator, snapshots, Path(folder or temporary), **options)
        report = Report(compared.metric, layout.num_parameters, **compared.facts())
        wrong: dict[str, Tensor] = {}
        for row, errors in compared.rows(itertools.chain(compared.groups(), extra_groups)):
            report.groups.append(row)
            if errors is not None:
                wrong[row.name] = errors
        report.compare(wrong, compared.bootstrap_seed)
        report.settings = dict(settings or {}) | {"seed": seed}
        report.sampling = {} if pipeline is None else sampling_of(pipeline)
        compared.complete(report)
        if outputs:
            report.reconstruction = (report.reconstruction or {}) | dict(outputs)
        report.describe()
        report.warnings = [*warnings, *report.warnings]
        if folder is not None and PartialState().is_main_process:
            save_report(report, folder, losses, **compared.figures)
    return report
