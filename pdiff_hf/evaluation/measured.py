"""The report on a generator of networks that are judged by one number over a split, such as detectors."""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from ..layout import ParameterLayout
from ..networks.batched import BatchedModels
from ..tasks import MeasuredTask
from ..tasks.task import Split
from ..utils.files import replacing, without_nan
from .audit import audit_group, audit_verdict
from .metrics import distances, precision_recall_density_coverage
from .report import Group, explained_variance, reconstruction_warnings
from .scoring import content_hash, context_hash

# So many networks are measured in one pass over the data and then written to the cache: what a kill can lose.
CHUNK_SIZE = 64


class Measurer:
    """
    Measures networks that differ in the tensors of a layout, each of them once.

    Args:
        task (`MeasuredTask`): Gives the data and the metric.
        model (`nn.Module`): The base model, on the device to compute on.
        layout (`ParameterLayout`): Which of its tensors differ.
        cache_dir (`str` or `os.PathLike`, *optional*): Numbers are kept here, by content, as `Scorer` keeps scores.
    """

    def __init__(
        self,
        task: MeasuredTask,
        model: nn.Module,
        layout: ParameterLayout,
        cache_dir: str | os.PathLike | None = None,
    ):
        self.task, self.layout = task, layout
        self.models = BatchedModels(model, layout)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._context = context_hash(model, layout)

    def measure(self, split: Split, parameters: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """
        The metric of networks on a split.

        Args:
            split (`str`): `validation` or `test`.
            parameters (`torch.Tensor` or `Sequence[torch.Tensor]`): Shape `(N, D)`, or N rows of shape `(D,)`.

        Returns:
            `torch.Tensor`: float64 of shape `(N,)`; nan for a network that the metric is not defined for.
        """
        keys = [content_hash(vector) for vector in parameters]
        path = self._path(split)
        known: dict[str, float | None] = json.loads(path.read_text()) if path is not None and path.is_file() else {}
        rows = {key: row for row, key in enumerate(keys) if key not in known}  # one of each
        missing = list(rows)
        description = f"{self.task.metric} on {split}"
        with tqdm(total=len(missing), desc=description, unit="network", disable=not missing) as progress:
            for start in range(0, len(missing), CHUNK_SIZE):
                part = missing[start : start + CHUNK_SIZE]
                values = self.task.measure(self.models, split, torch.stack([parameters[rows[key]] for key in part]))
                known |= dict(zip(part, without_nan(values.tolist()), strict=True))
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with replacing(path) as part_path:
                        part_path.write_text(json.dumps(known))
                progress.update(len(part))
        return torch.tensor([math.nan if known[key] is None else known[key] for key in keys], dtype=torch.float64)

    def _path(self, split: Split) -> Path | None:
        if self.cache_dir is None:
            return None
        context = self._context.copy()
        context.update(f"{self.task.metric} {split} {self.task.fingerprint(split)}".encode())
        return self.cache_dir / f"{context.hexdigest()}.json"


def evaluate_measured(measurer: Measurer, groups: Sequence[Group], heldout: torch.Tensor) -> dict:
    """
    Measures groups of networks on the validation and the test split, and compares the generated one with the others.

    Args:
        measurer (`Measurer`): For the base model and its task.
        groups (`Sequence[Group]`): As for `report.evaluate`. Of `reconstructed`, the held-out networks are measured, if
            there are any.
        heldout (`torch.Tensor`): bool of shape `(K,)`: originals that no generator has seen.

    Returns:
        `dict`: What `report.json` holds. As that of `report.evaluate`, but for what only classifiers have; `score` in
        place of `accuracy`, and `metric` says what the score is. A network whose score is not defined counts as the
        worst of its group in the choice of the best, and not in the mean; `num_undefined` says how many there are.
    """
    task, originals = measurer.task, groups[0].parameters
    reconstruction = explained_variance({group.name: group.parameters for group in groups}, heldout)
    if heldout.any():  # to measure a network is expensive, and reconstructions of what was seen say the least
        groups = [
            dataclasses.replace(group, parameters=group.parameters[heldout]) if group.name == "reconstructed" else group
            for group in groups
        ]
    vectors = [row for group in groups for row in group.parameters]
    validation, test = (measurer.measure(split, vectors) for split in ("validation", "test"))
    sign = 1.0 if task.higher_is_better else -1.0
    rows, audits, start = [], {}, 0
    for group in groups:
        own, part = group.name == "original", slice(start, start + len(group.parameters))
        start = part.stop
        scores, defined = test[part], test[part][~test[part].isnan()]
        place = distances(group.parameters, originals, exclude_self=own)
        audits[group.name] = audit = audit_group(group.name, place, exclude_self=own)
        best = (sign * validation[part]).nan_to_num(nan=-math.inf).argmax()
        rows.append(
            {
                "name": group.name,
                "family": group.family,
                "value": group.value,
                "n": len(scores),
                "num_undefined": len(scores) - len(defined),
                "score_mean": defined.mean().item(),
                "score_std": defined.std().item() if len(defined) > 1 else 0.0,
                "score_best": scores[best].item(),
                "score_best_on_test": sign * (sign * defined).max().item() if len(defined) else math.nan,
                "validation_score_mean": validation[part].nanmean().item(),
                "distance_nearest": audit.distance_relative,
                "distance_to_mean": audit.to_mean_relative,
                **({} if own else precision_recall_density_coverage(originals, group.parameters)),
                "scores": scores.tolist(),
            }
        )
    by_name = {row["name"]: row for row in rows}
    baselines = [row for row in rows if row["family"] is not None]
    return without_nan(
        {
            "num_parameters": originals.shape[1],
            "metric": {"name": task.metric, "higher_is_better": task.higher_is_better},
            "splits": {split: len(task.load_split(split)) for split in ("validation", "test")},
            "groups": rows,
            "reconstruction": reconstruction,
            "audit": {
                "verdict": audit_verdict(audits["generated"], [audits[row["name"]] for row in baselines]),
                "rows": [dataclasses.asdict(audit) | {"copies": audit.copies} for audit in audits.values()],
            },
            "verdict": _verdict(task, by_name["original"], by_name["generated"], baselines),
            "warnings": [] if reconstruction is None else reconstruction_warnings(reconstruction),
        }
    )


def _verdict(task: MeasuredTask, original: dict, generated: dict, baselines: Sequence[dict]) -> str:
    """How the means compare, in one line."""
    sentence = (
        f"The mean {task.metric} of the generated networks is {generated['score_mean']:.2f}, that of the originals "
        f"{original['score_mean']:.2f} ({'higher' if task.higher_is_better else 'lower'} is better)"
    )
    if not baselines:
        return sentence + "; they were compared with no baseline."
    sign = 1 if task.higher_is_better else -1
    better = sum(sign * row["score_mean"] > sign * generated["score_mean"] for row in baselines)
    return sentence + f"; of {len(baselines)} settings of trivial generators, {better} have a better mean."
