"""The benchmark of posteriors runs from the first image to its report, on both families."""

import json

import pytest
from support.scripts import SCRIPTS, run_script

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
    import posterior_examples
    import posterior_fields
    import posterior_priors

    for module, name, value in (
        (posterior_examples, "NUM_EXAMPLES", (0, 3)),
        (posterior_examples, "TUNING_STEPS", [0, 2]),
        (posterior_examples, "REFINE_STEPS", [0, 2]),
        (posterior_examples, "NUM_REFINED", 4),
        (posterior_examples, "NUM_CANDIDATES", 256),
        (posterior_examples, "NUM_QUERIES", {"validation": 20, "test": 40}),
        (posterior_fields, "NUM_DRAWS", 16),
        (posterior_fields, "NUM_NEAREST", 4),
        (posterior_priors, "SET_SIZE", 8),
    ):
        monkeypatch.setattr(module, name, value)
    flags = [*sum(TINY, []), "--family", family, "--output_dir", tmp_path]
    run_script(monkeypatch, "benchmarks/posterior.py", *flags)
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["examples"]) == ["0 examples", "3 examples"]
    text = (tmp_path / "report.md").read_text()
    assert "| generator |" in text and "| zoo generator and training networks, refined |" in text
    assert ("what the unknown bits cost at least" in text) == (family == "grouped")
    # What is trained already is read, and gives the same again.
    run_script(monkeypatch, "benchmarks/posterior.py", *flags)
    assert json.loads((tmp_path / "report.json").read_text())["examples"] == report["examples"]
    assert "tuning:" not in capsys.readouterr().out.split("hypernetwork by weights")[-1].split("generator")[0]
