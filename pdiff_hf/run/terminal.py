"""What the scripts say on a terminal, and how they end."""

import contextlib
import logging
import shlex
import sys
from collections.abc import Iterator

import datasets
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import HTTPError
from transformers.utils import logging as transformers_logging

from ..hub.push import HubError
from ..training.loop import TrainingError
from ..utils.errors import ResourceError, users_line
from ..utils.terminal import discard_output, shorten

INSTALLED = "python -m pdiff_hf "
KNOWN = (ValueError, OSError, ImportError, TrainingError, HubError, HTTPError, ResourceError)


def quiet_libraries(is_main_process: bool = True) -> None:
    """Only this package says what it does, and only in one process; other libraries say what goes wrong."""
    logging.basicConfig(level=logging.INFO if is_main_process else logging.ERROR, format="%(message)s")
    for library in ("accelerate", "datasets", "httpx", "matplotlib", "timm", "torch"):
        logging.getLogger(library).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """
    Ends the program with one line for everything that its user can put right: settings, files, the machine, packages
    that are missing, and whatever is raised in a file of the user's own, with the line there.
    """
    try:
        yield
        sys.stdout.flush()  # here, where it can still be told that nobody reads
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(1)
        where = users_line(error)
        if isinstance(error, KNOWN):
            sys.exit(shorten(f"error: {error}{where}"))
        if not where:
            raise  # an error of this library, whose traceback helps to mend it
        sys.exit(shorten(f"error: {type(error).__name__}: {error}{where}"))


def _nobody_reads() -> bool:
    """Whether the output goes to a program that has seen enough, like `head`; then the rest of it goes nowhere."""
    try:
        print(flush=True)  # what failed before may be gone from the buffer, so that a mere flush would not fail
    except BrokenPipeError:
        discard_output()
        return True
    return False


def command(script: str, *arguments: object, launcher: str = "python") -> str:
    """How to call one of the scripts, the way in which the one at work was called."""
    name = {"push_to_hub": "push"}.get(script, script)
    start = f"-m pdiff_hf {name}" if sys.argv[0].startswith(INSTALLED) else f"scripts/{script}.py"
    return f"{launcher} {start} {shlex.join(map(str, arguments))}"


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
