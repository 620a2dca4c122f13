"""How the scripts end."""

import contextlib
import os

import pytest

from pdiff_hf.run.terminal import one_line_errors


@pytest.mark.parametrize("length", [1, 100_000])  # less and more than the buffer holds
def test_nothing_is_said_to_a_reader_that_has_gone(length):
    read, write = os.pipe()
    os.close(read)
    output = os.fdopen(write, "w")
    with output, contextlib.redirect_stdout(output), pytest.raises(SystemExit) as end, one_line_errors():
        print("a" * length)
    assert end.value.code == 1


def test_a_connection_that_breaks_is_an_error():
    with pytest.raises(SystemExit, match="error: .*Broken pipe"), one_line_errors():
        raise BrokenPipeError(32, "Broken pipe")
