"""Numbers at their limits: gradients and losses that are not finite, and data sets with as little in them as can be."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from pdiff_hf import ParameterLayout, PDiffPipeline, evaluate
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.folder import RunError
from pdiff_hf.run.trainer import execute, prepare
from pdiff_hf.snapshots import CollectArguments, SnapshotWriter, collect_snapshots
from pdiff_hf.snapshots.dataset import load_snapshots, parameter_matrix
from pdiff_hf.tasks import ClassificationTask
from pdiff_hf.training import (
    make_sampling_scheduler,
    make_training_scheduler,
    train_autoencoder,
    train_denoiser,
)
from pdiff_hf.training.loop import Loop, LoopArguments, TrainingError
from pdiff_hf.training.state import latest_checkpoint

# ------------------------------------------------------------------------------------- training that leaves the numbers


class BadGradient(torch.autograd.Function):
    """The identity, but for one of its gradients."""

    @staticmethod
    def forward(ctx, value: torch.Tensor, bad: float) -> torch.Tensor:
        ctx.bad = bad
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        gradient = gradient.clone()
        gradient[0] = ctx.bad
        return gradient, None


def run(folder, bad_step=None, bad=math.nan, spoil="gradient", num_steps=30, accumulation=1, scale=1.0, **kwargs):
    """Trains a small network; in step `bad_step` the gradient, or the loss, has the value `bad`."""
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    count = 0

    def loss_function(model, indices, generator):
        nonlocal count
        step = count // accumulation
        count += 1
        target = torch.randn(len(indices), 3, generator=generator)
        output = model(target)
        if step == bad_step and spoil == "gradient":
            output = BadGradient.apply(output, bad)
        loss = scale * F.mse_loss(output, target)
        return loss + bad if step == bad_step and spoil == "loss" else loss

    checkpointing_steps = kwargs.pop("checkpointing_steps", None)
    args = LoopArguments(**{"num_steps": num_steps, "batch_size": 4, "learning_rate": 1e-3} | kwargs)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, step_scheduler_with_optimizer=False)
    loop = Loop(accelerator, 0, folder, checkpointing_steps)
    return model, loop.train(model, loss_function, 8, args, description="test")


@pytest.mark.parametrize(("bad", "max_grad_norm", "ema_decay"), [(math.nan, None, 0.9), (math.inf, 1.0, None)])
@pytest.mark.parametrize("bad_step", [0, 9, 10, 29])
def test_a_gradient_that_is_not_finite_stops_training_and_is_not_saved(
    tmp_path, bad_step, ema_decay, max_grad_norm, bad
):
    """Its loss is finite, and the next one is not; but after the last step, or before a checkpoint, there is none."""
    message = rf"test: the gradient of step {bad_step} is not finite, although its loss of \d.* is\. .*below 0\.001"
    with pytest.raises(TrainingError, match=message) as error:
        run(tmp_path, bad_step, bad, ema_decay=ema_decay, max_grad_norm=max_grad_norm, checkpointing_steps=2)
    latest = latest_checkpoint(tmp_path)
    assert (latest is None) == (bad_step < 2)
    if latest is None:
        assert "The last checkpoint is not written yet." in str(error.value)
        return
    assert int(latest.name.partition("-")[2]) == bad_step // 2 * 2 and str(latest) in str(error.value)
    for folder in tmp_path.iterdir():
        assert folder.name.startswith("checkpoint-")
        for file in folder.glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                numbers = tensor[: int(folder.name.partition("-")[2])] if name == "losses" else tensor
                assert numbers.isfinite().all(), (folder, file, name)


@pytest.mark.parametrize(("bad", "accumulation"), [(math.nan, 1), (math.inf, 2), (-math.inf, 1)])
@pytest.mark.parametrize("bad_step", [0, 12, 29])
def test_a_loss_that_is_not_finite_stops_training_at_its_step(tmp_path, bad_step, bad, accumulation):
    before = r" \(it was \d[^)]* before\)" if bad_step else ""
    message = rf"test: the loss is (nan|-?inf) at step {bad_step}{before}\. Try warm-up steps, .* below 0\.001"
    with pytest.raises(TrainingError, match=message):
        run(tmp_path, bad_step, bad, spoil="loss", accumulation=accumulation, checkpointing_steps=5)
    latest = latest_checkpoint(tmp_path)
    assert (None if latest is None else int(latest.name[11:])) == (bad_step // 5 * 5 or None)


def test_weights_that_overflow_in_the_last_step(tmp_path):
    """Loss and gradient are finite, and the step that they ask for is not."""
    with pytest.raises(TrainingError, match=r"test: the weights are not finite after step 0\. Try .* below 1e\+38"):
        run(tmp_path, num_steps=1, scale=1e4, learning_rate=1e38, optimizer="sgd", lr_scheduler="constant")


# -------------------------------------------------------------------------------------- little data, through the whole


class Points(ClassificationTask):
    """Two clouds of points, and a network with tensors of one number, of several, and ones that are never changed."""

    def load_base_model(self):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 3), nn.LeakyReLU(), nn.Linear(3, 1))
        model.scale = nn.Parameter(torch.tensor(1.0))
        return model

    def load_split(self, split):
        generator = torch.Generator().manual_seed(["train", "validation", "test"].index(split))
        labels = torch.randint(2, (40,), generator=generator)
        points = torch.randn(40, 2, generator=generator) + labels[:, None]
        return torch.utils.data.TensorDataset(points, labels)

    def fingerprint(self, split):
        return f"points {split}"

    def collate(self, examples):
        points, labels = zip(*examples, strict=True)
        return {"points": torch.stack(points), "labels": torch.stack(labels)}

    def predict(self, call, batch):
        return F.pad(call(batch["points"]), (0, 1))  # (B, 1) -> (B, 2)


class RootLoss(Points):
    """Its loss is 0 and its gradient is not finite from the start."""

    def loss(self, call, batch):
        return (0 * self.predict(call, batch)).square().sum().sqrt()


def layout_of(num_parameters: int) -> ParameterLayout:
    names = {1: ["2.bias"], 3: ["0.bias"], 7: ["0.weight", "2.bias"], 10: ["0.weight", "0.bias", "2.bias"]}
    return ParameterLayout.from_state_dict(Points().load_base_model().state_dict(), names[num_parameters])


ARCHITECTURES = {
    "whole vector": {"block_out_channels": (4, 4)},
    "tokens": {"block_out_channels": (4,), "norm_num_groups": None, "token_size": 4, "token_dim": 3},
    "linear": {"block_out_channels": ()},
}


def whole_chain(
    folder,
    parameters: torch.Tensor,
    layout: ParameterLayout,
    latent_dim: int,
    heldout=None,
    architecture=ARCHITECTURES["tokens"],
) -> dict:
    """Data set, autoencoder, denoiser, saved pipeline, sampling, evaluation; what the report holds."""
    with SnapshotWriter(folder / "snapshots", layout) as writer:
        for step, row in enumerate(parameters):
            writer.write(row, step=step, seed=0)
    snapshots = parameter_matrix(*load_snapshots(folder / "snapshots"))
    assert torch.equal(snapshots, parameters)
    loop = {"num_steps": 12, "batch_size": 4, "learning_rate": 1e-3, "max_grad_norm": 1.0}
    where = Loop(Accelerator(cpu=True, step_scheduler_with_optimizer=False), seed=0)
    autoencoder, losses = train_autoencoder(
        where,
        snapshots,
        layout,
        LoopArguments(**loop),
        latent_dim=latent_dim,
        architecture=architecture,
    )
    assert losses.isfinite().all()
    scheduler = make_training_scheduler(100)
    denoiser, losses = train_denoiser(
        where,
        autoencoder.encode(snapshots).latents.detach(),
        LoopArguments(**loop, ema_decay=0.9),
        scheduler=scheduler,
        block_out_channels=(4, 4),
        bottleneck_dim=8,
    )
    assert losses.isfinite().all()
    PDiffPipeline(autoencoder, denoiser, make_sampling_scheduler(scheduler)).save_pretrained(folder / "pipeline")
    pipe = PDiffPipeline.from_pretrained(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    generated = pipe(5, 4, torch.Generator().manual_seed(0), output_type="pt").parameters
    assert generated.shape == (5, layout.num_parameters) and generated.isfinite().all()
    (folder / "evaluation").mkdir()
    evaluate(
        pipe,
        Points(),
        snapshots=snapshots,
        base_model=Points().load_base_model(),
        num_models=5,
        baseline_models=3,
        baselines="few",
        folder=folder / "evaluation",
    )
    return json.loads((folder / "evaluation" / "report.json").read_text())


@pytest.mark.parametrize(("num_parameters", "num_snapshots"), [(1, 2), (7, 10)])
@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_few_snapshots_of_few_numbers_go_through_the_whole_chain(tmp_path, num_parameters, num_snapshots, architecture):
    layout = layout_of(num_parameters)
    torch.manual_seed(0)
    parameters = torch.randn(num_snapshots, layout.num_parameters)
    latent_dim = min(2, num_parameters)
    report = whole_chain(tmp_path, parameters, layout, latent_dim, architecture=architecture)
    groups = {group["name"]: group for group in report["groups"]}
    assert groups["generated"]["n"] == 5 and groups["snapshots"]["n"] == num_snapshots


def test_tensors_that_never_change_go_through_the_whole_chain_and_come_out_nearly_as_they_were(tmp_path):
    layout = layout_of(10)
    torch.manual_seed(0)
    parameters = torch.randn(10, 10)
    parameters[:, 6:9] = torch.tensor([0.0, 1e-30, 1e4])  # the tensor 0.bias
    whole_chain(tmp_path, parameters, layout, latent_dim=2)
    pipe = PDiffPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.autoencoder.parameter_std[1] == 1  # nothing to scale by
    generated = pipe(4, 4, torch.Generator().manual_seed(0), output_type="state_dict").parameters
    for state_dict in generated:
        assert (state_dict["0.bias"] - parameters[0, 6:9]).abs().max() < 5  # of values up to 10,000, after 12 steps


def test_snapshots_that_differ_in_one_number_alone(tmp_path):
    """Every other coordinate is constant, and most directions of the latent hold nothing."""
    parameters = torch.full((10, 7), 0.5)
    parameters[:, 3] = torch.arange(10.0)
    report = whole_chain(tmp_path, parameters, layout_of(7), latent_dim=7)
    assert {"snapshots", "generated", "reconstructed"} <= {group["name"] for group in report["groups"]}


def test_one_snapshot_is_too_few(tmp_path):
    layout = layout_of(7)
    with SnapshotWriter(tmp_path / "snapshots", layout) as writer:
        writer.write(torch.zeros(7), step=0, seed=0)
    recipe = PDiffConfig(output_dir=str(tmp_path / "run"), snapshots=str(tmp_path / "snapshots"), latent_dim=2)
    with pytest.raises(RunError, match="1 snapshots leave fewer than 2 to train on"):
        prepare(recipe, task=Points())
    with pytest.raises(ValueError, match="num_snapshots must be at least 2, got 1"):
        PDiffConfig(num_snapshots=1)
    with pytest.raises(RunError, match="latent_dim is 8, but only 7 parameters are selected"):
        prepare(
            PDiffConfig(output_dir=str(tmp_path / "run"), snapshots=str(tmp_path / "snapshots"), latent_dim=8),
            task=Points(),
        )


# ----------------------------------------------------------------------------------- snapshots of a training that fails


@pytest.mark.parametrize("every_n_steps", [1, 3])
def test_snapshots_whose_training_has_no_finite_gradient(tmp_path, every_n_steps):
    model, layout = RootLoss().load_base_model(), layout_of(7)
    before = layout.flatten(model.state_dict()).clone()
    with pytest.raises(
        TrainingError, match="snapshots: the trained tensors are not finite after step 1, whose loss of 0 is"
    ):
        collect_snapshots(
            Accelerator(cpu=True),
            RootLoss(),
            model,
            layout,
            tmp_path / "snapshots",
            CollectArguments(num_snapshots=4, every_n_steps=every_n_steps, batch_size=8),
            seed=0,
        )
    assert list(tmp_path.iterdir()) == [] and torch.equal(layout.flatten(model.state_dict()), before)


def test_a_run_that_diverges_keeps_what_was_finished(tmp_path):
    recipe = PDiffConfig(
        output_dir=str(tmp_path),
        stages=["base", "collect", "autoencoder"],
        base_epochs=1,
        num_snapshots=10,
        select=["0.weight", "0.bias"],
        collect_learning_rate=1e-3,
        latent_dim=2,
        autoencoder_steps=20,
        autoencoder_batch_size=4,
        autoencoder_learning_rate=1e30,
        checkpointing_steps=5,
        autoencoder_args={"warmup_steps": 0},
    )
    run = prepare(recipe, task=Points())
    with pytest.raises(TrainingError, match=r"autoencoder: the loss is (nan|inf) at step \d"):
        execute(run)
    assert run.is_finished("base") and run.is_finished("collect") and not run.is_finished("autoencoder")
    assert not (tmp_path / "autoencoder").exists()
    assert prepare(recipe, task=Points()).parameters.shape == (10, 9)  # what was collected is whole
