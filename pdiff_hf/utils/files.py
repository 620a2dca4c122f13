"""Files and folders that are whole or not there, however the program ends, and paths as people write them."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors tells in words what the system's error was, and torch tells only that a file came out too short.
NO_SPACE_MESSAGES = (*(f"(os error {number})" for number in NO_SPACE), "inline_container.cc", "iostream error")


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """
    A name beside `path` for a file or a folder to be written to in the block. Both are on the disk before it takes the
    place of `path`. After an exception nothing of it is left; after a kill the next call removes it.

    A file is replaced in one step. A folder is not: a kill may leave neither the old nor the new one, never parts.
    """
    path = Path(path)
    part = part_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(part)
    try:
        yield part
        sync(part)
        if part.is_dir():
            remove(path)
        part.replace(path)
    except BaseException:
        remove(part)
        raise
    _sync_one(path.parent)


def part_of(path: Path) -> Path:
    """The name beside `path` that `replacing` gives."""
    return path.with_name(f".{path.name}.part")


def remove(path: Path) -> None:
    """
    Removes a file, or a folder with all that it holds, that need not exist. A folder is renamed first, so that a kill
    leaves none of that name that lacks some of its files; what it leaves under the other name goes in the next call.
    Where `path` is a link, only the link is removed.
    """
    doomed = path.with_name(f".{path.name}.removed")
    if doomed.is_dir():
        shutil.rmtree(doomed)
    if path.is_dir() and not path.is_symlink():
        path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def permit(path: Path) -> None:
    """
    Gives a file, or all files in a folder, the permissions that the umask gives to any new file, where they have been
    written for their owner alone: safetensors does that whatever the umask says.
    """
    umask = os.umask(0o077)  # the only way to read it is to set it
    os.umask(umask)
    for file in (path, *path.rglob("*")):
        if file.is_file() and not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) == 0o600:
            file.chmod(0o666 & ~umask)


def sync(path: Path) -> None:
    """Returns when a file, or a folder with all that it holds, is on the disk and permitted to others: a power cut may
    otherwise keep the rename that follows and lose what was written before it."""
    permit(path)
    for inside in path.rglob("*"):
        _sync_one(inside)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_write_protected(error: BaseException) -> bool:
    """Whether an error says that a file may not be written, of a folder or disk that is read-only or another's."""
    return isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or the one that it came from, says that a file could not be written whole."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return True
        if any(message in str(error) for message in NO_SPACE_MESSAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_space(folder: Path) -> int:
    """Bytes that are free for a folder, which need not exist yet."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def check_writable(folder: Path) -> None:
    """Raises a `ValueError` if no file can be written to `folder`, or, where it does not exist, to what it would be
    made in. Nothing is left there."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not existing.exists():
        raise ValueError(
            f"nothing can be written to '{folder}': '{existing}' is a link to '{os.readlink(existing)}', which does "
            "not exist; make that folder, or remove the link"
        )
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise ValueError(f"nothing can be written to '{folder}': {error.strerror}") from error


def write_json(path: str | os.PathLike, values) -> None:
    """The file is always whole."""
    with replacing(path) as part:
        part.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def without_nan(values):
    """The same tree of lists and dicts with None for every number that is not finite: JSON has no NaN."""
    if isinstance(values, Mapping):
        return {key: without_nan(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [without_nan(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def expand_path(path: str) -> str:
    """
    `path` with `~` and environment variables replaced, as a shell does; what is not a path passes through.

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
