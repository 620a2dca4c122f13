"""A run for a family of tasks at a tiny size: its stages, what is kept, zoos from elsewhere, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_model
from support import runs
from support.recipes import TINY_FAMILY
from support.scripts import run_script

from pdiff_hf import PDiffPipeline
from pdiff_hf.evaluation import Kind, Report
from pdiff_hf.evaluation.opponents import Regime
from pdiff_hf.models import Fields
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.context import RunContext
from pdiff_hf.run.folder import RunError
from pdiff_hf.run.learning import between_descriptions, compare_outputs, regressed_latents
from pdiff_hf.run.trainer import prepare
from pdiff_hf.run.tuning import keep_better
from pdiff_hf.scripts.opponents import wanted_opponents
from pdiff_hf.snapshots import load_snapshots, parameter_matrix
from pdiff_hf.utils.seeds import named_seed

CHANGES = {
    "model_args": '{"img_size": 8, "in_chans": 1, "hidden_size": 4}',
    "max_train_samples": 120,
    "base_epochs": 10,
    "collect_steps": 6,
    "collect_every": 2,
    "denoiser_steps": 10,
    "tune_steps": 6,
    "tune_args": {"inference_steps": 4, "map": True, "weight_loss": 0.1},
    "baselines": "all",
}
TINY = PDiffConfig(**TINY_FAMILY | CHANGES)
TINY.soft = frozenset({*TINY_FAMILY, *CHANGES, "tune_args.map", "tune_args.weight_loss"})  # as those of a recipe


def run_in(folder, **changes) -> RunContext:
    config = TINY.changed(output_dir=str(folder), **changes)
    return prepare(config, extra_groups=wanted_opponents(config))


def finish(folder, figures: bool = False, **changes) -> RunContext:
    return runs.finish(TINY.changed(output_dir=str(folder), **changes), figures)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunContext:
    return finish(tmp_path_factory.mktemp("family") / "out", figures=True)


def test_a_denoiser_can_learn_what_a_regression_gives_for_other_conditions(finished, monkeypatch):
    monkeypatch.setattr(finished, "config", finished.config.changed(**{"denoiser_args.regressed_networks": 9}))
    latents, table = regressed_latents(finished)
    assert latents.shape == (9, 5) and table.shape == (9, finished.family.fields.width)
    family, again = finished.family, regressed_latents(finished)
    assert torch.equal(latents, again[0]) and torch.equal(table, again[1])
    keys = {family.key(condition) for condition in family.fields.conditions(table)}
    assert len(keys) == 9 and not keys & finished.unseen_tasks
    # Snapshots have a spread of 1 on average, and a regression on them less.
    assert 0 < latents.square().mean() < 1.5
    assert PDiffConfig(**TINY_FAMILY, tune_tasks="seen").num_regressed == 1500
    assert PDiffConfig(**TINY_FAMILY).num_regressed == 0


def test_of_described_tasks_a_regression_says_what_is_between_two_descriptions():
    fields = Fields(
        {
            "level": {"type": "scalar", "low": 0.0, "high": 4.0},
            "description": {"type": "text", "length": 4, "encoder": "none"},
        }
    )
    part = fields.columns["description"]
    ways = torch.full((3, 2, fields.width), torch.nan)  # three tasks, of which the first two are described twice
    ways[..., 0], ways[:2, :, part] = torch.arange(3.0).unsqueeze(1), torch.eye(4).unflatten(0, (2, 2))
    ways[2, 0, part] = torch.eye(4)[0]
    found = between_descriptions(fields, ways, 50, torch.Generator().manual_seed(0))
    seen = ways.flatten(0, 1)[:5]
    assert torch.isfinite(found).all() and set(found[:, 0].tolist()) == {0.0, 1.0, 2.0}
    torch.testing.assert_close(found[:, part].norm(dim=1), torch.ones(50))
    assert ((found[:, part] > 0).sum(1) <= 2).all() and (found[:, part] > 0).sum(1).eq(2).any()
    assert torch.equal(seen[:4, part], torch.eye(4))  # what was seen stays as it is


def test_the_report_has_every_answer_on_unseen_tasks(finished):
    report = Report.load(finished.folder / "evaluation")
    assert {name: len(tasks) for name, tasks in report.conditions.items()} == {"test": 3, "angle": 24}
    assert {row.kind for row in report.groups} == set(Kind) and len(report.groups) == 20
    # 40 steps of the base model, 6 tasks for 6 steps, and up to 6 of tuning; forward and backward are three passes.
    record = json.loads((finished.folder / "stages" / "tune.json").read_text())
    steps = len(record["results"]["losses"])
    base, zoo, tuning = 3 * (120 * 10 // 32) * 32, 3 * 6 * 6 * 16, 3 * steps * 4 * 8
    costs = {row.name: (row.cost.once, row.cost.each) for row in report.groups}
    assert costs["generated"] == (base + zoo + tuning, 0) and costs["kernel ridge"] == (base + zoo, 0)
    assert costs["generator by weights"] == (base + zoo, 0) and costs["base model"] == (base, 0)
    oracle = report.group("trained on the task, 5 times longer")
    each = 3 * 5 * 6 * 16
    assert costs[oracle.name] == (base + len(oracle.tried) * 2 * each, each) and len(oracle.tried) >= 4
    # Opponents get the passes of zoo and tuning together, in full for the two best rates, beside those of the search.
    basis = report.group("basis networks")
    assert costs["basis networks"][0] > base + zoo and len(basis.tried) >= 6
    assert report.group("one network 4 times wider, FiLM").size > 4 * report.generated.size
    assert report.sampling["num_inference_steps"] == 4
    text = (finished.folder / "evaluation" / "report.md").read_text()
    assert report.verdict[1] in text and "| kernel ridge" in text and "](accuracy_along_field.png)" in text
    figures = {path.name for path in (finished.folder / "evaluation").glob("*.png")}
    drawn = "accuracy_along_field", "scores", "losses", "reverse_process", "parameters", "latents"
    assert figures == {f"{name}.png" for name in drawn}


@torch.no_grad()
def test_the_generators_row_is_what_its_networks_reach_one_by_one(finished):
    pipe = PDiffPipeline.from_pretrained(finished.folder / "tuned")
    report = Report.load(finished.folder / "evaluation")
    conditions = report.conditions["test"]
    generator = torch.Generator().manual_seed(named_seed(0, "evaluate"))
    networks = pipe(2, 4, generator, condition=conditions, output_type="model").parameters
    accuracies = []
    for i, network in enumerate(networks):
        split = finished.family.task(conditions[i // 2]).load_split("test")
        batch = split.__getitems__(list(range(len(split))))
        accuracies.append(100 * (network(batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).float().mean())
    assert len(accuracies) == 6 and max(accuracies) > 15
    expected = torch.stack(accuracies).view(3, 2).mean(1).tolist()
    assert report.generated.scores() == pytest.approx(expected)


@pytest.mark.parametrize(("sign", "kept"), [(-1.0, 1.0), (2.0, 2.0)])
def test_a_generator_that_was_better_before_tuning_stays_as_it_was(sign, kept, caplog):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)

    def fit():
        torch.nn.init.constant_(model.weight, sign)
        return {"losses": [1.0]}

    results = keep_better(model, lambda: 50 + 10 * model.weight.item(), fit)
    assert results == {"losses": [1.0], "validation_accuracies": [60.0, 50 + 10 * sign]}
    assert model.weight.item() == kept
    assert ("from 60.00 to 40.00 %" in caplog.text) == (kept == 1.0)


def test_tuning_learns_a_map_that_is_saved(finished):
    untuned, tuned = (PDiffPipeline.from_pretrained(finished.folder / name) for name in ("pipeline", "tuned"))
    assert not untuned.autoencoder.config.tuned_map and tuned.autoencoder.config.tuned_map
    results = json.loads((finished.folder / "stages" / "tune.json").read_text())["results"]
    losses, (before, after) = results["validation_losses"], results["validation_accuracies"]
    is_kept = min(losses) < losses[0] and after >= before  # or the untuned one is
    assert (tuned.autoencoder.map_weight.abs().max() > 0) == is_kept
    assert torch.equal(tuned.condition_encoder.seen, untuned.condition_encoder.seen)
    assert len(tuned.condition_encoder.seen) == 6  # each task once, and not each snapshot
    latents = tuned.autoencoder.encode(parameter_matrix(*finished.snapshots)).latents
    assert latents.square().mean() == pytest.approx(1, abs=1e-4) and latents.var(0).max() > 1.5 * latents.var(0).min()


def test_a_stopped_evaluation_goes_on_with_what_it_has_not_scored(finished, monkeypatch):
    expected = json.loads((finished.folder / "evaluation" / "report.json").read_text())
    (finished.folder / "stages" / "evaluate.json").unlink()
    kept = next((finished.folder / "scores").glob("members-*.json"))
    rows = json.loads(kept.read_text())
    del rows["basis networks"], rows["hypernetwork"]
    kept.write_text(json.dumps(rows))
    trained, fit = set(), Regime.fit
    monkeypatch.setattr(Regime, "fit", lambda *args, **kwargs: trained.add(args[3]) or fit(*args, **kwargs))
    finish(finished.folder)
    assert trained == {"basis networks", "hypernetwork"}
    assert json.loads((finished.folder / "evaluation" / "report.json").read_text()) == expected


def test_networks_for_a_condition_from_the_shell(finished, tmp_path, monkeypatch):
    flags = [finished.folder / "tuned", "--num_models=2", "--num_inference_steps=4", "--only_generated"]
    condition = {"angle": 30.0, "invert": "yes"}
    run_script(monkeypatch, "generate.py", *flags, f"--condition={json.dumps(condition)}", f"--output_dir={tmp_path}")
    pipe = PDiffPipeline.from_pretrained(finished.folder / "tuned")
    expected = pipe(2, 4, torch.Generator().manual_seed(0), condition=condition).parameters
    for i, tensors in enumerate(expected):
        saved = load_file(tmp_path / f"network-{i:05d}.safetensors")
        assert saved.keys() == tensors.keys() and all(torch.equal(saved[name], tensors[name]) for name in saved)
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "generate.py", *flags, "--condition=37", f"--output_dir={tmp_path / 'other'}")


def test_a_zoo_from_elsewhere(finished, tmp_path):
    """Its tasks are the seen ones, and none of them is tested; the family must have its fields."""
    zoo = finished.folder / "snapshots"
    changes = {"snapshots": str(zoo), "baselines": "few", "tune_tasks": "seen", "tune_steps": 2, "num_tasks": 3}
    run = finish(tmp_path / "out", **changes)
    seen = {finished.family.key(condition) for condition in load_snapshots(zoo)[0].select_columns(list(run.fields))}
    keys = {name: {run.family.key(c) for c in run.fields.conditions(t)} for name, t in run.conditions.items()}
    assert len(seen) == 6 and not seen & (keys["validation"] | keys["test"] | keys["angle"])
    report = Report.load(run.folder / "evaluation")
    assert report.group("kernel ridge").cost.once == 3 * (120 * 10 // 32) * 32  # what others trained is not counted
    with pytest.raises(RunError, match="fields 'angle' .* and GroupedFamily has 'positive'"):
        run_in(tmp_path / "other", snapshots=str(zoo), family="grouped", family_args="{}", num_tasks=6)
    with pytest.raises(RunError, match="needs --family"):
        run_in(tmp_path / "other", snapshots=str(zoo), family=None, tune_steps=2)


def test_conditions_without_a_family_are_warned_of(finished, tmp_path):
    changes = {"tune_steps": 0, "tune_args.inference_steps": 10, "baselines": "few", "baseline_models": 1}
    run = finish(tmp_path / "out", snapshots=str(finished.folder / "snapshots"), family=None, **changes)
    report = Report.load(run.folder / "evaluation")
    assert report.warnings[0].startswith("The snapshots have conditions (angle, invert, occlude), and no family says")
    assert "--family" in report.warnings[0] and not report.fields and report.group("snapshots").n == 12


def evaluate(monkeypatch, finished, source, folder, *flags) -> Report:
    r = finished.config
    task = [
        f"--family={r.family}",
        f"--family_args={json.dumps(r.family_args)}",
        "--dataset=digits",
        "--max_train_samples=120",
    ]
    task += ["--max_eval_samples=40", f"--model={finished.folder / 'base_model'}", "--num_test_tasks=3"]
    task += ["--num_validation_tasks=2", "--collect_steps=2", "--collect_batch_size=8", "--num_models=2"]
    task += [f"--snapshots={finished.folder / 'snapshots'}", f"--output_dir={folder}", *flags]
    run_script(monkeypatch, "evaluate.py", source, *task)
    return Report.load(folder)


def test_networks_of_any_generator_are_audited_from_a_table(without_figures, finished, tmp_path, monkeypatch):
    pipe = PDiffPipeline.from_pretrained(finished.folder / "tuned")
    conditions = [
        {"angle": 40.0, "invert": "no", "occlude": "none"},
        {"angle": 90.0, "invert": "yes", "occlude": "top"},
    ]
    networks = pipe(2, 4, torch.Generator().manual_seed(0), condition=conditions, output_type="model").parameters
    lines, accuracies = ["network,angle:angle,invert,occlude"], []
    for i in (3, 0, 1, 2):  # in any order
        save_model(networks[i], str(tmp_path / f"{i}.safetensors"))
        lines.append(f"{i}.safetensors,{','.join(map(str, conditions[i // 2].values()))}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    report = evaluate(monkeypatch, finished, tmp_path / "table.csv", tmp_path / "out")
    assert [condition["angle"] for condition in report.conditions["test"]] == [40, 90]
    for i, network in enumerate(networks):
        split = finished.family.task(conditions[i // 2]).load_split("test")
        batch = split.__getitems__(list(range(len(split))))
        with torch.no_grad():
            predictions = network(batch["pixel_values"]).logits.argmax(-1)
        accuracies.append(100 * (predictions == batch["labels"]).float().mean())
    expected = torch.stack(accuracies).view(2, 2).mean(1).tolist()
    assert report.generated.scores() == pytest.approx(expected)
    (tmp_path / "table.csv").write_text("\n".join(lines[:4]))
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, finished, tmp_path / "table.csv", tmp_path / "out")


def test_a_saved_pipeline_is_audited(without_figures, finished, tmp_path, monkeypatch):
    report = evaluate(monkeypatch, finished, finished.folder / "tuned", tmp_path / "out", "--num_inference_steps=4")
    kinds = {Kind.GENERATED, Kind.CONTROL, Kind.SNAPSHOTS, Kind.BASELINE, Kind.ORACLE}
    assert {row.kind for row in report.groups} == kinds
    assert report.conditions["test"] == finished.fields.conditions(finished.conditions["test"])
    own = Report.load(finished.folder / "evaluation")
    for name in ("generated", "nearest snapshot", "base model"):
        assert report.group(name).sets["test"] == own.group(name).sets["test"]
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, finished, finished.folder / "autoencoder", tmp_path / "out")


OWN = """
from pdiff_hf.models.condition import Fields
from pdiff_hf.tasks.image_families import ImageFamily


class Darker(ImageFamily):
    fields = Fields({"gamma": {"type": "scalar", "low": 1, "high": 4}})

    def change(self, conditions, images, labels):
        return images ** conditions.over(images).gamma, labels
"""


def test_a_family_of_ones_own_is_one_class(tmp_path):
    path = tmp_path / "darker.py"
    path.write_text(OWN)
    changes = {"family_args": "{}", "baselines": "few", "tune_steps": 0, "num_test_tasks": 2}
    run = finish(tmp_path / "out", family=f"{path}:Darker", **changes)
    report = Report.load(run.folder / "evaluation")
    assert report.fields == {"gamma": {"type": "scalar", "low": 1, "high": 4}}
    assert set(report.conditions) == {"test", "gamma"} and report.generated.mean() > 0
    # Another body under the same name: nothing that was finished is reused.
    path.write_text(OWN.replace("gamma, labels", "gamma.square(), labels"))
    with pytest.raises(RunError, match=r"holds a run with other settings \(darker.py has been edited\)"):
        run_in(tmp_path / "out", family=f"{path}:Darker", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "rotated"}, "neither one of .* nor a class of your own"),
        ({"family_args": '{"range": {}}'}, "does not take the family_args range; it takes ranges, hold_out"),
        ({"family_args": '{"ranges": {"hue": [0, 1]}}'}, "has no field 'hue'"),
        ({"family_args": '{"hold_out": ["moon"]}'}, "hold_out can have combinations, extrapolation, not 'moon'"),
        ({"num_snapshots": 13}, "num_tasks must be a divisor of num_snapshots=13, got 6"),
        ({"collect_every": 6}, "need more than collect_steps=6"),
        (
            {"collect_args": {"optimizer": "sgd"}},
            "collect_args.optimizer=sgd has no effect: .* it is for a single task",
        ),
        ({"family": "grouped", "family_args": "{}", "num_tasks": 510, "num_snapshots": 510}, "fewer than"),
    ],
)
def test_what_is_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_in(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_an_autoencoder_is_trained_on_predictions_of_the_members(finished, tmp_path):
    """Reconstructions of held-out networks then predict more like them than from as many principal components."""
    folder, agreement = tmp_path / "out", {}
    shutil.copytree(finished.folder, folder)
    changes = {"latent_dim": 2, "baselines": "few", "tune_steps": 0, "overwrite_output_dir": True, "tune_args": {}}
    changes["heldout_snapshots"] = 0.25
    learned = {"autoencoder_steps": 80, "autoencoder_args": {"loss": "outputs", "latent_noise": 0}}
    for preset, more in (("pca", {}), ("linear", learned)):
        run = finish(folder, autoencoder_preset=preset, **changes, **more)
        agreement[preset] = compare_outputs(run, run.autoencoder, torch.device("cpu"))["agreement"]
    report = Report.load(folder / "evaluation")
    assert report.reconstruction == {"agreement": agreement["linear"]} and agreement["linear"] > agreement["pca"]
    assert "Outputs of reconstructions" in (folder / "evaluation" / "report.md").read_text()
