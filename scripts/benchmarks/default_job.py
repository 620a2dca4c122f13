"""
CPU seconds and peak memory of the default job, stage by stage.

    OMP_NUM_THREADS=1 python scripts/benchmarks/default_job.py
    OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 python scripts/benchmarks/default_job.py

The second form computes as a processor without AVX does.
"""

import argparse
import resource
import sys
import tempfile
from pathlib import Path

from pdiff_hf.evaluation.report import Report
from pdiff_hf.run.cli import load_config
from pdiff_hf.run.task import make_task
from pdiff_hf.run.trainer import execute, prepare
from pdiff_hf.utils import names


def used() -> tuple[float, float]:
    """CPU seconds and the peak of memory in MB, of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    rows = [("imports", *used())]
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_config("digits.yaml", output_dir=folder, seed=seed)
        task = make_task(recipe)
        rows.append(("data", *used()))
        for stage in recipe.stages:
            run = prepare(recipe.changed(stages=[stage]), task=task)
            execute(run)
            rows.append((stage, *used()))
        print(Report.load(Path(folder, names.EVALUATION)).to_terminal())
    print(f"{'stage':12} {'CPU s':>7} {'peak MB':>8}")
    before = 0.0
    for stage, seconds, peak in rows:
        print(f"{stage:12} {seconds - before:7.1f} {peak:8.0f}")
        before = seconds
    print(f"{'all':12} {before:7.1f} {rows[-1][2]:8.0f}")


if __name__ == "__main__":
    sys.exit(main())
