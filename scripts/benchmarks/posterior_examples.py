"""Part of `posterior.py`: a few labelled examples and nothing else, with every prior that could be weighed by them."""

import itertools
from collections.abc import Callable, Sequence

import torch
from posterior_bench import FamilyBench
from posterior_metrics import (
    TEMPERATURES,
    WeighedSet,
    fit_temperature,
    marginal_nll,
    mix,
    summarize,
    weigh,
)
from posterior_priors import NUM_CANDIDATES, Priors, fine_tune
from posterior_report import GENERATOR, TRAINING_NETWORKS, ZOO_GENERATOR

from pdiff_hf.evaluation.groups import training_cost
from pdiff_hf.networks.posterior import log_likelihoods, posterior_weights, resample
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.utils.seeds import derive_seed

NUM_EXAMPLES = (0, 1, 3, 6, 10, 20, 50)
SHARES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # of the generic network in a prior
TUNING_STEPS, TUNING_RATES = [0, 10, 30, 100, 300, 600], (1e-3, 3e-3, 1e-2)
NUM_REFINED, REFINE_STEPS = 32, [0, 3, 10, 30]
NUM_QUERIES = {"validation": 300, "test": 1000}


class Tasks:
    """Examples and queries of the validation or the test tasks, and the choice of settings on the former."""

    def __init__(self, bench: FamilyBench, split: str):
        self.bench, self.split, self.table = bench, split, bench.tables[split]
        self.models = NetworkRunner(bench.networks.model, bench.networks.layout)
        generator = torch.Generator().manual_seed(derive_seed(bench.seed, 30, len(self.table)))
        num_images = bench.family.num_examples("validation")
        order = torch.stack([torch.randperm(num_images, generator=generator) for _ in self.table])
        most = max(NUM_EXAMPLES)
        # Images that no network was trained on; queries of validation tasks are others of them.
        self.examples = bench.family.batch("validation", self.table, order[:, :most])
        num = NUM_QUERIES[split]
        total = bench.family.num_examples(split)
        num = min(num, total - most) // 20 * 20
        indices = order[:, most : most + num]
        if split == "test":
            indices = torch.randperm(total, generator=generator)[:num].expand(len(self.table), -1)
        self.queries = bench.family.batch(split, self.table, indices)

    def weigh(
        self,
        parameters: Callable[[int], torch.Tensor],
        num_examples: Sequence[int],
        temperatures: Sequence[float],
    ) -> list[WeighedSet]:
        """What candidates, `(N, D)` for each task, say about it."""
        found = []
        for t in range(len(self.table)):
            batches = ({k: v[t] for k, v in batch.items()} for batch in (self.examples, self.queries))
            predict = self.bench.family.predict
            found.append(weigh(self.models, predict, parameters(t), *batches, num_examples, temperatures))
        return found


class Examples:
    """Scores every method with every number of labelled examples, with what it has to choose chosen on validation."""

    def __init__(self, priors: Priors):
        self.priors, self.bench = priors, priors.bench
        self.tasks = {split: Tasks(self.bench, split) for split in ("validation", "test")}
        self.rows: dict[str, dict] = {}
        self.sections: dict[str, dict] = {f"{n} examples": {} for n in NUM_EXAMPLES}

    def weigh(self, parameters: torch.Tensor) -> dict[str, list[WeighedSet]]:
        """The same candidates for all tasks."""
        return {
            split: tasks.weigh(lambda _: parameters, NUM_EXAMPLES, TEMPERATURES) for split, tasks in self.tasks.items()
        }

    def add(
        self, name: str, kind: str, sources: Sequence[dict], shares: Sequence[Sequence[float]], once: int, num: int
    ):
        """
        Adds a method that weighs candidates.

        Args:
            sources (`list`): Of `weigh`.
            shares (`list`): Priors to choose from: the probability of each of the sources.
            once (`int`): Passes before the first task.
            num (`int`): Candidates.
        """
        self.rows[name] = {"kind": kind, "once": once}
        labels = {split: tasks.queries["labels"] for split, tasks in self.tasks.items()}

        def mixed(split: str, share: Sequence[float]) -> list[WeighedSet]:
            return [mix(parts, share) for parts in zip(*(source[split] for source in sources), strict=True)]

        scores = {}
        for share in dict.fromkeys(map(tuple, shares)):
            found = mixed("validation", share)
            scores[share] = torch.stack(
                [summarize(one, row)["nll"] for one, row in zip(found, labels["validation"], strict=True)]
            ).mean(0)  # (E, K)
        cache = {}
        for e, (n, section) in enumerate(zip(NUM_EXAMPLES, self.sections.values(), strict=True)):
            share, k = min(
                itertools.product(scores, range(len(TEMPERATURES))), key=lambda option: scores[option[0]][e, option[1]]
            )
            cache = {share: {split: mixed(split, share) for split in labels}} | {
                key: value for key, value in cache.items() if key == share
            }
            found = cache[share]
            scale = fit_temperature(
                torch.stack([one.probabilities[e, k] for one in found["validation"]]), labels["validation"]
            )
            row: dict = {"accuracy": [], "nll": [], "joint_nll": [], "effective_sample_size": [], "scaled_nll": []}
            for one, right in zip(found["test"], labels["test"], strict=True):
                for metric, value in summarize(one, right).items():
                    row[metric].append(value[e, k].item())
                row["scaled_nll"].append(marginal_nll(one.probabilities[e, k], right, scale).item())
            choice = {"shares": list(share), "temperature": TEMPERATURES[k]}
            section[name] = row | {"passes": num * n, "choice": choice}
        self._print(name)

    def add_networks(self, name: str, kind: str, once: int, options: Callable, numbers: Sequence[int]):
        """
        Adds a method that gives each task networks of its own.

        Args:
            options (`Callable`): `options(split, n)` gives, by what can be chosen, networks `(T, N, D)` and passes.
        """
        self.rows[name] = {"kind": kind, "once": once}
        labels = {split: tasks.queries["labels"] for split, tasks in self.tasks.items()}

        def evidence(split: str, networks: torch.Tensor) -> list[WeighedSet]:
            return self.tasks[split].weigh(lambda t: networks[t], [0], [1.0])

        def scores(split: str, found: Sequence[WeighedSet]) -> list[dict[str, float]]:
            each = [summarize(one, right) for one, right in zip(found, labels[split], strict=True)]
            return [{metric: value.item() for metric, value in one.items()} for one in each]

        for n in numbers:
            on_validation = {key: evidence("validation", rows) for key, (rows, _) in options("validation", n).items()}
            best = min(
                on_validation, key=lambda key: sum(row["nll"] for row in scores("validation", on_validation[key]))
            )
            scale = fit_temperature(
                torch.stack([one.probabilities[0, 0] for one in on_validation[best]]), labels["validation"]
            )
            networks, cost = options("test", n)[best]
            found = evidence("test", networks)
            values = scores("test", found)
            row: dict = {metric: [value[metric] for value in values] for metric in values[0]}
            row["scaled_nll"] = [
                marginal_nll(one.probabilities[0, 0], right, scale).item()
                for one, right in zip(found, labels["test"], strict=True)
            ]
            self.sections[f"{n} examples"][name] = row | {"passes": cost, "choice": str(best)}
        self._print(name)

    def refined(self, name: str, sets: Sequence[torch.Tensor]) -> Callable:
        """
        Options of `add_networks`: networks drawn from the sets of candidates with the weights that were chosen for the
        method `name`, and fine-tuned on the examples, all in one batch.
        """
        candidates = torch.cat(list(sets))

        def options(split: str, n: int) -> dict:
            tasks, choice = self.tasks[split], self.sections[f"{n} examples"][name]["choice"]
            shares = [share / len(rows) for share, rows in zip(choice["shares"], sets, strict=True)]
            log_prior = torch.cat([torch.full((len(r),), s).log() for r, s in zip(sets, shares, strict=True)])
            start = []
            for t in range(len(tasks.table)):
                batch = {key: value[t, :n] for key, value in tasks.examples.items()}
                likelihood = log_likelihoods(tasks.models, batch, candidates, self.bench.family.predict)
                weights = posterior_weights(likelihood, choice["temperature"], log_prior)
                start.append(candidates[resample(weights, NUM_REFINED, torch.Generator().manual_seed(t))])
            repeated = {key: value.repeat_interleave(NUM_REFINED, 0) for key, value in tasks.examples.items()}
            found = {}
            for rate in TUNING_RATES:
                after = fine_tune(self.bench, torch.cat(start), repeated, n, rate, REFINE_STEPS)
                for step, rows in after.items():
                    cost = len(candidates) * n + training_cost(step, n, NUM_REFINED)
                    found[f"{step} steps of {rate:g}"] = rows.unflatten(0, (-1, NUM_REFINED)), cost
            return found

        return options

    def _print(self, name: str) -> None:
        accuracies = {key: section[name]["accuracy"] for key, section in self.sections.items() if name in section}
        print(name, {key: round(sum(row) / len(row), 1) for key, row in accuracies.items()}, flush=True)


def labelled_examples(priors: Priors) -> tuple[dict, dict]:
    """Sections and rows of the report."""
    examples, bench = Examples(priors), priors.bench
    args = bench.args
    nothing = torch.full((bench.family.fields.width,), torch.nan)
    of_family, of_seen = (priors.draw(nothing, NUM_CANDIDATES, 1, of_seen=seen) for seen in (False, True))
    tuned = bench.zoo_passes + args.tune_steps * bench.per_step
    generic = examples.weigh(priors.generic.values.detach().unsqueeze(0))
    zoo = examples.weigh(priors.snapshots)
    with_generic = [(1 - share, share) for share in SHARES]

    def add(name: str, kind: str, parameters: torch.Tensor, once: int) -> dict:
        found = examples.weigh(parameters)
        examples.add(name, kind, [found, generic], with_generic, once + bench.opponent_passes, len(parameters))
        bench.clock(name)
        return found

    generated = priors.networks_for(priors.tuned, of_family, 0, 1)
    generator = add(GENERATOR, "generator", generated, tuned)
    examples.add("generator, without the generic network", "variant", [generator], [(1.0,)], tuned, NUM_CANDIDATES)
    add("generator, fields of seen tasks", "variant", priors.networks_for(priors.tuned, of_seen, 0, 2), tuned)
    by_weights = priors.networks_for(priors.by_weights, of_family, 0, 3)
    add("generator by weights", "variant", by_weights, bench.zoo_passes)
    add("hypernetwork", "hypernetwork", priors.networks_for(priors.hypernetwork, of_family, 0, 4), tuned)
    examples.add(
        TRAINING_NETWORKS,
        "closed form",
        [zoo, generic],
        with_generic,
        bench.zoo_passes + bench.opponent_passes,
        len(priors.snapshots),
    )
    noise = torch.Generator().manual_seed(derive_seed(bench.seed, 31))
    add("kernel ridge, fields of seen tasks", "closed form", priors.ridge(of_seen), bench.zoo_passes)
    add("kernel ridge, fields drawn", "closed form", priors.ridge(of_family), bench.zoo_passes)
    gaussian = priors.ridge.sample(of_family, 1, noise)[:, 0]
    add("kernel ridge + residuals", "closed form", gaussian, bench.zoo_passes)
    examples.add("generic network", "generic", [generic], [(1.0,)], bench.opponent_passes, 0)

    def networks(row: torch.Tensor) -> Callable:
        return lambda split, _: {"": (row.expand(len(bench.tables[split]), 1, -1), 0)}

    with torch.no_grad():
        row = priors.deterministic.sample_parameters(nothing.unsqueeze(0), noise)
    examples.add_networks("deterministic network", "deterministic", tuned, networks(row), NUM_EXAMPLES[:1])
    oracle = {split: bench.oracle(bench.tables[split]).unsqueeze(1) for split in ("validation", "test")}
    cost = training_cost(args.zoo_steps, bench.zoo_args.batch_size)
    examples.add_networks(
        "trained on the task", "oracle", bench.base_passes, lambda split, _: {"": (oracle[split], cost)}, NUM_EXAMPLES
    )
    bench.clock("oracle")

    def tuning(starts: Callable[[str, int], torch.Tensor]) -> Callable:
        def options(split: str, n: int) -> dict:
            found = {}
            for rate in TUNING_RATES:
                start = starts(split, n)
                after = fine_tune(bench, start, examples.tasks[split].examples, n, rate, TUNING_STEPS)
                for step, rows in after.items():
                    found[f"{step} steps of {rate:g}"] = rows.unsqueeze(1), training_cost(step, n)
            return found

        return options

    def most_likely(split: str, n: int) -> torch.Tensor:
        tasks = examples.tasks[split]
        batches = ({key: value[t, :n] for key, value in tasks.examples.items()} for t in range(len(tasks.table)))
        likelihoods = (log_likelihoods(tasks.models, b, priors.snapshots, bench.family.predict) for b in batches)
        return priors.snapshots[torch.stack([row.argmax() for row in likelihoods])]

    some = NUM_EXAMPLES[1:]
    start = priors.generic.values.detach()
    from_generic = tuning(lambda split, _: start.repeat(len(bench.tables[split]), 1))
    examples.add_networks("generic network, tuned on them", "fine-tuned", bench.opponent_passes, from_generic, some)
    examples.add_networks(
        "best training network, tuned on them", "fine-tuned", bench.zoo_passes, tuning(most_likely), some
    )
    sets = {GENERATOR: [generated, start.unsqueeze(0)], TRAINING_NETWORKS: [priors.snapshots, start.unsqueeze(0)]}
    for name, kind in {GENERATOR: "variant", TRAINING_NETWORKS: "fine-tuned"}.items():
        options, once = examples.refined(name, sets[name]), examples.rows[name]["once"]
        examples.add_networks(f"{name}, refined", kind, once, options, some)
    bench.clock("fine-tuning")
    add_zoo_rows(examples, zoo, generic)
    return examples.sections, examples.rows


def add_zoo_rows(examples: Examples, zoo: dict, generic: dict) -> None:
    """A zoo without conditions: what nothing but its networks and the examples of seen tasks can be made of."""
    priors, bench = examples.priors, examples.bench
    grid = [
        ((1 - g) * (1 - z), (1 - g) * z, g)
        for z, g in itertools.product((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), (0.0, 0.1, 0.5, 1.0))
    ]
    for name, module in priors.zoo.items():
        candidates = priors.networks_for(module, None, NUM_CANDIDATES, 5)
        found = examples.weigh(candidates)
        once = bench.zoo_passes + bench.opponent_passes
        examples.add(
            f"zoo generator, {name}", "zoo", [found, generic], [(1 - s, s) for s in SHARES], once, NUM_CANDIDATES
        )
        num = NUM_CANDIDATES + len(priors.snapshots)
        together = ZOO_GENERATOR if name == "predictive" else f"{ZOO_GENERATOR}, {name}"
        examples.add(together, "zoo", [found, zoo, generic], grid, once, num)
        if together == ZOO_GENERATOR:
            sets = [candidates, priors.snapshots, priors.generic.values.detach().unsqueeze(0)]
            options = examples.refined(together, sets)
            examples.add_networks(f"{together}, refined", "zoo", once, options, NUM_EXAMPLES[1:])
        bench.clock(f"zoo generator, {name}")
