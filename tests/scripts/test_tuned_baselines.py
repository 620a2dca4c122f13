"""Trivial generators with feedback: they are better for it, cost what they say, and stand in the report."""

import json
import math
from copy import deepcopy
from importlib.resources import files

import jsonschema
import pytest
import torch
from support.evaluation import digits, digits_pipeline, digits_snapshots, report_on

from pdiff_hf.evaluation import Cost, Kind
from pdiff_hf.evaluation.baselines import BaselineContext, low_rank_gaussian
from pdiff_hf.evaluation.groups import named_generator, search
from pdiff_hf.evaluation.score import Scorer
from pdiff_hf.evaluation.single_task import SingleTask
from pdiff_hf.scripts.tuned_baselines import BEST_OF, TEMPERATURES, TunedBaselines, tuned_baselines
from pdiff_hf.training.ensembles import EnsembleObjective, Tuning

SCHEMA = json.loads(files("pdiff_hf.evaluation").joinpath("report_schema.json").read_text())
TUNING = Tuning(EnsembleObjective(2, 0.1, 0.01), num_steps=30, num_networks=4, num_examples=50, passes=20_000)
COUNT = 6


def baselines(scorer, folder) -> TunedBaselines:
    snapshots = digits_snapshots()
    pipeline = digits_pipeline(scorer, snapshots).to(next(scorer.models.model.parameters()).device)
    options = {"tuning": TUNING, "baseline_models": COUNT, "baselines": "few", "seed": 0, "num_models": 1}
    return TunedBaselines(SingleTask(scorer, pipeline, snapshots, folder, **options))


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    return {group.name: group for group in baselines(digits(), tmp_path_factory.mktemp("tuned")).groups()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_groups(groups, tmp_path):
    """Its own random numbers tune them, but they have the same names and are as many."""
    scorer = Scorer(digits().task, deepcopy(digits().models.model).to("cuda"), digits().layout)
    found = {group.name: group.networks for group in baselines(scorer, tmp_path).groups()}
    assert found.keys() == groups.keys()
    assert all(parameters.shape == groups[name].networks.shape for name, parameters in found.items())


def loss(parameters: torch.Tensor) -> float:
    """Mean negative log-likelihood of the training examples."""
    scores = digits().score("train", parameters)
    return -scores.log_probs.float().gather(-1, scores.labels.expand(len(parameters), -1).unsqueeze(-1)).mean().item()


def test_feedback_makes_them_better(groups):
    snapshots = digits_snapshots()
    swag = low_rank_gaussian(
        BaselineContext(snapshots), COUNT, 1.0, named_generator(0, "SWAG, refined"), with_diagonal=True
    )
    losses = [loss(swag), *(loss(groups[f"SWAG, {steps} steps"].networks) for steps in (3, 9, 30))]
    assert losses == sorted(losses, reverse=True) and losses[3] < losses[0] - 0.05
    around_mean = groups["tuned mean, diagonal 0.5"].networks
    plain = snapshots.mean(0) + around_mean - around_mean.mean(0)
    assert loss(around_mean) < loss(plain) - 0.05
    torch.testing.assert_close(around_mean.std(0).mean(), 0.5 * snapshots.std(0).mean(), rtol=0.2, atol=0)
    assert loss(groups["tuned Gaussian 0.5"].networks) < losses[0]


def test_the_best_of_some_is_the_one_that_validation_prefers(groups):
    """The candidates of a network are the first ones of the larger choice."""
    candidates = low_rank_gaussian(
        BaselineContext(digits_snapshots()),
        COUNT * max(BEST_OF),
        1.0,
        named_generator(0, "best of SWAG"),
        with_diagonal=True,
    ).unflatten(0, (COUNT, -1))
    for count in BEST_OF:
        chosen = groups[f"SWAG, best of {count}"].networks
        for row, tried in zip(chosen, candidates, strict=True):
            values = digits().score("validation", tried[:count]).values
            assert digits().score("validation", row[None]).values.item() == values.max()


def test_they_cost_what_they_say(groups):
    validations = 5 * 4 * 50  # looks, networks, examples
    once = 3 * 30 * 4 * 50
    assert groups["tuned mean, low-rank 1.0"].cost == Cost(once + validations)
    assert groups["tuned Gaussian 1.0"].cost == Cost(4 * (once + validations))
    refined = groups["SWAG, 9 steps"]
    assert len(refined.tried) >= 4 and refined.note == f"learning rate of {len(refined.tried)}"
    assert refined.cost == Cost(len(refined.tried) * COUNT * (3 * 9 * 50 + 50), 3 * 9 * 50)
    assert groups["SWAG, best of 16"].cost == Cost(0, 16 * 50)
    assert len(groups) == 3 * len(TEMPERATURES["few"]) + 3 + 2
    assert all(len(group.networks) == COUNT and group.kind == Kind.OPPONENT for group in groups.values())


def test_a_rate_at_the_edge_is_not_the_end_of_the_search():
    best, tried = search(lambda rates: [(rate - 0.5) ** 2 for rate in rates], (0.01, 0.02, 0.04, 0.08))
    assert best == pytest.approx(0.64) and len(tried) == 8 and tried["1.28"] > tried["0.64"]  # until it rises again
    best, tried = search(list, (0.01, 0.02, 0.04, 0.08), most=2)
    assert best == pytest.approx(0.0025) and len(tried) == 6
    assert search(lambda rates: [math.nan, 1.0, 2.0, 3.0][: len(rates)], (1, 2, 3, 4))[0] == 2


def test_they_stand_in_the_report_of_a_tuned_generator(tmp_path, without_figures):
    scorer, snapshots = digits(), digits_snapshots()
    pipeline = digits_pipeline(scorer, snapshots)
    pipeline.register_to_config(temperature=0.5)
    options = {"num_models": 4, "baseline_models": 2, "extra_groups": tuned_baselines}
    report = report_on(scorer, snapshots, pipeline, tmp_path, tuning=TUNING, untuned=pipeline, **options)
    jsonschema.validate(report.to_dict(), SCHEMA)
    assert report.generated.cost == Cost(20_000)
    untuned = report.group("generator by weights")
    assert untuned.kind == Kind.VARIANT and untuned.sets == report.generated.sets
    tuned = {row.name for row in report.of_kind(Kind.OPPONENT)}
    assert {"tuned Gaussian 0.25", "SWAG, 30 steps", "SWAG, best of 4"} <= tuned
    assert f"of {len(tuned)} (accuracy and novelty)" in report.verdict[2]
    # 20,000 passes less those of the search are those of networks that take 30 steps of 50 images.
    section = report.to_markdown().partition("The same feedback")[2].partition("</details>")[0]
    lines = [line.split("|") for line in section.splitlines() if "| SWAG" in line]
    paid = {cells[1].strip(): cells[-2].strip() for cells in lines}
    assert paid["SWAG, best of 4"] == "100" and {"SWAG, 30 steps", "SWAG, best of 16"} < paid.keys()
    # The generator's own curve: neither a baseline, nor in the small table.
    curve = {row.value for row in report.of_kind(Kind.VARIANT) if row.sweep == "generated at other temperatures"}
    assert curve == {0.25, 0.75, 1.0, 1.25, 1.5}
    assert not any("generated 1.5" in cell for line in report.summary["rows"] for cell in line)
    expected = pipeline(2, generator=named_generator(0, "generated"), temperature=1.5, output_type="pt").parameters
    assert report.group("generated 1.5").scores() == scorer.score("test", expected).values.tolist()
