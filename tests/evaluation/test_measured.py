"""Networks judged by one number: measured once, by content, and reported without what only classifiers have."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from pdiff_hf.evaluation.measured import CHUNK_SIZE, Measurer, evaluate_measured
from pdiff_hf.evaluation.report import Group, format_summary
from torch import nn

from pdiff_hf.hub.push import make_model_card
from pdiff_hf.run.recipe import Recipe
from pdiff_hf.run.run import Run
from pdiff_hf.run.saved import evaluate_saved
from pdiff_hf.selection import select_layout
from pdiff_hf.tasks import MeasuredTask


class Regression(MeasuredTask):
    """A linear target with noise; the metric is not defined for networks whose error is beyond all measure."""

    metric, higher_is_better = "MSE", False

    def __init__(self):
        self.measured = []

    def load_base_model(self):
        return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 1))

    def load_split(self, split):
        generator = torch.Generator().manual_seed(["train", "validation", "test"].index(split))
        points = torch.randn(300, 6, generator=generator)
        return torch.utils.data.TensorDataset(points, points[:, :1] + 0.3 * torch.randn(300, 1, generator=generator))

    def fingerprint(self, split):
        return f"line {split}"

    def collate(self, examples):
        points, values = zip(*examples, strict=True)
        return {"points": torch.stack(points), "values": torch.stack(values)}

    def loss(self, call, batch):
        return F.mse_loss(call(batch["points"]), batch["values"])

    def measure(self, models, split, parameters):
        self.measured.append((split, len(parameters)))
        batch = self.collate(list(self.load_split(split)))
        outputs = models(lambda call: call(batch["points"]), parameters)
        errors = torch.cat([(output - batch["values"]).square().mean((1, 2)) for _, output in outputs]).double()
        return errors.where(errors < 100, math.nan)


def test_every_network_is_measured_once_and_kept_by_content(tmp_path):
    task = Regression()
    torch.manual_seed(0)
    model = task.load_base_model()
    layout = select_layout(model, ["norm"], [])
    parameters = layout.flatten(model.state_dict()) + 0.1 * torch.randn(CHUNK_SIZE + 6, layout.num_parameters)
    rows = [*parameters, parameters[3], parameters[3] + 1e6]
    values = Measurer(task, model, layout, tmp_path).measure("test", rows)
    assert values[3] == values[CHUNK_SIZE + 6] and values[-1].isnan() and not values[:-1].isnan().any()
    assert task.measured == [("test", CHUNK_SIZE), ("test", 7)]
    again = Measurer(task, model, layout, tmp_path)
    assert torch.equal(again.measure("test", parameters[5:9]), values[5:9])
    assert again.measure("test", rows[-1:]).isnan().all() and len(task.measured) == 2  # not measured again
    again.measure("validation", parameters[:1])
    with torch.no_grad():
        model[3].bias += 1  # another network around the same tensors
    assert not torch.equal(Measurer(task, model, layout, tmp_path).measure("test", parameters[:2]), values[:2])
    for i in (0, CHUNK_SIZE + 5):
        with torch.no_grad():
            model[3].bias -= int(i == 0)
            model.load_state_dict(layout.unflatten(parameters[i]), strict=False)
            batch = task.collate(list(task.load_split("test")))
            torch.testing.assert_close(task.loss(model, batch).double(), values[i], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    recipe = Recipe(
        output_dir=str(tmp_path_factory.mktemp("run")),
        base_epochs=3,
        num_snapshots=40,
        collect_learning_rate=1e-2,
        select=["norm"],
        latent_dim=8,
        autoencoder_steps=30,
        denoiser_steps=30,
        num_models=12,
        baseline_models=2,
    )
    run = Run(recipe, task=Regression())
    run.execute()
    return run


def test_a_run_reports_the_metric(run):
    folder = run.folder / "evaluation"
    report = json.loads((folder / "report.json").read_text())
    assert report["metric"] == {"name": "MSE", "higher_is_better": False}
    groups = {group["name"]: group for group in report["groups"]}
    generated, test, validation = (
        groups["generated"],
        Measurer(run.task, run.base_model, run.layout).measure("test", run.parameters),
        Measurer(run.task, run.base_model, run.layout).measure("validation", run.parameters),
    )
    original = groups["original"]
    assert original["score_mean"] == pytest.approx(test.mean().item(), rel=1e-5)
    assert original["score_best"] == pytest.approx(test[validation.argmin()].item(), rel=1e-5)  # lower is better
    assert original["score_best_on_test"] == pytest.approx(test.min().item(), rel=1e-5)
    assert generated["n"] == 12 and groups["vae"]["n"] == 2 and len(groups) > 20
    assert 0 < generated["score_mean"] < 1 and report["reconstruction"]["r2_train"] > 0
    better = sum(row["score_mean"] < generated["score_mean"] for row in report["groups"] if row["family"])
    assert f"{better} have a better mean" in report["verdict"] and "lower is better" in report["verdict"]
    assert "iou" not in json.dumps(report["groups"]) and "reverse_process" not in report
    text = (folder / "report.md").read_text()
    assert text.startswith(format_summary(report).rstrip()) and "MSE" in text and "Frontier" not in text
    assert {path.name for path in folder.glob("*.png")} == {"latents.png", "losses.png", "parameters.png", "scores.png"}
    assert "validation_accuracy" not in run.snapshots[0].column_names


def test_the_model_card_names_the_metric(run):
    card = make_model_card(run.folder / "pipeline", "someone/regression", run=run.folder)
    results = {result.metric_name: result for result in card.data.eval_results}
    assert set(results) == {"Mean MSE of 12 networks", "MSE of the network chosen on validation data"}
    assert card.data.metrics == ["MSE"] and "![" in card.text


def test_a_finished_pipeline_is_evaluated_alone(run, tmp_path, monkeypatch):
    monkeypatch.setattr("pdiff_hf.run.saved.make_task", lambda recipe: run.task)
    base = str(run.folder / "base_model")
    recipe = Recipe(
        output_dir=str(tmp_path), snapshots=str(run.folder / "snapshots"), model=base, num_models=3, baseline_models=0
    )
    report = evaluate_saved(str(run.folder / "pipeline"), recipe)
    assert [group["name"] for group in report["groups"]] == ["original", "ensemble", "reconstructed", "generated"]
    assert report["verdict"].endswith("compared with no baseline.")


def test_undefined_scores_are_counted_and_never_the_best():
    task = Regression()
    torch.manual_seed(0)
    model = task.load_base_model()
    layout = select_layout(model, ["norm"], [])
    snapshots = layout.flatten(model.state_dict()) + 0.1 * torch.randn(6, layout.num_parameters)
    generated = torch.cat([snapshots[:1] + 1e6, snapshots + 0.01])
    groups = [Group("original", snapshots), Group("generated", generated), Group("bad", snapshots[:2] + 1e6, "noise")]
    report = evaluate_measured(Measurer(task, model, layout), groups, torch.zeros(6, dtype=torch.bool))
    rows = {row["name"]: row for row in report["groups"]}
    assert rows["generated"]["num_undefined"] == 1 and rows["generated"]["scores"][0] is None
    assert rows["generated"]["score_best"] is not None
    assert rows["bad"]["score_mean"] is None and rows["bad"]["num_undefined"] == 2
    assert "7 (1 undefined)" in format_summary(report)
