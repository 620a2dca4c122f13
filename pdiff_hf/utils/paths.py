"""Paths as people write them."""

import os
import re


def expand_path(path: str) -> str:
    """
    `path` with `~` and environment variables replaced, as a shell does; what is no path passes through.

    Raises:
        ValueError: if it names a variable that is not set, or a user that there is not.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    unset = re.search(r"\$(\w+|\{\w+\})", expanded)
    if unset:
        raise ValueError(f"'{path}' cannot be used: the environment variable {unset[1].strip('{}')} is not set")
    if expanded.startswith("~"):
        raise ValueError(f"'{path}' cannot be used: there is no home folder of {expanded.partition('/')[0]}")
    return expanded
