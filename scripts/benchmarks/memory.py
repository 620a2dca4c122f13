"""How much memory each stage takes where the whole of a ResNet-18 (11.2 million parameters) is generated.

    OMP_NUM_THREADS=1 python scripts/benchmarks/memory.py
    OMP_NUM_THREADS=1 python scripts/benchmarks/memory.py --num_snapshots 20 --model test_resnet --image_size 16

Every stage of scripts/train.py runs in a process of its own, on real snapshots: consecutive steps of training on
scikit-learn's digits, which lie in a file of 4 bytes for each parameter of each snapshot. Memory is the peak of what
belongs to the process alone (RssAnon of /proc/PID/status, read every 20 ms): pages of files that are mapped into memory
can be read again, and do not count.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPTS = Path(__file__).parents[1]
INTERVAL = 0.02
STAGES = ["base", "collect", "autoencoder", "denoiser", "vae", "evaluate"]
# Few steps: memory does not depend on their number.
SETTINGS = {
    "select": "all",
    "base_epochs": 2,
    "collect_learning_rate": 1e-3,
    "latent_dim": 64,
    "autoencoder_steps": 100,
    "denoiser_steps": 100,
    "heldout_snapshots": 0.1,
    "num_models": 20,
    "baseline_models": 2,
}


def peak_memory(command: list[str]) -> int:
    """Bytes of anonymous memory that a process takes at most."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except ProcessLookupError:
            break
        peak = max([peak, *(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))])
        time.sleep(INTERVAL)
    if process.wait():
        sys.exit(f"error: {' '.join(command)} ended with status {process.returncode}")
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--image_size", type=int, default=8)
    parser.add_argument("--num_snapshots", type=int, default=100)
    parser.add_argument("--stages", nargs="+", default=STAGES)
    parser.add_argument("--output_dir", help="Of the run, which is kept; by default it is removed at the end.")
    args = parser.parse_args()
    imports = peak_memory([sys.executable, "-c", "import pdiff_hf.run.stages"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output_dir or temporary
        settings = SETTINGS | {
            "model": args.model,
            "image_size": args.image_size,
            "num_snapshots": args.num_snapshots,
            "output_dir": folder,
        }
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        print(f"{args.num_snapshots} snapshots of {args.model}; imports alone: {imports / 1e9:.2f} GB\n")
        print("| stage | peak GB | CPU seconds |\n|---|---:|---:|", flush=True)
        for stage in args.stages:
            before = os.times()
            command = [sys.executable, str(SCRIPTS / "train.py"), *flags, "--stages", stage]
            peak = peak_memory([*command, "--resume_from_checkpoint", "latest"])
            after = os.times()
            seconds = after.children_user + after.children_system - before.children_user - before.children_system
            print(f"| {stage} | {peak / 1e9:.2f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
