"""
The whole way for networks of 2,048 to 86 million generated parameters: memory, time, size, and what comes out.

    OMP_NUM_THREADS=1 python scripts/benchmarks/sizes.py
    OMP_NUM_THREADS=1 python scripts/benchmarks/sizes.py --sizes 11M 86M --baselines few
    OMP_NUM_THREADS=1 python scripts/benchmarks/sizes.py --sizes 11M --num_snapshots 8 --baseline_models 20

Every stage of scripts/train.py runs in a process of its own, on real snapshots: consecutive steps of training on
scikit-learn's digits, which lie in a file of 4 bytes for each parameter of each snapshot. Any other flag is one of
scripts/train.py, for all sizes. Memory is the peak of what belongs to the process alone (RssAnon of /proc/PID/status,
read every 20 ms): pages of files that are mapped into memory can be read again, and do not count. The generator is the
files of its autoencoder and denoiser. R² is of seen and of held-out snapshots; accuracy is mean ± standard deviation
over networks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pdiff_hf.evaluation.render import table

SCRIPTS = Path(__file__).parents[1]
INTERVAL = 0.02
STAGES = ["base", "collect", "autoencoder", "denoiser", "evaluate"]
RESNET = {"model": "resnet18", "base_epochs": 10, "num_snapshots": 40}
VIT = {
    "model": "vit_base_patch16_224",
    "image_size": 32,
    "base_epochs": 4,
    "base_learning_rate": 1e-4,
    "base_batch_size": 64,
    "collect_batch_size": 64,
    "collect_learning_rate": 1e-5,
    "num_snapshots": 24,
    "autoencoder_steps": 300,
    "denoiser_steps": 1000,
}
SIZES = {
    "2k": RESNET | {"select": "norm[-2:]"},
    "295k": RESNET | {"select": "layer2.1*", "collect_learning_rate": 1e-3},
    "11M": RESNET | {"select": "all", "num_snapshots": 24, "collect_learning_rate": 1e-4},
    "86M": VIT | {"select": "all"},
}
# Few steps: memory does not depend on their number. A ViT needs more, for networks as good as its snapshots.
SETTINGS = {
    "latent_dim": 64,
    "autoencoder_steps": 100,
    "denoiser_steps": 300,
    "num_models": 20,
    "baseline_models": 2,
}


def peak_memory(command: list[str], output: str = os.devnull) -> int:
    """Bytes of anonymous memory that a process takes at most; what it prints goes to the file `output`."""
    with open(output, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file)
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        try:
            lines = status.read_text(encoding="utf-8").splitlines()
        except ProcessLookupError:
            break
        peak = max([peak, *(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))])
        time.sleep(INTERVAL)
    if process.wait():
        sys.exit(f"error: {' '.join(command)} ended with status {process.returncode}")
    return peak


def measure(name: str, folder: Path, flags: list[str]) -> list[str]:
    """The row of a size, with a line for each stage on the way."""
    settings = SETTINGS | SIZES[name] | {"output_dir": str(folder)}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))] + flags
    start, peaks = os.times(), []
    for stage in STAGES:
        before = os.times()
        command = [sys.executable, str(SCRIPTS / "train.py"), *flags, "--stages", stage]
        peaks.append(peak_memory([*command, "--resume_from_checkpoint", "latest"]))
        print(f"{name} {stage}: {peaks[-1] / 1e9:.2f} GB, {children_seconds(before):.0f} s of CPU", flush=True)
    report = json.loads((folder / "evaluation" / "report.json").read_text(encoding="utf-8"))
    groups, explained = {group["name"]: group["measures"] for group in report["groups"]}, report["reconstruction"]
    files = [*(folder / "pipeline" / "autoencoder").iterdir(), *(folder / "pipeline" / "denoiser").iterdir()]
    return [
        f"{report['num_parameters']:,}",
        *(f"{peak / 1e9:.2f}" for peak in peaks),
        f"{children_seconds(start):.0f}",
        f"{sum(file.stat().st_size for file in files) / 1e6:,.0f}",
        *(f"{explained[key]:.3f}" for key in ("r2_train", "r2_heldout")),
        *(f"{groups[key]['score_mean']:.2f} ± {groups[key]['score_std']:.2f}" for key in ("snapshots", "generated")),
    ]


def children_seconds(before: os.times_result) -> float:
    """CPU seconds of processes that have ended since."""
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--output_dir", help="Of the runs, which are kept; by default they are removed.")
    args, flags = parser.parse_known_args()
    imports = peak_memory([sys.executable, "-c", "import pdiff_hf.run.stages"])
    print(f"imports alone: {imports / 1e9:.2f} GB", flush=True)
    rows = []
    for name in args.sizes:
        with tempfile.TemporaryDirectory() as temporary:
            rows.append(measure(name, Path(args.output_dir or temporary, name), flags))
    header = ["parameters", *(f"{stage} GB" for stage in STAGES), "CPU s", "generator MB", "R² seen", "R² held out"]
    print("\n" + table([*header, "snapshots %", "generated %"], rows))


if __name__ == "__main__":
    main()
