"""Two processes carry out all stages as one does, and write what one writes."""

import json
from pathlib import Path

import pytest
import torch
from run.test_family_run import CHANGES
from safetensors.torch import load_file
from support.recipes import TINY_FAMILY
from support.run_server import RECIPE, ROOT, together

from pdiff_hf.snapshots import load_snapshots, parameter_matrix

# Few steps, because rounding makes two trainings part in the long run.
SETTINGS = RECIPE | {
    "base_epochs": 1,
    "num_snapshots": 12,
    "collect_learning_rate": 0.003,
    "autoencoder_steps": 6,
    "denoiser_steps": 6,
    "checkpointing_steps": 4,
}


def flags_of(settings: dict) -> list[str]:
    """As a shell has them: lists word by word, mappings as JSON."""
    texts = {
        key: " ".join(v) if isinstance(v, list) else json.dumps(v) if isinstance(v, dict) else v
        for key, v in settings.items()
    }
    return [f"--{key}={text}" for key, text in texts.items()]


FLAGS = flags_of(SETTINGS)


def tensors(folder) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(folder)}: {name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        if path.parent.parent.name != "scores"
        for name, tensor in load_file(path).items()
    }


def assert_same_tensors(one: Path, two: Path) -> None:
    expected, found = tensors(one), tensors(two)
    assert list(expected) == list(found)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    snapshots = [parameter_matrix(*load_snapshots(run / "snapshots")) for run in (one, two)]
    torch.testing.assert_close(snapshots[1], snapshots[0], rtol=1e-5, atol=1e-5)


PROGRAM = """
import os, runpy, sys, torch
from pdiff_hf.run.processes import start_processes
start_processes()
days = torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout.days
print(f"waits for {days} days")  # in one piece, because two processes write at the same time
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_two_processes_do_in_all_stages_what_one_does_in_two_parts(two_servers, tmp_path):
    """Noise belongs to a part of a batch, so one process must compute it in as many parts."""
    one = two_servers[0].run(tmp_path / "one", *FLAGS, "--gradient_accumulation_steps=2")
    assert one.status == 0, one.errors
    arguments = (ROOT / "scripts/train.py", f"--output_dir={tmp_path / 'two'}", *FLAGS)
    two = together(two_servers, lambda server, ranks: server.program(PROGRAM, *arguments, environment=ranks))
    assert [process.status for process in two] == [0, 0], two
    errors, output = ("".join(getattr(process, name) for process in two) for name in ("errors", "output"))

    assert_same_tensors(tmp_path / "one", tmp_path / "two")
    reports = [json.loads((tmp_path / run / "evaluation/report.json").read_text()) for run in ("one", "two")]
    for a, b in zip(*(report["groups"] for report in reports), strict=True):
        assert (a["name"], a["n"]) == (b["name"], b["n"])
        assert b["sets"]["test"]["scores"][0] == pytest.approx(
            a["sets"]["test"]["scores"][0], abs=2.0
        )  # one of 60 examples is 1.7
        assert b["measures"]["nll"] == pytest.approx(a["measures"]["nll"], rel=1e-2)

    names = [
        {str(path.relative_to(tmp_path / run)) for path in (tmp_path / run).rglob("*") if "/scores/" not in str(path)}
        for run in ("one", "two")
    ]
    assert names[0] == names[1]
    counts = [len(list((tmp_path / run / "scores").rglob("*.*"))) for run in ("one", "two")]
    assert counts[0] == counts[1] > 0
    trainings = ("base model", "snapshots", "autoencoder", "denoiser")
    for bar in (*trainings, "accuracy on validation", "accuracy on test"):  # one process alone shows them
        assert errors.count(f"{bar}:   0%") == one.errors.count(f"{bar}:   0%") > 0, bar
    assert errors.count("[5/5] evaluate: done in") == 1
    assert output.count("The generator is in") == 1
    # The main process collects alone, and the others must not take that for its end: gloo's own limit is 30 minutes.
    assert output.count("waits for 28 days") == 2


@pytest.mark.slow
def test_two_processes_do_for_a_family_what_one_does_in_two_parts(two_servers, tmp_path):
    """The zoo, the generator, its tuning, and all that is scored."""
    settings = TINY_FAMILY | CHANGES | {"baselines": "few"}
    flags = flags_of(settings)
    one = two_servers[0].run(tmp_path / "one", *flags, "--gradient_accumulation_steps=2")
    assert one.status == 0, one.errors
    two = together(two_servers, lambda server, ranks: server.run(tmp_path / "two", *flags, environment=ranks))
    assert [process.status for process in two] == [0, 0], two
    assert_same_tensors(tmp_path / "one", tmp_path / "two")
    reports = [json.loads((tmp_path / run / "evaluation/report.json").read_text()) for run in ("one", "two")]
    one, two = ({group["name"]: group for group in report["groups"]} for report in reports)
    assert list(one) == list(two)
    for name, group in one.items():
        assert two[name]["cost"] == group["cost"], name
