"""Callbacks of `transformers.Trainer` in the trainings of a run."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState

from ..training import LoopCallback, LoopState


@contextlib.contextmanager
def forwarding(callbacks: Sequence[TrainerCallback], stage: str) -> Iterator[list[LoopCallback]]:
    """Tells `callbacks` of the training of a stage, within the block: its begin, its steps and its end."""
    if not callbacks:
        yield []
        return
    forward = Forward(callbacks, stage)
    forward.tell("on_train_begin")
    yield [forward]
    forward.tell("on_train_end")


class Forward(LoopCallback):
    """What a training says, as `transformers.TrainerCallback` has it; the stage comes as `stage`."""

    def __init__(self, callbacks: Sequence[TrainerCallback], stage: str):
        self.callbacks, self.stage = callbacks, stage
        self.state, self.control = TrainerState(), TrainerControl()

    def tell(self, event: str, state: LoopState | None = None, **kwargs: object) -> None:
        if state is not None:
            self.state.global_step, self.state.max_steps = state.step, state.num_steps
        for callback in self.callbacks:
            getattr(callback, event)(None, self.state, self.control, stage=self.stage, **kwargs)
        if state is not None and self.control.should_training_stop:
            state.should_stop = True

    def on_step_end(self, state: LoopState) -> None:
        self.tell("on_step_end", state)

    def on_log(self, state: LoopState, logs: dict[str, float]) -> None:
        self.state.log_history.append({**logs, "step": state.step, "stage": self.stage})
        self.tell("on_log", state, logs=logs)

    def on_save(self, state: LoopState, checkpoint: Path) -> None:
        self.tell("on_save", state, checkpoint=checkpoint)
