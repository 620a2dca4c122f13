"""
What training a generator takes as networks grow: operations, CPU time, peak memory; here and in the paper's widths.

    OMP_NUM_THREADS=1 python scripts/benchmarks/training.py
    OMP_NUM_THREADS=1 python scripts/benchmarks/training.py --sizes 2048 300288 --num_snapshots 50

Each row is measured as the paper's Table 13 is (`measure_training`), in a process of its own, on random snapshots that
lie in a file. Memory is the peak resident memory above that after the imports, with the snapshots (which stay in their
file, mapped into memory), the fit of the bases and the optimizer. On a GPU it is the peak that PyTorch has allocated
there. What would take too much memory or time is counted instead of run.
"""

import argparse
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
import yaml
from accelerate import Accelerator

from pdiff_hf.evaluation.render import table
from pdiff_hf.layout import ParameterLayout
from pdiff_hf.models import DENOISER_PRESETS, autoencoder_architecture
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.scripts.costs import estimate_training
from pdiff_hf.training import make_training_scheduler, train_autoencoder, train_denoiser
from pdiff_hf.training.loop import Loop, LoopArguments

TABLES = Path(__file__).parents[1] / "reproduce" / "tables.yaml"
# The paper's Table 13: megabytes of the autoencoder on an A100, length of the latent, megabytes of the diffusion model.
PAPER = {
    row["varies"]["num_parameters"]: tuple(map(int, row["paper"].split()))
    for row in yaml.safe_load(TABLES.read_text(encoding="utf-8"))["table13"]["rows"]
}
SIZES = [*PAPER, 1_000_000, 11_181_642]
BATCH_SIZE = 50
NAIVE = "paper's widths"
FORMS = {"here": ("tokens", "small"), NAIVE: ("paper", "paper")}
MOST_FLOPS = 5e11  # in a step that is run
PAPER_STEPS = (500, 1000)  # of the public implementation, for partial sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="D, parameters to generate.")
    parser.add_argument("--num_snapshots", type=int, default=100, help="K.")
    parser.add_argument("--num_steps", type=int, default=4, help="Steps that are timed.")
    args = parser.parse_args()
    device = Accelerator().device
    rows, step_seconds = [], {}
    for size in args.sizes:
        latent_dim = PAPER[size][1] if size in PAPER else 128
        for network in ("autoencoder", "denoiser"):
            for form, presets in FORMS.items():
                preset = presets[network == "denoiser"]
                cost = estimate_training(
                    network, size, latent_dim, preset, batch_size=BATCH_SIZE, device=torch.device("meta")
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
                paper = f"{PAPER[size][2 * (network == 'denoiser')]:,}" if size in PAPER else "-"
                rows.append([*row, f"{once.seconds - step:.1f}", f"{step:.3f}", f"{result.memory / 1e6:,.0f}", paper])
    print(
        f"{args.num_snapshots} snapshots, batch {BATCH_SIZE}, on {device.type} with {torch.get_num_threads()} threads\n"
    )
    header = ["parameters", "network", "form", "GFLOP a step", "s once", "s a step", "peak MB", "paper, MB on A100"]
    print(table(header, rows))
    recipe = PDiffConfig()
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
                f"\n{size:,} parameters, whole training: {total['here']:.0f} s of CPU here ({steps['here']} steps), "
                f"{total[NAIVE]:.0f} s in the paper's widths ({PAPER_STEPS} steps), "
                f"{total[NAIVE] / total['here']:.1f} times as much"
            )


@dataclass(frozen=True)
class TrainingMeasurement:
    """
    Args:
        memory (`int`): Peak in bytes, above that of the imports; the memory that there was, if that was not enough.
        seconds (`float`, *optional*): CPU time of it all; None if memory was not enough.
    """

    memory: int
    seconds: float | None

    @property
    def fits(self) -> bool:
        return self.seconds is not None


def measure_training(
    network: str, num_parameters: int, latent_dim: int, preset: str, num_steps: int = 2, num_snapshots: int = 100
) -> TrainingMeasurement:
    """
    Memory and time of training with a batch of 50, measured in a fresh process. Snapshots are mapped from a file, as
    those of a run are, and are part of the memory as far as they are read.

    Args:
        network (`str`): `autoencoder` or `denoiser`.
        num_parameters (`int`): D.
        latent_dim (`int`): L.
        preset (`str`): One of `AUTOENCODER_PRESETS` or `DENOISER_PRESETS`.
        num_steps (`int`, *optional*, defaults to 2): Steps of training.
        num_snapshots (`int`, *optional*, defaults to 100): K.
    """
    cuda = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    arguments = (network, num_parameters, latent_dim, preset, num_steps, num_snapshots, free)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return TrainingMeasurement(*pool.submit(_measure, *arguments).result())
        except (MemoryError, torch.OutOfMemoryError, BrokenProcessPool):
            return TrainingMeasurement(free, None)


def _measure(
    network: str, num_parameters: int, latent_dim: int, preset: str, num_steps: int, num_snapshots: int, free: int
) -> tuple[int, float]:
    """In the fresh process: peak memory above that of the imports, and CPU seconds."""
    accelerator = Accelerator()
    on_cpu = accelerator.device.type == "cpu"
    length = num_parameters if network == "autoencoder" else latent_dim
    with tempfile.TemporaryDirectory() as folder:
        snapshots = _random_snapshots(Path(folder, "snapshots"), num_snapshots, length)
        if on_cpu:
            # The whole machine must not suffer from what does not fit.
            limit = psutil.Process().memory_info().vms + free
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        loop, args = Loop(accelerator, seed=0), LoopArguments(num_steps=num_steps, batch_size=50, learning_rate=1e-5)
        before, start = resident_memory("VmRSS"), time.process_time()
        try:
            if network == "autoencoder":
                train_autoencoder(
                    loop,
                    snapshots,
                    ParameterLayout(("parameters",), ((length,),), ("float32",)),
                    args,
                    latent_dim=latent_dim,
                    architecture=autoencoder_architecture(preset, length),
                )
            else:
                scheduler = make_training_scheduler()
                train_denoiser(loop, snapshots, args, scheduler=scheduler, **DENOISER_PRESETS[preset])
        except RuntimeError as error:
            if on_cpu and "can't allocate memory" in str(error):
                raise MemoryError(str(error)) from error
            raise
        seconds = time.process_time() - start
    return resident_memory("VmHWM") - before if on_cpu else torch.cuda.max_memory_allocated(), seconds


def _random_snapshots(path: Path, num_snapshots: int, length: int) -> torch.Tensor:
    """Shape `(K, length)`, in a file that is mapped into memory and was not read yet."""
    generator = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        for _ in range(num_snapshots):
            file.write(torch.randn(length, generator=generator).numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=num_snapshots * length)
    return mapped.view(num_snapshots, length)


def resident_memory(name: str) -> int:
    """Bytes of this process in memory, now (`VmRSS`) or at most so far (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
