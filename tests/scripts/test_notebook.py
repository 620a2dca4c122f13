"""The notebook runs from top to bottom on a small run, from where Jupyter starts it, and shows what it has printed."""

import json
import shutil
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

NOTEBOOK = Path(__file__).parents[2] / "scripts" / "quickstart.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_every_cell_runs(family_run, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(family_run.folder, tmp_path / "run")
    monkeypatch.setenv("PDIFF_RUN", str(folder))
    monkeypatch.chdir(NOTEBOOK.parent)
    matplotlib.use("Agg")
    names: dict = {}
    for cell in CELLS:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert len(plt.get_fignums()) == 2
    plt.close("all")
    assert "equal: True" in capsys.readouterr().out
    assert (folder / "my_network" / "config.json").is_file()


def test_its_outputs_are_stored():
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert all(cell["outputs"] for cell in CELLS) and not any(o["output_type"] == "error" for o in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert NOTEBOOK.stat().st_size < 300_000
