"""Scores many networks in one pass over the data, and keeps what was scored, by content."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..batched import BatchedModels
from ..parameters import ParameterLayout
from ..tasks import Task, predict_logits
from ..tasks.task import Split


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
        task (`Task`): Gives the data and the prediction.
        model (`nn.Module`): The base model, on the device to compute on.
        layout (`ParameterLayout`): Which of its tensors differ.
        cache_dir (`str` or `os.PathLike`, *optional*): Scores are kept here, under a hash of everything that they
            depend on: the base model, the examples and labels of the split, and the network's own parameters. Without
            it they are computed anew.
    """

    def __init__(
        self, task: Task, model: nn.Module, layout: ParameterLayout, cache_dir: str | os.PathLike | None = None
    ):
        self.task, self.layout = task, layout
        self.models = BatchedModels(model, layout)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._context = hashlib.blake2b(digest_size=16)
        for name, tensor in model.state_dict().items():
            if name not in layout.names:
                self._context.update(name.encode() + _bytes(tensor))
        self._context.update(repr(layout.to_dict()).encode())

    def score(self, split: Split, parameters: torch.Tensor) -> Scores:
        """Scores of the networks `parameters`, shape `(N, D)`, on a split of the task."""
        keys = [hashlib.blake2b(_bytes(row), digest_size=16).hexdigest() for row in parameters]
        found = self._read(split)
        missing = {key: row for row, key in enumerate(keys) if key not in found}
        if missing:
            found |= self._compute(split, parameters[list(missing.values())], list(missing))
        labels = next(iter(found.values()))[2]
        return Scores(torch.stack([found[k][0] for k in keys]), torch.stack([found[k][1] for k in keys]), labels)

    def _compute(self, split: Split, parameters: torch.Tensor, keys: list[str]) -> dict[str, tuple]:
        """Runs the networks and writes what they say to the cache, under a temporary name first."""
        num_examples = len(self.task.load_split(split))
        predictions = torch.empty(len(parameters), num_examples, dtype=torch.int16)
        labels = torch.empty(num_examples, dtype=torch.long)
        log_probs = None
        for rows, examples, logits, batch_labels in predict_logits(self.task, self.models, split, parameters):
            if log_probs is None:
                log_probs = torch.empty(*predictions.shape, logits.shape[-1], dtype=torch.float16)
            predictions[rows, examples] = logits.argmax(-1).to("cpu", torch.int16)
            log_probs[rows, examples] = logits.float().log_softmax(-1).to("cpu", torch.float16)
            labels[examples] = batch_labels.cpu()
        if self.cache_dir is not None:
            folder = self._folder(split)
            folder.mkdir(parents=True, exist_ok=True)
            name = hashlib.blake2b("".join(keys).encode(), digest_size=16).hexdigest()
            tensors = {"predictions": predictions, "log_probs": log_probs, "labels": labels}
            save_file(tensors, folder / f".{name}.part", metadata={"keys": " ".join(keys)})
            (folder / f".{name}.part").rename(folder / f"{name}.safetensors")
        return {key: (predictions[i], log_probs[i], labels) for i, key in enumerate(keys)}

    def _folder(self, split: Split) -> Path:
        context = self._context.copy()
        context.update(split.encode() + self.task.fingerprint(split).encode())
        return self.cache_dir / context.hexdigest()

    def _read(self, split: Split) -> dict[str, tuple]:
        if self.cache_dir is None:
            return {}
        found: dict[str, tuple] = {}
        for path in sorted(self._folder(split).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                keys = file.metadata()["keys"].split()
                tensors = [file.get_tensor(name) for name in ("predictions", "log_probs", "labels")]
            found |= {key: (tensors[0][i], tensors[1][i], tensors[2]) for i, key in enumerate(keys)}
        return found


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
