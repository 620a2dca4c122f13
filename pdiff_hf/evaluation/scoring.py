"""Scores many networks in one pass over the data, and keeps what was scored, by content."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, send_to_device
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from ..layout import ParameterLayout
from ..networks.batched import BatchedModels
from ..tasks import ClassificationTask, predict_logits, take
from ..tasks.task import Split
from ..utils.files import replacing

# So many networks are scored in one pass over the data and then written to the cache: what a kill can lose. Every pass
# computes the frozen part of the network anew, which costs as much as some 15 to 35 networks do.
CHUNK_SIZE = 1024
# Nor are their parameters more than this.
CHUNK_BYTES = 2**30
NAMES = ("predictions", "log_probs", "labels")


@dataclass
class Scores:
    """
    What N networks say about the M examples of a split.

    Args:
        predictions (`torch.Tensor`): int16 of shape `(N, M)`, the predicted classes.
        log_probs (`torch.Tensor`): float16 of shape `(N, M, C)`. Not the source of `predictions`: classes that are
            nearly as probable as each other may round to the same number.
        labels (`torch.Tensor`): int64 of shape `(M,)`.
    """

    predictions: torch.Tensor
    log_probs: torch.Tensor
    labels: torch.Tensor

    @property
    def wrong(self) -> torch.Tensor:
        """bool of shape `(N, M)`, where a network errs."""
        return self.predictions != self.labels

    def __getitem__(self, rows: slice) -> "Scores":
        return Scores(self.predictions[rows], self.log_probs[rows], self.labels)


class Scorer:
    """
    Scores networks that differ in the tensors of a layout, each of them once.

    Args:
        task (`ClassificationTask`): Gives the data and the prediction.
        model (`nn.Module`): The base model, on the device to compute on.
        layout (`ParameterLayout`): Which of its tensors differ.
        cache_dir (`str` or `os.PathLike`, *optional*): Scores are kept here, under a hash of everything that they
            depend on: the base model, the examples and labels of the split, and the network's own parameters. Without
            it they are computed anew.
    """

    def __init__(
        self,
        task: ClassificationTask,
        model: nn.Module,
        layout: ParameterLayout,
        cache_dir: str | os.PathLike | None = None,
    ):
        self.task, self.layout = task, layout
        self.models = BatchedModels(model, layout)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._classes: int | None = None
        self._has_help = False
        self._context = context_hash(model, layout)

    def score(self, split: Split, parameters: torch.Tensor | Sequence[torch.Tensor]) -> Scores:
        """
        Scores of networks on a split of the task.

        Args:
            split (`str`): `train`, `validation` or `test`.
            parameters (`torch.Tensor` or `Sequence[torch.Tensor]`): Shape `(N, D)`, or N rows of shape `(D,)`, which
                saves a copy of what lies in several tensors.

        Raises:
            ValueError: if what the networks say would not fit into memory; nothing is computed before.
        """
        rows: dict[str, list[int]] = {}  # the same network may be asked for several times
        for row, vector in enumerate(parameters):
            rows.setdefault(content_hash(vector), []).append(row)
        self.check_memory(split, len(parameters))
        scores = self._empty(split, len(parameters))
        missing = dict(rows)
        for keys, chunk in self._read(split):
            for i, key in enumerate(keys):
                if key in missing:
                    _fill(scores, missing.pop(key), chunk, i)
        keys = list(missing)
        size = max(1, min(CHUNK_SIZE, CHUNK_BYTES // (4 * self.layout.num_parameters)))
        with tqdm(
            total=len(keys), desc=f"scoring on {split}", unit="network", disable=not keys, mininterval=1.0
        ) as progress:
            for start in range(0, len(keys), size):
                part = keys[start : start + size]
                chunk = self._compute(split, torch.stack([parameters[missing[key][0]] for key in part]), part)
                for i, key in enumerate(part):
                    _fill(scores, missing[key], chunk, i)
                progress.update(len(part))
        return scores

    def check_memory(self, split: Split, num_networks: int) -> None:
        """Raises a `ValueError` if the scores of so many networks would take more than half of the free memory."""
        check_memory(num_networks, len(self.task.load_split(split)), self._num_classes(split))

    def _num_classes(self, split: Split) -> int:
        """Found out with one example, so that memory can be checked before any real work."""
        if self._classes is None:
            device = next(self.models.model.parameters()).device
            batch = send_to_device(self.task.collate(take(self.task.load_split(split), [0])), device)
            with torch.no_grad():
                self._classes = self.task.predict(self.models.model, batch).shape[-1]
        return self._classes

    def _empty(self, split: Split, num_networks: int) -> Scores:
        num_examples = len(self.task.load_split(split))
        return Scores(
            torch.empty(num_networks, num_examples, dtype=torch.int16),
            torch.empty(num_networks, num_examples, self._num_classes(split), dtype=torch.float16),
            torch.empty(num_examples, dtype=torch.long),
        )

    def _compute(self, split: Split, parameters: torch.Tensor, keys: list[str]) -> Scores:
        """Runs the networks, on all processes that help, and writes what they say to the cache."""
        if self._has_help:
            broadcast_object_list([(split, parameters)])
            scores = self._run_share(split, parameters)
        else:
            scores = self._run(split, parameters)
        if self.cache_dir is not None:
            folder = self._folder(split)
            folder.mkdir(parents=True, exist_ok=True)
            name = hashlib.blake2b("".join(keys).encode(), digest_size=16).hexdigest()
            with replacing(folder / f"{name}.safetensors") as part:
                save_file(vars(scores), part, metadata={"keys": " ".join(keys)})
        return scores

    def _run(self, split: Split, parameters: torch.Tensor) -> Scores:
        scores = self._empty(split, len(parameters))
        for rows, examples, logits, labels in predict_logits(self.task, self.models, split, parameters):
            scores.predictions[rows, examples] = logits.argmax(-1).to("cpu", torch.int16)
            scores.log_probs[rows, examples] = logits.float().log_softmax(-1).to("cpu", torch.float16)
            scores.labels[examples] = labels.cpu()
        return scores

    def _run_share(self, split: Split, parameters: torch.Tensor) -> Scores | None:
        """Every process runs its share of the networks; the main one gets the scores of all."""
        state = PartialState()
        shares = parameters.tensor_split(state.num_processes)  # those of the first processes are not empty
        own = self._run(split, shares[state.process_index])
        gathered = [None] * state.num_processes if state.is_main_process else None
        torch.distributed.gather_object(own, gathered, dst=0)
        if gathered is None:
            return None
        columns = ([getattr(scores, name) for scores in gathered] for name in ("predictions", "log_probs"))
        return Scores(*map(torch.cat, columns), labels=own.labels)

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
        while True:
            asked = [None]
            broadcast_object_list(asked)
            if asked[0] is None:
                return
            self._run_share(*asked[0])

    def _folder(self, split: Split) -> Path:
        context = self._context.copy()
        context.update(split.encode() + self.task.fingerprint(split).encode())
        return self.cache_dir / context.hexdigest()

    def _read(self, split: Split) -> Iterator[tuple[list[str], Scores]]:
        """What the cache holds, file by file."""
        if self.cache_dir is None:
            return
        for path in sorted(self._folder(split).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                yield file.metadata()["keys"].split(), Scores(**{name: file.get_tensor(name) for name in NAMES})


def check_memory(num_networks: int, num_examples: int, num_classes: int) -> None:
    """Raises a `ValueError` if log-probabilities of this size would take more than half of the free memory."""
    needed, free = 2 * num_networks * num_examples * num_classes, psutil.virtual_memory().available
    if needed > free / 2:
        raise ValueError(
            f"the log-probabilities of {num_networks} networks on {num_examples} examples with {num_classes} classes "
            f"need {needed:,} bytes, more than half of the {free:,} bytes of free memory; use fewer examples "
            f"(--max_eval_samples {free // 2 // (2 * num_networks * num_classes)} at most) or fewer networks"
        )


def _fill(scores: Scores, rows: list[int], chunk: Scores, i: int) -> None:
    """Copies network `i` of `chunk` to `rows` of `scores`."""
    scores.predictions[rows] = chunk.predictions[i]
    scores.log_probs[rows] = chunk.log_probs[i]
    scores.labels.copy_(chunk.labels)


def context_hash(model: nn.Module, layout: ParameterLayout) -> "hashlib.blake2b":
    """A hash to be continued, of everything that networks which differ in the tensors of `layout` have in common."""
    context = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        if name not in layout.names:
            context.update(name.encode() + _bytes(tensor))
    context.update(repr(layout.to_dict()).encode())
    return context


def content_hash(parameters: torch.Tensor) -> str:
    """Of a network's own parameters, a name for what is kept about it."""
    return hashlib.blake2b(_bytes(parameters), digest_size=16).hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
