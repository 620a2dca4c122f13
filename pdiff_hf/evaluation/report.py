"""A report: what was compared with what, and how it came out."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.files import replacing, write_json
from ..utils.names import REPORT
from ..utils.reports import FIGURES, load_report
from . import render
from .report_data import GroupRow, ReportData
from .summary import summarise
from .verdict import find_warnings, write_verdict

__all__ = ["GroupRow", "Report"]

if TYPE_CHECKING:
    from typing_extensions import Self


class Report(ReportData):
    """A [`ReportData`] that reads and writes itself, and says what it holds."""

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Self":
        """
        Args:
            path (`str` or `os.PathLike`): A `report.json`, also of version 0.2, or the folder that it is in.

        Raises:
            OSError, ValueError: see [`~pdiff_hf.utils.reports.load_report`].
        """
        path = Path(path)
        report = cls.from_dict(load_report(path / REPORT if path.is_dir() else path))
        if not report.summary:  # of an older version, whose words are others
            report.describe()
        return report

    def describe(self) -> None:
        """Puts the numbers into words: warnings, verdict and summary."""
        self.warnings, self.verdict, self.summary = find_warnings(self), write_verdict(self), summarise(self)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `report.json`, `report.md` and `report.html`; the latter two show the figures that are there."""
        folder = Path(folder)
        write_json(folder / REPORT, self.to_dict())
        with replacing(folder / "report.md") as part:
            part.write_text(self.to_markdown(name for name in FIGURES if (folder / name).is_file()), encoding="utf-8")
        with replacing(folder / "report.html") as part:
            part.write_text(render.to_html(self, folder), encoding="utf-8")

    def to_markdown(self, figures: Iterator[str] | Sequence[str] = ()) -> str:
        """The whole report, with figures beside it."""
        return render.to_markdown(self, list(figures))

    def to_terminal(self) -> str:
        """Verdict, small table and warnings, in 80 columns."""
        return render.to_terminal(self)
