"""How good generated networks are, beside what trivial generators and tuned opponents make."""

from .evaluation import evaluate
from .groups import Group
from .report import GroupRow, Report
from .report_data import Cost, Kind
