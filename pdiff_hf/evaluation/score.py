"""Scores networks for a single task: many in one pass over its data, kept by content."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..layout import ParameterLayout
from ..networks.batch_norm import RecomputedStatistics
from ..networks.runner import GPU_MEMORY_BUDGET, NetworkRunner
from ..tasks import ClassificationTask, MeasuredTask, Task, predict_logits
from ..tasks.task import Split, load_batch, statistics_batches
from ..utils.files import replacing
from .geometry import Matrix
from .metrics import accuracy
from .report_data import Metric

# The parameters of networks that are scored in one pass are no more than this.
CHUNK_BYTES = 2**29
CACHE_FORMAT = b"3"
# Networks in one pass. Every pass computes the frozen part of the network anew, which costs as much as some 15 to 35
# classifiers do.
CLASSIFIERS_AT_ONCE, MEASURED_AT_ONCE = 1024, 64


@dataclass
class Scores:
    """
    How N networks do on a split; what it holds has a row a network.

    Args:
        values (`torch.Tensor`): float64 of shape `(N,)`, the metric, of classifiers the accuracy in percent; nan where
            it is not defined.
        predictions (`torch.Tensor`, *optional*): Of classifiers on M examples, int16 of shape `(N, M)`, the predicted
            classes; -1, which is never right, where the logits of an example are not finite.
        log_probs (`torch.Tensor`, *optional*): float16 of shape `(N, M, C)`. Not the source of `predictions`: classes
            that are nearly as probable as each other may round to the same number.
        labels (`torch.Tensor`, *optional*): int64 of shape `(M,)`.
    """

    values: Tensor
    predictions: Tensor = None  # type: ignore[assignment]  # this and the next two are there for classifiers
    log_probs: Tensor = None  # type: ignore[assignment]
    labels: Tensor = None  # type: ignore[assignment]

    @property
    def parts(self) -> dict[str, Tensor]:
        """What there is, by name."""
        return {name: part for name, part in vars(self).items() if part is not None}

    @property
    def undefined(self) -> Tensor:
        """bool of shape `(N,)`: networks whose metric, or some of whose predictions, are not defined."""
        return self.values.isnan() if self.predictions is None else (self.predictions < 0).any(1)

    @property
    def wrong(self) -> Tensor:
        """bool of shape `(N, M)`, where a classifier errs."""
        return self.predictions != self.labels

    def __getitem__(self, rows: slice) -> "Scores":
        return Scores(**{name: part if name == "labels" else part[rows] for name, part in self.parts.items()})


class Scorer:
    """
    Scores networks that differ in the tensors of a layout, each of them once. Of classifiers it keeps what they say
    about every example.

    Args:
        task (`ClassificationTask` or `MeasuredTask`): Gives the data and the metric.
        model (`nn.Module`): The base model, on the device to compute on.
        layout (`ParameterLayout`): Which of its tensors differ.
        cache_dir (`str` or `os.PathLike`, *optional*): Scores are kept here, under a hash of everything that they
            depend on: the base model, the examples and labels of the split, and the network's own parameters. Without
            it they are computed anew.
        recompute_statistics (`bool`, *optional*, defaults to `False`): Whether each network gets its own running
            statistics of batch norm, from training data; see [`RecomputedStatistics`].

    Attributes:
        metric (`Metric`): What `values` of scores are.
        classifies (`bool`): Whether there are predictions to compare.
        chunk_size (`int`): So many networks are scored in one pass over the data and then written to the cache: what a
            kill can lose.

    Raises:
        ValueError: if the task does not say how networks are judged, or there are no statistics to recompute.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        layout: ParameterLayout,
        cache_dir: str | os.PathLike | None = None,
        recompute_statistics: bool = False,
    ):
        if isinstance(task, MeasuredTask):
            self.metric, self.chunk_size = Metric(task.metric, task.unit, task.higher_is_better), MEASURED_AT_ONCE
        elif isinstance(task, ClassificationTask):
            self.metric, self.chunk_size = Metric("accuracy", "%"), CLASSIFIERS_AT_ONCE
        else:
            raise ValueError(
                f"{type(task).__name__} must be a ClassificationTask or a MeasuredTask: it has to say how networks are "
                "judged"
            )
        self.task, self.layout, self.classifies = task, layout, isinstance(task, ClassificationTask)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._has_help, self._classes = False, 0
        # To be continued: of everything that networks which differ in the tensors of `layout` have in common.
        self._context = hashlib.blake2b(digest_size=16)
        for name, tensor in model.state_dict().items():
            if name not in layout.names:
                self._context.update(name.encode() + _bytes(tensor))
        self._context.update(repr(layout.to_dict()).encode())
        self._statistics = None
        if recompute_statistics:
            device = next(model.parameters()).device
            self._statistics = RecomputedStatistics(model, layout, lambda: statistics_batches(task, device))
            self._context.update(f"recomputed from {task.fingerprint('train')}".encode())
        self.models = NetworkRunner(model, layout if self._statistics is None else self._statistics.layout)

    def complete(self, parameters: Tensor) -> Tensor:
        """Parameters of shape `(N, D)` with all that `models` needs of a network: its statistics, if it has its own."""
        return parameters if self._statistics is None else self._statistics(parameters)

    def num_examples(self, split: Split) -> int:
        """How many examples a split has."""
        return len(self.task.load_split(split))  # type: ignore[arg-type]  # map-style, so that it has a length

    def score(self, split: Split, parameters: Matrix | Sequence[Tensor]) -> Scores:
        """
        Scores of networks on a split of the task.

        Args:
            split (`str`): `train`, `validation` or `test`.
            parameters (`torch.Tensor`, `Rows` or `Sequence[torch.Tensor]`): Shape `(N, D)`, or N rows of shape
                `(D,)`, which saves a copy of what lies in several tensors.

        Raises:
            ValueError: if the scores would not fit into memory; nothing is computed before.
        """
        self.check_memory(split, len(parameters))
        missing: dict[str, list[int]] = {}  # the same network may be asked for several times
        for row in range(len(parameters)):
            missing.setdefault(_content_hash(parameters[row]), []).append(row)
        scores = self._empty(split, len(parameters))
        for known, chunk in self._read(split):
            for i, key in enumerate(known):
                if key in missing:
                    _fill(scores, missing.pop(key), chunk, i)
        keys, what, is_shown = list(missing), f"{self.metric.name} on {split}", bool(missing) and not self.classifies
        size = max(1, min(self.chunk_size, CHUNK_BYTES // (4 * self.layout.num_parameters)))
        with tqdm(total=len(keys), desc=what, unit="network", disable=not is_shown, leave=False) as progress:
            for start in range(0, len(keys), size):
                part = keys[start : start + size]
                computed = self._compute(split, torch.stack([parameters[missing[key][0]] for key in part]), part).parts
                for i, key in enumerate(part):
                    _fill(scores, missing[key], computed, i)
                progress.update(len(part))
        return scores

    def _compute(self, split: Split, parameters: Tensor, keys: list[str]) -> Scores:
        """Runs the networks, on all processes that help, and writes their scores to the cache."""
        if self._has_help:
            broadcast_object_list([(split, parameters)])
            scores = self._run_share(split, parameters)
            assert scores is not None  # the main process gathers
        else:
            scores = self._run(split, parameters)
        if self.cache_dir is not None:
            name = hashlib.blake2b("".join(keys).encode(), digest_size=16).hexdigest()
            with replacing(self._folder(split) / f"{name}.safetensors") as part:
                save_file(scores.parts, part, metadata={"keys": " ".join(keys)})
        return scores

    def _run_share(self, split: Split, parameters: Tensor) -> Scores | None:
        """Every process runs its share of the networks; the main one gets the scores of all."""
        state = PartialState()
        share = parameters.tensor_split(state.num_processes)[state.process_index]  # the first ones are not empty
        own = self._run(split, share) if len(share) else self._empty(split, 0)
        gathered: list[Any] | None = [None] * state.num_processes if state.is_main_process else None
        torch.distributed.gather_object(own, gathered, dst=0)
        if gathered is None:
            return None
        parts = {name: torch.cat([scores.parts[name] for scores in gathered]) for name in own.parts if name != "labels"}
        return Scores(**parts, labels=own.labels)

    @contextlib.contextmanager
    def with_help(self) -> Iterator[None]:
        """For the main process: within the block, networks are scored on all processes, which must be in [`help`]."""
        self._has_help = PartialState().num_processes > 1
        try:
            yield
            # Not after an exception: the other processes may be in the middle of a share, and a launcher ends them.
            if self._has_help:
                broadcast_object_list([None])
        finally:
            self._has_help = False

    def help(self) -> None:
        """For the other processes: scores what the main process asks for until its block [`with_help`] ends."""
        while (asked := broadcast_object_list([None])[0]) is not None:
            self._run_share(*asked)

    def _folder(self, split: Split) -> Path:
        assert self.cache_dir is not None
        context = self._context.copy()
        context.update(CACHE_FORMAT + f"{self.metric} {split} {self.task.fingerprint(split)}".encode())
        return self.cache_dir / context.hexdigest()

    def _read(self, split: Split) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
        """What the cache holds, file by file."""
        if self.cache_dir is None:
            return
        for path in sorted(self._folder(split).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                yield file.metadata()["keys"].split(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    # ---- classifiers

    def check_memory(self, split: Split, num_networks: int) -> None:
        """Raises a `ValueError` if the scores of so many networks would take more than half of the free memory."""
        if not self.classifies:  # one number a network needs no check
            return
        num_examples, num_classes = self.num_examples(split), self._num_classes(split)
        needed, free = 2 * num_networks * num_examples * num_classes, psutil.virtual_memory().available
        if needed > free / 2:
            raise ValueError(
                f"the log-probabilities of {num_networks} networks on {num_examples} examples with {num_classes} "
                f"classes need {needed:,} bytes, more than half of the {free:,} bytes of free memory; use fewer "
                f"networks, or examples (--max_eval_samples {free // 2 // (2 * num_networks * num_classes)} at most)"
            )

    def _num_classes(self, split: Split) -> int:
        """Found out with one example, so that memory can be checked before any real work."""
        if not self._classes:
            assert isinstance(self.task, ClassificationTask)
            batch = load_batch(self.task, split, [0], next(self.models.model.parameters()).device)
            with torch.no_grad():
                self._classes = self.task.predict(self.models.model, batch).shape[-1]
        return self._classes

    def _empty(self, split: Split, num_networks: int, device: torch.device | None = None) -> Scores:
        """Room for the scores of so many networks."""
        scores = Scores(torch.empty(num_networks, dtype=torch.float64))
        if self.classifies:
            shape = num_networks, self.num_examples(split)
            scores.predictions = torch.empty(shape, dtype=torch.int16, device=device)
            scores.log_probs = torch.empty(*shape, self._num_classes(split), dtype=torch.float16, device=device)
            scores.labels = torch.empty(shape[1], dtype=torch.long, device=device)
        return scores

    def _run(self, split: Split, parameters: Tensor) -> Scores:
        """Scores networks, at least one, in one pass."""
        if isinstance(self.task, MeasuredTask):
            return Scores(self.task.measure(self.models, split, self.complete(parameters)).double().cpu())
        # Scores stay on the device until the last: to copy some is to wait for all that is queued there.
        device = next(self.models.model.parameters()).device
        size = 2 * len(parameters) * self.num_examples(split) * (1 + self._num_classes(split))
        scores = self._empty(split, len(parameters), device if size <= GPU_MEMORY_BUDGET else None)
        assert isinstance(self.task, ClassificationTask)
        parts = predict_logits(self.task, self.models, split, self.complete(parameters))
        total, is_main = scores.predictions.numel(), PartialState().is_main_process
        what = f"{self.metric.name} on {split}"
        with tqdm(total=total, desc=what, unit="pass", unit_scale=True, disable=not is_main, leave=False) as progress:
            for rows, examples, logits, labels in parts:
                log_probs = logits.float().log_softmax(-1)
                predictions = logits.argmax(-1).masked_fill(log_probs.isnan().any(-1), -1)
                scores.predictions[rows, examples] = predictions.to(scores.predictions)
                scores.log_probs[rows, examples] = log_probs.to(scores.log_probs)
                scores.labels[examples] = labels.to(scores.labels)
                progress.update(predictions.numel())
        scores = Scores(**{name: part.cpu() for name, part in scores.parts.items()})
        scores.values = accuracy(scores.predictions, scores.labels)
        return scores


def _fill(scores: Scores, rows: list[int], chunk: dict[str, Tensor], i: int) -> None:
    """Copies network `i` of `chunk` to `rows` of `scores`."""
    for name, tensor in scores.parts.items():
        if name == "labels":
            tensor.copy_(chunk[name])
        else:
            tensor[rows] = chunk[name][i]


def _content_hash(parameters: Tensor) -> str:
    """Of a network's own parameters, a name for what is kept about it."""
    return hashlib.blake2b(_bytes(parameters), digest_size=16).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
