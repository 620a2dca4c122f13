"""
Networks for an unknown task, with a few labelled examples of it or with a field of its condition unknown.

    python scripts/benchmarks/on_demand.py --seeds 0 1 2
    python scripts/benchmarks/posterior.py outputs/on_demand/seed0 outputs/on_demand/seed1 outputs/on_demand/seed2

It takes finished runs of a family and their unseen tasks. Candidates from several priors are weighted by the likelihood
of the examples, as `PDiffPipeline.posterior` does, and networks are fine-tuned on them. What each method has to choose
(temperature of the likelihood, learning rate, steps) is chosen for each number of examples on validation tasks.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from pdiff_hf.evaluation.closed_forms import mean_networks, tuned_ridge
from pdiff_hf.evaluation.compare import paired_difference
from pdiff_hf.evaluation.member_score import MemberScorer
from pdiff_hf.evaluation.report import Report
from pdiff_hf.networks.posterior import log_likelihoods, posterior_weights, refine, resample
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.pipelines import PDiffPipeline
from pdiff_hf.run.cli import load_config
from pdiff_hf.run.terminal import quiet_libraries
from pdiff_hf.run.trainer import prepare
from pdiff_hf.tasks.task import Batch
from pdiff_hf.utils import names
from pdiff_hf.utils.files import write_json

NUM_EXAMPLES, SHOWN = (1, 3, 10, 20, 50), 20  # differences are with 20
NUM_CANDIDATES, NUM_DRAWN, REFINE_STEPS = 2048, 64, 50
TEMPERATURES = (1.0, 1.5, 2.0, 4.0)  # of likelihoods
RATES, STEPS = (0.001, 0.003, 0.01, 0.03), (0, 10, 30, 100)  # of fine-tuning
NUM_SETTING_TASKS, NUM_QUERIES = 16, 500
NUM_DRAWS, JOINT_QUERIES = 256, 20  # where a field is unknown
GENERATOR = "posterior of the generator"
# Accuracy in percent and negative log-likelihood of a task, for each of some settings.
Scores = dict[str, tuple[float, float]]


class Bench:
    """The unseen tasks of a run, and what could answer for them."""

    def __init__(self, folder: Path):
        config = load_config(str(folder / "recipe.yaml"), output_dir=str(folder), stages=["evaluate"])
        self.run = run = prepare(config)
        self.family, self.networks = run.family, NetworkRunner(run.base_model, run.layout)
        self.snapshots, self.known = run.known_snapshots()
        self.tuned = run.pipeline
        self.by_weights = PDiffPipeline.from_pretrained(run.folder / names.PIPELINE)
        self.by_weights.register_to_config(**config.sampling)
        self.tasks = {"validation": run.conditions["validation"][:NUM_SETTING_TASKS], "test": run.conditions["test"]}
        order = torch.Generator().manual_seed(config.seed)
        num = self.family.num_examples("validation")
        self.indices = {
            split: torch.stack([torch.randperm(num, generator=order) for _ in table])
            for split, table in self.tasks.items()
        }
        self.drawn = self.family.conditions(NUM_CANDIDATES, config.seed + 1, without=run.unseen_tasks)

    def examples(self, split: str, task: int) -> Batch:
        """Of a task, from images that no network was trained on."""
        return self._batch("validation", split, task, self.indices[split][task, : max(NUM_EXAMPLES)])

    def queries(self, split: str, task: int) -> Batch:
        """Test images; of a validation task other validation images."""
        if split == "validation":
            rest = self.indices[split][task, max(NUM_EXAMPLES) :][:NUM_QUERIES]
            return self._batch("validation", split, task, rest)
        total = self.family.num_examples("test")
        rows = torch.linspace(0, total - 1, min(total, NUM_QUERIES)).round().long()
        return self._batch("test", split, task, rows)

    def _batch(self, source: str, split: str, task: int, indices: torch.Tensor) -> Batch:
        batch = self.family.batch(source, self.tasks[split][task : task + 1], indices)  # type: ignore[arg-type]
        return {name: values[0] for name, values in batch.items()}

    @torch.no_grad()
    def sample(self, pipeline: PDiffPipeline, conditions: list | None, num: int = 1) -> torch.Tensor:
        """Parameters `(N, D)`: `num` networks for each condition, or without any `num` for those that were seen."""
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipeline(num, generator=generator, condition=conditions, output_type="pt", return_dict=False)[0]

    @functools.cached_property
    def ridge(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Kernel ridge regression from conditions to networks, chosen on validation tasks."""
        seen, _, means = mean_networks(self.snapshots, self.known)
        scorer = MemberScorer(self.family, self.networks, self.run.conditions["validation"], 500)
        return tuned_ridge(scorer, seen, means)

    def priors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Candidates for all tasks, by what they come from."""
        drawn = self.family.fields.table(self.drawn)
        yield GENERATOR, self.sample(self.tuned, self.drawn)
        yield f"{GENERATOR}, seen conditions", self.sample(self.tuned, None, NUM_CANDIDATES)
        yield f"{GENERATOR} by weights", self.sample(self.by_weights, self.drawn)
        yield "posterior of kernel ridge", self.ridge(drawn)
        yield "posterior of the training networks", self.snapshots

    # ---- a few labelled examples

    def weigh(self, candidates: torch.Tensor, split: str, task: int) -> dict[int, Scores]:
        """What weighted candidates say about a task, by the number of examples and the temperature."""
        queries = self.queries(split, task)
        keys = [(n, t) for n in NUM_EXAMPLES for t in TEMPERATURES]
        likelihoods = {n: self.likelihoods(candidates, split, task, n) for n in NUM_EXAMPLES}
        weights = torch.stack([posterior_weights(likelihoods[n], t) for n, t in keys])  # (K, N)
        probabilities = self.logits(candidates, queries).softmax(-1)  # (N, B, C)
        mixed = (weights @ probabilities.flatten(1)).unflatten(1, probabilities.shape[1:])
        answers: dict[int, Scores] = {n: {} for n in NUM_EXAMPLES}
        for (n, t), values in zip(keys, mixed, strict=True):
            answers[n][f"temperature {t:g}"] = score(values, queries["labels"])
        return answers

    def logits(self, rows: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Of networks `(N, D)` on one batch, shape `(N, B, C)`."""
        return torch.cat([out for _, out in self.networks(lambda call: self.family.predict(call, batch), rows)])

    def likelihoods(self, candidates: torch.Tensor, split: str, task: int, n: int) -> torch.Tensor:
        """Log-likelihoods of the first n examples of a task, shape `(N,)`."""
        examples = {name: values[:n] for name, values in self.examples(split, task).items()}
        return log_likelihoods(self.networks, examples, candidates, self.family.predict)

    def refined(self, candidates: torch.Tensor, task: int) -> tuple[float, float]:
        """Networks that are drawn from the posterior and fine-tuned on the examples, each for itself."""
        weights = posterior_weights(self.likelihoods(candidates, "test", task, SHOWN))
        rows = candidates[resample(weights, NUM_DRAWN, torch.Generator().manual_seed(task))]
        examples = {name: values[:SHOWN] for name, values in self.examples("test", task).items()}
        settings = {"num_steps": REFINE_STEPS, "predict": self.family.predict}
        rows = refine(self.networks.model, self.networks.layout, rows, examples, **settings)
        queries = self.queries("test", task)
        return score(self.logits(rows, queries).softmax(-1).mean(0), queries["labels"])

    def fine_tune(self, starts: torch.Tensor, split: str, n: int) -> list[Scores]:
        """For each task of a split the network `starts[task]`, fine-tuned on n examples with each rate and so long."""
        tasks = range(len(starts))
        batch, queries = (
            {name: torch.stack([one[name] for one in each]) for name in each[0]}
            for each in ([self.examples(split, t) for t in tasks], [self.queries(split, t) for t in tasks])
        )
        batch = {name: values[:, :n] for name, values in batch.items()}
        found: list[Scores] = [{} for _ in tasks]
        for rate in RATES:
            rows = starts.clone().requires_grad_()
            optimizer = torch.optim.AdamW([rows], lr=rate, weight_decay=0)
            for step in range(max(STEPS) + 1):
                if step in STEPS:
                    with torch.no_grad():
                        logits = self.networks.stack(self.family.predict, rows, queries)
                    for t in tasks:
                        found[t][f"rate {rate:g}, {step} steps"] = score(logits[t].softmax(-1), queries["labels"][t])
                logits = self.networks.stack(self.family.predict, rows, batch)
                loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()) * len(starts)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return found

    def few_examples(self) -> dict[str, dict[int, dict]]:
        """Accuracies and losses of the unseen tasks, and what was chosen, by method and number of examples."""
        found: dict[str, dict[int, dict]] = {}
        for name, candidates in self.priors():
            scores = {
                split: [self.weigh(candidates, split, t) for t in range(len(table))]
                for split, table in self.tasks.items()
            }
            found[name] = {n: choose({k: [one[n] for one in v] for k, v in scores.items()}) for n in NUM_EXAMPLES}
            if name == GENERATOR:
                values = [self.refined(candidates, t) for t in range(len(self.tasks["test"]))]
                found[f"{name}, refined for {REFINE_STEPS} steps"] = {SHOWN: as_row(values)}
        for name, start in {"training network": self.snapshots, "base model": None}.items():
            found[f"best {name}, fine-tuned" if start is not None else f"{name}, fine-tuned"] = {
                n: choose({split: self.fine_tune(self.starts(start, split, n), split, n) for split in self.tasks})
                for n in NUM_EXAMPLES
            }
        report = Report.load(self.run.folder / names.EVALUATION)
        for name, row in (("told the condition", report.generated), ("trained on the task", "trained on the task")):
            row = report.group(row) if isinstance(row, str) else row
            losses = [sum(one) / len(one) for one in row.sets["test"]["losses"]]
            given = {"accuracy": row.scores(), "nll": losses, "choice": row.note}
            found[name] = dict.fromkeys(NUM_EXAMPLES, given)
        return found

    def starts(self, candidates: torch.Tensor | None, split: str, n: int) -> torch.Tensor:
        """The most likely candidate for each task, or the base model: shape `(T, D)`."""
        tasks = range(len(self.tasks[split]))
        if candidates is None:
            return self.networks.base_parameters().repeat(len(tasks), 1)
        return torch.stack([candidates[self.likelihoods(candidates, split, t, n).argmax()] for t in tasks])

    # ---- a field that is unknown

    @torch.no_grad()
    def unknown(self, field: str) -> dict[str, list[float]]:
        """Joint negative log-likelihood of some queries of each unseen task in nats, if a field is unknown."""
        fields, found = self.family.fields, dict[str, list[float]]()
        values = [condition[field] for condition in self.drawn[:NUM_DRAWS]]
        for t, condition in enumerate(fields.conditions(self.tasks["test"])):
            conditions = [condition | {field: value} for value in values]
            sets = {
                "generator": self.sample(self.tuned, conditions),
                "kernel ridge": self.ridge(fields.table(conditions)),
                "generator by weights": self.sample(self.by_weights, conditions),
                "training networks": self.snapshots,
                "base model": self.networks.base_parameters()[None],
            }
            queries = self.queries("test", t)
            num = len(queries["labels"]) // JOINT_QUERIES * JOINT_QUERIES
            order = torch.randperm(len(queries["labels"]), generator=torch.Generator().manual_seed(t))[:num]
            queries = {name: value[order] for name, value in queries.items()}
            for name, rows in sets.items():
                logits = torch.cat(
                    [out for _, out in self.networks(lambda call, q=queries: self.family.predict(call, q), rows)]
                )
                right = -F.cross_entropy(
                    logits.movedim(-1, 1), queries["labels"].expand(len(rows), -1), reduction="none"
                )
                joint = right.unflatten(1, (-1, JOINT_QUERIES)).sum(2).logsumexp(0) - math.log(len(rows))
                found.setdefault(name, []).append(-joint.mean().item())
        return found


def score(probabilities: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Accuracy in percent and negative log-likelihood of probabilities `(B, C)`."""
    right = probabilities.gather(1, labels[:, None]).clamp_min(1e-12)
    return 100 * (probabilities.argmax(1) == labels).float().mean().item(), -right.log().mean().item()


def choose(scores: dict[str, list[Scores]]) -> dict:
    """The scores of the unseen tasks with the setting of the lowest loss on validation tasks."""
    best = min(scores["validation"][0], key=lambda key: sum(one[key][1] for one in scores["validation"]))
    return as_row([one[best] for one in scores["test"]]) | {"choice": best}


def as_row(values: list[tuple[float, float]]) -> dict:
    return {"accuracy": [a for a, _ in values], "nll": [loss for _, loss in values], "choice": ""}


def show(report: dict) -> str:
    """Tables in Markdown, pooled over runs."""
    found, lines = report["examples"], []
    lines.append("| method | " + " | ".join(f"{n}" for n in NUM_EXAMPLES) + f" | posterior minus this ({SHOWN}) |")
    lines.append("| --- |" + " --: |" * (len(NUM_EXAMPLES) + 1))
    own = found[GENERATOR][str(SHOWN)]["accuracy"]
    for name, row in sorted(found.items(), key=lambda item: -mean(item[1][str(SHOWN)]["accuracy"])):
        means = {n: f"{mean(one['accuracy']):.1f} / {mean(one['nll']):.3f}" for n, one in row.items()}
        cells = [means.get(str(n), "–") for n in NUM_EXAMPLES]
        cells.append("–" if name == GENERATOR else difference(own, row[str(SHOWN)]["accuracy"]))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if report["unknown"]:
        lines += ["", f"| {report['field']} unknown | joint NLL | generator minus this |", "| --- | --: | --: |"]
        own = report["unknown"]["generator"]
        for name, values in sorted(report["unknown"].items(), key=lambda item: mean(item[1])):
            lines.append(f"| {name} | {mean(values):.1f} | {difference(own, values)} |")
    return "\n".join(lines)


def difference(own: list[float], other: list[float]) -> str:
    """Paired over tasks, with a 95% interval."""
    one = paired_difference(own, other)
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(one.difference, *one.interval)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def pool(reports: list[dict]) -> dict:
    """Reports of several runs as one: lists of tasks one after the other, choices side by side."""
    first, *others = reports
    if not others:
        return first
    if isinstance(first, dict):
        return {key: pool([one[key] for one in reports]) for key in first}
    return sum(reports, []) if isinstance(first, list) else "; ".join(dict.fromkeys(map(str, reports)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="Folders of finished runs of one recipe.")
    parser.add_argument("--unknown", default="angle", help="A field of its conditions.")
    parser.add_argument("--output", type=Path, default=Path("outputs/posterior.json"))
    args = parser.parse_args()
    quiet_libraries()
    reports = []
    for folder in args.runs:
        start, bench = time.process_time(), Bench(folder)
        few = {name: {str(n): row for n, row in rows.items()} for name, rows in bench.few_examples().items()}
        reports.append({"examples": few, "unknown": bench.unknown(args.unknown)})
        print(f"{folder}: {time.process_time() - start:.0f} s of CPU", flush=True)
    report = pool(reports) | {"field": args.unknown}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, report)
    print(show(report))
    chosen = {name: {n: one["choice"] for n, one in rows.items()} for name, rows in report["examples"].items()}
    print(json.dumps(chosen, indent=1))


if __name__ == "__main__":
    main()
