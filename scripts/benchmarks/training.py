"""What training a generator takes as networks grow: operations, CPU time, peak memory; here and in the paper's widths.

    OMP_NUM_THREADS=1 python scripts/benchmarks/training.py
    OMP_NUM_THREADS=1 python scripts/benchmarks/training.py --sizes 2048 300288 --num_snapshots 50

Each row is measured as the paper's Table 13 is (`measure_training`), in a process of its own, on random snapshots that
lie in a file. Memory is the peak resident memory above that after the imports, with the snapshots (which stay in their
file, mapped into memory), the fit of the bases and the optimizer. On a GPU it is the peak that PyTorch has allocated
there. What would take too much memory or time is counted instead of run.
"""

import argparse

import psutil
import torch
from accelerate import Accelerator
from reproduce.experiments import EXPERIMENTS, measure_training

from pdiff_hf.evaluation.render import table
from pdiff_hf.run.recipe import Recipe
from pdiff_hf.training.estimate import estimate_autoencoder, estimate_denoiser

# The paper's Table 13: megabytes of autoencoder and diffusion on an A100, and the length of the latent.
PAPER = {
    row.varies["num_parameters"]: (int(row.paper[0]), int(row.paper[2]), row.varies["latent_dim"])
    for row in EXPERIMENTS["table13"].rows
}
SIZES = [*PAPER, 1_000_000, 11_181_642]
BATCH_SIZE = 50
NAIVE = "paper's widths"
FORMS = {"here": ("tokens", "small"), NAIVE: ("paper", "paper")}
MOST_FLOPS = 5e11  # in a step that is run
PAPER_STEPS = (500, 1000)  # of the public implementation, for partial sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="D, numbers to generate.")
    parser.add_argument("--num_snapshots", type=int, default=100, help="K.")
    parser.add_argument("--num_steps", type=int, default=4, help="Steps that are timed.")
    args = parser.parse_args()
    device = Accelerator().device
    rows, step_seconds = [], {}
    for size in args.sizes:
        latent_dim = PAPER[size][2] if size in PAPER else 128
        for network, estimate in (("autoencoder", estimate_autoencoder), ("denoiser", estimate_denoiser)):
            for form, presets in FORMS.items():
                preset = presets[network == "denoiser"]
                cost = estimate(
                    size if network == "autoencoder" else latent_dim,
                    preset=preset,
                    num_steps=1,
                    batch_size=BATCH_SIZE,
                    device=torch.device("meta"),
                    **({"latent_dim": latent_dim} if network == "autoencoder" else {}),
                )
                row = [f"{size:,}", network, form, f"{cost.flops / 1e9:,.1f}"]
                if cost.memory > psutil.virtual_memory().available / 2 or cost.flops > MOST_FLOPS:
                    rows.append([*row, "-", "-", f"{cost.memory / 1e6:,.0f} (counted)", "-"])
                    continue
                # What is done once (the fit of the bases) is in the difference between many steps and one.
                once, result = (
                    measure_training(network, size, latent_dim, preset, num_steps, args.num_snapshots)
                    for num_steps in (1, 1 + args.num_steps)
                )
                if not (once.fits and result.fits):
                    rows.append([*row, "-", "-", f"more than {result.memory / 1e6:,.0f}", "-"])
                    continue
                step = (result.seconds - once.seconds) / args.num_steps
                step_seconds[size, network, form] = step, once.seconds - step
                paper = f"{PAPER[size][network == 'denoiser']:,}" if size in PAPER else "-"
                rows.append([*row, f"{once.seconds - step:.1f}", f"{step:.3f}", f"{result.memory / 1e6:,.0f}", paper])
    print(
        f"{args.num_snapshots} snapshots, batch {BATCH_SIZE}, on {device.type} with {torch.get_num_threads()} threads\n"
    )
    header = ["numbers", "network", "form", "GFLOP a step", "s once", "s a step", "peak MB", "paper, MB on A100"]
    print(table(header, rows))
    recipe = Recipe()
    for size in args.sizes:
        if (size, "denoiser", NAIVE) in step_seconds and (size, "autoencoder", NAIVE) in step_seconds:
            steps = {
                "here": (recipe.autoencoder_steps, recipe.denoiser_steps),
                NAIVE: PAPER_STEPS,
            }
            total = {
                form: sum(
                    step_seconds[size, network, form][0] * count + step_seconds[size, network, form][1]
                    for network, count in zip(("autoencoder", "denoiser"), counts, strict=True)
                )
                for form, counts in steps.items()
            }
            print(
                f"\n{size:,} numbers, whole training: {total['here']:.0f} s of CPU here ({steps['here']} steps), "
                f"{total[NAIVE]:.0f} s in the paper's widths ({PAPER_STEPS} steps), "
                f"{total[NAIVE] / total['here']:.1f} times as much"
            )


if __name__ == "__main__":
    main()
