"""Where files that were written for version 0.2 look for families."""

import warnings

from .family import Family, TaskFamily
from .image_families import ImageFamily, TransformedFamily

__all__ = ["Family", "ImageFamily", "TaskFamily", "TransformedFamily"]

warnings.warn("pdiff_hf.tasks.families is gone soon: import ImageFamily from pdiff_hf", FutureWarning, stacklevel=2)
