"""The processes of a run, on one host or on several."""

import contextlib
import socket
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

from ..utils.errors import first_line
from .folder import RunError

SHARED_FILE = ".processes"
SHARED_SECONDS = 10.0  # a folder in a network may show late what another host has written
# What gloo, which has no type of error of its own, says of a process that is gone.
LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


# Settings of Accelerate's launcher that change how networks are trained.
SHARDING = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
}


def start_processes() -> PartialState:
    """
    What the processes of a run have in common; the first call in a program makes it. The main process collects
    snapshots alone, for which the others wait longer than they do by default.

    Raises:
        RunError: if the launcher asks for what a run does not do, and would leave out or fail with later.
    """
    for name, variable in SHARDING.items():
        if parse_flag_from_env(variable):
            raise RunError(
                f"the launcher is set to {name}, which cuts networks into shards; what a run trains is small, and each "
                "process has all of it. Choose plain data parallelism: `accelerate config`, or `accelerate launch "
                "--multi_gpu`"
            )
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(weeks=4))


def check_shared(folder: Path) -> None:
    """
    That all processes see what the main one writes to `folder`. Every process has to call it.

    Raises:
        RunError: in all processes, if one does not.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    word, path = [uuid.uuid4().hex], folder / SHARED_FILE
    broadcast_object_list(word)
    if state.is_main_process:
        path.write_text(word[0], encoding="utf-8")
    state.wait_for_everyone()
    end = time.monotonic() + SHARED_SECONDS
    while not (seen := path.is_file() and path.read_text(encoding="utf-8") == word[0]) and time.monotonic() < end:
        time.sleep(0.1)
    found = gather_object([f"process {state.process_index} on {socket.gethostname()}" if not seen else ""])
    if state.is_main_process:
        path.unlink()
    if any(found):
        raise RunError(
            f"{', '.join(filter(None, found))} does not see what the main process writes to '{folder}': output_dir has "
            "to be one folder that all hosts share"
        )


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """Raises a `RunError` where the connection to another process is lost within the block."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or any(text in str(error) for text in LOST)
        if PartialState().num_processes == 1 or not lost:
            raise
        raise RunError(
            f"another process of this run has ended or cannot be reached any more, and its own output says why "
            f"({first_line(error)}). What is finished and the last checkpoint are kept: start all processes again with "
            "--resume_from_checkpoint latest"
        ) from error
