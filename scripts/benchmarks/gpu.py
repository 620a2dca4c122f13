"""
All that a few minutes on a borrowed GPU can tell: sampling, training and scoring, written to one JSON.

    python scripts/benchmarks/gpu.py gpu.json                        # under 8 minutes on a card with 16 GB or more
    python scripts/benchmarks/gpu.py cpu.json --device cpu --small   # that the script works, before the card is there

It needs no network: the images are scikit-learn's digits, the networks have fresh weights, and snapshots are random.
Every measurement is written when it is done. One that fails is written with its error, and the others go on. Seconds
are those of a wall clock, the median of some repetitions after one that is not counted; memory is the peak that PyTorch
allocates (on a GPU alone). Bounds are the operations that PyTorch counts, at the rate of a product of two large
matrices that is measured first.
"""

import argparse
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch.utils.flop_counter import FlopCounterMode

from pdiff_hf import PDiffPipeline
from pdiff_hf.evaluation.score import Scorer
from pdiff_hf.layout import ParameterLayout
from pdiff_hf.models import DENOISER_PRESETS, LatentDenoiser, ParameterAutoencoder, autoencoder_architecture
from pdiff_hf.selection import select_parameters
from pdiff_hf.tasks import ImageClassificationTask
from pdiff_hf.training import (
    make_sampling_scheduler,
    make_training_scheduler,
    train_autoencoder,
    train_denoiser,
)
from pdiff_hf.training.loop import Loop, LoopArguments

LATENT_DIM = 128
REPEATS = 5
BUDGET = 450  # seconds; what has not begun by then is left out, and named


class Bench:
    """Runs measurements one after the other and keeps what they found in a file."""

    def __init__(self, path: Path, device: torch.device, small: bool):
        self.path, self.device, self.small = path, device, small
        self.start = time.perf_counter()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
        versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
        self.found: dict[str, Any] = {"device": name, "small": small, "versions": versions, "measurements": {}}

    def run(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Writes what `measure` returns, or why there is nothing."""
        if time.perf_counter() - self.start > BUDGET:
            result: dict[str, Any] = {"error": f"not begun: {BUDGET} seconds were over"}
        else:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)
            began = time.perf_counter()
            try:
                result = measure()
            except Exception as error:  # the card may be gone in minutes: all else has to be measured
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}"}
            if self.device.type == "cuda":
                result["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
            result["took_seconds"] = time.perf_counter() - began
        self.found["measurements"][name] = result
        self.found["seconds"] = time.perf_counter() - self.start
        self.path.write_text(json.dumps(self.found, indent=2), encoding="utf-8")
        print(f"{name}: {json.dumps(result)}", flush=True)

    def seconds(self, function: Callable[[], Any], repeats: int = REPEATS) -> float:
        """Of one call, with all that it queues on the device."""
        times = []
        for _ in range(repeats + 1):
            self.wait()
            start = time.perf_counter()
            function()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def pipeline(self, num_parameters: int, preset: str, dtype: torch.dtype = torch.float32) -> PDiffPipeline:
        """A generator with fresh weights."""
        torch.manual_seed(0)
        autoencoder = ParameterAutoencoder(
            layout_of(num_parameters).to_dict(), LATENT_DIM, **autoencoder_architecture("tokens", num_parameters)
        )
        denoiser = LatentDenoiser(LATENT_DIM, **DENOISER_PRESETS[preset])
        scheduler = make_sampling_scheduler(make_training_scheduler())
        pipe = PDiffPipeline(autoencoder.eval(), denoiser.eval(), scheduler).to(self.device, dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def rate(self, dtype: torch.dtype) -> dict[str, Any]:
        size = 512 if self.small else 8192
        one, other = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        return {"tflops": 2 * size**3 / self.seconds(lambda: one @ other) / 1e12}

    def sampling(
        self, num_parameters: int, preset: str, num_models: int, steps: int, dtype: torch.dtype, compiled: bool = False
    ) -> dict[str, Any]:
        """200 networks with their parameters on the CPU, as a caller gets them."""
        pipe = self.pipeline(num_parameters, preset, dtype)
        if steps > 100:
            pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        if compiled:
            pipe.compile()

        def sample(count: int = num_models) -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            return pipe(count, steps, generator, output_type="pt").parameters

        start = time.perf_counter()
        many = sample()
        first = time.perf_counter() - start
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            pipe.denoiser(torch.zeros(num_models, LATENT_DIM, device=self.device, dtype=dtype), 0)
        return {
            "seconds": self.seconds(sample, 1 if steps > 100 else REPEATS),
            "first_seconds": first,
            "denoiser_flops": steps * counter.get_total_flops(),
            "same_bits_for_fewer": bool(torch.equal(many[:3], sample(3))),
        }

    def training(self, network: str, num_parameters: int, preset: str) -> dict[str, Any]:
        """Seconds of a step with a batch of 50: the difference between some steps and one."""
        accelerator, generator = Accelerator(cpu=self.device.type == "cpu"), torch.Generator().manual_seed(0)
        length = num_parameters if network == "autoencoder" else LATENT_DIM
        snapshots = torch.randn(8 if self.small else 64, length, generator=generator)

        def train(num_steps: int) -> float:
            args = LoopArguments(num_steps=num_steps, batch_size=min(50, len(snapshots)), learning_rate=1e-4)
            loop, start = Loop(accelerator, seed=0), time.perf_counter()
            if network == "denoiser":
                scheduler = make_training_scheduler()
                train_denoiser(loop, snapshots, args, scheduler=scheduler, **DENOISER_PRESETS[preset])
            else:
                train_autoencoder(
                    loop,
                    snapshots,
                    layout_of(length),
                    args,
                    latent_dim=LATENT_DIM,
                    architecture=autoencoder_architecture(preset, length),
                )
            self.wait()
            return time.perf_counter() - start

        train(1)
        # A step of the token autoencoder is far shorter than what comes before the first one.
        once, steps = train(1), 4 if self.small else 300 if preset == "tokens" else 30
        return {"step_seconds": (train(1 + steps) - once) / steps, "once_seconds": once}

    def scoring(self, select: str, image_size: int) -> dict[str, Any]:
        """Networks that differ in a part, on all test images; and a few of them one at a time."""
        torch.manual_seed(0)
        task = ImageClassificationTask("test_resnet" if self.small else "resnet18", image_size=image_size)
        model = task.load_base_model().eval().to(self.device)
        layout = ParameterLayout.from_state_dict(model.state_dict(), select_parameters(model, select))
        base = layout.flatten({name: tensor.cpu() for name, tensor in model.state_dict().items()})
        num_models = 8 if self.small else 200 if len(base) < 5e6 else 40  # of whole networks less than 2 GB
        parameters = base + 0.05 * base.std() * torch.randn(num_models, len(base))
        scorer = Scorer(task, model, layout)
        seconds = self.seconds(lambda: scorer.score("test", parameters), 2)
        alone = self.seconds(lambda: [scorer.score("test", row[None]) for row in parameters[:4]], 1) / 4
        together = scorer.score("test", parameters).predictions[:4]
        single = torch.cat([scorer.score("test", row[None]).predictions for row in parameters[:4]])
        return {
            "seconds": seconds,
            "networks": num_models,
            "images": scorer.num_examples("test"),
            "seconds_each_alone": alone,
            "same_predictions": (together == single).double().mean().item(),
        }

    def offloaded(self) -> dict[str, Any]:
        """Whether a pipeline whose models wait on the CPU gives what one on the device gives."""
        pipe = self.pipeline(2048, "mlp")
        generator = torch.Generator().manual_seed(0)
        expected = pipe(8, generator=generator, output_type="pt").parameters
        pipe.enable_model_cpu_offload(device=self.device)
        got = pipe(8, generator=generator.manual_seed(0), output_type="pt").parameters
        return {"largest_difference": (got - expected).abs().max().item()}


def layout_of(num_parameters: int) -> ParameterLayout:
    return ParameterLayout(("parameters",), ((num_parameters,),), ("float32",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="The JSON file to write.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="Few networks, small ones, and few steps.")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: PyTorch finds no GPU; --device cpu --small shows that the script works")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    bench, single = Bench(args.output, device, args.small), torch.float32
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for dtype in dtypes:
        bench.run(f"product of matrices, {dtype}", lambda dtype=dtype: bench.rate(dtype))
    sizes, count = ([2048], 8) if args.small else ([2048, 300_288, 11_181_642], 200)
    presets = ["mlp", "small"] if args.small else ["mlp", "small", "paper"]
    for preset in presets:
        for dtype in dtypes:
            bench.run(
                f"sampling, {preset}, 10 steps, {dtype}",
                lambda preset=preset, dtype=dtype: bench.sampling(2048, preset, count, 10, dtype),
            )
        if not args.small:
            bench.run(
                f"sampling, {preset}, 1000 steps of DDPM, {single}",
                lambda preset=preset: bench.sampling(2048, preset, count, 1000, single),
            )
    for size in sizes[1:]:
        bench.run(f"sampling, {size:,} parameters", lambda size=size: bench.sampling(size, "small", 16, 10, single))
    for preset in presets:
        bench.run(f"training denoiser, {preset}", lambda preset=preset: bench.training("denoiser", LATENT_DIM, preset))
    for size in sizes:
        for preset in ["tokens"] if size > 1e6 or args.small else ["tokens", "paper"]:
            bench.run(
                f"training autoencoder, {preset}, {size:,}",
                lambda preset=preset, size=size: bench.training("autoencoder", size, preset),
            )
    image_size = 16 if args.small else 28
    for select in ["norm[-2:]"] if args.small else ["norm[-2:]", "layer2.1*", "all"]:
        bench.run(f"scoring, {select}", lambda select=select: bench.scoring(select, image_size))
    if device.type != "cpu":
        bench.run("offloading", bench.offloaded)
    # Last, because compiling takes longest.
    for preset in presets[:1] if args.small else presets:
        bench.run(
            f"sampling, {preset}, 10 steps, compiled",
            lambda preset=preset: bench.sampling(2048, preset, count, 10, single, compiled=True),
        )
    failed = [name for name, result in bench.found["measurements"].items() if "error" in result]
    print(f"{len(failed)} of {len(bench.found['measurements'])} failed: {', '.join(failed) or 'none'}", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
