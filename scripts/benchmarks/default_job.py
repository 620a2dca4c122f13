"""
CPU seconds and peak memory of the default job or another recipe, stage by stage; and what its denoiser has learned.

    OMP_NUM_THREADS=1 python scripts/benchmarks/default_job.py
    OMP_NUM_THREADS=1 python scripts/benchmarks/default_job.py digits.yaml --seed 1
    OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 python scripts/benchmarks/default_job.py

The last form computes as a processor without AVX does. For many networks of one task, the denoiser's loss is compared
with that of the best denoiser of a Gaussian with the snapshots' mean and variances, on snapshots that neither has seen.
"""

import argparse
import resource
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from pdiff_hf.evaluation.report import Report
from pdiff_hf.pipelines import PDiffPipeline
from pdiff_hf.run.cli import load_config
from pdiff_hf.run.context import RunContext
from pdiff_hf.run.trainer import execute, prepare
from pdiff_hf.scripts.opponents import wanted_opponents
from pdiff_hf.training.denoiser import LatentGenerator, denoising_loss, make_training_scheduler
from pdiff_hf.utils import names


def used() -> tuple[float, float]:
    """CPU seconds and the peak of memory in MB, of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


class GaussianDenoiser(nn.Module):
    """The best predictions of noise or velocity for latents `(N, L)` with independent Gaussian coordinates."""

    def __init__(self, latents: torch.Tensor, scheduler):
        super().__init__()
        self.variance, self.mean = torch.var_mean(latents, dim=0, correction=0)
        self.levels, self.kind = scheduler.alphas_cumprod, scheduler.config.prediction_type

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, *_) -> torch.Tensor:
        level = self.levels[timesteps].unsqueeze(1)  # (N, 1)
        gain = level.sqrt() * self.variance / (level * self.variance + 1 - level)
        clean = self.mean + gain * (noisy - level.sqrt() * self.mean)
        noise = (noisy - level.sqrt() * clean) / (1 - level).sqrt()
        return noise if self.kind == "epsilon" else level.sqrt() * noise - (1 - level).sqrt() * clean


@torch.no_grad()
def heldout_losses(run: RunContext) -> list[float]:
    """The denoising loss on snapshots that generators never see: of the denoiser before tuning, and of a Gaussian."""
    denoiser = PDiffPipeline.from_pretrained(run.folder / names.PIPELINE).denoiser
    settings = run.config.denoiser_args.num_train_timesteps, run.config.prediction_type
    scheduler, heldout = make_training_scheduler(*settings), run.latents[run.heldout].repeat(200, 1)
    models = LatentGenerator(denoiser), GaussianDenoiser(run.latents[run.seen], scheduler)
    return [denoising_loss(m, scheduler, heldout, torch.Generator().manual_seed(0)).item() for m in models]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("recipe", nargs="?", default="on_demand.yaml")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = [("imports", *used())]
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_config(args.recipe, output_dir=folder, seed=args.seed)
        task = recipe.make_task()
        rows.append(("data", *used()))
        for stage in recipe.stages:
            run = prepare(recipe.changed(stages=[stage]), task=task, extra_groups=wanted_opponents(recipe))
            execute(run)
            rows.append((stage, *used()))
        print(Report.load(Path(folder, names.EVALUATION)).to_terminal())
        if not run.config.has_conditions and len(run.heldout):
            print("loss on held-out snapshots: denoiser {:.3f}, Gaussian {:.3f}".format(*heldout_losses(run)))
    print(f"{'stage':12} {'CPU s':>7} {'peak MB':>8}")
    before = 0.0
    for stage, seconds, peak in rows:
        print(f"{stage:12} {seconds - before:7.1f} {peak:8.0f}")
        before = seconds
    print(f"{'all':12} {before:7.1f} {rows[-1][2]:8.0f}")


if __name__ == "__main__":
    sys.exit(main())
