"""The notebook runs from top to bottom on a small run, from where Jupyter starts it, and shows what it has printed."""

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from support.recipes import TINY_FAMILY

from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.trainer import execute, prepare

NOTEBOOK = Path(__file__).parents[2] / "scripts" / "quickstart.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    run = prepare(PDiffConfig(**TINY_FAMILY, output_dir=str(tmp_path / "run")))
    execute(run)
    monkeypatch.setenv("PDIFF_RUN", str(run.folder))
    monkeypatch.chdir(NOTEBOOK.parent)
    matplotlib.use("Agg")
    names: dict = {}
    for cell in CELLS:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert len(plt.get_fignums()) == 2
    plt.close("all")
    assert "equal: True" in capsys.readouterr().out
    assert (run.folder / "my_network" / "config.json").is_file()


def test_its_outputs_are_stored():
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert all(cell["outputs"] for cell in CELLS) and not any(o["output_type"] == "error" for o in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert NOTEBOOK.stat().st_size < 300_000
