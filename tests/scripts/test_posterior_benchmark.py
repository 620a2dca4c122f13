"""The benchmark of posteriors runs on a finished run, from the first example to its tables."""

import json

import pytest
from support.scripts import SCRIPTS

from pdiff_hf.run.cli import load_config
from pdiff_hf.run.trainer import execute, prepare

TINY = {"num_tasks": 12, "num_snapshots": 24, "num_validation_tasks": 3, "num_test_tasks": 3, "base_epochs": 2}
TINY |= {"collect_steps": 60, "latent_dim": 6, "denoiser_steps": 5, "tune_steps": 2, "max_eval_samples": 40}


@pytest.mark.slow
def test_the_benchmark_of_posteriors(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")
    import posterior

    execute(prepare(load_config("on_demand.yaml", output_dir=str(tmp_path / "run"), **TINY)))
    small = {"NUM_EXAMPLES": (3, 20), "STEPS": (0, 2), "RATES": (0.01,), "NUM_CANDIDATES": 64, "NUM_DRAWS": 8}
    for name, value in small.items():
        monkeypatch.setattr(posterior, name, value)
    found = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["posterior.py", *[str(tmp_path / "run")] * 2, "--output", str(found)])
    posterior.main()
    report = json.loads(found.read_text())
    rows = report["examples"]
    assert {name: len(row["20"]["nll"]) for name, row in rows.items()} == dict.fromkeys(rows, 6)  # of two runs
    assert rows["posterior of the training networks"]["3"]["choice"].startswith("temperature")
    assert rows["base model, fine-tuned"]["3"]["choice"] in ("rate 0.01, 0 steps", "rate 0.01, 2 steps")
    assert set(report["unknown"]) >= {"generator", "kernel ridge", "base model"}
    assert "| posterior of the generator | " in capsys.readouterr().out
