"""Runs side by side take over each other's finished stages, as links."""

import json
import logging
import os
import shutil
from pathlib import Path

from pdiff_hf.run.recipe import Recipe
from pdiff_hf.run.run import FOLDERS, stage_settings
from pdiff_hf.utils.files import write_json

logger = logging.getLogger(__name__)


def share_stages(recipe: Recipe) -> None:
    """
    Gives the run of a recipe every stage that a run beside it has finished with the same settings, as a link, and the
    scores of all runs beside it.
    """
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    scores = folder.parent.parent / "scores"
    scores.mkdir(exist_ok=True)
    _link(folder / "scores", scores)
    for stage, stage_folder in FOLDERS.items():
        settings, own = stage_settings(recipe, stage), folder / stage_folder
        if has_finished(folder, stage, settings):
            continue
        if own.is_symlink():
            own.unlink()  # a link to what is gone, or one whose record was not written yet
        for other in sorted(folder.parent.iterdir()):
            if other != folder and has_finished(other, stage, settings):
                shutil.rmtree(own, ignore_errors=True)  # the rest of a stage that was killed
                _link(own, (other / stage_folder).resolve())
                write_json(folder / "stages" / f"{stage}.json", _record(other, stage))
                logger.info("%s: taken over from %s", stage, other.name)
                break


def has_finished(folder: Path, stage: str, settings: dict) -> bool:
    """Whether the run in `folder` has finished a stage with these settings."""
    record = _record(folder, stage)
    return record is not None and record["settings"] == settings and (folder / FOLDERS[stage]).is_dir()


def _record(folder: Path, stage: str) -> dict | None:
    path = folder / "stages" / f"{stage}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _link(path: Path, target: Path) -> None:
    """A relative link, so that the whole can be moved."""
    if not path.is_symlink():
        path.symlink_to(os.path.relpath(target.resolve(), path.parent.resolve()), target_is_directory=True)
