"""Snapshots of a training run that is not ours: a callback for `transformers.Trainer`, and a recorder for any loop."""

import inspect
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from ..layout import ParameterLayout
from ..models.condition import Condition, ConditionError, Fields
from ..selection import select_layout
from ..utils.files import replacing, without_nan, write_json
from .dataset import COLUMNS, SnapshotError, SnapshotWriter, check_finite

logger = logging.getLogger(__name__)


class SnapshotRecorder:
    """
    Records tensors of `model` while it is being trained, and writes the parameter data set at the end. A context
    manager:

        with SnapshotRecorder(model, "snapshots", select="norm[-2:]") as recorder:
            for step in range(1, num_steps + 1):
                ...  # one training step
                recorder.snapshot(step, accuracy=...)  # metrics are optional

    Until then each snapshot is a file in a hidden folder beside `folder`, so that a run which is killed can go on.
    Where `torch.distributed` runs several processes, the first one records.

    Args:
        model (`nn.Module`): The network itself, not a wrapper of `DistributedDataParallel` or `torch.compile`.
        folder (`str` or `os.PathLike`): Must not exist yet.
        select, exclude, batch_norm_statistics: See [`~pdiff_hf.selection.select_parameters`].
        condition (`Mapping`, *optional*): What this run trains the network for, such as `{"angle": 37.0}`.
        fields (`Fields` or `dict`, *optional*): Of the condition, such as `{"angle": {"type": "angle"}}`; the same in
            all runs whose snapshots are to be imported together.
        seed (`int`, *optional*, defaults to 0): For the column `seed`.
        resume_step (`int`, *optional*, defaults to 0): What an interrupted run recorded up to this step is kept. 0
            starts afresh.

    Raises:
        SnapshotError: if `folder` exists, if none of the selected tensors is trained, or if an interrupted run recorded
            other tensors; by `snapshot`, for a value that is not finite; at the end, for fewer than 2 snapshots.
        LayoutError: if nothing is selected.
        ConditionError: for a condition without fields, or one that does not fit them.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike,
        select: str | Sequence[str] = "norm[-2:]",
        exclude: str | Sequence[str] = (),
        *,
        batch_norm_statistics: bool = False,
        condition: Condition | None = None,
        fields: Fields | Mapping[str, Mapping] | None = None,
        seed: int = 0,
        resume_step: int = 0,
    ):
        self.model, self.folder, self.seed = model, Path(folder), seed
        self.condition = condition
        self.fields = fields if fields is None or isinstance(fields, Fields) else Fields(fields)
        if self.fields is not None:
            self.fields.table([condition or {}])  # an error comes before the training
        elif condition is not None:
            raise ConditionError(f"the condition {condition} needs fields=..., which say what each of its values is")
        self.layout = select_layout(model, select, exclude, batch_norm_statistics=batch_norm_statistics)
        self.is_active = not (torch.distributed.is_initialized() and torch.distributed.get_rank() > 0)
        self._recording = self.folder.with_name(f".{self.folder.name}.recording")
        self._previous: torch.Tensor | None = None
        self._others: dict[str, float] = {}
        if self.folder.exists():
            raise SnapshotError(f"'{self.folder}' exists already; snapshots are never added to a finished data set")
        parameters = dict(model.named_parameters())
        if not any(parameters[name].requires_grad for name in self.layout.names if name in parameters):
            raise SnapshotError(
                f"none of the selected tensors is trained (requires_grad is False): '{self.layout.names[0]}', ..."
            )
        if self.is_active:
            self._prepare(resume_step)

    def _prepare(self, resume_step: int) -> None:
        if not resume_step:
            shutil.rmtree(self._recording, ignore_errors=True)
        self._recording.mkdir(parents=True, exist_ok=True)
        layout_file = self._recording / "layout.json"
        if layout_file.is_file() and ParameterLayout.from_dict(_read_json(layout_file)) != self.layout:
            raise SnapshotError(
                f"the interrupted run recorded other tensors; delete '{self._recording}' to record without it"
            )
        write_json(layout_file, self.layout.to_dict())
        for path in self._recording.glob("step-*"):
            if _step(path) > resume_step:
                path.unlink()
        if kept := self._files():
            self._previous = load_file(kept[-1])["parameters"]

    def _files(self) -> list[Path]:
        """Of the snapshots so far, in order."""
        return sorted(self._recording.glob("step-*.safetensors"), key=_step)

    def __enter__(self) -> "SnapshotRecorder":
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        if exception_type is None:
            self.finish()

    def snapshot(self, step: int, **metrics: float) -> None:
        """Records the selected tensors as they are now. A snapshot equal to the one before is left out."""
        if not self.is_active:
            return
        vector = self.layout.flatten(self.model.state_dict()).cpu()
        try:
            check_finite(vector[None].numpy(), self.layout)
        except SnapshotError as error:
            raise SnapshotError(f"step {step}: {error}") from None
        if self._previous is not None and torch.equal(vector, self._previous):
            # The first step of a warm-up and a step that a gradient scaler skips change nothing.
            logger.warning("step %d changed none of the recorded tensors, so it gives no snapshot", step)
            return
        self._previous = vector
        self._others = self._others or self._sums_of_others()
        with replacing(self._recording / f"step-{step}.safetensors") as part:
            save_file({"parameters": vector}, part)
        self.add_metrics(step, metrics)

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of the snapshot that was taken at `step`."""
        if reserved := [name for name in metrics if name in COLUMNS]:
            raise SnapshotError(f"a metric cannot be named {reserved[0]}; the data set has a column of that name")
        if self.is_active and metrics:
            path = self._recording / f"step-{step}.json"
            write_json(path, _read_json(path) | without_nan({name: float(value) for name, value in metrics.items()}))

    @torch.no_grad()
    def _sums_of_others(self) -> dict[str, float]:
        """Of the parameters that are not recorded."""
        selected = set(self.layout.names)
        return {name: p.double().sum().item() for name, p in self.model.named_parameters() if name not in selected}

    def finish(self) -> None:
        """Writes the data set, with a column for every metric that any snapshot has."""
        if not self.is_active:
            return
        others = self._sums_of_others()
        if changed := [name for name, total in self._others.items() if others[name] != total]:
            logger.warning(
                "%d tensors that are not selected changed between the first snapshot and the last ('%s', ...), so that "
                "snapshots do not belong to one network: set requires_grad to False for these tensors before snapshots "
                "are taken, or select them too",
                len(changed),
                changed[0],
            )
        files = self._files()
        if len(files) < 2:
            raise SnapshotError(
                f"only {len(files)} snapshots were recorded for '{self.folder}'; was there a step that changed the "
                "selected tensors?"
            )
        metrics = {path: _read_json(path.with_suffix(".json")) for path in files}
        names = list(dict.fromkeys(name for values in metrics.values() for name in values))
        with SnapshotWriter(self.folder, self.layout, metrics=names, fields=self.fields) as writer:
            for path, values in metrics.items():
                vector, shown = load_file(path)["parameters"], {name: values.get(name) for name in names}
                writer.write(vector, step=_step(path), seed=self.seed, condition=self.condition, **shown)
        shutil.rmtree(self._recording)


class SnapshotCallback(TrainerCallback):
    """
    Records snapshots during a run of `transformers.Trainer` and writes the parameter data set when it ends:

        Trainer(..., callbacks=[SnapshotCallback("snapshots", select="norm[-2:]")])

    Evaluations at the step of a snapshot become its metrics. A run that continues from a checkpoint continues
    recording there. Parameters that are spread over processes (FSDP, DeepSpeed ZeRO-3) are not supported.

    Args:
        folder, select, exclude, batch_norm_statistics, condition, fields: See [`SnapshotRecorder`].
        every_n_steps (`int`, *optional*, defaults to 1): Optimizer steps between two snapshots.
        first_step (`int`, *optional*, defaults to 1): No snapshot before this step, such as the end of the warm-up.

    Raises:
        SnapshotError, LayoutError: when training begins or continues, as [`SnapshotRecorder`] does.
    """

    def __init__(
        self, folder: str | os.PathLike, *args: Any, every_n_steps: int = 1, first_step: int = 1, **kwargs: Any
    ):
        if every_n_steps < 1:
            raise SnapshotError(f"every_n_steps must be at least 1, got {every_n_steps}")
        # An argument that there is not is an error here, and not when training begins.
        inspect.signature(SnapshotRecorder).bind(None, folder, *args, seed=0, resume_step=0, **kwargs)
        self.recorded = (folder, *args), kwargs
        self.every_n_steps, self.first_step = every_n_steps, first_step
        self.recorder: SnapshotRecorder | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        recorded, named = self.recorded
        self.recorder = SnapshotRecorder(model, *recorded, **named, seed=args.seed, resume_step=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        assert self.recorder is not None
        if state.global_step >= self.first_step and state.global_step % self.every_n_steps == 0:
            self.recorder.snapshot(state.global_step)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.recorder is not None:  # it is None for an evaluation before training
            numbers = {n: v for n, v in (metrics or {}).items() if isinstance(v, int | float) and n != "epoch"}
            useful = {n: v for n, v in numbers.items() if not n.endswith(("_runtime", "_per_second"))}
            self.recorder.add_metrics(state.global_step, useful)

    def on_train_end(self, args, state, control, **kwargs):
        assert self.recorder is not None
        self.recorder.finish()
        self.recorder = None


def _step(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
