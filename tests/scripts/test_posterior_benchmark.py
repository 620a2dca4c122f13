"""The benchmark of posteriors runs from the first image to its report, on both families."""

import json

import pytest
from support.scripts import SCRIPTS

TINY = [
    ["--num_seen=12", "--num_validation=2", "--num_unseen=2", "--base_steps=20", "--zoo_steps=60", "--latent_dim=6"],
    [
        "--denoiser_steps=5",
        "--tune_steps=2",
        "--set_steps=2",
        "--hidden_size=6",
        "--num_inference_steps=2",
        "--zoo_sharpness=4",
    ],
]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["transformed", "grouped"])
def test_the_benchmark_of_posteriors(family, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")
    import posterior
    import posterior_priors

    small = {"NUM_EXAMPLES": (0, 3), "TUNING_STEPS": [0, 2], "REFINE_STEPS": [0, 2], "NUM_REFINED": 4}
    small |= {"NUM_CANDIDATES": 256, "NUM_QUERIES": {"validation": 20, "test": 40}, "NUM_DRAWS": 16, "NUM_NEAREST": 4}
    for name, value in small.items():
        monkeypatch.setattr(posterior, name, value)
    monkeypatch.setattr(posterior_priors, "SET_SIZE", 8)
    flags = [*sum(TINY, []), "--family", family, "--output_dir", tmp_path]
    monkeypatch.setattr("sys.argv", ["posterior.py", *map(str, flags)])
    posterior.main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["examples"]) == ["0 examples", "3 examples"]
    text = (tmp_path / "report.md").read_text()
    assert "| generator  " in text and "| zoo generator and training networks, refined " in text
    assert ("what the unknown bits cost at least" in text) == (family == "grouped")
    # What is trained already is read, and gives the same again.
    capsys.readouterr()
    posterior.main()
    assert json.loads((tmp_path / "report.json").read_text())["examples"] == report["examples"]
    assert "tuned:" not in capsys.readouterr().out
