"""A prior over networks: unknown fields and a few labelled examples, against everything simpler that could serve.

python scripts/benchmarks/posterior.py                                         # scikit-learn's digits
python scripts/benchmarks/posterior.py --dataset path/to/fashion_mnist --image_size 14 --seeds 0 1 2
python scripts/benchmarks/posterior.py --dataset path/to/fashion_mnist --image_size 14 --family grouped
"""

import argparse
import functools
import itertools
import json
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from posterior_metrics import (
    TEMPERATURES,
    WeighedSet,
    expected_unknown_nll,
    fit_temperature,
    marginal_nll,
    mix,
    summarize,
    validity,
    weigh,
)
from posterior_priors import NUM_CANDIDATES, Clock, Priors, add_arguments
from posterior_report import GENERATOR, TRAINING_NETWORKS, ZOO_GENERATOR, pool_reports, render_markdown
from torch import Tensor

from pdiff_hf.evaluation.groups import training_cost
from pdiff_hf.networks.posterior import log_likelihoods, posterior_weights, resample
from pdiff_hf.tasks.label_groups import GroupedFamily
from pdiff_hf.utils.files import write_json
from pdiff_hf.utils.seeds import derive_seed

NUM_EXAMPLES = (0, 1, 3, 6, 10, 20, 50)
SHARES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # of the generic network in a prior
# Of a generator of a zoo and of the zoo, and of the generic network beside both.
ZOO_SHARES, GENERIC_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), (0.0, 0.1, 0.5, 1.0)
TUNING_STEPS, TUNING_RATES = [0, 10, 30, 100, 300, 600], (1e-3, 3e-3, 1e-2)
NUM_REFINED, REFINE_STEPS = 32, [0, 3, 10, 30]
NUM_QUERIES = {"validation": 300, "test": 1000}
NUM_DRAWS, NUM_NEAREST = 256, 32  # where fields are unknown
NUM_UNKNOWN = (1, 7, 9, 10)  # bits of a grouped task

# What each task of a split is answered with: `answers("test")`.
Answers = Callable[[str], Sequence[WeighedSet]]
# For a number of labelled examples, by what can be chosen, the answers and the passes of a task.
Options = Callable[[int], dict[Any, tuple[Answers, int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--output_dir", default="outputs/posterior", help="What is trained in it already is used.")
    args = parser.parse_args()
    folder, reports = Path(args.output_dir), []
    for seed in args.seeds:
        clock = Clock()
        bench = Bench(Priors(args, seed, folder / f"seed{seed}" / "trained", clock))
        settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "seeds")}
        report = {"examples": bench.labelled_examples(), "fields": bench.unknown_fields(), "rows": bench.rows}
        report |= {"ideal": bench.ideal, "validity": bench.valid_networks()}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        report["settings"] = settings | {"seed": seed, "cpu_seconds": clock.seconds, "peak_memory_gb": peak}
        write_json(folder / f"seed{seed}" / "report.json", report)
        reports.append(report)
        print(json.dumps(clock.seconds), flush=True)
    report = pool_reports(reports)
    write_json(folder / "report.json", report)
    (folder / "report.md").write_text(render_markdown(report), encoding="utf-8")
    print(render_markdown(report))


class Tasks:
    """Examples and queries of the validation or the test tasks."""

    def __init__(self, priors: Priors, split: str):
        self.family, self.networks, self.table = priors.family, priors.networks, priors.tables[split]
        generator = torch.Generator().manual_seed(derive_seed(priors.seed, 30, len(self.table)))
        num_images, most = self.family.num_examples("validation"), max(NUM_EXAMPLES)
        order = torch.stack([torch.randperm(num_images, generator=generator) for _ in self.table])
        # Images that no network was trained on; queries of validation tasks are others of them.
        self.examples = self.family.batch("validation", self.table, order[:, :most])
        total = self.family.num_examples(split)
        num = min(NUM_QUERIES[split], total - most) // 20 * 20
        indices = order[:, most : most + num]
        if split == "test":
            indices = torch.randperm(total, generator=generator)[:num].expand(len(self.table), -1)
        self.queries = self.family.batch(split, self.table, indices)

    def first(self, t: int, n: int) -> dict[str, Tensor]:
        """The first n examples of a task."""
        return {name: values[t, :n] for name, values in self.examples.items()}

    def likelihoods(self, t: int, n: int, networks: Tensor) -> Tensor:
        """Of the first n examples of a task, shape `(N,)`."""
        return log_likelihoods(self.networks, self.first(t, n), networks, self.family.predict)

    def weigh(
        self, networks: Callable[[int], Tensor], numbers: Sequence[int] = (0,), temperatures: Sequence[float] = (1.0,)
    ) -> list[WeighedSet]:
        """What candidates, `networks(t)` of shape `(N, D)` for each task, say about it."""
        found = []
        for t in range(len(self.table)):
            batches = ({name: values[t] for name, values in batch.items()} for batch in (self.examples, self.queries))
            found.append(weigh(self.networks, self.family.predict, networks(t), *batches, numbers, temperatures))
        return found


class Bench:
    """
    Scores every method, with what it has to choose chosen on validation tasks.

    Attributes:
        rows (`dict`): Kind of each method, and passes before the first task.
        ideal (`dict`): What the unknown bits of grouped tasks cost at least.
    """

    def __init__(self, priors: Priors):
        self.priors = priors
        self.tasks = {split: Tasks(priors, split) for split in ("validation", "test")}
        self.rows: dict[str, dict] = {}
        self.ideal: dict[str, float] = {}
        self.sections: dict[str, dict] = {f"{n} examples": {} for n in NUM_EXAMPLES}

    def methods(self) -> dict[str, tuple[str, int, Callable[[Tensor, int, int], Tensor]]]:
        """
        Priors of networks by name: what kind they are, passes before the first task, and `networks(known, num, seed)`,
        that agree with a row of a table, NaN where it is unknown.
        """
        p = self.priors

        def by(module, of_seen: bool = False) -> Callable[[Tensor, int, int], Tensor]:
            return lambda known, num, seed: p.networks_for(module, p.draw(known, num, seed, of_seen), 0, seed)

        def ridge(of_seen: bool) -> Callable[[Tensor, int, int], Tensor]:
            return lambda known, num, seed: p.ridge(p.draw(known, num, seed, of_seen))

        return {
            GENERATOR: ("generator", p.tuned_passes, by(p.tuned)),
            "generator, fields of seen tasks": ("variant", p.tuned_passes, by(p.tuned, of_seen=True)),
            "generator by weights": ("variant", p.zoo_passes, by(p.by_weights)),
            "hypernetwork": ("hypernetwork", p.tuned_passes, by(p.hypernetwork)),
            "kernel ridge, fields drawn": ("closed form", p.zoo_passes, ridge(of_seen=False)),
            "kernel ridge, fields of seen tasks": ("closed form", p.zoo_passes, ridge(of_seen=True)),
        }

    # ---- a few labelled examples and nothing else, with every prior that could be weighed by them

    def add(self, name: str, kind: str, once: int, options: Options, numbers: Sequence[int] = ()) -> None:
        """Adds a method to the sections of these numbers of examples, all by default."""
        self.rows[name] = {"kind": kind, "once": once}
        labels = {split: tasks.queries["labels"] for split, tasks in self.tasks.items()}

        def scores(answers: Answers, split: str) -> list[dict[str, float]]:
            pairs = zip(answers(split), labels[split], strict=True)
            return [{metric: value.item() for metric, value in summarize(*pair).items()} for pair in pairs]

        for n in numbers or NUM_EXAMPLES:
            found = options(n)
            best = min(found, key=lambda key: sum(row["nll"] for row in scores(found[key][0], "validation")))
            answers, passes = found[best]
            chosen = torch.stack([one.probabilities for one in answers("validation")])
            scale = fit_temperature(chosen, labels["validation"])
            values = scores(answers, "test")
            row: dict = {metric: [value[metric] for value in values] for metric in values[0]}
            pairs = zip(answers("test"), labels["test"], strict=True)
            row["scaled_nll"] = [marginal_nll(one.probabilities, right, scale).item() for one, right in pairs]
            self.sections[f"{n} examples"][name] = row | {"passes": passes, "choice": best}
        accuracies = {key: section[name]["accuracy"] for key, section in self.sections.items() if name in section}
        print(name, {key: round(sum(row) / len(row), 1) for key, row in accuracies.items()}, flush=True)

    def add_weighed(
        self, name: str, kind: str, once: int, sources: Sequence[dict], shares: Sequence[tuple], num: int
    ) -> None:
        """
        Adds a method that weighs `num` candidates.

        Args:
            sources (`list`): Of `weigh`.
            shares (`list`): Priors to choose from: the probability of each of the sources.
        """

        def options(n: int) -> dict[Any, tuple[Answers, int]]:
            e = NUM_EXAMPLES.index(n)

            def answers(split: str, share: tuple, k: int) -> list[WeighedSet]:
                each = zip(*(source[split] for source in sources), strict=True)
                return [mix([part.at(e, k) for part in parts], share) for parts in each]

            choices = itertools.product(dict.fromkeys(shares), enumerate(TEMPERATURES))
            return {
                (share, temperature): (functools.partial(answers, share=share, k=k), num * n)
                for share, (k, temperature) in choices
            }

        self.add(name, kind, once, options)

    def weigh(self, candidates: Tensor) -> dict[str, list[WeighedSet]]:
        """The same candidates for all tasks, with all numbers of examples."""
        tasks = self.tasks.items()
        return {split: some.weigh(lambda _: candidates, NUM_EXAMPLES, TEMPERATURES) for split, some in tasks}

    def given(self, networks: Callable[[str], Tensor], passes: int = 0) -> tuple[Answers, int]:
        """Networks for each task of a split, shape `(T, N, D)`, that all count alike."""
        cache: dict[str, list[WeighedSet]] = {}

        def answers(split: str) -> list[WeighedSet]:
            if split not in cache:
                rows = networks(split)
                cache[split] = [one.at(0, 0) for one in self.tasks[split].weigh(lambda t: rows[t])]
            return cache[split]

        return answers, passes

    def fine_tuned(
        self, starts: Callable[[str, int], Tensor], each: int, candidates: int, all_steps: list[int]
    ) -> Options:
        """`each` networks for a task, `starts(split, n)` of shape `(T · each, D)`, tuned on its examples."""

        def options(n: int) -> dict[Any, tuple[Answers, int]]:
            @functools.cache
            def tuned(split: str, rate: float) -> dict[int, Tensor]:
                examples = {k: v.repeat_interleave(each, 0) for k, v in self.tasks[split].examples.items()}
                return self.priors.fine_tune(starts(split, n), examples, n, rate, all_steps)

            def networks(split: str, rate: float, step: int) -> Tensor:
                return tuned(split, rate)[step].unflatten(0, (-1, each))

            return {
                f"{step} steps of {rate:g}": self.given(
                    functools.partial(networks, rate=rate, step=step), candidates * n + training_cost(step, n, each)
                )
                for rate, step in itertools.product(TUNING_RATES, all_steps)
            }

        return options

    def refined(self, name: str, sets: Sequence[Tensor]) -> Options:
        """
        Networks drawn from the sets of candidates with the weights that were chosen for the method `name`, and
        fine-tuned on the examples, all in one batch.
        """
        candidates = torch.cat(list(sets))

        def starts(split: str, n: int) -> Tensor:
            share, temperature = self.sections[f"{n} examples"][name]["choice"]
            of_each = zip(sets, share, strict=True)
            log_prior = torch.cat([torch.full((len(rows),), part / len(rows)).log() for rows, part in of_each])
            start = []
            for t in range(len(self.tasks[split].table)):
                weights = posterior_weights(self.tasks[split].likelihoods(t, n, candidates) / temperature + log_prior)
                start.append(candidates[resample(weights, NUM_REFINED, torch.Generator().manual_seed(t))])
            return torch.cat(start)

        return self.fine_tuned(starts, NUM_REFINED, len(candidates), REFINE_STEPS)

    def labelled_examples(self) -> dict[str, dict]:
        """The sections of the report."""
        p, some = self.priors, NUM_EXAMPLES[1:]
        nothing = torch.full((p.family.fields.width,), torch.nan)
        start = p.generic.values.detach()
        generic, zoo = self.weigh(start.unsqueeze(0)), self.weigh(p.snapshots)
        with_generic = [(1 - share, share) for share in SHARES]
        noise = torch.Generator().manual_seed(derive_seed(p.seed, 31))
        candidates = {name: answer(nothing, NUM_CANDIDATES, 1) for name, (_, _, answer) in self.methods().items()}
        candidates["kernel ridge + residuals"] = p.ridge.sample(p.draw(nothing, NUM_CANDIDATES, 1), 1, noise)[:, 0]
        candidates[TRAINING_NETWORKS] = p.snapshots
        for name, rows in candidates.items():
            kind, once, _ = self.methods().get(name, ("closed form", p.zoo_passes, None))
            found = zoo if name == TRAINING_NETWORKS else self.weigh(rows)
            self.add_weighed(name, kind, once + p.opponent_passes, [found, generic], with_generic, len(rows))
            if name == GENERATOR:
                alone = "generator, without the generic network"
                self.add_weighed(alone, "variant", once, [found], [(1.0,)], NUM_CANDIDATES)
            p.clock(name)
        self.add_weighed("generic network", "generic", p.opponent_passes, [generic], [(1.0,)], 0)
        with torch.no_grad():
            told_nothing = p.deterministic.sample_parameters(nothing.unsqueeze(0), noise)
        told = {"": self.given(lambda split: told_nothing.expand(len(p.tables[split]), 1, -1))}
        self.add("deterministic network", "deterministic", p.tuned_passes, lambda n: told, NUM_EXAMPLES[:1])
        cost = training_cost(p.args.zoo_steps, p.zoo_args.batch_size)
        oracle = self.given(lambda split: p.oracle(p.tables[split]).unsqueeze(1), cost)
        self.add("trained on the task", "oracle", p.base_passes, lambda n: {"": oracle})
        p.clock("oracle")

        def most_likely(split: str, n: int) -> Tensor:
            tasks = self.tasks[split]
            best = [tasks.likelihoods(t, n, p.snapshots).argmax() for t in range(len(tasks.table))]
            return p.snapshots[torch.stack(best)]

        from_generic = self.fine_tuned(lambda split, _: start.repeat(len(p.tables[split]), 1), 1, 0, TUNING_STEPS)
        self.add("generic network, tuned on them", "fine-tuned", p.opponent_passes, from_generic, some)
        from_best = self.fine_tuned(most_likely, 1, 0, TUNING_STEPS)
        self.add("best training network, tuned on them", "fine-tuned", p.zoo_passes, from_best, some)
        for name, kind in {GENERATOR: "variant", TRAINING_NETWORKS: "fine-tuned"}.items():
            options = self.refined(name, [candidates[name], start.unsqueeze(0)])
            self.add(f"{name}, refined", kind, self.rows[name]["once"], options, some)
        p.clock("fine-tuning")
        # A zoo without conditions: what nothing but its networks and the examples of seen tasks can be made of.
        grid = [((1 - g) * (1 - z), (1 - g) * z, g) for z, g in itertools.product(ZOO_SHARES, GENERIC_SHARES)]
        once = p.zoo_passes + p.opponent_passes
        for name, module in p.zoo.items():
            sampled = p.networks_for(module, None, NUM_CANDIDATES, 5)
            found, num = self.weigh(sampled), NUM_CANDIDATES + len(p.snapshots)
            self.add_weighed(f"zoo generator, {name}", "zoo", once, [found, generic], with_generic, NUM_CANDIDATES)
            together = ZOO_GENERATOR if name == "predictive" else f"{ZOO_GENERATOR}, {name}"
            self.add_weighed(together, "zoo", once, [found, zoo, generic], grid, num)
            if together == ZOO_GENERATOR:
                options = self.refined(together, [sampled, p.snapshots, start.unsqueeze(0)])
                self.add(f"{together}, refined", "zoo", once, options, some)
            p.clock(f"zoo generator, {name}")
        return self.sections

    # ---- tasks of which some fields are unknown, answered with a set of networks

    def unknown_fields(self) -> dict[str, dict]:
        """The sections of the report."""
        family, table = self.priors.family, self.tasks["test"].table
        index, width = torch.arange(len(table)).unsqueeze(1), table.shape[1]
        columns = torch.arange(width)
        if isinstance(family, GroupedFamily):
            names = {number: f"{number} of {width} bits unknown" for number in NUM_UNKNOWN}
            unknown = {name: (columns - index) % width < number for number, name in names.items()}
            self.ideal = {name: expected_unknown_nll(width, width - number) for number, name in names.items()}
        else:
            unknown = {
                "angle unknown": (columns == family.fields.columns["angle"].start).expand(len(table), -1),
                "all but one unknown": columns != index % width,
                "all unknown": torch.ones(table.shape, dtype=torch.bool),
            }
        sections = {}
        for name, mask in unknown.items():
            sections[name] = self._section(torch.where(mask, torch.nan, table))
            self.priors.clock(name)
        return sections

    def _section(self, known: Tensor) -> dict[str, dict]:
        """Scores of every method, for tasks of which a table `(T, width)` says what is known."""
        p, tasks, fields = self.priors, self.tasks["test"], self.priors.family.fields
        noise = torch.Generator().manual_seed(derive_seed(p.seed, 40))
        oracle = p.oracle(tasks.table)
        gaussians = {row: p.fit_ridge(torch.tensor(row)) for row in set(map(tuple, (~known.isnan()).tolist()))}

        def gaussian(t: int) -> Tensor:
            regression = gaussians[tuple((~known[t].isnan()).tolist())]
            return regression.sample(known[t : t + 1].nan_to_num(), NUM_DRAWS, noise)[0]

        def nearest(t: int) -> Tensor:
            is_known = ~known[t].isnan()
            if not is_known.any():
                return p.snapshots
            asked = torch.where(is_known, known[t], 0).unsqueeze(0)
            distances = torch.cdist(fields.features(asked), fields.features(torch.where(is_known, p.table, 0)))[0]
            return p.snapshots[distances.topk(NUM_NEAREST, largest=False).indices]

        @torch.no_grad()
        def deterministic(t: int) -> Tensor:
            return p.deterministic.sample_parameters(known[t : t + 1], noise)

        def drawn(answer: Callable[[Tensor, int, int], Tensor]) -> Callable[[int], Tensor]:
            return lambda t: answer(known[t], NUM_DRAWS, 100 + t)

        methods = {name: (kind, once, drawn(answer)) for name, (kind, once, answer) in self.methods().items()} | {
            "conditional Gaussian": ("closed form", p.zoo_passes, gaussian),
            "nearest training networks": ("closed form", p.zoo_passes, nearest),
            "deterministic network": ("deterministic", p.tuned_passes, deterministic),
            "generic network": ("generic", p.opponent_passes, lambda t: p.generic.values.detach().unsqueeze(0)),
            "trained on the task": ("oracle", p.base_passes, lambda t: oracle[t : t + 1]),
        }
        found = {}
        for name, (kind, once, networks) in methods.items():
            self.rows.setdefault(name, {"kind": kind, "once": once})
            pairs = zip(tasks.weigh(networks), tasks.queries["labels"], strict=True)
            each = [summarize(one.at(0, 0), labels) for one, labels in pairs]
            found[name] = {metric: [scores[metric].item() for scores in each] for metric in each[0]}
        return found

    def valid_networks(self) -> dict[str, dict[str, float]]:
        """How good networks of each prior are for the seen or test task that they are best for."""
        p = self.priors
        conditions = p.draw(torch.full((p.family.fields.width,), torch.nan), 64, 0)
        networks = {
            GENERATOR: p.networks_for(p.tuned, conditions, 0, 0),
            "generator by weights": p.networks_for(p.by_weights, conditions, 0, 0),
            TRAINING_NETWORKS: p.snapshots[-64:],
            **{f"zoo generator, {name}": p.networks_for(m, None, 256, 0)[:64] for name, m in p.zoo.items()},
        }
        table = torch.cat([p.tables["train"], p.tables["test"]])
        found = {n: validity(p.family, p.networks, rows, table, num_examples=200)[0] for n, rows in networks.items()}
        p.clock("validity")
        return {name: {"mean": a.mean().item(), "std": a.std().item(), "n": len(a)} for name, a in found.items()}


if __name__ == "__main__":
    main()
