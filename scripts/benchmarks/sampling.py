"""
How many denoising steps a generator needs: accuracy and time against the number of steps, in one run.

    python scripts/benchmarks/sampling.py outputs/digits
    python scripts/benchmarks/sampling.py outputs/fashion_mnist --num_models 200 --steps 5 20 1000

The argument is the output folder of a finished run of scripts/train.py. Every row starts from the same noise and
is scored on the test split. `ancestral` is DDPM, the sampler that the paper uses, and the reference at 1000 steps.

The naive form is that of the published implementation: 1000 steps of DDPM for one network after the other. Its time is
that of a few networks, times their number; with this run's own denoiser, and with one of the paper's widths. Times are
CPU seconds of this process, so that other programs on the machine do not count.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch.utils.flop_counter import FlopCounterMode

from pdiff_hf import PDiffPipeline
from pdiff_hf.evaluation.metrics import accuracy, iou_within
from pdiff_hf.evaluation.render import table
from pdiff_hf.evaluation.score import Scorer
from pdiff_hf.models import DENOISER_PRESETS, LatentDenoiser
from pdiff_hf.run.cli import load_config
from pdiff_hf.run.trainer import prepare

NAIVE_STEPS = 1000
NAIVE_MODELS = 2  # that are timed


def time_naive(pipe: PDiffPipeline, num_models: int) -> float:
    """Seconds that `num_models` networks take one after the other."""
    start = time.process_time()
    for seed in range(NAIVE_MODELS):
        latents = torch.randn(1, pipe.denoiser.config.latent_dim, generator=torch.Generator().manual_seed(seed))
        for timestep in pipe.scheduler.timesteps:
            with torch.no_grad():
                noise = pipe.denoiser(latents, timestep).sample
            latents = pipe.scheduler.step(noise, timestep, latents).prev_sample
        with torch.no_grad():
            pipe.autoencoder.decode(latents)
    return (time.process_time() - start) / NAIVE_MODELS * num_models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("run", help="Output folder of a finished run.")
    parser.add_argument("--num_models", type=int, default=200, help="Networks in each row.")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 20, 50, 100, 1000])
    parser.add_argument("--seed", type=int, default=0, help="Of the starting noise.")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    recipe = load_config(Path(args.run, "recipe.yaml"), output_dir=args.run)
    run = prepare(recipe)
    pipe = run.pipeline
    pipe.set_progress_bar_config(disable=True)
    scorer = Scorer(run.task, run.base_model, run.layout, cache_dir=run.folder / "scores")
    latents = torch.zeros(args.num_models, pipe.denoiser.config.latent_dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pipe.denoiser(latents, 0)
    flops = counter.get_total_flops()

    samplers = {"DPM-Solver++": pipe.scheduler, "ancestral": DDPMScheduler.from_config(pipe.scheduler.config)}
    rows, seconds_of = [], {}
    for name, scheduler in samplers.items():
        for steps in args.steps:
            pipe.scheduler = scheduler
            start = time.process_time()
            generated = pipe(
                args.num_models,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(args.seed),
                output_type="pt",
            ).parameters
            seconds = seconds_of[name, steps] = time.process_time() - start
            scores = scorer.score("test", generated)
            accuracies = accuracy(scores.predictions, scores.labels)
            rows.append(
                [
                    name,
                    str(steps),
                    f"{accuracies.mean():.2f} ± {accuracies.std():.2f}",
                    f"{iou_within(scores.wrong):.3f}",
                    f"{seconds:.2f}",
                    f"{steps * flops / 1e9:.1f}",
                ]
            )
    print(
        f"{args.num_models} networks of {run.layout.num_parameters:,} parameters, {torch.get_num_threads()} threads\n"
    )
    header = ["sampler", "steps", "accuracy", "IoU within", "seconds", "GFLOP of the denoiser"]
    print(table(header, rows))
    few = min(args.steps, key=lambda steps: abs(steps - (recipe.num_inference_steps or 10)))
    here = seconds_of["DPM-Solver++", few]
    pipe.scheduler = samplers["ancestral"]
    pipe.scheduler.set_timesteps(NAIVE_STEPS)
    naive = {"this denoiser": time_naive(pipe, args.num_models)}
    wide = LatentDenoiser(pipe.denoiser.config.latent_dim, **DENOISER_PRESETS["paper"]).eval()
    naive["the paper's widths"] = time_naive(PDiffPipeline(pipe.autoencoder, wide, pipe.scheduler), args.num_models)
    for name, seconds in naive.items():
        print(
            f"\none at a time, {NAIVE_STEPS} steps, {name}: {seconds:.0f} s (of {NAIVE_MODELS} networks), "
            f"{seconds / here:.0f} times the {here:.2f} s of {few} steps together"
        )


if __name__ == "__main__":
    main()
