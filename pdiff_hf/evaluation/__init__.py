"""How good generated networks are, beside what trivial generators and tuned opponents make."""

from .evaluation import evaluate
from .groups import Cost, Group, Kind
from .report import GroupRow, Report

__all__ = ["Cost", "Group", "GroupRow", "Kind", "Report", "evaluate"]
