"""A prior over networks: unknown fields and a few labelled examples, against everything simpler that could serve.

python scripts/benchmarks/posterior.py                                         # scikit-learn's digits
python scripts/benchmarks/posterior.py --dataset path/to/fashion_mnist --image_size 14 --seeds 0 1 2
python scripts/benchmarks/posterior.py --dataset path/to/fashion_mnist --image_size 14 --family grouped
"""

import argparse
import json
import resource
from pathlib import Path

import torch
from posterior_bench import Clock, FamilyBench, add_arguments
from posterior_examples import labelled_examples
from posterior_fields import unknown_fields
from posterior_metrics import validity
from posterior_priors import Priors
from posterior_report import GENERATOR, TRAINING_NETWORKS, pool_reports, render_markdown

from pdiff_hf.utils.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--set_steps", type=int, default=600, help="Of tuning a generator without conditions.")
    parser.add_argument(
        "--zoo_sharpness", type=float, nargs="*", default=[], help="Also tune on likelihood^(1 / this)."
    )
    parser.add_argument("--output_dir", default="outputs/posterior", help="What is trained in it already is used.")
    args = parser.parse_args()
    folder, reports = Path(args.output_dir), []
    for seed in args.seeds:
        clock = Clock()
        bench = FamilyBench(args, seed, clock)
        report = run(bench, Priors(bench, folder / f"seed{seed}" / "trained"))
        report["settings"] |= {"seed": seed, "cpu_seconds": clock.seconds}
        report["settings"]["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        write_json(folder / f"seed{seed}" / "report.json", report)
        reports.append(report)
        print(json.dumps(clock.seconds), flush=True)
    report = pool_reports(reports)
    write_json(folder / "report.json", report)
    (folder / "report.md").write_text(render_markdown(report), encoding="utf-8")
    print(render_markdown(report))


def run(bench: FamilyBench, priors: Priors) -> dict:
    examples, rows = labelled_examples(priors)
    fields, ideal = unknown_fields(priors, rows)
    return {
        "settings": {name: value for name, value in vars(bench.args).items() if name not in ("output_dir", "seeds")},
        "rows": rows,
        "examples": examples,
        "fields": fields,
        "ideal": ideal,
        "validity": valid_networks(priors),
    }


def valid_networks(priors: Priors) -> dict[str, dict[str, float]]:
    """How good networks of each prior are for the seen or test task that they are best for."""
    bench = priors.bench
    conditions = priors.draw(torch.full((bench.family.fields.width,), torch.nan), 64, 0)
    networks = {
        GENERATOR: priors.networks_for(priors.tuned, conditions, 0, 0),
        "generator by weights": priors.networks_for(priors.by_weights, conditions, 0, 0),
        TRAINING_NETWORKS: priors.snapshots[-64:],
        **{f"zoo generator, {name}": priors.networks_for(m, None, 256, 0)[:64] for name, m in priors.zoo.items()},
    }
    table = torch.cat([bench.tables["train"], bench.tables["test"]])
    found = {}
    for name, rows in networks.items():
        accuracy = validity(bench.family, bench.networks, rows, table, num_examples=200)[0]
        found[name] = {"mean": accuracy.mean().item(), "std": accuracy.std().item(), "n": len(rows)}
    bench.clock("validity")
    return found


if __name__ == "__main__":
    main()
