"""The report on unseen members of a family: closed forms, tuned opponents, costs, and what it says."""

import dataclasses
import json
from importlib.resources import files

import jsonschema
import pytest
import torch
from accelerate import Accelerator
from benchmarks.on_demand import pool_reports
from support.families import make_family, make_networks

from pdiff_hf.evaluation import Cost, Kind, Report, evaluate
from pdiff_hf.evaluation.closed_forms import closed_forms, nearest_seen
from pdiff_hf.evaluation.member_score import MemberScorer
from pdiff_hf.evaluation.members import Spent
from pdiff_hf.evaluation.opponents import (
    Regime,
    oracles,
)
from pdiff_hf.evaluation.verdict import find_warnings, write_verdict
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.snapshots.zoo import ZooArguments
from pdiff_hf.tasks import accuracies
from pdiff_hf.training.tune import fresh_tasks
from pdiff_hf.utils.reports import TEST

SCHEMA = json.loads(files("pdiff_hf.evaluation").joinpath("report_schema.json").read_text())


@pytest.fixture(scope="module")
def world():
    """A family, its base model, tables of members, and networks around the base model for the seen ones."""
    family = make_family()
    networks = make_networks(family)
    tables = {
        name: family.fields.table(rows)
        for name, rows in family.split({"train": 12, "validation": 4, "test": 6}, seed=0).items()
    }
    noise = torch.randn(24, networks.layout.num_parameters, generator=torch.Generator().manual_seed(0))
    return family, networks, tables, networks.base_parameters() + 0.1 * noise


def regime_of(world) -> Regime:
    family, networks, tables, _ = world
    device = Accelerator().device
    batches = lambda args: fresh_tasks(family, args, set(), device)  # noqa: E731
    return Regime(family, networks, Accelerator(), batches, 12, tables["validation"], 0)


def test_scores_are_those_of_each_task_by_itself(world):
    family, networks, tables, snapshots = world
    table, parameters = tables["test"][:3], snapshots[:6].unflatten(0, (3, 2))
    scores = MemberScorer(family, networks, table).score("test", parameters)
    for t, condition in enumerate(family.fields.conditions(table)):
        task = family.task(condition)
        models = NetworkRunner(networks.model, networks.layout)
        torch.testing.assert_close(scores.values[t], accuracies(task, models, "test", parameters[t]).double())
        networks.model.load_state_dict(networks.layout.unflatten(parameters[t, 0]))
        split = task.load_split("test")
        batch = split.__getitems__(list(range(len(split))))
        assert scores.losses[t, 0].item() == pytest.approx(task.loss(networks.model, batch).item(), rel=1e-4)
    alike = parameters[:, :1].expand(-1, 2, -1)
    vote = MemberScorer(family, networks, table).score("test", alike, vote=True)
    torch.testing.assert_close(vote.losses[:, 0], scores.losses[:, 0])
    networks.model.load_state_dict(networks.layout.unflatten(snapshots.mean(0)))


def test_nearest():
    seen = torch.tensor([[0.0], [1.0], [5.0]])
    assert nearest_seen(torch.tensor([[0.4], [4.0]]), seen, 1).tolist() == [[0], [2]]
    assert nearest_seen(torch.tensor([[0.4]]), seen, 2).tolist() == [[0, 1]]
    assert nearest_seen(torch.tensor([[2.6]]), seen[:, None] + torch.tensor([[0.0], [1.5]]), 2).tolist() == [[1, 0]]


def test_closed_forms_choose_on_validation(world):
    family, networks, tables, snapshots = world
    regime = regime_of(world)
    forms = closed_forms(regime, snapshots, tables["train"].repeat(2, 1), Cost(1000))
    groups = {name: make() for name, make in forms}
    # The nearest snapshot is the last one of the nearest task.
    features = family.fields.features
    rows = torch.cdist(features(tables["test"]), features(tables["train"])).argmin(1)
    assert torch.equal(groups["nearest snapshot"].networks(TEST, tables["test"]), snapshots[12 + rows])
    assert groups["nearest snapshot"].kind == Kind.SNAPSHOTS and groups["kernel ridge"].cost == Cost(1000)
    ensemble = groups["ensemble of nearest snapshots"]
    best = min(ensemble.tried, key=ensemble.tried.get)
    assert ensemble.vote and ensemble.size == int(best) * regime.size and ensemble.note == f"{best} tasks"


def evaluated(world, regime, cached, **kwargs) -> Report:
    """Of the base model as the generated networks, with scores kept in the folder `cached`."""
    family, networks, tables, snapshots = world
    return evaluate(
        networks.base_parameters().expand(6, 3, -1),
        family,
        snapshots=snapshots,
        conditions=tables["train"].repeat(2, 1),
        base_model=networks.model,
        layout=networks.layout,
        sets={name: tables[name] for name in ("validation", TEST)},
        regime=regime,
        num_examples=40,
        cache=cached / "cache.json",
        **kwargs,
    )


@pytest.fixture(scope="module")
def report(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    found = evaluated(
        world,
        regime_of(world),
        folder,
        folder=folder,
        spent=Spent(300, 1000, 2_000_000),
        zoo=ZooArguments(num_steps=10, batch_size=8),
    )
    return found, folder


def test_a_whole_report(report, world, tmp_path):
    found, folder = report
    family, networks, tables, snapshots = world
    jsonschema.validate(found.to_dict(), SCHEMA)
    assert Report.load(folder).to_dict() == found.to_dict()
    assert {path.name for path in folder.glob("report.*")} == {"report.json", "report.md", "report.html"}
    assert found.conditions[TEST] == family.fields.conditions(tables["test"])
    scorer = MemberScorer(family, networks, tables["test"], 40)
    features = family.fields.features
    rows = torch.cdist(features(tables["test"]), features(tables["train"])).argmin(1)
    expected = scorer.score("test", snapshots[12 + rows]).values.mean(1).tolist()
    assert found.group("nearest snapshot").scores() == pytest.approx(expected)
    # The generated networks are the base model here.
    assert found.group("base model").comparisons[TEST].difference == pytest.approx(0, abs=1e-6)
    assert found.generated.n == 3 and found.generated.cost == Cost(2_000_000)
    oracle = found.group("trained on the task")
    assert oracle.kind == Kind.ORACLE and len(oracle.tried) >= 4
    assert oracle.cost == Cost(300 + len(oracle.tried) * 4 * 3 * 10 * 8, 3 * 10 * 8)  # the search is on 4 members
    text = (folder / "report.md").read_text()
    assert "0.04: " in text and "free: needs no feedback" in text and "2e+06" not in text
    cells = {row[0]: row for row in found.summary["rows"]}
    assert cells["generated"][-4:-1] == ["–", "2M", "0"]
    terminal = found.to_terminal()
    assert all(len(line) <= 80 for line in terminal.splitlines())


def test_pooled_reports_are_as_of_one_run(report):
    found = report[0]
    pooled = pool_reports([found, found])
    assert len(pooled.conditions[TEST]) == 12 and "score_mean" not in pooled.generated.measures  # which are one run's
    one, both = (r.group("kernel ridge").comparisons[TEST] for r in (found, pooled))
    assert both.difference == pytest.approx(one.difference)
    assert both.interval[1] - both.interval[0] < one.interval[1] - one.interval[0]


def test_tuning_mends_an_under_tuned_opponent(world, monkeypatch):
    """The rate that networks of seen tasks were trained at says nothing about how good an oracle can be."""
    family, networks, tables, _ = world
    scorer = MemberScorer(family, networks, tables["test"])
    regime, args = regime_of(world), ZooArguments(num_steps=25, batch_size=32, learning_rate=1e-4)
    under_tuned = scorer.score("test", regime.specialists(tables["test"], args)).values.mean()
    ((_, make),) = oracles(regime, args, 0, (1,))
    group = make()
    tuned = scorer.score("test", group.networks(TEST, tables["test"])).values.mean()
    assert tuned > under_tuned + 5
    best = min(group.tried, key=group.tried.get)
    assert group.note == f"learning rate {best} of {len(group.tried)}"
    rates = sorted(group.tried, key=float)
    assert best not in (rates[0], rates[-1])  # until it falls again at both edges


def with_scores(report: Report, **scores: float) -> Report:
    """The report with another mean score for some groups."""
    copy = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    spread = [-1.0, 1.0, -2.0, 2.0, -0.5, 0.5]
    for name, value in scores.items():
        copy.group(name.replace("_", " ")).sets[TEST]["scores"] = [[value + s] for s in spread]
    copy.compare()
    copy.describe()
    return copy


def test_the_report_recommends_what_is_better(report):
    better = with_scores(report[0], generated=70.0, nearest_snapshot=60.0, kernel_ridge=65.0, trained_on_the_task=69.9)
    first, second, third = better.verdict
    assert first == "Against the snapshots: better, +10.00 (nearest snapshot, 70.00 and 60.00 %)."
    assert second == "Against free alternatives: better, +5.00 (kernel ridge, 70.00 and 65.00 %)."
    assert third == "With equal feedback: better, +0.10 (trained on the task, 70.00 and 69.90 %)."
    worse = with_scores(report[0], generated=70.0, nearest_snapshot=81.7, kernel_ridge=75.0)
    assert write_verdict(worse)[1].endswith("Use nearest snapshot.")
    assert len(" ".join(worse.verdict).split()) <= 40


def test_a_generator_that_ignores_its_conditions_is_warned_of(report):
    copy = with_scores(report[0], generated=70.0)
    control = dataclasses.replace(copy.generated, name="generated, shuffled conditions", kind=Kind.CONTROL)
    copy.groups.append(control)
    copy.compare()
    copy.describe()
    assert "the generator ignores what it is told" in find_warnings(copy)[0]
    control.sets = {TEST: {"scores": [[s] for s in (20.0, 40.0, 80.0, 90.0, 100.0, 100.0)]}}  # six tasks cannot tell
    copy.compare()
    (warning,) = find_warnings(copy)
    assert "6 tasks cannot decide whether" in warning and " to +" in warning and "as good" not in warning
    control.sets = {TEST: {"scores": [[30.0]] * 6}}
    copy.compare()
    copy.describe()
    assert not find_warnings(copy)
    before = dataclasses.replace(control, name="generator by weights", kind=Kind.VARIANT)
    copy.groups = [row for row in copy.groups if row.name != before.name] + [before]
    before.sets = {TEST: {"scores": [[90.0]] * 6}}
    copy.compare()
    assert "better before tuning (90.00 %" in find_warnings(copy)[0]


def test_evaluate_is_one_call(world, without_figures):
    family, networks, tables, snapshots = world
    conditions = family.fields.conditions(tables["train"].repeat(2, 1))
    options = {"base_model": networks.model, "layout": networks.layout, "snapshots": snapshots}
    options |= {"sets": {"validation": tables["validation"], TEST: tables["test"]}, "num_examples": 20}
    options |= {"zoo": ZooArguments(num_steps=2, batch_size=4)}
    answers = networks.base_parameters().expand(6, -1)
    report = evaluate(answers, family, conditions=conditions, **options)
    assert report.generated.n == 1 and report.group("kernel ridge").verdict is not None
    with pytest.raises(ValueError, match="conditions is needed"):
        evaluate(answers, family, **options)
