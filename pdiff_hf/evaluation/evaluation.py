"""Evaluates generated networks: groups of networks, scored, compared, and put into one report."""

import importlib.util
import itertools
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
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
from .groups import ExtraGroups, pending
from .members import Members
from .report import Report
from .score import Scorer
from .sets import Sets
from .single_task import SingleTask

logger = logging.getLogger(__name__)


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
    extra_groups: ExtraGroups = (),
    losses: Mapping[str, Sequence[float]] | None = None,
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
        extra_groups (`Iterable[Group | Pending]` or `Callable`, *optional*): Further groups, each made when it is asked
            for; or a function that gives them for the [`SingleTask`], [`Members`] or [`Sets`] that is compared.
        losses (`Mapping`, *optional*): The loss at every step, by network, for a figure.
        settings (`Mapping`, *optional*): To be kept in the report.
        warnings (`Sequence[str]`, *optional*): What else a reader has to know.
        outputs (`Mapping`, *optional*): How reconstructions compute, to stand beside what they explain.
        folder (`str` or `os.PathLike`, *optional*): Receives the report and its figures.
        seed (`int`, *optional*, defaults to 0): Of everything that is drawn.
        options: `untuned`, the generator before it was tuned, and the others of [`SingleTask`], [`Members`] or
            [`Sets`].

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
    fields = one.fields if isinstance(one, DataTask) else family.fields
    table = fields.table(conditions) if isinstance(conditions, Sequence) else conditions
    options |= {"seed": seed} | ({} if num_models is None else {"num_models": num_models})
    with tempfile.TemporaryDirectory() as temporary:
        compared: SingleTask | Members | Sets
        if isinstance(one, DataTask):
            compared = Sets(one, NetworkRunner(base_model, layout), generator, snapshots, table, **options)
        elif one is None:
            if table is None:
                raise ValueError("conditions is needed: a family has members, and snapshots are of some of them")
            networks, where = NetworkRunner(base_model, layout), None if folder is None else Path(folder)
            compared = Members(family, networks, generator, snapshots, table, where, baselines=baselines, **options)
        else:
            scorer = scorer or Scorer(one, base_model, layout)
            where = Path(folder or temporary)
            compared = SingleTask(scorer, generator, snapshots, where, baselines=baselines, **options)
        report = Report(compared.metric, layout.num_parameters, **compared.facts())
        report.settings = dict(settings or {}) | {"seed": seed}
        if pipeline is not None:
            names = ("num_inference_steps", "temperature", "guidance_scale")
            report.sampling = {name: pipeline.config[name] for name in names}
            report.sampling["scheduler"] = type(pipeline.scheduler).__name__
        extra = extra_groups(compared) if callable(extra_groups) else extra_groups
        report.groups += compared.rows(map(pending, itertools.chain(compared.groups(), extra)))
        compared.complete(report)
        if outputs:
            report.reconstruction = (report.reconstruction or {}) | dict(outputs)
        report.describe()
        report.warnings = [*warnings, *report.warnings]
        if folder is not None and PartialState().is_main_process:
            Path(folder).mkdir(parents=True, exist_ok=True)
            if importlib.util.find_spec("matplotlib"):
                from .plots import draw_figures

                draw_figures(report, folder, losses=losses, **compared.figures)
            else:
                logger.warning("the report has no figures, which need matplotlib: pip install 'pdiff_hf[report]'")
            report.save(folder)
    return report
