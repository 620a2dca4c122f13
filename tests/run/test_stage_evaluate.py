"""The stage `evaluate` of a run."""

import dataclasses
import json

import pytest
import torch
from reproduce.extra_groups import hyper_representations, vae
from safetensors.torch import load_file
from support import recipes
from support.runs import finish

from pdiff_hf import PDiffPipeline
from pdiff_hf.evaluation import Kind, Report
from pdiff_hf.evaluation.groups import named_generator
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.folder import RunError
from pdiff_hf.run.trainer import prepare
from pdiff_hf.scripts.saved import evaluate_saved
from pdiff_hf.scripts.tuned_baselines import tuned_baselines
from pdiff_hf.utils.names import generator_folder

FOLDERS = ("pipeline", "tuned")
TINY = recipes.TINY | {"max_eval_samples": 50, "num_models": 3, "num_inference_steps": 2, "baseline_models": 1}
TINY |= {"autoencoder_batch_size": 4, "denoiser_batch_size": 4}


def test_extra_groups_stand_in_the_report_and_belong_to_it(tmp_path):
    settings = PDiffConfig(**TINY, output_dir=str(tmp_path / "run"))
    run = finish(settings, figures=True, extra_groups=vae)
    report = Report.load(run.folder / "evaluation")
    assert report.group("vae").n == 1 and report.group("vae").verdict is not None
    assert len(list((run.folder / "evaluation").glob("*.png"))) == 6
    assert prepare(settings).is_finished("evaluate")  # it has all that others have
    with pytest.raises(RunError, match="extra_groups"):
        prepare(settings, extra_groups=hyper_representations)
    finish(settings.changed(num_models=4, overwrite_output_dir=True))
    assert Report.load(run.folder / "evaluation").generated.n == 4


def test_scores_that_will_not_fit_into_memory_are_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(
        ValueError, match=r"more than half of the [\d,]+ bytes of free memory; use .*--max_eval_samples"
    ):
        prepare(PDiffConfig(**TINY | {"num_models": 10**11}, output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_tuned_generator_is_the_one_that_is_evaluated(tmp_path):
    changes = {"tune_steps": 4, "tune_models": 3, "tune_batch_size": 5, "baseline_models": 0}
    run = finish(PDiffConfig(**TINY | changes, output_dir=str(tmp_path / "run")))
    weights = {name: load_file(run.folder / name / "denoiser/diffusion_pytorch_model.safetensors") for name in FOLDERS}
    assert any(not torch.equal(weights["pipeline"][key], weights["tuned"][key]) for key in weights["tuned"])
    assert generator_folder(run.folder) == run.folder / "tuned"
    record = json.loads((run.folder / "stages/tune.json").read_text())
    assert len(record["results"]["losses"]) == 4
    assert min(record["results"]["validation_losses"]) < float("inf")
    parameters = run.pipeline(3, 2, torch.Generator().manual_seed(0), output_type="pt").parameters
    alone = PDiffPipeline.from_pretrained(run.folder / "tuned")
    assert torch.equal(alone(3, 2, torch.Generator().manual_seed(0), output_type="pt").parameters, parameters)
    for config in (run.folder / "tuned").rglob("*.json"):
        assert str(tmp_path) not in config.read_text()  # it may be published
    with pytest.raises(RunError, match="tune_models=3 cannot be cut into 2 equal parts"):
        prepare(PDiffConfig(**TINY | changes, gradient_accumulation_steps=2, output_dir=str(tmp_path / "other")))


def test_validation_chooses_the_diversity_and_the_report_gives_others_the_same(tmp_path):
    changes = {"tune_steps": 4, "tune_models": 4, "tune_batch_size": 5}
    changes |= {
        "tune_args": {"ensemble_size": 2, "diversity": [0.0, 5.0], "penalty": 0.1},
        "baseline_models": 2,
        "baselines": "few",
    }
    run = finish(PDiffConfig(**TINY | changes, temperature=0.5, output_dir=str(tmp_path / "run")))
    results = json.loads((run.folder / "stages/tune.json").read_text())["results"]
    tried = results["validation_loss_of_diversity"]
    assert set(tried) == {"0", "5"} and tried[f"{results['diversity']:g}"] == min(tried.values())
    saved = json.loads((run.folder / "tuned/tuning.json").read_text())
    assert saved["objective"] == {"ensemble_size": 2, "diversity": results["diversity"], "penalty": 0.1}
    num_unseen = len(run.task.load_split("validation"))
    assert saved["passes"] == 2 * (3 * 4 * 4 * 5 + 5 * 4 * num_unseen)  # validated before and after each of the steps
    report = Report.load(run.folder / "evaluation")
    assert report.tuning["passes"] == report.generated.cost.once == saved["passes"]
    assert report.sampling["temperature"] == 0.5 and "at temperature 0.5" in report.summary["about"]
    assert report.group("generator by weights").kind == "variant"
    # What was judged is what everybody gets who samples the run's generator without a word about how.
    pipe = PDiffPipeline.from_pretrained(run.folder)
    assert (pipe.config.temperature, pipe.config.num_inference_steps) == (0.5, 2)
    networks = pipe(3, generator=named_generator(0, "generated"), output_type="model").parameters
    split = run.task.load_split("test")
    batch = split.__getitems__(list(range(len(split))))
    with torch.no_grad():
        right = [network(batch["pixel_values"]).logits.argmax(-1) == batch["labels"] for network in networks]
    assert report.generated.scores() == pytest.approx([100 * row.float().mean().item() for row in right])
    assert report.group("SWAG, 4 steps").verdict is not None
    recipe = PDiffConfig(
        **TINY | changes | {"model": None, "max_eval_samples": 20},
        snapshots=str(run.folder / "snapshots"),
        dataset="digits",
    )
    recipe = dataclasses.replace(recipe, output_dir=str(tmp_path / "again"))
    again = evaluate_saved(str(run.folder / "tuned"), recipe, tuned_baselines)
    assert again.of_kind(Kind.OPPONENT) and again.tuning["passes"] == saved["passes"]
