"""The scripts as a user starts them, but in this process."""

import runpy
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run_script(monkeypatch, name: str, *flags) -> None:
    """`scripts/NAME` with these flags; raises `SystemExit` where it ends with an error."""
    path = str(SCRIPTS / name)
    monkeypatch.setattr(sys, "argv", [path, *map(str, flags)])
    runpy.run_path(path, run_name="__main__")


def generate(monkeypatch, *flags) -> None:
    """`scripts/generate.py` with 3 networks of 4 steps from seed 7."""
    run_script(monkeypatch, "generate.py", *flags, "--num_models=3", "--num_inference_steps=4", "--seed=7")
