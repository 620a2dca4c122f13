"""
Networks on demand: a generator for a family of tasks, against everything simpler that answers to a condition.

    python scripts/benchmarks/on_demand.py --baselines all --seeds 0 1 2                  # scikit-learn's digits
    python scripts/benchmarks/on_demand.py scripts/recipes/on_demand_fashion.yaml --dataset path/to/fashion_mnist
    python scripts/benchmarks/on_demand.py scripts/recipes/on_demand_fashion.yaml ... --tune_tasks seen --num_tasks 64

It executes the recipe once for each seed, with other tasks each time, and pools the reports over all unseen tasks. All
other flags are those of scripts/train.py.
"""

import dataclasses
import json
import resource
from collections.abc import Sequence
from pathlib import Path

from pdiff_hf.evaluation.report import Report
from pdiff_hf.run.cli import ConfigParser
from pdiff_hf.run.config import PDiffConfig
from pdiff_hf.run.terminal import quiet_libraries
from pdiff_hf.run.trainer import execute, prepare
from pdiff_hf.scripts.opponents import wanted_opponents
from pdiff_hf.utils import names


def main() -> None:
    parser = ConfigParser("on_demand.yaml", description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    recipe, flags = parser.parse_config()
    seeds = flags.seeds
    quiet_libraries()
    folder = Path(recipe.output_dir)
    reports = [finish(recipe.changed(seed=s, output_dir=str(folder / f"seed{s}"))) for s in seeds]
    report = pool_reports(reports)
    report.save(folder)
    print(report.to_terminal())


def finish(recipe: PDiffConfig) -> Report:
    """The report of one seed; with the CPU seconds of the stages that were not finished before, and peak memory."""
    seconds = {}
    for stage in recipe.stages:
        before = _cpu_seconds()
        run = prepare(recipe.changed(stages=[stage]), extra_groups=wanted_opponents(recipe))
        execute(run)
        seconds[stage] = round(_cpu_seconds() - before, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"seed {recipe.seed}: {sum(seconds.values()):.0f} s of CPU, {peak:.1f} GB at most", json.dumps(seconds))
    report = Report.load(Path(recipe.output_dir, names.EVALUATION))
    print(report.to_terminal(), flush=True)
    return report


def pool_reports(reports: Sequence[Report]) -> Report:
    """One report of several runs with other tasks and seeds, as if their tasks had been those of one run."""
    first, *others = reports
    names_of = [row.name for row in first.groups if all(row.name in {g.name for g in r.groups} for r in others)]
    pooled = dataclasses.replace(
        first,
        settings={"runs": [report.settings for report in reports]},
        conditions={name: sum((report.conditions[name] for report in reports), []) for name in first.conditions},
        groups=[],
    )
    for name in names_of:
        rows = [report.group(name) for report in reports]
        sets = {
            set_name: {key: sum((row.sets[set_name][key] for row in rows), []) for key in scores}
            for set_name, scores in rows[0].sets.items()
        }
        notes = "; ".join(dict.fromkeys(row.note for row in rows))
        # Measures and what was tried are those of one run.
        pooled.groups.append(dataclasses.replace(rows[0], note=notes, sets=sets, comparisons={}, measures={}, tried={}))
    pooled.compare()
    pooled.describe()
    return pooled


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
