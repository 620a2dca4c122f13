"""The audit of a conditional generator: its baselines against other implementations, its interval, and its verdict."""

import json

import numpy as np
import pytest
import torch
from benchmarks.on_demand import pool_reports
from sklearn.kernel_ridge import KernelRidge as SklearnKernelRidge
from support.families import make_family, make_networks

from pdiff_hf.evaluation.conditional import (
    ConditionalAudit,
    Cost,
    paired_bootstrap,
    plot_field,
    score_tasks,
    verdict,
)
from pdiff_hf.evaluation.conditional_baselines import BasisNetworks, GenericNetwork, nearest_mean
from pdiff_hf.models.kernel_ridge import KernelRidge
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.tasks import accuracy


def test_kernel_ridge_is_scikit_learns():
    family = make_family()
    table = family.fields.table(family.conditions(20, seed=0))
    parameters = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    asked = family.fields.table(family.conditions(5, seed=1))
    ridge = KernelRidge(family.fields, table, parameters, 0.1, [0.5] * 4)
    reference = SklearnKernelRidge(alpha=0.1, kernel="rbf", gamma=0.5 * 0.5**2)
    mean, features = parameters.mean(0), family.fields.features
    reference.fit(features(table).numpy(), (parameters - mean).numpy())
    expected = mean + torch.from_numpy(reference.predict(features(asked).numpy()))
    torch.testing.assert_close(ridge(asked), expected.float(), atol=1e-5, rtol=1e-4)

    # The covariance of samples is that of residuals where each network is left out in turn.
    residuals = []
    for i in range(20):
        rest = [j for j in range(20) if j != i]
        reference.fit(features(table[rest]).numpy(), (parameters[rest] - mean).numpy())
        residuals.append((parameters[i] - mean).numpy() - reference.predict(features(table[i : i + 1]).numpy())[0])
    samples = ridge.sample(asked[:1], 40_000, torch.Generator().manual_seed(0))[0]
    covariance = np.transpose(residuals) @ np.asarray(residuals) / 20
    np.testing.assert_allclose(torch.cov(samples.T).numpy(), covariance, atol=0.05)
    torch.testing.assert_close(samples.mean(0), ridge(asked[:1])[0], atol=0.05, rtol=0)


def test_tuned_kernel_ridge_takes_the_best_of_what_it_tries():
    family = make_family(ranges={"angle": None, "invert": None, "occlude": None})
    table = family.fields.table(family.conditions(30, seed=0))
    asked = family.fields.table(family.conditions(10, seed=1))

    def truth(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([(3 * rows).sin(), rows], dim=1)

    ridge = KernelRidge.tuned(
        family.fields, table, truth(table), lambda model: (model(asked) - truth(asked)).square().mean().item()
    )
    assert (ridge(asked) - truth(asked)).square().mean() < 1e-3


def test_nearest_mean():
    seen, parameters = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[1.0], [3.0], [100.0]])
    assert nearest_mean(torch.tensor([[0.4], [4.0]]), seen, parameters, 1).tolist() == [[1.0], [100.0]]
    assert nearest_mean(torch.tensor([[0.4]]), seen, parameters, 2).tolist() == [[2.0]]


def test_paired_bootstrap():
    better = paired_bootstrap([3.0, 4.0, 6.0, 5.0], [2.0, 3.0, 4.0, 3.0])
    assert better["difference"] == 1.5 and better["verdict"] == "better" and 1 <= better["low"] < 1.5 < better["high"]
    assert paired_bootstrap([2.0, 3.0], [3.0, 4.0])["verdict"] == "worse"
    assert paired_bootstrap([0.0, 5.0] * 5, [5.0, 0.0] * 5)["verdict"] == "undecided"
    # With many tasks it is the interval of the central limit theorem.
    differences = np.random.default_rng(0).normal(1, 2, 400)
    row = paired_bootstrap(differences, np.zeros(400))
    half = 1.96 * differences.std() / 20
    assert row["high"] - row["low"] == pytest.approx(2 * half, rel=0.1)


def test_scores_are_those_of_each_task_by_itself():
    family = make_family()
    networks = make_networks(family)
    conditions = family.conditions(3, seed=0)
    parameters = networks.base_parameters() + 0.2 * torch.randn(3, networks.layout.num_parameters)
    table = family.fields.table(conditions)
    respond = lambda rows, batch: networks.stack(family.predict, parameters[rows], batch)  # noqa: E731
    accuracies, losses = score_tasks(family, respond, table, "test", 10_000)
    for t, condition in enumerate(conditions):
        task = family.task(condition)
        models = NetworkRunner(networks.model, networks.layout)
        assert accuracies[t].item() == pytest.approx(accuracy(task, models, "test", parameters[t : t + 1]).item())
        networks.model.load_state_dict(networks.layout.unflatten(parameters[t]))
        split = task.load_split("test")
        batch = split.__getitems__(list(range(len(split))))
        assert losses[t].item() == pytest.approx(task.loss(networks.model, batch).item(), rel=1e-4)


def test_a_whole_audit(tmp_path):
    family = make_family()
    networks = make_networks(family)
    sets = family.split({"train": 12, "validation": 4, "test": 6}, seed=0)
    tables = {name: family.fields.table(rows) for name, rows in sets.items()}
    snapshots = networks.base_parameters() + 0.1 * torch.randn(24, networks.layout.num_parameters)
    audit = ConditionalAudit(family, networks, {"test": tables["test"]}, num_examples=40)
    audit.add_closed_form(snapshots, tables["train"].repeat(2, 1), tables["validation"], Cost(1000))
    start = networks.base_parameters()
    audit.add("generator", "generator", lambda _, t: start.expand(len(t), 3, -1), Cost(2_000_000, 10))
    modules = {
        "generic": GenericNetwork(networks, family.predict, start),
        "with condition": GenericNetwork(networks, family.predict, start, family.fields, torch.Size((1, 8, 8))),
        "basis": BasisNetworks(networks, family.predict, start, family.fields, num_basis=3),
    }
    for name, module in modules.items():
        audit.add_module(name, "trained", module, Cost())
    report = json.loads(json.dumps(audit.report({"seed": 0})))
    # Untrained, both generic networks are the base model, as are the "generated" ones.
    assert report["rows"]["generic"]["sets"] == report["rows"]["with condition"]["sets"]
    assert report["comparisons"]["test"]["generic"]["difference"] == pytest.approx(0, abs=1e-6)
    # The nearest seen task is represented by its last snapshot.
    features = family.fields.features
    nearest = torch.cdist(features(tables["test"]), features(tables["train"])).argmin(1)
    expected = audit.score(tables["test"], snapshots[12 + nearest], "test")[0].tolist()
    assert report["rows"]["nearest seen task"]["sets"]["test"]["accuracy"] == pytest.approx(expected)
    assert report["conditions"]["test"][0]["occlude"] == sets["test"][0]["occlude"]
    pooled = pool_reports([report, report])
    assert len(pooled["conditions"]["test"]) == 12
    assert pooled["comparisons"]["test"]["kernel ridge"]["difference"] == pytest.approx(
        report["comparisons"]["test"]["kernel ridge"]["difference"]
    )
    summary = report["summary"]
    cells = {row[0]: row for row in summary["rows"]}
    assert set(cells) == set(report["rows"]) and {len(row) for row in cells.values()} == {len(summary["header"])}
    assert cells["generator"][-3:] == ["–", "2.00M", "10"]
    plot_field(report, "angle", "test", ["generator", "generic"], tmp_path / "angle.png")
    assert (tmp_path / "angle.png").stat().st_size > 5000


def test_the_verdict_says_what_the_numbers_say():
    def report(generator: list[float], ridge: list[float]) -> dict:
        rows = {
            name: {"kind": kind, "sets": {"test": {"accuracy": accuracy}}}
            for name, kind, accuracy in (
                ("generator", "generator", generator),
                ("mean of all", "closed form", [10.0] * 4),
                ("kernel ridge", "closed form", ridge),
            )
        }
        comparisons = {name: paired_bootstrap(generator, row["sets"]["test"]["accuracy"]) for name, row in rows.items()}
        return {"rows": rows, "comparisons": {"test": comparisons}, "conditions": {"test": [{}] * 4}}

    better = verdict(report([70.0, 72.0, 71.0, 73.0], [60.0, 63.0, 61.0, 60.0]))
    assert better.startswith("On 4 unseen tasks the generator's networks reach 71.5%. Better than a closed-form answer")
    assert "(the best of 2, kernel ridge, 61.0%): +10.5 points" in better and "as good" not in better
    worse = verdict(report([60.0, 63.0, 61.0, 60.0], [70.0, 72.0, 71.0, 73.0]))
    assert "Worse than a closed-form answer" in worse
    assert "That is at least as good here, and needs no generator." in worse
    assert "Undecided against a closed-form" in verdict(report([60.0, 63.0, 60.0, 63.0], [63.0, 60.0, 63.0, 60.0]))
