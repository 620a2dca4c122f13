"""The scripts as a user starts them, but in this process."""

import runpy
import sys
from pathlib import Path

GENERATE = str(Path(__file__).parents[2] / "scripts" / "generate.py")


def generate(monkeypatch, *flags) -> None:
    """`scripts/generate.py` with 3 networks of 4 steps from seed 7."""
    argv = [GENERATE, *map(str, flags), "--num_models", "3", "--num_inference_steps", "4", "--seed", "7"]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(GENERATE, run_name="__main__")
