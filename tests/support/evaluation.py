"""Small but real scorers: classifiers of few digits, and a regression whose metric is one number."""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from pdiff_hf import LatentDenoiser, ParameterAutoencoder, PDiffPipeline, Report, evaluate
from pdiff_hf.evaluation.score import Scorer
from pdiff_hf.selection import select_layout
from pdiff_hf.tasks import ImageClassificationTask, MeasuredTask
from pdiff_hf.training import make_sampling_scheduler, make_training_scheduler


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def digits() -> Scorer:
    """For the last two norms of an untrained MLP on 50 digits."""
    task = ImageClassificationTask("mlp_mini", max_train_samples=100, max_eval_samples=50)
    torch.manual_seed(0)
    model = task.load_base_model()
    return Scorer(task, model, select_layout(model, ["norm[-2:]"], []))


def report_on(scorer: Scorer, snapshots: torch.Tensor, generator, folder=None, **options) -> Report:
    """The report, with all baselines."""
    options = {"baselines": "all", "scorer": scorer, "folder": folder} | options
    return evaluate(generator, scorer.task, snapshots=snapshots, **options)


def snapshots_around(scorer: Scorer, count: int = 12) -> torch.Tensor:
    """Networks around the base model."""
    base = scorer.layout.flatten(scorer.models.model.state_dict())
    return base + 0.3 * torch.randn(count, len(base), generator=torch.Generator().manual_seed(1))


def digits_snapshots(count: int = 12) -> torch.Tensor:
    return snapshots_around(digits(), count)


def digits_pipeline(scorer: Scorer, snapshots: torch.Tensor, base_model: nn.Module | None = None) -> PDiffPipeline:
    """An untrained generator that knows the snapshots' statistics."""
    torch.manual_seed(0)
    autoencoder = ParameterAutoencoder(scorer.layout.to_dict(), latent_dim=8, block_out_channels=(4, 4)).eval()
    autoencoder.fit_parameter_statistics(snapshots)
    autoencoder.fit_latent_statistics(autoencoder.tokenize(snapshots))
    denoiser = LatentDenoiser(8, block_out_channels=(4, 4), bottleneck_dim=16).eval()
    scheduler = make_sampling_scheduler(make_training_scheduler())
    pipeline = PDiffPipeline(autoencoder, denoiser, scheduler, base_model, num_inference_steps=2)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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


def regression(cache_dir=None) -> Scorer:
    """For the norm of an untrained network."""
    task = Regression()
    torch.manual_seed(0)
    model = task.load_base_model()
    return Scorer(task, model, select_layout(model, ["norm"], []), cache_dir)
