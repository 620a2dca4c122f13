"""Runs from beginning to end, in this process."""

import pytest

from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.context import RunContext
from pdiff_hf.run.trainer import execute, prepare
from pdiff_hf.scripts.opponents import wanted_opponents

DRAW = "pdiff_hf.evaluation.plots.draw_figures"


def finish(config: PDiffConfig, figures: bool = False, **options) -> RunContext:
    """The run of a config, finished as `scripts/train.py` does it; figures take longer than everything else."""
    run = prepare(config, **{"extra_groups": wanted_opponents(config)} | options)
    with pytest.MonkeyPatch.context() as patch:
        if not figures:
            patch.setattr(DRAW, lambda *args, **kwargs: None)
        execute(run)
    return run


def finish_in(folder, settings: dict, **changes) -> RunContext:
    """The run of some settings in a folder, with its figures."""
    return finish(PDiffConfig(**settings | changes, output_dir=str(folder)), figures=True)
