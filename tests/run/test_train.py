"""The main job on real digits at a tiny size: stages, reuse, kill and resume, reports, and errors before any work."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTImageProcessor

from pdiff_hf import PDiffPipeline
from pdiff_hf.layout import LayoutError
from pdiff_hf.run.folder import RunError
from pdiff_hf.run.recipe import Recipe
from pdiff_hf.run.run import Run
from pdiff_hf.snapshots import SnapshotError, load_snapshots, parameter_matrix
from pdiff_hf.tasks import ImageClassificationTask, Task

ROOT = Path(__file__).parents[2]
TINY = {
    "model": "test_resnet",
    "image_size": 16,
    "max_train_samples": 600,
    "max_eval_samples": 100,
    "base_epochs": 8,
    "num_snapshots": 30,
    "collect_batch_size": 32,
    "latent_dim": 16,
    "autoencoder_steps": 60,
    "autoencoder_batch_size": 10,
    "denoiser_steps": 60,
    "denoiser_batch_size": 10,
    "num_models": 8,
    "num_inference_steps": 5,
    "checkpointing_steps": 10,
}


def carry_out(folder, **changes) -> Run:
    run = Run(Recipe(**TINY | {"output_dir": str(folder)} | changes))
    with run.lock():
        run.execute()
    return run


def bits(folder) -> dict[str, str]:
    """A digest of every file of a saved pipeline: its weights and configurations."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    return carry_out(tmp_path_factory.mktemp("run") / "out")


def test_the_report(finished):
    report = json.loads((finished.folder / "evaluation" / "report.json").read_text())
    assert report["num_parameters"] == finished.layout.num_parameters
    assert report["splits"] == {"validation": 100, "test": 100}
    groups = {group["name"]: group for group in report["groups"]}
    sizes = {name: groups[name]["n"] for name in ("snapshots", "mean", "reconstructed", "generated")}
    assert sizes == {"snapshots": 30, "mean": 1, "reconstructed": 3, "generated": 8}
    for group in groups.values():
        assert 0 <= group["score_best"] <= group["score_best_on_test"] <= 100
        assert 0 <= group["max_iou"] <= 1
    assert groups["mean"]["iou_within"] is None
    text = (finished.folder / "evaluation" / "report.md").read_text()
    assert f"{groups['generated']['score_mean']:.2f}" in text


def test_the_report_is_what_a_plain_loop_over_the_networks_finds(finished):
    """The originals, one by one, as whole networks of transformers, on images that the task prepared."""
    dataset, layout = load_snapshots(finished.folder / "snapshots")
    task = ImageClassificationTask("test_resnet", image_size=16, max_train_samples=600, max_eval_samples=100)
    split = task.load_split("test")
    batch = split.__getitems__(list(range(len(split))))
    model = AutoModelForImageClassification.from_pretrained(finished.folder / "base_model").eval()
    accuracies, wrong = [], []
    for row in parameter_matrix(dataset, layout):
        model.load_state_dict(layout.unflatten(row), strict=False)
        with torch.no_grad():
            wrong.append(model(batch["pixel_values"]).logits.argmax(-1) != batch["labels"])
        accuracies.append(100 - 100 * wrong[-1].float().mean().item())
    report = json.loads((finished.folder / "evaluation" / "report.json").read_text())
    original = report["groups"][0]
    assert original["score_mean"] == pytest.approx(sum(accuracies) / 30, abs=1e-4)
    assert original["score_best_on_test"] == pytest.approx(max(accuracies), abs=1e-4)
    best = max(range(30), key=lambda i: dataset[i]["validation_accuracy"])
    assert original["score_best"] == pytest.approx(accuracies[best], abs=1e-4)
    iou = [
        (a & b).sum().item() / (a | b).sum().item() if (a | b).any() else 1.0
        for i, a in enumerate(wrong)
        for j, b in enumerate(wrong)
        if i != j
    ]
    assert original["iou_within"] == pytest.approx(sum(iou) / len(iou), abs=1e-6)


def test_snapshots_differ_only_in_the_selected_tensors(finished):
    dataset, layout = load_snapshots(finished.folder / "snapshots")
    parameters = parameter_matrix(dataset, layout)
    assert parameters.shape == (30, layout.num_parameters) and dataset["step"][:] == list(range(1, 31))
    owners = {name.rpartition(".")[0] for name in layout.names}
    assert len(layout.names) == 4 and len(owners) == 2
    assert all("Norm" in type(finished.base_model.get_submodule(name)).__name__ for name in owners)
    base = layout.flatten(finished.base_model.state_dict())
    # AdamW moves every number by about the learning rate in its first step.
    assert 0 < (parameters[0] - base).abs().max() < 0.04
    assert (parameters[-1] - base).norm() > (parameters[0] - base).norm()


def test_finished_stages_are_reused_and_their_results_are_the_same_bits(finished, tmp_path):
    times = {p: p.stat().st_mtime_ns for p in (finished.folder / "stages").iterdir()}
    carry_out(finished.folder)
    assert {p: p.stat().st_mtime_ns for p in (finished.folder / "stages").iterdir()} == times
    again = carry_out(tmp_path / "again")
    assert bits(again.folder / "pipeline") == bits(finished.folder / "pipeline")
    assert all(
        str(tmp_path).encode() not in path.read_bytes()
        for path in (again.folder / "pipeline").rglob("*")
        if path.is_file()
    )
    reports = [json.loads((run.folder / "evaluation" / "report.json").read_text()) for run in (again, finished)]
    assert reports[0] == reports[1]


def test_other_settings_are_refused_unless_asked_for(finished, tmp_path):
    with pytest.raises(RunError, match="denoiser_steps: 60 there, 61 asked for"):
        carry_out(finished.folder, denoiser_steps=61)
    carry_out(tmp_path, stages=["base", "collect"])
    with pytest.raises(RunError, match="stage evaluate needs autoencoder, denoiser, vae first"):
        carry_out(tmp_path, stages=["evaluate"])
    base = (tmp_path / "stages" / "base.json").stat().st_mtime_ns
    carry_out(tmp_path, stages=["base", "collect"], num_snapshots=12, overwrite_output_dir=True)
    assert len(load_snapshots(tmp_path / "snapshots")[0]) == 12
    assert (tmp_path / "stages" / "base.json").stat().st_mtime_ns == base


def test_the_saved_generator_makes_working_networks(finished, tmp_path):
    subprocess.run(
        [sys.executable, ROOT / "scripts/generate.py", finished.folder / "pipeline", "--num_models=3", "--seed=5",
         "--num_inference_steps=5", "--output_dir", tmp_path / "networks"],
        check=True,
    )  # fmt: skip
    pipe = PDiffPipeline.from_pretrained(finished.folder / "pipeline")
    networks = pipe(
        3, num_inference_steps=5, generator=torch.Generator().manual_seed(5), output_type="model"
    ).parameters
    split = finished.task.load_split("test")
    batch = split.__getitems__(list(range(len(split))))
    for i, expected in enumerate(networks):
        folder = tmp_path / "networks" / f"network-{i:05d}"
        written = load_file(folder / "model.safetensors")
        network = AutoModelForImageClassification.from_pretrained(folder).eval()
        assert len(written) == len(network.state_dict())
        with torch.no_grad():
            assert torch.equal(network(batch["pixel_values"]).logits, expected(batch["pixel_values"]).logits)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "resnet81"}, ValueError, "'resnet81' is not a timm architecture"),
        ({"select": ["layer9.*"]}, LayoutError, "'layer9.*' selects no parameter"),
        ({"select": ["norm[-2:]"], "exclude": ["all"]}, LayoutError, "nothing is left to generate"),
        ({"latent_dim": 5000}, RunError, "latent_dim is 5000, but only 384 parameters"),
        ({"num_inference_steps": 50, "num_train_timesteps": 10}, RunError, "num_inference_steps is 50"),
        ({"gradient_accumulation_steps": 4}, RunError, "autoencoder_batch_size=10 cannot be cut into 4"),
        ({"max_train_samples": 0}, ValueError, "max_train_samples must be at least 1"),
    ],
)
def test_wrong_settings_are_found_before_any_work(changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        Run(Recipe(**TINY | {"output_dir": str(tmp_path / "out")} | changes))
    assert not (tmp_path / "out").exists()


def test_a_spoiled_data_set_is_refused_before_training(finished, tmp_path):
    carry_out(tmp_path, stages=["base", "collect"])
    path = tmp_path / "snapshots" / "data" / "snapshots.arrow"
    parameters = parameter_matrix(*load_snapshots(tmp_path / "snapshots"))
    spoiled = path.read_bytes().replace(
        parameters[3].numpy().tobytes(), torch.full_like(parameters[3], torch.nan).numpy().tobytes()
    )
    path.write_bytes(spoiled)
    with pytest.raises(SnapshotError, match="snapshot 3 is not finite: tensor 'timm_model"):
        carry_out(tmp_path)
    assert not (tmp_path / "autoencoder").exists()


def test_a_second_run_in_the_folder_is_refused(finished):
    second = Run(Recipe(**TINY | {"output_dir": str(finished.folder)}))
    with (
        finished.lock(),
        pytest.raises(RunError, match="another run is at work in"),
        second.lock(),
    ):
        pass


def flags(folder) -> list[str]:
    values = TINY | {"output_dir": folder}
    return [f"--{key}={value}" for key, value in values.items()]


def launch(folder, *arguments, **kwargs) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        ROOT / "scripts/train.py",
        *flags(folder),
        *arguments,
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in the background has them ignore Ctrl-C, and new processes would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **kwargs,
    )


def wait_for(pattern: str, folder: Path, process: subprocess.Popen) -> None:
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.fixture
def another_precision():
    """Accelerate settles the precision once a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision_accumulation_and_a_tracker(another_precision, tmp_path):
    run = carry_out(
        tmp_path,
        mixed_precision="bf16",
        image_size=32,  # on one pixel, torch 2.14 leaves gradients of a convolution with stride 2 unset (bf16, CPU)
        gradient_accumulation_steps=2,
        base_batch_size=32,
        report_to="tensorboard",
        baseline_models=2,
    )
    report = json.loads((run.folder / "evaluation" / "report.json").read_text())
    assert report["reconstruction"]["r2_train"] > 0.5
    assert run.autoencoder.dtype == torch.float32
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_killed_in_every_training_stage_and_resumed_it_ends_with_the_same_bits(finished, tmp_path):
    for pattern in (
        "checkpoints/base/checkpoint-*",
        "checkpoints/autoencoder/checkpoint-*",
        "checkpoints/denoiser/checkpoint-*",
    ):
        process = launch(tmp_path, "--resume_from_checkpoint=latest")
        wait_for(pattern, tmp_path, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = launch(tmp_path, "--resume_from_checkpoint=latest")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "going on from step" in errors and "| generated" in output
    assert bits(tmp_path / "pipeline") == bits(finished.folder / "pipeline")
    assert (tmp_path / "evaluation/report.json").read_bytes() == (
        finished.folder / "evaluation/report.json"
    ).read_bytes()


@pytest.mark.slow
def test_interrupted_it_says_how_to_go_on_and_errors_are_one_line(tmp_path):
    process = launch(tmp_path / "out")
    wait_for("out/checkpoints/base/checkpoint-*", tmp_path, process)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate()[1]
    assert process.returncode != 0 and "--resume_from_checkpoint latest" in errors
    process = launch(tmp_path / "other", "--model=resnet81")
    output, errors = process.communicate()
    assert process.returncode != 0 and "error: model 'resnet81' is not a timm architecture" in errors
    assert not (tmp_path / "other").exists()


class Adapted(ImageClassificationTask):
    """The base model with LoRA adapters."""

    def load_base_model(self):
        import peft

        return peft.get_peft_model(super().load_base_model(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))

    # All of its weights; PEFT itself would save the adapters alone.
    save_base_model, load_saved = Task.save_base_model, Task.load_saved


@pytest.mark.slow
def test_adapters_of_a_peft_model_are_generated(tmp_path):
    pytest.importorskip("peft")
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        num_labels=10,
    )
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    recipe = Recipe(
        **TINY | {"model": str(tmp_path / "vit"), "select": ["*.lora_*"], "output_dir": str(tmp_path / "run")}
    )
    run = Run(recipe, task=Adapted(recipe.model, image_size=16, max_train_samples=600, max_eval_samples=100))
    run.execute()
    pipe = run.pipeline
    assert pipe.autoencoder.layout.num_parameters == 2 * 2 * 2 * (2 * 16)  # layers, projections, A and B, r x 16
    network = run.base_model
    generated = pipe(2, generator=torch.Generator().manual_seed(0)).parameters
    assert not network.load_state_dict(generated[0], strict=False).unexpected_keys
    images = torch.randn(1, 3, 16, 16)
    first = network(pixel_values=images).logits
    network.load_state_dict(generated[1], strict=False)
    assert not torch.equal(network(pixel_values=images).logits, first)


@pytest.mark.slow
def test_the_linear_autoencoder_takes_the_place_of_the_learned_one(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    changes = {"autoencoder_preset": "pca", "normalization": "tensor", "overwrite_output_dir": True}
    run = carry_out(folder, **changes, baseline_models=2)
    assert not list(run.pipeline.autoencoder.parameters())
    report = json.loads((folder / "evaluation" / "report.json").read_text())
    assert report["reconstruction"]["r2_train"] == pytest.approx(report["reconstruction"]["linear_r2_train"], abs=0.05)
    assert report["reconstruction"]["r2_train"] > finished_r2(finished)
    assert "vae" not in {group["name"] for group in report["groups"]}


def finished_r2(run: Run) -> float:
    return json.loads((run.folder / "evaluation" / "report.json").read_text())["reconstruction"]["r2_train"]
