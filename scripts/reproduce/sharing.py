"""Runs side by side take over each other's finished stages, as links."""

import logging

from pdiff_hf.run.folder import link
from pdiff_hf.run.run import Run
from pdiff_hf.run.stages import STAGES
from pdiff_hf.utils import names

logger = logging.getLogger(__name__)


def share_stages(run: Run) -> None:
    """
    Gives a run, as links, every stage that a run beside it has finished with the same settings, and the scores of all
    runs beside it.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    scores = run.folder.parent.parent / names.SCORES
    scores.mkdir(exist_ok=True)
    link(run.folder / names.SCORES, scores)
    for name, stage in STAGES.items():
        other = run.files.take_over(stage, run.settings(name))
        if other is not None:
            logger.info("%s: taken over from %s", name, other.name)
