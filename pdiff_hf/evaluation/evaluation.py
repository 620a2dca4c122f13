"""Evaluates generated networks: groups of networks, scored, compared, and put into one report."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..layout import ParameterLayout
from ..models.condition import Condition
from ..networks.runner import NetworkRunner
from ..pipelines import PDiffPipeline
from ..tasks import Task
from ..tasks.family import Family, as_family
from .members import evaluate_members
from .report import Report
from .score import make_scorer
from .single_task import evaluate_task


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
        num_models (`int`, *optional*): Networks to sample: 200 for a task and 4 for each member by default.
        baselines (`str`, *optional*, defaults to `"few"`): Or `all`, which takes much longer.
        folder (`str` or `os.PathLike`, *optional*): Receives the report and its figures.
        seed (`int`, *optional*, defaults to 0): Of everything that is drawn.
        options: Those of [`evaluate_task`] or [`evaluate_members`].

    Returns:
        `Report`: What came out.

    Raises:
        ValueError: if base model, layout or conditions are missing or do not fit.
    """
    family = as_family(task)
    pipeline = generator if isinstance(generator, PDiffPipeline) else None
    base_model = base_model if base_model is not None or pipeline is None else pipeline.base_model
    layout = layout if layout is not None or pipeline is None else pipeline.autoencoder.layout
    if base_model is None or layout is None:
        raise ValueError(
            f"{'base_model' if base_model is None else 'layout'} is needed: the networks differ from it in some tensors"
        )
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary if folder is None else folder)
        if not family.fields:
            scorer = make_scorer(family.task({}), base_model, layout)
            options |= {"num_models": num_models or 200, "baselines": baselines, "seed": seed}
            return evaluate_task(scorer, snapshots, generator, output, **options)
        if conditions is None:
            raise ValueError("conditions is needed: a family has members, and snapshots are of some of them")
        table = conditions if isinstance(conditions, Tensor) else family.fields.table(conditions)
        return evaluate_members(
            family,
            NetworkRunner(base_model, layout),
            generator,
            snapshots,
            table,
            output,
            num_models=num_models or 4,
            seed=seed,
            **options,
        )
