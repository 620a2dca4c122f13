"""The report on networks for a task: every metric for every group, and no number that is not finite."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import torch
from support.evaluation import digits, digits_pipeline, digits_snapshots, regression, report_on, snapshots_around

from pdiff_hf.evaluation import Kind, Report, evaluate, single_task
from pdiff_hf.evaluation.baselines import standard_baselines
from pdiff_hf.evaluation.compare import CLOSE, WORSE, Comparison
from pdiff_hf.evaluation.geometry import Yardstick
from pdiff_hf.evaluation.groups import named_generator
from pdiff_hf.evaluation.metrics import COVERAGE, ensemble_metrics, iou_within, max_iou
from pdiff_hf.evaluation.verdict import find_warnings, write_verdict
from pdiff_hf.models import encode_in_batches
from pdiff_hf.utils.reports import TEST, load_report

SCHEMA = json.loads(files("pdiff_hf.evaluation").joinpath("report_schema.json").read_text())
GOLDEN = Path(__file__).parents[1] / "models" / "golden" / "0.2.0" / "reports"


def test_a_report_on_a_pipeline_has_everything(whole):
    report, folder = whole
    jsonschema.validate(load_report(folder / "report.json"), SCHEMA)
    assert Report.load(folder).to_dict() == report.to_dict()
    supported = [b.name for b in standard_baselines() if b.min_snapshots <= 10]
    curve = [f"generated {value}" for value in (0.25, 0.5, 0.75, 1.25, 1.5)]
    first = ["snapshots", "mean of the snapshots", "reconstructed", "generated"]
    assert [row.name for row in report.groups] == [*first, *supported, *curve, "vae"]
    assert [row.n for row in report.groups[:4]] == [12, 1, 2, 5]  # two of the snapshots are held out
    for row in report.groups:
        missing = {"iou_within", "recall"} if row.n == 1 else set()
        missing |= set(COVERAGE) if row.kind == Kind.SNAPSHOTS else set()
        assert {name for name, value in row.measures.items() if value is None} == missing, row.name
        assert row.ensembles[0]["size"] == 1 and row.ensembles[-1]["size"] == row.n
        assert (row.verdict is None) is (row.kind == Kind.GENERATED)
    assert report.splits == {"validation": 50, "test": 50} and report.conditions == {TEST: [{}]}
    sampling = {"num_inference_steps": 2, "temperature": 1.0, "guidance_scale": 1.0}
    assert report.sampling == sampling | {"scheduler": "DPMSolverMultistepScheduler"}
    assert "Sampled in 2 steps of DPMSolverMultistepScheduler at temperature 1." in report.summary["about"]
    assert report.reverse_process["steps"] == [0, 1, 2]
    assert torch.tensor(report.reverse_process["scores"]).shape == (5, 3)
    assert all(isinstance(value, float) for value in report.reconstruction.values())
    figures = ("accuracy_vs_similarity", "max_similarity", "reverse_process", "parameters", "latents", "losses")
    written = {"report.json", "report.md", "report.html", *(f"{name}.png" for name in figures)}
    assert {path.name for path in folder.glob("*")} == written


def test_what_people_read(whole):
    report, folder = whole
    assert len(report.verdict) == 3 and len(" ".join(report.verdict).split()) <= 40
    terminal = report.to_terminal()
    assert all(len(line) <= 80 for line in terminal.splitlines())
    assert terminal.startswith("Against the snapshots: ") and "\nmean of the snapshots " in terminal
    text = (folder / "report.md").read_text()
    assert report.verdict[1] in text and "lower is newer" in text and "undecided" not in text
    assert "![Accuracy against the similarity" in text and text.count("<details>") == text.count("</details>")
    page = (folder / "report.html").read_text()
    sources = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            sources.extend(value for name, value in attributes if name in ("src", "href"))

    Reader().feed(page)
    assert len(sources) == 6 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert report.verdict[0] in page and "<script" not in page


def test_metrics_are_those_of_the_functions_and_selection_is_on_validation(tmp_path, without_figures):
    scorer, snapshots = digits(), digits_snapshots()
    generated = snapshots.flip(0)[:5] * 1.2
    report = report_on(scorer, snapshots, generated, tmp_path, baseline_models=0)
    row, test = report.generated, scorer.score("test", generated)
    validation = scorer.score("validation", generated)
    assert row.scores() == test.values.tolist() and row.mean() == pytest.approx(test.values.mean().item())
    assert row.measures["score_best"] == test.values[validation.values.argmax()]
    assert row.measures["iou_within"] == pytest.approx(iou_within(test.wrong))
    similarity = max_iou(test.wrong, scorer.score("test", snapshots).wrong)
    assert row.measures["max_iou"] == pytest.approx(similarity.mean().item())
    assert row.ensembles == ensemble_metrics(test.log_probs, test.labels)
    nearest = Yardstick(snapshots).place(generated)["nearest_relative"]
    assert row.measures["distance_nearest"] == pytest.approx(nearest.quantile(0.5).item())
    difference = report.group("snapshots").comparisons[TEST].difference
    assert difference == pytest.approx(row.mean() - report.group("snapshots").mean())
    assert report.reconstruction is None and report.reverse_process is None and report.sampling == {}
    assert report.verdict[2] == "With equal feedback: not compared."


def test_a_measured_task_has_the_same_schema(tmp_path, without_figures):
    scorer = regression()
    snapshots = snapshots_around(scorer)
    settings = {"num_models": 4, "baseline_models": 2}
    report = report_on(scorer, snapshots, digits_pipeline(scorer, snapshots), tmp_path, **settings)
    jsonschema.validate(report.to_dict(), SCHEMA)
    test, validation = (scorer.score(split, snapshots).values for split in ("test", "validation"))
    measures = report.group("snapshots").measures
    assert measures["score_mean"] == pytest.approx(test.mean().item(), rel=1e-5)
    assert measures["score_best"] == pytest.approx(test[validation.argmin()].item())  # lower is better
    assert measures["score_best_on_test"] == pytest.approx(test.min().item())
    assert "max_iou" not in measures and "(MSE and novelty)" not in report.verdict[1]
    assert "lower is better" in report.summary["about"]
    assert report.summary["header"] == ["group", "MSE", "distance to mean", "generated vs. this row"]
    assert all(row.comparisons[TEST].better is None for row in report.of_kind(Kind.BASELINE))


@pytest.mark.parametrize("make", (digits, regression), ids=("classifiers", "measured"))
def test_networks_that_have_no_score_are_counted_and_never_break_a_report(make, tmp_path):
    scorer = make()
    snapshots = snapshots_around(scorer)
    bad = snapshots[:2] * 1e38
    for generated, count in ((torch.cat([bad[:1], snapshots[2:7] + 0.01]), 1), (bad, 2)):
        report = report_on(scorer, snapshots, generated, tmp_path, baseline_models=1)
        jsonschema.validate(load_report(tmp_path / "report.json"), SCHEMA)
        text = (tmp_path / "report.md").read_text()
        assert report.generated.num_undefined == count and f"{len(generated)} ({count} not finite)" in text
        assert f"{count} of {len(generated)} generated networks have" in report.warnings[0]
        assert (report.generated.measures["score_best"] is None) is (make is regression and count == 2)
        assert "nan" not in text and "inf " not in text


def reported(generated, snapshots=None) -> Report:
    snapshots = digits_snapshots() if snapshots is None else snapshots
    return report_on(digits(), snapshots, generated, baseline_models=2, baselines="few")


def test_copies_are_called_so():
    snapshots = digits_snapshots()
    copies = reported(snapshots[:5] + 1e-6)
    assert copies.generated.memorisation["copies"]
    assert "5 are closer to a snapshot than allowed" in find_warnings(copies)[0]
    contracted = reported(snapshots.mean(0) + 1e-3 * torch.randn(5, snapshots.shape[1]))
    assert not contracted.generated.memorisation["copies"] and not find_warnings(contracted)


def test_groups_are_scored_alike_whatever_they_are_scored_with(monkeypatch):
    generated = digits_snapshots()[:4] + 0.2
    together = reported(generated)
    monkeypatch.setattr(digits(), "chunk_size", 3)
    assert [row.sets for row in reported(generated).groups] == [row.sets for row in together.groups]
    same = digits_snapshots()[:1].repeat(3, 1)
    alike = report_on(digits(), same, same.clone(), baseline_models=0)
    assert alike.generated.measures["iou_within"] == 1 and alike.group("snapshots").verdict == CLOSE


def test_results_that_are_too_large_for_memory_lie_in_a_file(tmp_path, monkeypatch, without_figures):
    """Whatever lies in files, the report is the same, and nothing is left in the folder."""
    scorer, snapshots = digits(), digits_snapshots()
    pipeline, heldout = digits_pipeline(scorer, snapshots), torch.arange(12) == 3
    settings = {"num_models": 5, "baseline_models": 2, "heldout": heldout}
    plain = report_on(scorer, snapshots, pipeline, tmp_path / "plain", **settings)
    monkeypatch.setattr(single_task, "CHUNK_BYTES", 16)
    latents = encode_in_batches(pipeline.autoencoder, snapshots)
    in_file = report_on(scorer, snapshots, pipeline, tmp_path / "file", latents=latents, **settings)
    assert in_file.to_dict() == plain.to_dict()
    assert {path.name for path in (tmp_path / "file").iterdir()} == {"report.json", "report.md", "report.html"}
    with pytest.raises(ValueError, match=r"more than half.*--baseline_models \d+ at most"):
        report_on(scorer, snapshots, snapshots[:2], tmp_path / "out", baseline_models=10**12)
    assert not (tmp_path / "out").exists()


def test_evaluate_is_one_call(without_figures):
    scorer, snapshots = digits(), digits_snapshots()
    model, layout = scorer.models.model, scorer.layout
    report = evaluate(snapshots[:3] + 0.1, scorer.task, snapshots=snapshots, base_model=model, layout=layout)
    assert report.generated.n == 3 and len(report.of_kind(Kind.BASELINE)) > 5
    with pytest.raises(ValueError, match="layout is needed"):
        evaluate(snapshots[:3], scorer.task, snapshots=snapshots, base_model=model)


@pytest.mark.parametrize("kind", ["task", "family"])
def test_reports_of_0_2_are_read(kind, tmp_path):
    old = json.loads((GOLDEN / f"{kind}.json").read_text())
    report = Report.load(GOLDEN / f"{kind}.json")
    jsonschema.validate(report.to_dict(), SCHEMA)
    report.save(tmp_path)
    assert Report.load(tmp_path).to_dict() == report.to_dict()
    if kind == "task":
        row = next(row for row in old["groups"] if row["name"] == "generated")
        assert report.generated.scores() == row["scores"]
        assert report.generated.cost.once == row["feedback"]["once"]
    else:
        row = old["rows"]["generator"]
        assert report.generated.scores() == row["sets"]["test"]["accuracy"]
        assert report.generated.cost.once == 3 * row["once"]  # forward and backward were one pass
        assert report.of_kind(Kind.SNAPSHOTS)[0].name == "nearest seen task"
    assert len(report.verdict) == 3 and "undecided" not in json.dumps(report.to_dict())


def test_reports_of_other_versions_are_refused(tmp_path):
    path = tmp_path / "report.json"
    for text, message in (
        ('{"groups": [{"name": "original"}]}', "format 1, as pdiff_hf 0.1 writes it.*Evaluate again"),
        ('{"version": 99}', "format 99.*this version reads formats 2 and 3"),
        ("[1]", "is not a report"),
        ("{", "is not a report"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            Report.load(path)


# ---------------------------------------------------------------------------------------------------------- the verdict


def changed(report: Report, difference: float, verdict: str, **changes) -> Report:
    """The report with another comparison with the snapshots."""
    copy = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    copy.group("snapshots").comparisons[TEST] = Comparison(difference, (difference - 1, difference + 1), verdict)
    return dataclasses.replace(copy, **changes)


def test_the_verdict_says_what_the_numbers_say(whole):
    worse = changed(whole[0], -15.0, WORSE)
    first, second, _ = write_verdict(worse)
    assert first.startswith("Against the snapshots: worse, -15.00 (")
    count = len(worse.of_kind(Kind.BASELINE))
    for i, row in enumerate(worse.of_kind(Kind.BASELINE)):
        row.comparisons[TEST] = dataclasses.replace(row.comparisons[TEST], verdict=WORSE if i < 3 else CLOSE)
    assert f"better than 0, worse than 3 of {count} (accuracy and novelty)" in write_verdict(worse)[1]


@pytest.mark.parametrize(
    ("explained", "more_steps", "advice"),
    [
        ((0.6, 0.95, -14.0), None, "loses 14.00 of 15.00 .*explains 60%.*components 95%.*raise --autoencoder_steps"),
        ((0.59, 0.6, -14.0), None, "explains 59%.*components 60%.*raise --latent_dim"),
        ((0.99, 0.99, -0.1), None, "loses 0.10 of 15.00, the denoiser the rest: raise --denoiser_steps"),
        ((0.99, 0.99, 0.3), 75.0, "loses 0.00 of 15.00.*raise --num_inference_steps .100 .* reach 75.00"),
        ((0.99, 0.99, -0.1), 17.5, "100 denoising steps reach 17.50, so raise --denoiser_steps"),
        ((None, None, None), None, "raise --denoiser_steps"),
    ],
)
def test_what_to_change_follows_from_what_was_measured(whole, explained, more_steps, advice):
    r2, linear, difference = explained
    reconstruction = {"r2_train": r2, "r2_heldout": None, "linear_r2_train": linear, "linear_r2_heldout": None}
    changes: dict = {"reconstruction": reconstruction | {"score_difference": difference}}
    if more_steps is not None:
        changes["more_steps"] = {"num_inference_steps": 100, "n": 20, "score_mean": more_steps}
    worse = changed(whole[0], -15.0, WORSE, **changes)
    assert any(re.search(advice, warning) for warning in find_warnings(worse))
    assert not any("raise --" in warning for warning in find_warnings(changed(whole[0], 1.0, CLOSE, **changes)))


def test_warnings_are_of_what_has_happened(whole):
    report = whole[0]
    same = changed(report, 0.0, CLOSE)
    snapshots = same.group("snapshots")
    snapshots.sets[TEST]["scores"] = [[99.0] * 12]
    snapshots.measures["score_std"] = 0.0
    same.reconstruction["r2_train"] = 0.1
    found = " ".join(find_warnings(same))
    assert "All 12 snapshots have the same accuracy, 99.00 %: comparing" in found
    assert "errs on only 0.5 of 50" in found and "explains only 10%" in found
    assert "errs on only" not in " ".join(report.warnings)  # it is untrained, and errs often


def test_networks_that_are_worse_are_tried_with_more_steps(tmp_path, without_figures, monkeypatch):
    scorer, snapshots = digits(), digits_snapshots()
    pipeline = digits_pipeline(scorer, snapshots)
    worse = Comparison(-9.0, (-10.0, -8.0), WORSE)
    monkeypatch.setattr("pdiff_hf.evaluation.compare.Bootstrap.compare", lambda *args: worse)
    report = report_on(scorer, snapshots, pipeline, tmp_path, num_models=2, baseline_models=0)
    assert report.more_steps["num_inference_steps"] == 10 and report.more_steps["n"] == 20
    again = pipeline(2, generator=named_generator(0, "generated"), output_type="pt").parameters
    assert report.generated.scores() == scorer.score("test", again).values.tolist()
