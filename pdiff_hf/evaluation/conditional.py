"""The audit of a conditional generator: are its networks for unseen tasks better than those of simpler answers?"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from matplotlib.figure import Figure

from ..models.kernel_ridge import KernelRidge
from ..models.products import AdapterProducts, contracted, expanded
from ..networks.runner import NetworkRunner
from ..tasks.family import Family
from ..tasks.task import Split
from ..utils.files import write_json
from ..utils.reports import REPORT_VERSION
from .conditional_baselines import nearest_mean
from .plots import DPI, GENERATED, MARKERS, OTHERS, SNAPSHOTS, WIDTH

NUM_BOOTSTRAP = 10_000
NEIGHBORS = (2, 3, 5, 8)
TASKS_AT_ONCE = 16
GENERATOR = "generator"
# What the names of rows mean for the verdict.
KINDS = {
    "generator": "the generator",
    "closed form": "a closed-form answer",
    "trained": "networks trained in the same regime",
    "oracle": "networks trained on the unseen task itself",
    "control": "what should be worse",
}


@dataclass(frozen=True)
class Cost:
    """
    Passes forward and backward over one image by one network.

    Args:
        once (`int`): Before the first unseen task.
        each (`int`): For each unseen task.
    """

    once: int = 0
    each: int = 0


@torch.no_grad()
def score_tasks(
    family: Family,
    respond: Callable[[torch.Tensor, Any], torch.Tensor],
    table: torch.Tensor,
    split: Split,
    num_examples: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Scores networks, each on its own task.

    Args:
        respond (`Callable`): `respond(rows, batch)` gives logits `(t, B, C)` for the tasks `rows`, indices `(t,)`.
        table (`torch.Tensor`): The conditions, shape `(T, width)`.
        num_examples (`int`): No more examples of the split than this, evenly spaced over it.

    Returns:
        `tuple`: Accuracy in percent, and mean cross-entropy in nats, both of shape `(T,)`.
    """
    total = family.num_examples(split)
    indices = torch.linspace(0, total - 1, min(num_examples, total)).round().long()
    accuracies, losses = [], []
    for rows in torch.arange(len(table)).split(TASKS_AT_ONCE):
        correct, loss = torch.zeros(len(rows)), torch.zeros(len(rows))
        for part in indices.split(500):
            batch = family.batch(split, table[rows], part)
            logits = respond(rows, batch)
            correct += (logits.argmax(-1) == batch["labels"]).sum(1)
            loss += F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").sum(1)
        accuracies.append(100 * correct / len(indices))
        losses.append(loss / len(indices))
    return torch.cat(accuracies), torch.cat(losses)


def paired_bootstrap(first: Sequence[float], second: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """
    The mean difference between two methods over tasks, with its 95% interval over draws of as many tasks.

    Returns:
        `dict`: `difference`, `low`, `high`, and the `verdict` (better, worse or undecided) seen from the first.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(len(difference), size=(NUM_BOOTSTRAP, len(difference)))
    low, high = np.quantile(difference[rows].mean(1), [0.025, 0.975]).tolist()
    verdict = "better" if low > 0 else "worse" if high < 0 else "undecided"
    return {"difference": float(difference.mean()), "low": low, "high": high, "verdict": verdict}


def mean_networks(
    snapshots: torch.Tensor, table: torch.Tensor, products: AdapterProducts | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The mean of the snapshots of each task.

    Args:
        snapshots (`torch.Tensor`): Shape `(N, D)`.
        table (`torch.Tensor`): Their conditions without unknown fields, shape `(N, width)`.
        products (`AdapterProducts`, *optional*): Means are of these, where they are given.

    Returns:
        `tuple`: The T different conditions, which of them each snapshot has, shape `(N,)`, and the means, `(T, D)`, or
        vectors with products.
    """
    seen, inverse = table.unique(dim=0, return_inverse=True)
    vectors = expanded(snapshots, products)
    sums = torch.zeros(len(seen), vectors.shape[1]).index_add_(0, inverse, vectors)
    return seen, inverse, sums / torch.bincount(inverse).unsqueeze(1)


class ConditionalAudit:
    """
    Collects the scores of methods on sets of unseen tasks.

    Args:
        family (`Family`): Of the tasks.
        networks (`NetworkRunner`): Runs the networks.
        test_sets (`Mapping[str, torch.Tensor]`): Tables of unseen conditions; `test` is what the verdict is about.
        num_examples (`int`, *optional*, defaults to 2000): Of the test split, for each task.
        cache (`str` or `os.PathLike`, *optional*): A file that keeps the scores of each method that is done, so that an
            audit that was stopped goes on there; the one process with a cache writes it.
    """

    def __init__(
        self,
        family: Family,
        networks: NetworkRunner,
        test_sets: Mapping[str, torch.Tensor],
        num_examples: int = 2000,
        cache: str | os.PathLike | None = None,
    ):
        self.family, self.networks, self.num_examples = family, networks, num_examples
        self.test_sets = dict(test_sets)
        self.rows: dict[str, dict[str, Any]] = {}
        self.cache = None if cache is None else Path(cache)
        self._kept = (
            json.loads(self.cache.read_text(encoding="utf-8"))
            if self.cache is not None and self.cache.is_file()
            else {}
        )

    def score(self, table: torch.Tensor, parameters: torch.Tensor, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
        """Accuracy and loss of networks `(T, D)`, or of n for each task, `(T, n, D)`, averaged over them."""
        samples = parameters.unsqueeze(1) if parameters.ndim == 2 else parameters

        def score(sample: torch.Tensor) -> torch.Tensor:
            def respond(rows: torch.Tensor, batch: Any) -> torch.Tensor:
                return self.networks.stack(self.family.predict, sample[rows], batch)

            return torch.stack(score_tasks(self.family, respond, table, split, self.num_examples))

        accuracy, loss = torch.stack([score(sample) for sample in samples.unbind(1)]).mean(0)
        return accuracy, loss

    def score_module(
        self, table: torch.Tensor, module: torch.nn.Module, split: Split, num_examples: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Accuracy and loss of the answers `module(table, batch, generator)`, always with the same noise."""
        noise = torch.Generator().manual_seed(0)
        return score_tasks(
            self.family, lambda rows, batch: module(table[rows], batch, noise), table, split, num_examples
        )

    def add(
        self,
        name: str,
        kind: str,
        parameters_of: Callable[[str, torch.Tensor], torch.Tensor],
        cost: Cost,
        note: str = "",
    ) -> None:
        """
        Adds a method.

        Args:
            kind (`str`): One of `KINDS`.
            parameters_of (`Callable`): `parameters_of(name of the set, table)` gives `(T, D)` or `(T, n, D)`.
        """
        self._add(
            name,
            kind,
            lambda: (lambda set_name, t: self.score(t, parameters_of(set_name, t), "test"), cost),
            note,
        )

    def add_module(self, name: str, kind: str, module: torch.nn.Module, cost: Cost, note: str = "") -> None:
        """Adds a method that answers by itself: `module(table, batch, generator)` gives logits."""

        def score(_, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.score_module(table, module, "test", self.num_examples)

        self._add(name, kind, lambda: (score, cost), note)

    def add_trained(self, name: str, train: Callable[[], tuple[torch.nn.Module, Cost]]) -> None:
        """Adds networks that are trained in the generator's regime: `train` gives a module as above, and its cost."""

        def score() -> tuple[Callable, Cost]:
            module, cost = train()
            return lambda _, table: self.score_module(table, module, "test", self.num_examples), cost

        self._add(name, "trained", score, "")

    def _add(self, name: str, kind: str, prepare: Callable[[], tuple[Callable, Cost]], note: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if name in self._kept:
            self.rows[name] = self._kept[name]
            return
        score, cost = prepare()
        sets: dict[str, dict[str, list[float]]] = {}
        for set_name, table in self.test_sets.items():
            accuracy, loss = score(set_name, table)
            sets[set_name] = {"accuracy": accuracy.tolist(), "loss": loss.tolist()}
        self.rows[name] = {"kind": kind, "once": cost.once, "each": cost.each, "note": note, "sets": sets}
        if self.cache is not None and PartialState().is_main_process:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.cache, self.rows)

    def tuned_ridge(
        self, seen: torch.Tensor, means: torch.Tensor, validation: torch.Tensor, products: AdapterProducts | None = None
    ) -> KernelRidge:
        """
        Kernel ridge regression whose settings are chosen by the loss on validation tasks.

        Args:
            seen (`torch.Tensor`), means (`torch.Tensor`): Conditions and their networks, of [`mean_networks`].
            validation (`torch.Tensor`): Conditions of validation tasks.
            products (`AdapterProducts`, *optional*): Where the networks are vectors with products.
        """

        def loss(vectors_of: Callable[[torch.Tensor], torch.Tensor]) -> float:
            return self.score(validation, contracted(vectors_of(validation), products), "validation")[1].mean().item()

        return KernelRidge.tuned(self.family.fields, seen, means, loss)

    def add_closed_form(
        self,
        snapshots: torch.Tensor,
        table: torch.Tensor,
        validation: torch.Tensor,
        cost: Cost,
        *,
        num_samples: int = 4,
        seed: int = 0,
        products: AdapterProducts | None = None,
    ) -> KernelRidge:
        """
        Adds the answers that need nothing but networks with conditions: the mean of all, the nearest seen task, the
        mean of the nearest ones, and kernel ridge regression alone and with its residual covariance. What they have to
        choose, they choose by the loss on validation tasks.

        Args:
            snapshots (`torch.Tensor`): Shape `(N, D)`.
            table (`torch.Tensor`): Their conditions without unknown fields, shape `(N, width)`; equal rows are
                snapshots of one task, and averaged.
            validation (`torch.Tensor`): Conditions of validation tasks.
            products (`AdapterProducts`, *optional*): Means and regressions are of these, where they are given.

        Returns:
            `KernelRidge`: From conditions to parameters, or vectors with products.
        """
        fields = self.family.fields
        seen, inverse, means = mean_networks(snapshots, table, products)
        last = torch.zeros(len(seen), dtype=torch.long).scatter_reduce_(
            0, inverse, torch.arange(len(table)), "amax", include_self=False
        )
        features = fields.features(seen)

        def loss(parameters_of: Callable[[torch.Tensor], torch.Tensor]) -> float:
            return self.score(validation, parameters_of(validation), "validation")[1].mean().item()

        def neighbors(k: int) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda rows: contracted(nearest_mean(fields.features(rows), features, means, k), products)

        best = min((k for k in NEIGHBORS if k <= len(seen)), default=1, key=lambda k: loss(neighbors(k)))
        ridge = self.tuned_ridge(seen, means, validation, products)
        generator = torch.Generator().manual_seed(seed)
        mean = contracted(means.mean(0), products)
        self.add("mean of all networks", "closed form", lambda _, t: mean.expand(len(t), -1), cost)
        self.add(
            "nearest seen task",
            "closed form",
            lambda _, t: snapshots[last[torch.cdist(fields.features(t), features).argmin(1)]],
            cost,
        )
        self.add("mean of nearest seen tasks", "closed form", lambda _, t: neighbors(best)(t), cost, f"{best} tasks")
        note = f"ridge {ridge.ridge:g}, scales {', '.join(f'{scale:g}' for scale in ridge.scales)}"
        self.add("kernel ridge", "closed form", lambda _, t: contracted(ridge(t), products), cost, note)
        self.add(
            "kernel ridge + residuals",
            "closed form",
            lambda _, t: contracted(ridge.sample(t, num_samples, generator), products),
            cost,
            note,
        )
        return ridge

    def report(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """
        Everything as JSON has it: the conditions, every score of every task, comparisons with the generator on each
        set, the verdict and the table that a reader wants first, as reports on one task have them.
        """
        report = {
            "version": REPORT_VERSION,
            "kind": "conditional",
            "metric": {"name": "accuracy", "unit": "%", "higher_is_better": True},
            "num_parameters": self.networks.layout.num_parameters,
            "settings": dict(settings),
            "fields": self.family.fields.to_dict(),
            "conditions": {name: self.family.fields.conditions(table) for name, table in self.test_sets.items()},
            "rows": self.rows,
        }
        return compared(report)


def compared(report: dict[str, Any]) -> dict[str, Any]:
    """The report with comparisons, verdict and summary."""
    rows = report["rows"]
    comparisons = {
        set_name: {
            name: paired_bootstrap(rows[GENERATOR]["sets"][set_name]["accuracy"], row["sets"][set_name]["accuracy"])
            for name, row in rows.items()
            if name != GENERATOR
        }
        for set_name in report["conditions"]
    }
    report = report | {"comparisons": comparisons}
    return report | {"verdict": verdict(report), "warnings": [], "summary": summarise(report)}


def mean_accuracy(report: Mapping[str, Any], name: str, set_name: str = "test") -> float:
    """Over the tasks of a set, in percent."""
    return float(np.mean(report["rows"][name]["sets"][set_name]["accuracy"]))


def verdict(report: Mapping[str, Any]) -> str:
    """What the numbers say, in a paragraph: against the best method of each kind on the test tasks."""
    accuracy = mean_accuracy(report, GENERATOR)
    sentences = [f"On {len(report['conditions']['test'])} unseen tasks the generator's networks reach {accuracy:.1f}%."]
    for kind, description in KINDS.items():
        names = [name for name, row in report["rows"].items() if row["kind"] == kind and name != GENERATOR]
        if not names or kind == "generator":
            continue
        best = max(names, key=lambda name: mean_accuracy(report, name))
        row = report["comparisons"]["test"][best]
        amount = f"{row['difference']:+.1f} points, 95% interval {row['low']:+.1f} to {row['high']:+.1f}"
        best_text = f"{best}, {mean_accuracy(report, best):.1f}%"
        what = f"the best of {len(names)}, {best_text}" if len(names) > 1 else best_text
        word = {"undecided": "Undecided against"}.get(row["verdict"], f"{row['verdict'].capitalize()} than")
        sentences.append(f"{word} {description} ({what}): {amount}.")
        if kind == "closed form" and row["verdict"] != "better":
            sentences.append("That is at least as good here, and needs no generator.")
    return " ".join(sentences)


def summarise(report: Mapping[str, Any]) -> dict[str, Any]:
    """
    One row a method, the best first.

    Returns:
        `dict`: `header` and `rows`, texts, and `about`, which explains the columns.
    """
    sets = list(report["conditions"])
    header = ["method", *(f"{name} ({len(report['conditions'][name])} tasks)" for name in sets)]
    header += ["generator minus this, test", "passes once", "passes a task"]
    rows = []
    for name, row in sorted(report["rows"].items(), key=lambda item: -mean_accuracy(report, item[0])):
        cells = [name, *(f"{mean_accuracy(report, name, set_name):.1f}" for set_name in sets)]
        comparison = report["comparisons"]["test"].get(name)
        cells.append(
            "–"
            if comparison is None
            else "{difference:+.1f} ({low:+.1f} to {high:+.1f}), {verdict}".format(**comparison)
        )
        rows.append([*cells, passes(row["once"]), passes(row["each"])])
    about = (
        f"{report['num_parameters']:,} parameters a network. Accuracy in percent, mean over tasks. Differences are "
        "paired over tasks, with a 95% bootstrap interval. Passes are forward and backward, of one network over one "
        "image: before the first unseen task, and for each."
    )
    return {"header": header, "rows": rows, "about": about}


def passes(number: int) -> str:
    """A number of passes over images, short."""
    return f"{number / 1e6:.2f}M" if number >= 1e5 else f"{number / 1e3:.1f}k" if number >= 1e3 else str(number)


def plot_field(
    report: Mapping[str, Any], field: str, set_name: str, names: Sequence[str], path: str | os.PathLike
) -> None:
    """Writes a figure of the accuracy of some methods against the values that a field has in a set of tasks."""
    values = [condition[field] for condition in report["conditions"][set_name]]
    order = np.argsort(values)
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.add_subplot()
    styles = zip((GENERATED, SNAPSHOTS, *OTHERS), MARKERS, strict=False)
    for name, (colour, marker) in zip(names, styles, strict=False):
        accuracy = np.asarray(report["rows"][name]["sets"][set_name]["accuracy"])
        axes.plot(np.asarray(values)[order], accuracy[order], color=colour, marker=marker, markersize=4, label=name)
    axes.set_xlabel(field)
    axes.set_ylabel("accuracy on the task, %")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)  # below, where no curve is
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=DPI)
