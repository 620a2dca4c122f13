"""The main job on real digits at a tiny size: its report, what is reused, what is refused, and what it prints."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.run_server import FLAGS, RECIPE, files
from transformers import AutoModelForImageClassification

from pdiff_hf import PDiffPipeline
from pdiff_hf.layout import LayoutError
from pdiff_hf.run.cli import load_config
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.context import RunContext
from pdiff_hf.run.folder import RunError
from pdiff_hf.run.trainer import execute, prepare
from pdiff_hf.snapshots import SnapshotError, load_snapshots, parameter_matrix
from pdiff_hf.tasks import ImageClassificationTask
from pdiff_hf.utils.seeds import named_seed


def run_in(folder, **changes) -> RunContext:
    return prepare(PDiffConfig(**RECIPE | {"output_dir": str(folder)} | changes))


@pytest.fixture(scope="module")
def finished(whole_run) -> RunContext:
    return run_in(whole_run[0])


@pytest.fixture
def copied(whole_run, tmp_path):
    """A folder with the finished run, to be changed."""
    return shutil.copytree(whole_run[0], tmp_path / "out")


@torch.no_grad()
def test_the_report_is_what_a_plain_loop_over_the_networks_finds(finished):
    """The snapshots, one by one, as whole networks of transformers, on images that the task prepared."""
    dataset, layout = load_snapshots(finished.folder / "snapshots")
    split = finished.task.load_split("test")
    batch = split.__getitems__(list(range(len(split))))
    model = AutoModelForImageClassification.from_pretrained(finished.folder / "base_model").eval()
    wrong = []
    for row in parameter_matrix(dataset, layout):
        model.load_state_dict(layout.unflatten(row), strict=False)
        wrong.append(model(batch["pixel_values"]).logits.argmax(-1) != batch["labels"])
    accuracies = [100 - 100 * w.float().mean().item() for w in wrong]
    report = json.loads((finished.folder / "evaluation" / "report.json").read_text())
    groups = {group["name"]: group for group in report["groups"]}
    snapshots = groups["snapshots"] | groups["snapshots"]["measures"]
    assert report["num_parameters"] == layout.num_parameters and report["splits"] == {"validation": 60, "test": 60}
    assert (snapshots["n"], groups["mean of the snapshots"]["n"], groups["generated"]["n"]) == (16, 1, 6)
    assert snapshots["score_mean"] == pytest.approx(sum(accuracies) / 16, abs=1e-4)
    assert snapshots["score_best_on_test"] == pytest.approx(max(accuracies), abs=1e-4)
    best = max(range(16), key=lambda i: dataset[i]["validation_accuracy"])
    assert snapshots["score_best"] == pytest.approx(accuracies[best], abs=1e-4)
    iou = [
        (a & b).sum().item() / (a | b).sum().item() if (a | b).any() else 1.0
        for i, a in enumerate(wrong)
        for j, b in enumerate(wrong)
        if i != j
    ]
    assert snapshots["iou_within"] == pytest.approx(sum(iou) / len(iou), abs=1e-6)


def test_the_base_model_warms_up(tmp_path):
    """AdamW moves by about the learning rate in a step; it is still near 0 where the warm-up is far from its end."""
    moved = {}
    for steps in (0, 10_000):
        run = run_in(tmp_path / str(steps), stages=["base"], base_args={"warmup_steps": steps})
        execute(run)
        torch.manual_seed(named_seed(run.config.seed, "base weights"))
        before = dict(run.task.load_base_model().named_parameters())
        moved[steps] = max((p - before[n]).abs().max().item() for n, p in run.base_model.named_parameters())
    assert moved[10_000] < 0.02 * moved[0]


def test_snapshots_differ_only_in_the_selected_tensors(finished):
    dataset, layout = load_snapshots(finished.folder / "snapshots")
    parameters = parameter_matrix(dataset, layout)
    assert parameters.shape == (16, layout.num_parameters) and dataset["step"][:] == list(range(1, 17))
    owners = {name.rpartition(".")[0] for name in layout.names}
    assert len(layout.names) == 4 and len(owners) == 2
    assert all("Norm" in type(finished.base_model.get_submodule(name)).__name__ for name in owners)
    base = layout.flatten(finished.base_model.state_dict())
    # AdamW moves every parameter by about the learning rate in its first step.
    assert 0 < (parameters[0] - base).abs().max() < 0.04
    assert (parameters[-1] - base).norm() > (parameters[0] - base).norm()


def test_held_out_snapshots_are_chosen_by_index_at_equal_distances(finished):
    heldout = torch.nonzero(finished.heldout).flatten()
    assert heldout.tolist() == [5, 10] and finished.seen.tolist() == [i for i in range(16) if i not in (5, 10)]
    assert finished.latents.shape == (16, 8)


@torch.no_grad()
def test_the_saved_generator_makes_the_networks_of_the_pipeline(run_server, finished, tmp_path):
    arguments = [finished.folder / "pipeline", "--num_models=3", "--seed=5", "--num_inference_steps=4"]
    result = run_server.run(tmp_path / "networks", *arguments, script="generate")
    assert result.status == 0 and "3 networks are in" in result.output, result.errors
    pipe = PDiffPipeline.from_pretrained(finished.folder / "pipeline")
    networks = pipe(3, num_inference_steps=4, generator=torch.Generator().manual_seed(5), output_type="model")
    images = torch.randn(2, 3, 64, 64)
    for i, expected in enumerate(networks.parameters):
        folder = tmp_path / "networks" / f"network-{i:05d}"
        network = AutoModelForImageClassification.from_pretrained(folder).eval()
        assert len(load_file(folder / "model.safetensors")) == len(network.state_dict())
        assert torch.equal(network(images).logits, expected(images).logits)


def test_what_it_prints(run_server, copied):
    """Finished stages are reused; the end is the small table, the verdict and what to type next."""
    before = files(copied)
    shutil.rmtree(copied / "evaluation")
    result = run_server.run(copied, *FLAGS)
    assert result.status == 0 and files(copied) == before, result.errors
    # Progress bars clear their lines when they end.
    lines = [line for line in result.errors.splitlines() if line.strip() and "%|" not in line]
    stages = ["base", "collect", "autoencoder", "denoiser"]
    assert lines[:4] == [f"[{i}/5] {stage}: already finished; reusing" for i, stage in enumerate(stages, 1)]
    assert lines[4] == "[5/5] evaluate: 6 generated networks, and 2 of each baseline"
    assert re.fullmatch(r"\[5/5\] evaluate: done in [\d.]+ s", lines[-1])
    others = [line for line in lines[4:] if not line.startswith("[5/5]")]
    assert not others, others
    table = [line for line in result.output.splitlines() if line.startswith("| ")]
    assert len(table) <= 2 + 8 and "Against the snapshots:" in result.output
    assert str(copied).join(["  python scripts/generate.py ", "/pipeline --num_models 10\n"]) in result.output
    assert result.output.endswith(f"  python scripts/app.py {copied}\n")


def test_other_settings_are_refused_unless_asked_for(run_server, whole_run, copied):
    with pytest.raises(RunError, match="denoiser_steps: 30 there, 31 asked for"):
        run_in(copied, denoiser_steps=31)
    before = files(copied)
    result = run_server.run(copied, *FLAGS, "--baseline_models=0", "--num_models=7", "--overwrite_output_dir")
    assert result.status == 0, result.errors
    after = files(copied)
    changed = {name.partition("/")[0] for name in before if after.get(name) != before[name]}
    assert changed == {"evaluation", "stages"} and before["stages/denoiser.json"] == after["stages/denoiser.json"]
    groups = json.loads((copied / "evaluation" / "report.json").read_text())["groups"]
    assert [group["n"] for group in groups if group["name"] == "generated"] == [7]


def test_other_data_or_another_task_do_not_take_over_finished_stages(copied):
    class Turned(ImageClassificationTask):
        def fingerprint(self, split):
            return super().fingerprint(split) + " turned" * (split == "train")

    class Same(ImageClassificationTask):
        pass

    settings = {key: RECIPE[key] for key in ("model", "image_size", "max_train_samples", "max_eval_samples")}
    recipe = PDiffConfig(**RECIPE | {"output_dir": str(copied)})
    with pytest.raises(RunError, match=r"task_class: '[^']*\.ImageClassificationTask' there, '[^']*\.Same' asked for"):
        prepare(recipe, task=Same(**settings, dataset="digits"))
    with pytest.raises(RunError, match="train data: .* turned' asked for"):
        prepare(recipe, task=Turned(**settings, dataset="digits"))


def test_stages_that_are_missing_are_named(run_server, copied):
    shutil.rmtree(copied / "autoencoder")
    (copied / "stages" / "evaluate.json").unlink()
    result = run_server.run(copied, *FLAGS, "--stages=evaluate")
    message = f"error: stage evaluate needs autoencoder first, which '{copied}' does not have"
    assert result.status == 1 and message in result.errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "resnet81"}, ValueError, "'resnet81' is not a timm architecture"),
        ({"task": "image_classificaton"}, ValueError, "is neither one of image_classification"),
        ({"task": "nowhere.py:Own"}, ValueError, "'nowhere.py' cannot be imported"),
        ({"select": ["layer9.*"]}, LayoutError, "'layer9.*' selects no parameter"),
        ({"select": ["norm[-2:]"], "exclude": ["all"]}, LayoutError, "nothing is left to generate"),
        ({"latent_dim": 5000}, RunError, "latent_dim is 5000, but only 160 parameters"),
        (
            {"num_inference_steps": 50, "denoiser_args": {"num_train_timesteps": 10}},
            RunError,
            "num_inference_steps is 50",
        ),
        ({"gradient_accumulation_steps": 3}, RunError, "autoencoder_batch_size=8 cannot be cut into 3"),
        ({"mixed_precision": "fp16"}, RunError, "mixed_precision=fp16 needs a GPU, and this run has a CPU"),
        (
            {"num_snapshots": 2, "heldout_snapshots": 0.4},
            RunError,
            "2 snapshots leave fewer than 2 to train on",
        ),
        # Not even the administrator can write there.
        ({"output_dir": "/proc/no/such/run"}, ValueError, "nothing can be written to '/proc/no/such/run'"),
        ({"output_dir": f"{__file__}/run"}, ValueError, f"nothing can be written to '{__file__}/run'"),
    ],
)
def test_what_is_wrong_is_found_before_any_work(changes, error, message, tmp_path):
    with pytest.raises(error, match=re.escape(message)):
        run_in(**{"folder": tmp_path / "out"} | changes) if "output_dir" not in changes else prepare(
            PDiffConfig(**RECIPE | changes)
        )
    assert not (tmp_path / "out").exists()


def test_a_spoiled_data_set_is_refused_before_training(run_server, copied):
    path = copied / "snapshots" / "data" / "snapshots.arrow"
    row = parameter_matrix(*load_snapshots(copied / "snapshots"))[3].numpy()
    path.write_bytes(path.read_bytes().replace(row.tobytes(), (row * float("nan")).tobytes()))
    with pytest.raises(SnapshotError, match="snapshot 3 is not finite: tensor 'timm_model"):
        run_in(copied).parameters  # noqa: B018
    (copied / "stages" / "autoencoder.json").unlink()
    result = run_server.run(copied, *FLAGS, "--stages=autoencoder")
    assert result.status == 1 and "error: snapshot 3 is not finite: tensor 'timm_model" in result.errors


def test_the_precision_of_the_launcher_is_used_and_recorded(run_server, whole_run, tmp_path):
    """With a tracker and accumulation, which the launcher's precision must not disturb."""
    stages = ["--stages", "base", "collect", "autoencoder", "--gradient_accumulation_steps=2"]
    launched = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    results = [
        run_server.run(tmp_path / "launch", *FLAGS, *stages, environment=launched),
        run_server.run(tmp_path / "flag", *FLAGS, *stages, "--mixed_precision=bf16", "--report_to=tensorboard"),
    ]
    assert [result.status for result in results] == [0, 0], results
    assert load_config(tmp_path / "launch" / "recipe.yaml").mixed_precision == "bf16"
    assert list((tmp_path / "flag" / "logs").rglob("events.out.tfevents.*"))
    for name in ("base_model", "snapshots", "autoencoder", "stages"):
        assert files(tmp_path / "launch" / name) == files(tmp_path / "flag" / name)
    weights = [load_file(folder / "base_model" / "model.safetensors") for folder in (tmp_path / "flag", whole_run[0])]
    assert {name: tensor.dtype for name, tensor in weights[0].items()} == dict.fromkeys(weights[1], torch.float32)
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    refused = run_server.run(tmp_path / "fp8", *FLAGS, environment={"ACCELERATE_MIXED_PRECISION": "fp8"})
    assert "error: the launcher is set to mixed_precision=fp8; use no, fp16 or bf16" in refused.errors
    for name, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        refused = run_server.run(tmp_path / name, *FLAGS, environment={variable: "true"})
        assert refused.errors.startswith(f"error: the launcher is set to {name}, which cuts networks into shards")
        assert not (tmp_path / name).exists()
    assert not (tmp_path / "fp8").exists()


def test_the_linear_autoencoder_takes_the_place_of_the_learned_one(run_server, copied):
    trained = ("--autoencoder_steps", "--autoencoder_batch_size", "--autoencoder_args")
    flags = [flag for flag in FLAGS if not flag.startswith(trained)]
    flags += ["--autoencoder_preset=pca", "--autoencoder_args=normalization=tensor", "--overwrite_output_dir"]
    result = run_server.run(copied, *flags)
    assert result.status == 0, result.errors
    pipe = PDiffPipeline.from_pretrained(copied / "pipeline")
    report = json.loads((copied / "evaluation" / "report.json").read_text())
    explained = report["reconstruction"]
    assert not list(pipe.autoencoder.parameters())
    assert explained["r2_train"] == pytest.approx(explained["linear_r2_train"], abs=0.05)
