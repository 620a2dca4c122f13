"""
How many denoising steps a generator needs: accuracy and time against the number of steps, in one run.

    python scripts/benchmarks/sampling.py outputs/digits
    python scripts/benchmarks/sampling.py outputs/fashion_mnist --num_models 200 --steps 5 20 1000

The argument is the output folder of a finished run of scripts/train.py. Every row starts from the same noise and
is scored on the test split. `ancestral` is DDPM, the sampler that the paper uses, and the reference at 1000 steps.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch.utils.flop_counter import FlopCounterMode

from pdiff_hf.evaluation.metrics import accuracy, iou_within
from pdiff_hf.evaluation.report import format_table
from pdiff_hf.evaluation.scoring import Scorer
from pdiff_hf.recipe import RecipeParser
from pdiff_hf.stages import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("run", help="Output folder of a finished run.")
    parser.add_argument("--num_models", type=int, default=200, help="Networks in each row.")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 20, 50, 100, 1000])
    parser.add_argument("--seed", type=int, default=0, help="Of the starting noise.")
    args = parser.parse_args()
    recipe = RecipeParser().parse_recipe([str(Path(args.run, "recipe.yaml")), "--output_dir", args.run])
    run = Run(recipe)
    pipe = run.pipeline
    pipe.set_progress_bar_config(disable=True)
    scorer = Scorer(run.task, run.base_model, run.layout, cache_dir=run.folder / "scores")
    latents = torch.zeros(args.num_models, pipe.denoiser.config.latent_dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pipe.denoiser(latents, 0)
    flops = counter.get_total_flops()

    samplers = {"DPM-Solver++": pipe.scheduler, "ancestral": DDPMScheduler.from_config(pipe.scheduler.config)}
    rows = []
    for name, scheduler in samplers.items():
        for steps in args.steps:
            pipe.scheduler = scheduler
            start = time.perf_counter()
            generated = pipe(
                args.num_models,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(args.seed),
                output_type="pt",
            ).parameters
            seconds = time.perf_counter() - start
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
    print("\n".join(format_table(header, rows)))


if __name__ == "__main__":
    main()
