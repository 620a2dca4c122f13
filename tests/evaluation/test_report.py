"""The report: every metric for every group, verdicts, JSON without NaN, Markdown whose tables and links are whole."""

import json
import re

import pytest
import torch
from PIL import Image

from pdiff_hf.evaluation.baselines import BaselineContext, standard_baselines
from pdiff_hf.evaluation.generator import evaluate_generator, sample_baselines
from pdiff_hf.evaluation.metrics import distances, ensemble_metrics, iou_within, max_iou
from pdiff_hf.evaluation.report import Group, evaluate, format_report, format_summary, write_report
from pdiff_hf.evaluation.scoring import Scorer
from pdiff_hf.layout import ParameterLayout
from pdiff_hf.selection import select_parameters
from pdiff_hf.tasks import ImageClassificationTask

METRICS = {
    *("accuracy_mean", "accuracy_std", "accuracy_best", "accuracy_best_on_test", "nll", "ece", "iou_self", "iou_max"),
    *("distance_nearest", "distance_to_mean", "precision", "recall", "density", "coverage"),
}


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    """For the last two norms of an MLP on few digits."""
    task = ImageClassificationTask("mlp_mini", max_train_samples=100, max_eval_samples=50)
    torch.manual_seed(0)
    model = task.load_base_model()
    layout = ParameterLayout.from_state_dict(model.state_dict(), select_parameters(model, "norm[-2:]"))
    return Scorer(task, model, layout)


@pytest.fixture(scope="module")
def snapshots(scorer) -> torch.Tensor:
    torch.manual_seed(1)
    base = scorer.layout.flatten(scorer.models.model.state_dict())
    return base + 0.3 * torch.randn(12, len(base))


def by_name(report: dict) -> dict[str, dict]:
    return {row["name"]: row for row in report["groups"]}


def test_every_metric_of_every_group(scorer, snapshots, tmp_path):
    generated = snapshots[:6] + 0.1
    report = evaluate_generator(scorer, snapshots, generated, tmp_path, baseline_models=3)
    rows = by_name(report)
    supported = [b for b in standard_baselines() if not b.needs_latents and b.min_snapshots <= 12]
    assert list(rows) == ["original", "ensemble", "generated", *(b.name for b in supported)]
    for name, row in rows.items():
        single = {"iou_self", "recall"} if row["n"] == 1 else set()
        own = {"precision", "recall", "density", "coverage"} if name == "original" else set()
        assert {key for key in METRICS if row.get(key) is None} == single | own, name
        assert [entry["size"] for entry in row["ensembles"]][0] == 1 and row["ensembles"][-1]["size"] == row["n"]
    assert report["num_parameters"] == scorer.layout.num_parameters
    assert report["splits"] == {"validation": 50, "test": 50}
    assert report["reconstruction"] is None  # there is no autoencoder
    assert [row["name"] for row in report["frontier"]["rows"]] == ["generated", *(b.name for b in supported)]
    assert [row["name"] for row in report["audit"]["rows"]] == list(rows)
    assert len(report["audit"]["rows"][2]["nearest_in_weights"]) == 6


def test_metrics_are_those_of_the_functions_and_selection_is_on_validation(scorer, snapshots, tmp_path):
    generated = snapshots.flip(0)[:5] * 1.2
    row = by_name(evaluate_generator(scorer, snapshots, generated, tmp_path, baseline_models=0))["generated"]
    test, validation = (scorer.score(split, generated) for split in ("test", "validation"))
    correct = 100 * (~test.wrong).double().mean(1)
    assert row["accuracies"] == pytest.approx(correct.tolist())
    assert row["accuracy_mean"] == pytest.approx(correct.mean().item())
    assert row["accuracy_best"] == pytest.approx(correct[(~validation.wrong).sum(1).argmax()].item())
    assert row["iou_self"] == pytest.approx(iou_within(test.wrong))
    assert row["iou_max"] == pytest.approx(max_iou(test.wrong, scorer.score("test", snapshots).wrong).mean().item())
    assert row["ensembles"] == ensemble_metrics(test.log_probs, test.labels)
    assert row["distance_nearest"] == pytest.approx(
        distances(generated, snapshots)["nearest_relative"].quantile(0.5).item()
    )


def evaluated(scorer, snapshots, generated, seed=0) -> dict:
    """Without figures, which take longer than everything else."""
    baselines = sample_baselines(BaselineContext(snapshots, scorer.layout.sizes), 2, seed)
    groups = [Group("original", snapshots), Group("generated", generated), *baselines[:8]]
    return evaluate(scorer, groups, torch.zeros(len(snapshots), dtype=torch.bool), seed)


def test_copies_and_contractions_are_called_so(scorer, snapshots):
    copies = evaluated(scorer, snapshots, snapshots[:5] + 1e-6)
    assert "Copies" in copies["audit"]["verdict"] and "; copies of snapshots are among them." in copies["verdict"]
    mean = snapshots.mean(0) + 1e-3 * torch.randn(5, snapshots.shape[1])
    contracted = evaluated(scorer, snapshots, mean)
    assert "No copying" in contracted["audit"]["verdict"] and "contraction" in contracted["audit"]["verdict"]


def test_files_on_disk(scorer, snapshots, tmp_path):
    report = evaluate_generator(
        scorer, snapshots, snapshots[:1] + 1.0, tmp_path, baseline_models=2, losses={"denoiser": {"loss": [1.0, 0.5]}}
    )
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text and "Infinity" not in text and json.loads(text) == report
    markdown = (tmp_path / "report.md").read_text()
    assert markdown.startswith(format_summary(report).rstrip())
    for expected in (report["verdict"], report["frontier"]["sentence"], report["audit"]["verdict"]):
        assert expected in markdown
    assert markdown.index("| generated") < markdown.index("Verdict") < markdown.index("### Frontier")
    linked = re.findall(r"\]\((\S+\.png)\)", markdown)
    assert sorted(linked) == sorted(path.name for path in tmp_path.glob("*.png"))
    assert {"accuracy_vs_similarity.png", "max_similarity.png", "parameters.png", "losses.png"} == set(linked)
    for name in linked:
        Image.open(tmp_path / name).verify()
    tables = [block.splitlines() for block in markdown.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5
    for table in tables:
        assert len({len(line) for line in table}) == 1 and len({line.count("|") for line in table}) == 1


def test_the_same_seed_gives_the_same_report(scorer, snapshots):
    first, again, other = (evaluated(scorer, snapshots, snapshots[:3] + 0.1, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_heldout_snapshots_are_in_no_baseline(scorer, snapshots, tmp_path):
    heldout = torch.zeros(12, dtype=torch.bool)
    heldout[:6] = True
    shifted = snapshots.clone()
    shifted[heldout] += 100.0
    report = evaluate_generator(scorer, shifted, snapshots[:3], tmp_path, heldout=heldout, baseline_models=2)
    alone = evaluate_generator(scorer, snapshots[~heldout], snapshots[:3], tmp_path, baseline_models=2)
    for name in ("soup all", "noise 0.05", "low-rank Gaussian 1.0"):
        assert by_name(report)[name]["accuracies"] == by_name(alone)[name]["accuracies"]


def test_networks_that_all_agree_give_no_nan(scorer, snapshots, tmp_path):
    same = snapshots[:1].repeat(3, 1)
    report = evaluate(
        scorer, [Group("original", same), Group("generated", same.clone())], torch.zeros(3, dtype=torch.bool)
    )
    write_report(report, tmp_path)
    assert by_name(report)["generated"]["iou_self"] == 1 and "–" in format_report(report)


def test_a_poor_autoencoder_and_a_test_without_errors_are_warned_of(scorer, snapshots):
    groups = [
        Group("original", snapshots),
        Group("reconstructed", snapshots.mean(0).repeat(12, 1)),
        Group("generated", snapshots[:3] + 0.1),
    ]
    report = evaluate(scorer, groups, torch.zeros(12, dtype=torch.bool))
    assert report["reconstruction"] == {"r2_train": pytest.approx(0, abs=1e-5), "r2_heldout": None}
    assert any("explains only 0%" in warning for warning in report["warnings"])
    assert not any("errs on only" in warning for warning in report["warnings"])  # it is untrained, and errs often
    assert all(f"WARNING: {warning}" in format_summary(report) for warning in report["warnings"])


def test_baselines_that_do_not_fit_into_memory_are_refused(scorer, snapshots):
    context = BaselineContext(snapshots, scorer.layout.sizes)
    assert len(sample_baselines(context, 1, seed=0)) > 30
    with pytest.raises(ValueError, match=r"more than half.*--baseline_models \d+ at most"):
        sample_baselines(context, 10**12, seed=0)
