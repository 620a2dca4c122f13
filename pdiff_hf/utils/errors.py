"""Errors of the machine in one line, and limits for what a file may ask of it."""

import contextlib
import importlib.util
import os
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from .files import is_disk_full, is_write_protected
from .memory import is_out_of_memory

_SPECS = [importlib.util.find_spec(f"pdiff_hf{room}") for room in ("", ".pipelines", ".scripts")]
_OWN = [os.path.realpath(path) for spec in _SPECS if spec for path in spec.submodule_search_locations or ()]
# The largest networks of transformers have some ten thousand.
MAX_MODULES = 100_000


@contextlib.contextmanager
def limited_modules() -> Iterator[None]:
    """
    A network that is built in this block can have `MAX_MODULES` modules.

    Raises:
        ValueError: by what would build another one. A config can ask for as many layers as it likes, and memory and
            time run out long before they are all there.
    """
    count = 0

    def register(module: nn.Module, name: str, submodule: nn.Module) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES:
            raise ValueError(f"the config describes a network of more than {MAX_MODULES:,} modules")

    hook = nn.modules.module.register_module_module_registration_hook(register)
    try:
        yield
    finally:
        hook.remove()


def users_line(error: BaseException) -> str:
    """
    ` (FILE, line N: CODE)` where an error came out of a file of the user's own: one that is neither of this package nor
    of an installed library; else nothing.
    """
    libraries = (sysconfig.get_path("stdlib"), *(str(path) for path in _OWN))
    cause: BaseException | None = error
    while cause is not None:
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            path = os.path.realpath(frame.filename)
            if os.path.isfile(path) and "site-packages" not in Path(path).parts and not path.startswith(libraries):
                return f" ({frame.filename}, line {frame.lineno}: {frame.line})"
        if isinstance(cause, SyntaxError) and cause.filename and os.path.isfile(cause.filename):
            return f" ({cause.filename}, line {cause.lineno}: {(cause.text or '').strip()})"
        cause = cause.__cause__
    return ""


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line that makes sense in the message of another error."""
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]


class ResourceError(RuntimeError):
    """There is not enough disk or memory; the message says for what, and how to go on."""


@contextlib.contextmanager
def resource_errors(what: str, folder: Path, go_on: str, save_memory: str = "Make memory free") -> Iterator[None]:
    """
    Says in words, as a `ResourceError`, what libraries say in many ways when the machine has too little of something.

    Args:
        what (`str`): That is at work in the block.
        folder (`Path`): That it writes to.
        go_on (`str`): What is kept, and how to go on.
        save_memory (`str`, *optional*): How to need less memory.
    """
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise ResourceError(
                f"{what}: a file in '{folder}' could not be written whole, because the disk is full or a quota is "
                f"reached. Make space: {go_on}"
            ) from error
        if is_write_protected(error):
            raise ResourceError(f"{what}: '{folder}' cannot be written to ({first_line(error)}): {go_on}") from error
        if is_out_of_memory(error):
            raise ResourceError(f"{what}: out of memory ({first_line(error)}). {save_memory}: {go_on}") from error
        raise
