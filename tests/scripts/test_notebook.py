"""The notebook runs from top to bottom on a small run."""

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from support.recipes import TINY

from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.trainer import execute, prepare

NOTEBOOK = Path(__file__).parents[2] / "scripts" / "quickstart.ipynb"


def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    changes = {"tune_steps": 2, "tune_models": 4, "tune_batch_size": 4, "baseline_models": 0, "num_models": 2}
    run = prepare(PDiffConfig(**TINY | changes, output_dir=str(tmp_path / "run")))
    execute(run)
    monkeypatch.setenv("PDIFF_RUN", str(run.folder))
    matplotlib.use("Agg")
    names: dict = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # it is read without results of another machine
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert len(plt.get_fignums()) == 2
    plt.close("all")
    assert "equal: True" in capsys.readouterr().out
    assert (run.folder / "my_network" / "config.json").is_file()
