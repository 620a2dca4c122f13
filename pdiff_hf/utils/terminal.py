"""The terminal that a script was started from, or the lack of one."""

import atexit
import io
import os
import re
import sys

MAX_VALUE, MAX_MESSAGE = 200, 1500  # characters
# What a message quotes (an apostrophe is no quote), what it lists, and words without a space.
_VALUES = re.compile(
    rf"(?<!\w)'[^']{{{MAX_VALUE},}}'(?!\w)|\"[^\"]{{{MAX_VALUE},}}\"|\[[^\[\]]{{{MAX_VALUE},}}\]"
    rf"|\{{[^{{}}]{{{MAX_VALUE},}}\}}|\S{{{MAX_VALUE + 1},}}"
)


def start_script(doc: str | None) -> str:
    """
    What a script calls first, so that nothing it prints can end it: without a standard output, as daemons and pythonw
    have none, it goes nowhere; what the encoding of the terminal lacks becomes `?`; and a reader that has seen enough,
    such as `head`, may close the pipe.

    Args:
        doc (`str`, *optional*): The script's docstring, which `python -OO` takes away. The libraries below need theirs,
            so that the script begins anew without that.

    Returns:
        `str`: Its first paragraph, a description for `--help`.
    """
    if sys.flags.optimize > 1:
        _keep_docstrings()
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number, which a file of the run would have got
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  open until the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    atexit.register(_flush)
    return (doc or "").strip().partition("\n\n")[0]


def _keep_docstrings() -> None:
    """Replaces this process by the same without `-OO` or PYTHONOPTIMIZE=2: without docstrings, transformers and
    diffusers cannot be imported."""
    given = sys.orig_argv[1:]
    kept = [re.sub("O", "", flag) if re.fullmatch(r"-[A-Za-z]*O[A-Za-z]*", flag) else flag for flag in given]  # -BOO
    if os.environ.pop("PYTHONOPTIMIZE", None) or kept != given:
        os.execv(sys.executable, [sys.executable, *(flag for flag in kept if flag != "-")])


def _flush() -> None:
    """The last flush, which the interpreter would do with a message if nobody reads any more."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
    except ValueError:  # it is closed
        pass


def discard_output() -> None:
    """What is printed from here on, and what is still in the buffer, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def shorten(message: str) -> str:
    """A message in one line, with no more than 200 characters of each value in it."""
    line = _VALUES.sub(lambda value: f"{value[0][: MAX_VALUE - 3]}...", " ".join(message.split()))
    return line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE - 3]}..."
