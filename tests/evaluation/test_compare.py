"""The report: every metric for every group, verdicts, one schema for all tasks, and no number that is not finite."""

import json
import re
from importlib.resources import files

import jsonschema
import pytest
import torch
from support.evaluation import digits, digits_pipeline, digits_snapshots, regression, snapshots_around

from pdiff_hf.evaluation import compare as comparing
from pdiff_hf.evaluation import sampling
from pdiff_hf.evaluation.baselines import Baseline, BaselineContext, standard_baselines
from pdiff_hf.evaluation.compare import compare, compare_generator
from pdiff_hf.evaluation.frontier import Difference
from pdiff_hf.evaluation.geometry import Yardstick
from pdiff_hf.evaluation.metrics import METRICS, GroupMetric, ensemble_metrics, iou_within, max_iou
from pdiff_hf.evaluation.render import format_report, format_summary
from pdiff_hf.evaluation.sampling import Group, room_for, sample_baselines
from pdiff_hf.utils.files import without_nan
from pdiff_hf.utils.reports import load_report

SCHEMA = json.loads(files("pdiff_hf.evaluation").joinpath("report_schema.json").read_text())


def by_name(report: dict) -> dict[str, dict]:
    return {row["name"]: row for row in report["groups"]}


@pytest.fixture
def without_figures(monkeypatch):
    """Figures take longer than everything else."""
    monkeypatch.setattr(comparing, "draw_figures", lambda *args, **kwargs: None)


def test_a_report_on_a_pipeline_has_everything(whole):
    report, folder = whole
    assert load_report(folder / "report.json") == report
    jsonschema.validate(report, SCHEMA)
    rows = by_name(report)
    supported = [b.name for b in standard_baselines() if b.min_snapshots <= 10]
    curve = [f"generated {value}" for value in (0.25, 0.5, 0.75, 1.25, 1.5)]
    assert list(rows) == ["snapshots", "mean", "reconstructed", "generated", *supported, *curve, "vae"]
    assert [rows[name]["n"] for name in list(rows)[:5]] == [12, 1, 2, 5, 2]  # two of the snapshots are held out
    for name, row in rows.items():
        missing = {"iou_within", "recall"} if row["n"] == 1 else set()
        missing |= {"precision", "recall", "density", "coverage"} if name == "snapshots" else set()
        assert {metric.key for metric in METRICS if row[metric.key] is None} == missing, name
        assert [entry["size"] for entry in row["ensembles"]][0] == 1 and row["ensembles"][-1]["size"] == row["n"]
    assert report["metric"] == {"name": "accuracy", "unit": "%", "higher_is_better": True}
    assert report["splits"] == {"validation": 50, "test": 50}
    assert [row["name"] for row in report["frontier"]["rows"]] == ["generated", *supported, "vae"]
    assert [row["name"] for row in report["audit"]["rows"]] == list(rows)
    assert report["reverse_process"]["steps"] == [0, 1, 2]
    assert torch.tensor(report["reverse_process"]["scores"]).shape == (5, 3)
    assert all(isinstance(value, float) for value in report["reconstruction"].values())
    assert {path.name for path in folder.glob("*")} == {"report.json", "report.md"} | {
        f"{name}.png"
        for name in ("accuracy_vs_similarity", "max_similarity", "reverse_process", "parameters", "latents", "losses")
    }


def test_metrics_are_those_of_the_functions_and_selection_is_on_validation(tmp_path, without_figures):
    scorer, snapshots = digits(), digits_snapshots()
    generated = snapshots.flip(0)[:5] * 1.2
    report = compare_generator(scorer, snapshots, generated, tmp_path, baseline_models=0)
    row = by_name(report)["generated"]
    test, validation = (scorer.score(split, generated) for split in ("test", "validation"))
    assert row["scores"] == test.values.tolist()
    assert row["score_mean"] == pytest.approx(test.values.mean().item())
    assert row["score_best"] == test.values[validation.values.argmax()]
    assert row["iou_within"] == pytest.approx(iou_within(test.wrong))
    assert row["max_iou"] == pytest.approx(max_iou(test.wrong, scorer.score("test", snapshots).wrong).mean().item())
    assert row["ensembles"] == ensemble_metrics(test.log_probs, test.labels)
    nearest = Yardstick(snapshots).place(generated)["nearest_relative"]
    assert row["distance_nearest"] == pytest.approx(nearest.quantile(0.5).item())
    own, mean = (by_name(report)[name]["score_mean"] for name in ("snapshots", "generated"))
    assert report["difference"]["difference"] == pytest.approx(mean - own)
    assert report["reconstruction"] is None and "reverse_process" not in report
    assert report["verdict"].endswith("They were compared with no baseline.")


def test_a_measured_task_has_the_same_schema(tmp_path, without_figures):
    scorer = regression()
    snapshots = snapshots_around(scorer)
    settings = {"num_models": 4, "baseline_models": 2}
    report = compare_generator(scorer, snapshots, digits_pipeline(scorer, snapshots), tmp_path, **settings)
    jsonschema.validate(report, SCHEMA)
    assert report["metric"] == {"name": "MSE", "unit": "", "higher_is_better": False}
    rows = by_name(report)
    test, validation = (scorer.score(split, snapshots).values for split in ("test", "validation"))
    assert rows["snapshots"]["score_mean"] == pytest.approx(test.mean().item(), rel=1e-5)
    assert rows["snapshots"]["score_best"] == pytest.approx(test[validation.argmin()].item())  # lower is better
    assert rows["snapshots"]["score_best_on_test"] == pytest.approx(test.min().item())
    assert "iou" not in json.dumps(report["groups"]) and "reverse_process" not in report
    assert all(row["max_iou"] is None for row in report["frontier"]["rows"])
    for row in report["frontier"]["rows"][1:]:
        assert row["better"] + row["worse"] <= 1 and row["verdict"] in ("better", "worse", "undecided")
    assert "lower is better" in report["verdict"]
    assert report["summary"]["header"] == ["group", "n", "MSE", "best", "to mean", "generated are"]


@pytest.mark.parametrize("make", (digits, regression), ids=("classifiers", "measured"))
def test_networks_that_have_no_score_are_counted_and_never_break_a_report(make, tmp_path):
    scorer = make()
    snapshots = snapshots_around(scorer)
    bad = snapshots[:2] * 1e38
    for generated, count in ((torch.cat([bad[:1], snapshots[2:7] + 0.01]), 1), (bad, 2)):
        report = compare_generator(scorer, snapshots, generated, tmp_path, baseline_models=1)
        jsonschema.validate(report, SCHEMA)
        row = by_name(report)["generated"]
        assert row["num_undefined"] == count and f"{len(generated)} ({count} not finite)" in format_summary(report)
        assert f"{count} of {len(generated)} generated networks have" in report["warnings"][0]
        assert (row["score_best"] is None) is (make is regression and count == 2)
        if make is digits:
            assert (row["nll"] is None) is (row["ece"] is None) is (count == 2)
            assert row["ensembles"][-1]["nll"] is None
        assert "nan" not in (tmp_path / "report.md").read_text() and "inf " not in (tmp_path / "report.md").read_text()


@pytest.fixture(scope="module")
def groups():
    """Baselines that all reports below have in common."""
    return list(sample_baselines(BaselineContext(digits_snapshots(), digits().layout.sizes), 2, 0))[:8]


def reported(groups, generated, snapshots=None) -> dict:
    snapshots = digits_snapshots() if snapshots is None else snapshots
    return without_nan(compare(digits(), [Group("snapshots", snapshots), Group("generated", generated), *groups]))


def test_copies_and_contractions_are_called_so(groups):
    snapshots = digits_snapshots()
    copies = reported(groups, snapshots[:5] + 1e-6)
    assert copies["audit"]["verdict"].startswith("Copies")
    assert "Copies of snapshots are among the 5 generated" in comparing.find_warnings(copies)[0]
    contracted = reported(groups, snapshots.mean(0) + 1e-3 * torch.randn(5, snapshots.shape[1]))
    assert contracted["audit"]["verdict"].startswith("No copying")
    assert "contraction" in contracted["audit"]["verdict"] and not comparing.find_warnings(contracted)


def test_groups_are_scored_alike_whatever_they_are_scored_with(groups, monkeypatch):
    generated = digits_snapshots()[:4] + 0.2
    together = reported(groups, generated)
    monkeypatch.setattr(type(digits()), "chunk_size", 3)
    apart = reported(groups, generated)
    for key in ("groups", "audit", "frontier"):
        assert json.dumps(apart[key])[:200] == json.dumps(together[key])[:200]
    assert [row["scores"] for row in apart["groups"]] == [row["scores"] for row in together["groups"]]


def test_snapshots_that_all_agree(groups):
    same = digits_snapshots()[:1].repeat(3, 1)
    report = reported([], same.clone(), same)
    assert by_name(report)["generated"]["iou_within"] == 1 and report["difference"]["difference"] == 0
    assert report["difference"]["verdict"] == "undecided"


def test_a_new_metric_is_one_entry(tmp_path, without_figures):
    def spread(evidence):
        return (evidence.values.max() - evidence.values.min()).item()

    METRICS.append(GroupMetric("score_range", "range", ".1f", spread))
    try:
        generated = digits_snapshots()[:3] + 1
        report = compare_generator(digits(), digits_snapshots(), generated, tmp_path, baseline_models=1)
    finally:
        METRICS.pop()
    jsonschema.validate(report, SCHEMA)
    scores = torch.tensor(by_name(report)["generated"]["scores"])
    assert by_name(report)["generated"]["score_range"] == scores.max() - scores.min()
    assert "| range |" in (tmp_path / "report.md").read_text()


def test_a_new_baseline_is_one_entry(tmp_path, monkeypatch, without_figures):
    def flip(context, num_models, generator):
        return context.snapshots[torch.arange(num_models)].flip(1)

    monkeypatch.setattr(sampling, "standard_baselines", lambda which: [Baseline("flip", "all", flip)])
    report = compare_generator(digits(), digits_snapshots(), digits_snapshots()[:3] + 1, tmp_path, baseline_models=4)
    assert [(row["name"], row["n"]) for row in report["groups"]][-1] == ("flip all", 4)
    assert "| flip all " in format_summary(report)


def test_a_sample_of_the_generated_networks_is_scored(tmp_path, without_figures):
    snapshots = digits_snapshots()
    generated = torch.cat([snapshots + 0.1, snapshots - 0.1])
    reports = [
        compare_generator(digits(), snapshots, generated, tmp_path, baseline_models=0, score_models=count)
        for count in (6, 24, 100)
    ]
    assert [by_name(report)["generated"]["n"] for report in reports] == [6, 24, 24]
    assert all(report["num_generated"] == 24 for report in reports)
    assert "6 of the 24 generated networks" in reports[0]["summary"]["about"]
    assert "A sample" not in reports[1]["summary"]["about"]
    chosen = set(by_name(reports[0])["generated"]["scores"])
    assert chosen <= set(by_name(reports[1])["generated"]["scores"])


def test_results_that_are_too_large_for_memory_lie_in_a_file(tmp_path, monkeypatch, without_figures):
    """Whatever lies in files, the report is the same, and nothing is left in the folder."""
    scorer, snapshots = digits(), digits_snapshots()
    pipeline, heldout = digits_pipeline(scorer, snapshots), torch.arange(12) == 3
    settings = {"num_models": 5, "baseline_models": 2, "heldout": heldout}
    plain = compare_generator(scorer, snapshots, pipeline, tmp_path / "plain", **settings)
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 16)
    large = room_for(3, 7, tmp_path)
    large[:] = 1.5
    assert large.shape == (3, 7) and large.sum() == 31.5 and not list(tmp_path.glob("tmp*"))
    latents = sampling.encode(pipeline, snapshots)
    assert compare_generator(scorer, snapshots, pipeline, tmp_path / "file", latents=latents, **settings) == plain
    assert {path.name for path in (tmp_path / "file").iterdir()} == {"report.json", "report.md"}


def test_what_would_not_fit_is_refused_before_any_work(tmp_path):
    snapshots = digits_snapshots()
    with pytest.raises(ValueError, match=r"more than half.*--baseline_models \d+ at most"):
        compare_generator(digits(), snapshots, snapshots[:2], tmp_path / "out", baseline_models=10**12)
    assert not (tmp_path / "out").exists()


def test_reports_of_other_versions_are_refused(tmp_path):
    path = tmp_path / "report.json"
    for text, message in (
        ('{"groups": [{"name": "original"}]}', "format 1, as pdiff_hf 0.1 writes it.*Evaluate again"),
        ('{"version": 99}', "format 99.*this version reads format 2"),
        ("[1]", "is not a report"),
        ("{", "is not a report"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_report(path)


# ---------------------------------------------------------------------------------------------------------- the verdict


def verdict(generated, snapshots, lower_is_better=False, baselines=(), **changes) -> str:
    """Of a report with these means."""
    sign = -1 if lower_is_better else 1
    gain = sign * (generated - snapshots)
    report = {
        "metric": {"name": "AP", "unit": "%", "higher_is_better": not lower_is_better},
        "groups": [{"name": "snapshots", "score_mean": snapshots}, {"name": "generated", "score_mean": generated}],
        "difference": {
            "difference": generated - snapshots,
            "interval": [generated - snapshots - 0.5, generated - snapshots + 0.5],
            "verdict": "better" if gain > 0.5 else "worse" if gain < -0.5 else "undecided",
        },
        "reconstruction": None,
        "frontier": {
            "rows": [{"verdict": None, "max_iou": None}, *({"verdict": name, "tuned": False} for name in baselines)]
        },
    }
    return comparing.write_verdict(report | changes)


def test_the_first_sentence_compares_with_the_snapshots():
    assert verdict(77.2, 77).startswith(
        "The generated networks are as good as the snapshots within the sampling error: mean AP 77.20 against 77.00 % "
        "(difference +0.20, 95% interval -0.30 to +0.70). They were compared with no baseline."
    )
    assert "are better than the snapshots: mean AP 10.00 against 12.00 %, lower is better" in verdict(10, 12, True)
    worse = verdict(62, 77, baselines=["better", "worse", "worse", "undecided"])
    assert "are worse than the snapshots: mean AP 62.00 against 77.00 % (difference -15.00" in worse
    assert "cannot say where it is lost. Of 4 settings of trivial generators they are better than 1 and worse" in worse
    assert worse.count(". ") == 1
    groups = [{"name": name, "score_mean": None} for name in ("snapshots", "generated")]
    assert "is not defined" in verdict(62, 77, groups=groups)


@pytest.mark.parametrize(
    ("explained", "more_steps", "advice"),
    [
        ((0.6, 0.95, -14.0), None, "loses 14.00 of it .*explains 60%.*components 95%.*raise --autoencoder_steps"),
        ((0.59, 0.6, -14.0), None, "explains 59%.*components 60%.*raise --latent_dim"),
        ((0.99, 0.99, -0.1), None, "loses 0.10 of it, the denoiser the rest: raise --denoiser_steps"),
        ((0.99, 0.99, 0.3), 75.0, "loses 0.00 of it.*raise --num_inference_steps .100 reach 75.00"),
        ((0.99, 0.99, -0.1), 62.5, "and 100 denoising steps reach 62.50: raise --denoiser_steps"),
        ((None, None, None), None, "raise --denoiser_steps"),
    ],
)
def test_what_to_change_follows_from_what_was_measured(explained, more_steps, advice):
    r2, linear, difference = explained
    changes = {
        "reconstruction": {"r2_train": r2, "r2_heldout": None, "linear_r2_train": linear, "linear_r2_heldout": None}
        | {"score_difference": difference}
    }
    if more_steps is not None:
        changes["more_steps"] = {"num_inference_steps": 100, "n": 20, "score_mean": more_steps}
    assert re.search(advice, verdict(62, 77, **changes))


def test_networks_that_are_worse_are_tried_with_more_steps(tmp_path, without_figures, monkeypatch):
    scorer, snapshots = digits(), digits_snapshots()
    worse = Difference(-9.0, (-10.0, -8.0), "worse")
    monkeypatch.setattr(comparing.Bootstrap, "difference", lambda *args: worse)
    report = compare_generator(
        scorer,
        snapshots,
        digits_pipeline(scorer, snapshots),
        tmp_path,
        num_models=2,
        baseline_models=0,
    )
    jsonschema.validate(report, SCHEMA)
    assert report["more_steps"]["num_inference_steps"] == 10 and report["more_steps"]["n"] == 20


def test_snapshots_that_all_score_the_same_are_warned_of(whole):
    report, _ = whole
    same = json.loads(json.dumps(report))
    same["groups"][0] |= {"name": "snapshots", "n": 3, "score_mean": 0.0, "score_std": 0.0}
    (warning,) = set(comparing.find_warnings(same)) - set(comparing.find_warnings(report))
    assert "All 3 snapshots have the same accuracy, 0.00 %: comparing" in warning
    same["groups"][0] |= {"score_std": 0.01}
    assert warning not in comparing.find_warnings(same)


def test_a_poor_autoencoder_and_a_test_without_errors_are_warned_of(whole):
    report, _ = whole
    poor = json.loads(json.dumps(report))
    poor["reconstruction"]["r2_train"] = 0.1
    poor["groups"][0]["score_mean"] = 99.0
    few, little = comparing.find_warnings(poor)[-2:]
    assert "errs on only 0.5 of 50" in few and "explains only 10%" in little
    assert "errs on only" not in " ".join(report["warnings"])  # it is untrained, and errs often
    poor["warnings"] = [few, little]
    assert format_report(poor).count("> **Warning:**") == 2
