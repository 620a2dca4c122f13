"""
Networks on demand: a generator for a family of tasks, against everything simpler that answers to a condition.

    python scripts/benchmarks/on_demand.py --baselines all --seeds 0 1 2                  # scikit-learn's digits
    python scripts/benchmarks/on_demand.py scripts/recipes/on_demand_fashion.yaml --dataset path/to/fashion_mnist
    python scripts/benchmarks/on_demand.py scripts/recipes/on_demand_fashion.yaml ... --tune_tasks seen --num_tasks 64

It executes the recipe once for each seed, with other tasks each time, and pools the reports over all unseen tasks. All
other flags are those of scripts/train.py.
"""

import json
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdiff_hf.evaluation.conditional import compared
from pdiff_hf.evaluation.render import format_summary
from pdiff_hf.run.cli import ConfigParser
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.terminal import quiet_libraries
from pdiff_hf.run.trainer import execute, prepare
from pdiff_hf.utils import names
from pdiff_hf.utils.files import write_json
from pdiff_hf.utils.reports import load_report


def main() -> None:
    parser = ConfigParser("on_demand.yaml", description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    recipe, flags = parser.parse_config()
    seeds = flags.seeds
    quiet_libraries()
    folder = Path(recipe.output_dir)
    reports = [finish(recipe.changed(seed=s, output_dir=str(folder / f"seed{s}"))) for s in seeds]
    report = pool_reports(reports)
    write_json(folder / names.REPORT, report)
    (folder / "report.md").write_text(format_summary(report), encoding="utf-8")
    print(format_summary(report))


def finish(recipe: PDiffConfig) -> dict:
    """The report of one seed; with the CPU seconds of the stages that were not finished before, and peak memory."""
    seconds = {}
    for stage in recipe.stages:
        before = _cpu_seconds()
        run = prepare(recipe.changed(stages=[stage]))
        execute(run)
        seconds[stage] = round(_cpu_seconds() - before, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"seed {recipe.seed}: {sum(seconds.values()):.0f} s of CPU, {peak:.1f} GB at most", json.dumps(seconds))
    report = load_report(Path(recipe.output_dir, names.EVALUATION, names.REPORT))
    print(format_summary(report), flush=True)
    return report


def pool_reports(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One report of several runs with other tasks and seeds, as if their tasks had been those of one run."""
    first = reports[0]
    pooled: dict[str, Any] = {
        **{key: first[key] for key in ("version", "kind", "metric", "num_parameters", "fields")},
        "settings": {"runs": [report["settings"] for report in reports]},
        "conditions": {name: sum((r["conditions"][name] for r in reports), []) for name in first["conditions"]},
        "rows": {},
    }
    for name, row in first["rows"].items():
        sets: dict[str, dict[str, list[float]]] = {
            set_name: {
                key: sum((report["rows"][name]["sets"][set_name][key] for report in reports), []) for key in scores
            }
            for set_name, scores in row["sets"].items()
        }
        notes = "; ".join(dict.fromkeys(report["rows"][name]["note"] for report in reports))
        pooled["rows"][name] = {**row, "note": notes, "sets": sets}
    return compared(pooled)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
