"""Trivial generators with feedback: they are better for it, cost what they say, and stand in the report."""

import json
from copy import deepcopy
from importlib.resources import files

import jsonschema
import pytest
import torch
from support.evaluation import digits, digits_pipeline, digits_snapshots

from pdiff_hf.evaluation import compare as comparing
from pdiff_hf.evaluation.baselines import low_rank_gaussian
from pdiff_hf.evaluation.compare import compare_generator
from pdiff_hf.evaluation.render import format_report
from pdiff_hf.evaluation.sampling import Passes, named_generator
from pdiff_hf.evaluation.scoring import make_scorer
from pdiff_hf.evaluation.tuned_baselines import BEST_OF, TEMPERATURES, TunedBaselines
from pdiff_hf.evaluation.verdict import break_even, write_verdict
from pdiff_hf.training.ensembles import EnsembleObjective, Tuning

SCHEMA = json.loads(files("pdiff_hf.evaluation").joinpath("report_schema.json").read_text())
TUNING = Tuning(EnsembleObjective(2, 0.1, 0.01), num_steps=30, num_networks=4, num_examples=50, passes=20_000)
COUNT = 6


@pytest.fixture(scope="module")
def groups():
    scorer, snapshots = digits(), digits_snapshots()
    autoencoder = digits_pipeline(scorer, snapshots).autoencoder
    with torch.no_grad():
        latents = autoencoder.encode(snapshots).latents
    baselines = TunedBaselines(scorer, autoencoder, snapshots, latents, TUNING, COUNT, "few", seed=0)
    return {group.name: group for group in baselines.groups()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_groups(groups):
    """Its own random numbers tune them, but they have the same names and are as many."""
    scorer = make_scorer(digits().task, deepcopy(digits().models.model).to("cuda"), digits().layout)
    snapshots = digits_snapshots()
    autoencoder = digits_pipeline(scorer, snapshots).autoencoder
    with torch.no_grad():
        latents = autoencoder.encode(snapshots).latents
    autoencoder.to("cuda")
    baselines = TunedBaselines(scorer, autoencoder, snapshots, latents, TUNING, COUNT, "few", seed=0)
    found = {group.name: group.parameters for group in baselines.groups()}
    assert found.keys() == groups.keys()
    assert all(parameters.shape == groups[name].parameters.shape for name, parameters in found.items())


def loss(parameters: torch.Tensor) -> float:
    """Mean negative log-likelihood of the training examples."""
    scores = digits().score("train", parameters)
    return -scores.log_probs.float().gather(-1, scores.labels.expand(len(parameters), -1).unsqueeze(-1)).mean().item()


def test_feedback_makes_them_better(groups):
    snapshots = digits_snapshots()
    swag = low_rank_gaussian(snapshots, COUNT, 1.0, named_generator(0, "SWAG, refined"), with_diagonal=True)
    losses = [loss(swag), *(loss(groups[f"SWAG, {steps} steps"].parameters) for steps in (3, 9, 30))]
    assert losses == sorted(losses, reverse=True) and losses[3] < losses[0] - 0.05
    around_mean = groups["tuned mean, diagonal 0.5"].parameters
    plain = snapshots.mean(0) + around_mean - around_mean.mean(0)
    assert loss(around_mean) < loss(plain) - 0.05
    torch.testing.assert_close(around_mean.std(0).mean(), 0.5 * snapshots.std(0).mean(), rtol=0.2, atol=0)
    assert loss(groups["tuned Gaussian 0.5"].parameters) < losses[0]


def test_the_best_of_some_is_the_one_that_validation_prefers(groups):
    """The candidates of a network are the first ones of the larger choice."""
    candidates = low_rank_gaussian(
        digits_snapshots(), COUNT * max(BEST_OF), 1.0, named_generator(0, "best of SWAG"), with_diagonal=True
    ).unflatten(0, (COUNT, -1))
    for count in BEST_OF:
        chosen = groups[f"SWAG, best of {count}"].parameters
        for row, tried in zip(chosen, candidates, strict=True):
            values = digits().score("validation", tried[:count]).values
            assert digits().score("validation", row[None]).values.item() == values.max()


def test_they_cost_what_they_say(groups):
    validations = 5 * 4 * 50  # looks, networks, examples
    once = 3 * 30 * 4 * 50
    assert groups["tuned mean, low-rank 1.0"].feedback == Passes(once + validations, 0)
    assert groups["tuned Gaussian 1.0"].feedback == Passes(3 * (once + validations), 0)
    assert groups["SWAG, 9 steps"].feedback == Passes(0, 3 * 9 * 50)
    assert groups["SWAG, best of 16"].feedback == Passes(0, 16 * 50)
    assert len(groups) == 3 * len(TEMPERATURES["few"]) + 3 + 2
    assert all(group.parameters.shape[0] == COUNT for group in groups.values())


def test_they_stand_in_the_report_of_a_tuned_generator(tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "draw_figures", lambda *args, **kwargs: None)
    scorer, snapshots = digits(), digits_snapshots()
    pipeline = digits_pipeline(scorer, snapshots)
    pipeline.register_to_config(temperature=0.5)
    settings = {"num_models": 4, "baseline_models": 2}
    report = compare_generator(scorer, snapshots, pipeline, tmp_path, tuning=TUNING, **settings)
    jsonschema.validate(report, SCHEMA)
    rows = {row["name"]: row for row in report["groups"]}
    assert rows["generated"]["feedback"] == {"once": 20_000, "each": 0}
    tuned = [row["name"] for row in report["frontier"]["rows"] if row["tuned"] and row["name"] != "generated"]
    assert {"tuned Gaussian 0.25", "SWAG, 30 steps", "SWAG, best of 4"} <= set(tuned)
    assert f"of {len(tuned)} settings of trivial generators with the same feedback" in report["verdict"]
    plain = len(report["frontier"]["rows"]) - 1 - len(tuned)
    assert f"Of {plain} settings of trivial generators they are" in report["verdict"]
    # 20,000 passes are those of 5 networks that take 30 steps of 50 images forward and backward.
    paid = {entry["name"]: entry["num_models"] for entry in report["tuning"]["break_even"]}
    assert paid["SWAG, 30 steps"] == 5 and paid["SWAG, best of 4"] == 100 and len(paid) == 5
    assert "| SWAG, 30 steps " in (text := format_report(report)) and "The same feedback" in text
    # The generator's own curve: neither a baseline, nor in the small table.
    curve = {row["value"]: row for row in report["temperatures"]}
    assert set(curve) == {0.25, 0.75, 1.0, 1.25, 1.5} and "generated 1.5" in rows
    assert sum(curve[1.5]["plain"].values()) == plain and sum(curve[1.5]["tuned"].values()) == len(tuned)
    assert not any("generated 1.5" in cell for line in report["summary"]["rows"] for cell in line)
    (expected,) = pipeline(2, 2, named_generator(0, "generated"), temperature=1.5, output_type="pt", return_dict=False)
    assert rows["generated 1.5"]["scores"] == scorer.score("test", expected).values.tolist()


def sentence(verdicts: dict[str, str]) -> str:
    """Of a report in which some groups with feedback have these verdicts."""
    generated = {"name": "generated", "score_mean": 80.0, "feedback": {"once": 1000, "each": 0}}
    each = {"A": 0, "B": 30, "C": 300}
    report = {
        "metric": {"name": "accuracy", "unit": "%", "higher_is_better": True},
        "groups": [
            {"name": "snapshots", "score_mean": 80.0},
            generated,
            *({"name": name, "feedback": {"once": 0, "each": each[name]}} for name in verdicts),
        ],
        "difference": {"difference": 0.0, "interval": [-1.0, 1.0], "verdict": "undecided"},
        "frontier": {
            "rows": [{"name": "generated", "verdict": None, "max_iou": 0.5, "tuned": True}]
            + [{"name": name, "verdict": verdict, "max_iou": 0.5, "tuned": True} for name, verdict in verdicts.items()]
        },
        "tuning": {"passes": 1000},
    }
    report["tuning"]["break_even"] = break_even(report)
    return write_verdict(report)


def test_the_verdict_follows_from_the_numbers():
    worse = sentence({"A": "worse", "B": "better", "C": "undecided"})
    assert "tuned on the task, in 1,000 passes of an image" in worse
    assert (
        "of 3 settings of trivial generators with the same feedback it is better than 1 and worse than 1 (A)" in worse
    )
    assert worse.endswith("Against C its cost is paid back after 4 networks, against B after 34.")
    assert "worse than 2 (A and B)" in sentence({"A": "worse", "B": "worse"})
    assert sentence({"A": "better"}).endswith("better than 1 and worse than 0, and 0 are undecided.")
    assert "no trivial generator with the same feedback was compared" in sentence({})
