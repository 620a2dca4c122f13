"""The benchmark of posteriors runs on a finished run, from the first example to its tables."""

import json

import pytest
from support.scripts import SCRIPTS


@pytest.mark.slow
def test_the_benchmark_of_posteriors(family_run, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")
    import posterior

    small = {"NUM_EXAMPLES": (3, 20), "STEPS": (0, 2), "RATES": (0.01,), "NUM_CANDIDATES": 64, "NUM_DRAWS": 8}
    for name, value in small.items():
        monkeypatch.setattr(posterior, name, value)
    found = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["posterior.py", *[str(family_run.folder)] * 2, "--output", str(found)])
    posterior.main()
    report = json.loads(found.read_text())
    rows = report["examples"]
    assert {name: len(row["20"]["nll"]) for name, row in rows.items()} == dict.fromkeys(rows, 6)  # of two runs
    assert rows["posterior of the training networks"]["3"]["choice"].startswith("temperature")
    assert rows["base model, fine-tuned"]["3"]["choice"] in ("rate 0.01, 0 steps", "rate 0.01, 2 steps")
    assert set(report["unknown"]) >= {"generator", "kernel ridge", "base model"}
    assert "| posterior of the generator | " in capsys.readouterr().out
