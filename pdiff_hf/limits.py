"""What keeps a file of a few bytes from asking for all of the machine."""

import contextlib
from collections.abc import Iterator

from torch import nn

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


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line that makes sense in the message of another error."""
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
