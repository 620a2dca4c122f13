"""What training a generator takes as networks grow: operations, CPU time, peak memory; here and in the paper's widths.

    OMP_NUM_THREADS=1 python scripts/benchmarks/training.py
    OMP_NUM_THREADS=1 python scripts/benchmarks/training.py --sizes 2048 300288 --num_snapshots 50

Each row is measured in a process of its own, on random low-rank snapshots that lie in a file. Memory is the peak
resident memory above that after the imports, with the snapshots (which stay in their file, mapped into memory), the fit
of the bases and the optimizer. On a GPU it is the peak that PyTorch has allocated there. What would take too much
memory or time is counted instead of run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time

import numpy as np
import psutil
import torch
from accelerate import Accelerator

from pdiff_hf.evaluation.report import format_table
from pdiff_hf.experiments import resident_memory
from pdiff_hf.loop import LoopArguments
from pdiff_hf.models import DENOISER_PRESETS, autoencoder_architecture
from pdiff_hf.parameters import ParameterLayout
from pdiff_hf.recipe import Recipe
from pdiff_hf.training import NoiseArguments, make_training_scheduler, train_autoencoder, train_denoiser
from pdiff_hf.training.estimate import estimate_autoencoder, estimate_denoiser

# The paper's Table 13: megabytes of autoencoder and diffusion on an A100, and the length of the latent.
PAPER = {2048: (658, 530, 128), 30016: (3756, 1418, 256), 100288: (13352, 3594, 512), 300288: (44882, 12942, 1024)}
SIZES = [*PAPER, 1_000_000, 11_181_642]
BATCH_SIZE = 50
RANK = 20  # of the snapshots
NAIVE = "paper's widths"
FORMS = {"here": ("tokens", "small"), NAIVE: ("paper", "paper")}
MOST_FLOPS = 5e11  # in a step that is run
PAPER_STEPS = (500, 1000)  # of the public implementation, for partial sets


def make_snapshots(path: str, num_snapshots: int, num_parameters: int) -> np.ndarray:
    """Snapshots of rank `RANK` about a mean, shape `(K, D)`, in a file."""
    generator = np.random.default_rng(0)
    matrix = np.lib.format.open_memmap(path, "w+", np.float32, (num_snapshots, num_parameters))
    factors = generator.standard_normal((num_snapshots, RANK), np.float32)
    for start in range(0, num_parameters, 2**16):
        stop = min(start + 2**16, num_parameters)
        matrix[:, start:stop] = factors @ generator.standard_normal((RANK, stop - start), np.float32)
    return matrix


def measure(network: str, form: str, path: str, latent_dim: int, num_steps: int) -> dict:
    """Trains one network for `num_steps` in this process: CPU seconds, and bytes above what the imports took."""
    preset = FORMS[form][network == "denoiser"]
    accelerator = Accelerator()
    snapshots = torch.from_numpy(np.load(path, mmap_mode="c"))
    layout = ParameterLayout(("parameters",), ((snapshots.shape[1],),), ("float32",))
    latents = torch.randn(len(snapshots), latent_dim)
    before = resident_memory("VmRSS")
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"args": LoopArguments(num_steps, BATCH_SIZE, 1e-3), "seed": 0, "checkpoint_dir": folder}
        if network == "autoencoder":
            architecture = autoencoder_architecture(preset, layout.num_parameters)
            arguments |= {"noise": NoiseArguments(), "latent_dim": latent_dim, "architecture": architecture}
            train_autoencoder(accelerator, snapshots, layout, **arguments)
        else:
            arguments |= DENOISER_PRESETS[preset]
            train_denoiser(accelerator, latents, scheduler=make_training_scheduler(), **arguments)
    seconds = time.process_time() - start
    if accelerator.device.type == "cuda":
        return {"seconds": seconds, "memory": torch.cuda.max_memory_allocated(accelerator.device)}
    return {"seconds": seconds, "memory": resident_memory("VmHWM") - before}


def measure_apart(*arguments) -> dict:
    """[`measure`] in a process of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps(arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="D, numbers to generate.")
    parser.add_argument("--num_snapshots", type=int, default=100, help="K.")
    parser.add_argument("--num_steps", type=int, default=4, help="Steps that are timed.")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(*args.measure)))
        return
    device = Accelerator().device
    rows, step_seconds = [], {}
    for size in args.sizes:
        latent_dim = PAPER[size][2] if size in PAPER else 128
        with tempfile.NamedTemporaryFile(suffix=".npy") as file:
            make_snapshots(file.name, args.num_snapshots, size)
            for network, estimate in (("autoencoder", estimate_autoencoder), ("denoiser", estimate_denoiser)):
                for form, presets in FORMS.items():
                    cost = estimate(
                        size if network == "autoencoder" else latent_dim,
                        preset=presets[network == "denoiser"],
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
                    once = measure_apart(network, form, file.name, latent_dim, 1)
                    result = measure_apart(network, form, file.name, latent_dim, 1 + args.num_steps)
                    step = (result["seconds"] - once["seconds"]) / args.num_steps
                    step_seconds[size, network, form] = step, once["seconds"] - step
                    paper = f"{PAPER[size][network == 'denoiser']:,}" if size in PAPER else "-"
                    rows.append(
                        [*row, f"{once['seconds'] - step:.1f}", f"{step:.3f}", f"{result['memory'] / 1e6:,.0f}", paper]
                    )
    print(
        f"{args.num_snapshots} snapshots, batch {BATCH_SIZE}, on {device.type} with {torch.get_num_threads()} threads\n"
    )
    header = ["numbers", "network", "form", "GFLOP a step", "s once", "s a step", "peak MB", "paper, MB on A100"]
    print("\n".join(format_table(header, rows)))
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
