"""A run's folder: which stages are finished and with which settings, their checkpoints, and what runs share."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..utils import names
from ..utils.files import part_of, remove, replacing, write_json

CHECKPOINT_SETTINGS = "settings.json"
SOURCE = "source of "  # what begins the name of the digest of a file with a class


class RunError(ValueError):
    """A run cannot be executed as asked; nothing was changed."""


@dataclass(frozen=True)
class Stage:
    """
    A step of a run whose result is kept in the run's folder.

    Args:
        name (`str`): In settings, flags and records.
        folder (`str`): What it leaves, inside the run's folder.
        needs (`tuple[str, ...]`): Stages whose results it reads.
        sections (`tuple[type, ...]`): Sections of the settings that it reads, beside those of the stages it needs.
        about (`str`): What it does, for people, with settings in braces.
        execute (`Callable`): `execute(context, stage)` does the work, and records its end with [`RunContext.finish`].
        about_family (`str`, *optional*): `about` where networks answer to conditions.
        is_wanted (`Callable`, *optional*): `is_wanted(config)` says whether a run has the stage at all.
    """

    name: str
    folder: str
    needs: tuple[str, ...]
    sections: tuple[type, ...]
    about: str
    execute: Callable[[Any, "Stage"], None]
    about_family: str = ""
    is_wanted: Callable[[Any], bool] = lambda config: True


class RunFolder:
    """
    What is on the disk of a run. Everything is written such that a kill at any moment leaves it whole: a record never
    stands beside a result that it does not describe.

    Args:
        path (`str` or `os.PathLike`): The run's `output_dir`; it need not exist.

    Raises:
        RunError: if it is a file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"output_dir '{self.path}' is a file")

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def record(self, stage: Stage) -> dict | None:
        """`settings` and `results` of the stage's last end; None if it has not been finished."""
        return _read(self.record_file(stage))

    def is_finished(self, stage: Stage, settings: Mapping[str, Any]) -> bool:
        """Whether the stage was finished with these settings, and its result is there."""
        record = self.record(stage)
        return (
            record is not None
            and record["settings"] == settings
            # Snapshots from elsewhere stay there.
            and ((self / stage.folder).is_dir() or bool(settings.get("snapshots")) and stage.folder == names.SNAPSHOTS)
        )

    def finish(self, stage: Stage, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
        """Records the end of a stage; its checkpoints are no longer needed."""
        write_json(self.record_file(stage), {"settings": settings, "results": results})
        remove(self.checkpoints(stage))

    @contextlib.contextmanager
    def replacing(self, stage: Stage) -> Iterator[Path]:
        """
        A new folder for the result of a stage; the record of an older result goes before that result does. Where the
        folder is a link to an empty one, such as on a larger disk, the result goes there.
        """
        self.check_link(stage)
        with replacing(self._place(stage)) as folder:
            folder.mkdir()
            yield folder
            remove(self.record_file(stage))

    def check_link(self, stage: Stage) -> None:
        """Raises a `RunError` where the result of a stage would replace what somebody else's link leads to."""
        path = self / stage.folder
        if path.is_symlink() and path.exists() and (not path.is_dir() or any(path.iterdir())):
            use = f", or use what is there with --snapshots {path.resolve()}" if stage.folder == names.SNAPSHOTS else ""
            raise RunError(
                f"'{path}' is a link to '{os.readlink(path)}', which is not empty: what stage {stage.name} writes "
                f"would take its place. Remove the link{use}"
            )

    def _place(self, stage: Stage) -> Path:
        path = self / stage.folder
        return path.resolve() if path.is_symlink() else path

    def checkpoints(self, stage: Stage) -> Path:
        """The folder of a stage's `checkpoint-N`."""
        return self / names.CHECKPOINTS / stage.name

    def checkpoint_settings(self, stage: Stage) -> dict | None:
        """What the stage's checkpoints were written with; None if there are none."""
        return _read(self.checkpoints(stage) / CHECKPOINT_SETTINGS)

    def open_checkpoints(self, stage: Stage, settings: Mapping[str, Any], resume: bool) -> None:
        """Removes the stage's checkpoints unless they are to be gone on with and have the same settings."""
        if not resume or self.checkpoint_settings(stage) != settings:
            remove(self.checkpoints(stage))
            write_json(self.checkpoints(stage) / CHECKPOINT_SETTINGS, settings)

    def clean_up(self, stage: Stage) -> None:
        """Removes what a kill may have left of a finished stage."""
        remove(self.checkpoints(stage))
        remove(part_of(self._place(stage)))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second run out of the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self / ".lock", timeout=0):
                yield
        except Timeout as error:
            raise RunError(f"another run is at work in '{self.path}'; choose another --output_dir, or wait") from error

    def record_file(self, stage: Stage) -> Path:
        """Where the record of a stage is."""
        return self / names.RECORDS / f"{stage.name}.json"


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """In which settings two differ, in words."""
    keys = [key for key in (*new, *(old.keys() - new.keys())) if old.get(key) != new.get(key)]
    changed = [
        f"{key.removeprefix(SOURCE)} has been edited"
        if key.startswith(SOURCE)
        else f"{key}: {old.get(key)!r} there, {new.get(key)!r} asked for"
        for key in keys
    ]
    return "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
