"""Part of `posterior.py`: tasks of which some fields are unknown, answered with a set of networks."""

import torch
from posterior_examples import Tasks
from posterior_metrics import expected_unknown_nll, summarize
from posterior_priors import Priors
from posterior_report import GENERATOR

from pdiff_hf.tasks.label_groups import GroupedFamily
from pdiff_hf.utils.seeds import derive_seed

NUM_DRAWS, NUM_NEAREST = 256, 32
NUM_UNKNOWN = (1, 7, 9, 10)  # bits of a grouped task


def unknown_fields(priors: Priors, rows: dict) -> tuple[dict, dict]:
    """Sections of the report for (a), and what the unknown bits of grouped tasks cost at least."""
    bench = priors.bench
    tasks, table = Tasks(bench, "test"), bench.tables["test"]
    index, width = torch.arange(len(table)).unsqueeze(1), table.shape[1]
    columns = torch.arange(width)
    ideal = {}
    if isinstance(bench.family, GroupedFamily):
        unknown = {}
        for number in NUM_UNKNOWN:
            name = f"{number} of {width} bits unknown"
            unknown[name] = (columns - index) % width < number
            ideal[name] = expected_unknown_nll(width, width - number)
    else:
        unknown = {
            "angle unknown": (columns == bench.family.fields.columns["angle"].start).expand(len(table), -1),
            "all but one unknown": columns != index % width,
            "all unknown": torch.ones(table.shape, dtype=torch.bool),
        }
    sections = {}
    for name, mask in unknown.items():
        sections[name] = section(priors, tasks, torch.where(mask, torch.nan, table), rows)
        bench.clock(name)
    return sections, ideal


def section(priors: Priors, tasks: Tasks, known: torch.Tensor, rows: dict) -> dict:
    """Scores of every method, for tasks of which a table `(T, width)` says what is known."""
    bench, fields = priors.bench, priors.bench.family.fields
    tuned = bench.zoo_passes + bench.args.tune_steps * bench.per_step
    noise = torch.Generator().manual_seed(derive_seed(bench.seed, 40))
    oracle = bench.oracle(tasks.table)
    gaussians = {row: priors.fit_ridge(torch.tensor(row)) for row in set(map(tuple, (~known.isnan()).tolist()))}

    def gaussian(t: int) -> torch.Tensor:
        is_known = ~known[t].isnan()
        return gaussians[tuple(is_known.tolist())].sample(known[t : t + 1].nan_to_num(), NUM_DRAWS, noise)[0]

    def nearest(t: int) -> torch.Tensor:
        is_known = ~known[t].isnan()
        if not is_known.any():
            return priors.snapshots
        asked = torch.where(is_known, known[t], 0).unsqueeze(0)
        distances = torch.cdist(fields.features(asked), fields.features(torch.where(is_known, priors.table, 0)))[0]
        return priors.snapshots[distances.topk(NUM_NEAREST, largest=False).indices]

    @torch.no_grad()
    def deterministic(t: int) -> torch.Tensor:
        return priors.deterministic.sample_parameters(known[t : t + 1], noise)

    def drawn(t: int, of_seen: bool = False) -> torch.Tensor:
        return priors.draw(known[t], NUM_DRAWS, 100 + t, of_seen)

    methods = {
        GENERATOR: ("generator", tuned, lambda t: priors.networks_for(priors.tuned, drawn(t), 0, 100 + t)),
        "generator, fields of seen tasks": (
            "variant",
            tuned,
            lambda t: priors.networks_for(priors.tuned, drawn(t, True), 0, 100 + t),
        ),
        "generator by weights": (
            "variant",
            bench.zoo_passes,
            lambda t: priors.networks_for(priors.by_weights, drawn(t), 0, 100 + t),
        ),
        "hypernetwork": (
            "hypernetwork",
            tuned,
            lambda t: priors.networks_for(priors.hypernetwork, drawn(t), 0, 100 + t),
        ),
        "kernel ridge, fields drawn": ("closed form", bench.zoo_passes, lambda t: priors.ridge(drawn(t))),
        "kernel ridge, fields of seen tasks": ("closed form", bench.zoo_passes, lambda t: priors.ridge(drawn(t, True))),
        "conditional Gaussian": ("closed form", bench.zoo_passes, gaussian),
        "nearest training networks": ("closed form", bench.zoo_passes, nearest),
        "deterministic network": ("deterministic", tuned, deterministic),
        "generic network": ("generic", bench.opponent_passes, lambda t: priors.generic.values.detach().unsqueeze(0)),
        "trained on the task": ("oracle", bench.base_passes, lambda t: oracle[t : t + 1]),
    }
    found = {}
    for name, (kind, once, parameters) in methods.items():
        rows.setdefault(name, {"kind": kind, "once": once})
        each = [
            summarize(evidence, labels)
            for evidence, labels in zip(tasks.weigh(parameters, [0], [1.0]), tasks.queries["labels"], strict=True)
        ]
        found[name] = {metric: [scores[metric].item() for scores in each] for metric in each[0]}
    return found
