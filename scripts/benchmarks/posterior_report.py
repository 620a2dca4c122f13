"""What a benchmark of posteriors found, as tables and sentences that follow from its numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pdiff_hf.evaluation.compare import paired_difference
from pdiff_hf.evaluation.render import table
from pdiff_hf.evaluation.summary import short as passes

GENERATOR = "generator"
ZOO_GENERATOR = "zoo generator and training networks"
TRAINING_NETWORKS = "training networks"
# What the generator is compared with, in this order.
KINDS = {
    "closed form": "every closed-form opponent",
    "fine-tuned": "every fine-tuned network",
    "generic": "the generic network",
    "hypernetwork": "the hypernetwork",
    "deterministic": "the deterministic network",
    "oracle": "networks trained on the task",
}
LOWER_IS_BETTER = ("nll", "joint_nll", "scaled_nll")
NAMES = {"accuracy": "accuracy", "nll": "NLL", "joint_nll": "joint NLL", "scaled_nll": "NLL after scaling"}

# The scores of all tasks, by method and by name: {"generator": {"accuracy": [...], "nll": [...]}}.
Section = Mapping[str, Mapping[str, Any]]


def compare(section: Section, metric: str, first: str, second: str) -> dict[str, Any]:
    """How much better one method is than another in a metric, paired over tasks; see [`paired_difference`]."""
    scores = section[first][metric], section[second][metric]
    found = paired_difference(*(scores if metric not in LOWER_IS_BETTER else scores[::-1]))
    low, high = found.interval
    return {"difference": found.difference, "low": low, "high": high, "verdict": found.verdict}


def best_of(section: Section, metric: str, names: Sequence[str]) -> str:
    """The method with the best mean."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return max(names, key=lambda name: sign * np.mean(section[name][metric]))


def pool_reports(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One report of several seeds, as if their tasks had been those of one run; of the methods that all have."""
    first = reports[0]
    pooled = dict(first) | {"settings": {"runs": [report["settings"] for report in reports]}}
    for part in ("examples", "fields"):
        pooled[part] = {
            key: {
                name: {
                    metric: sum((list(report[part][key][name][metric]) for report in reports), [])
                    if isinstance(values, list)
                    else values
                    for metric, values in row.items()
                }
                for name, row in section.items()
                if all(name in report[part][key] for report in reports)
            }
            for key, section in first[part].items()
        }
    return pooled


def verdict(report: Mapping[str, Any], part: str, metrics: Sequence[str], subject: str = GENERATOR) -> list[str]:
    """A sentence for each section of a part of a report: against the best of each kind in each metric."""
    sentences = []
    for key, section in report[part].items():
        if subject not in section:
            continue
        count = len(section[subject][metrics[0]])
        own = " / ".join(f"{np.mean(section[subject][metric]):.2f}" for metric in metrics)
        text = f"{key}: {own} ({' / '.join(NAMES[metric] for metric in metrics)}, {count} tasks)."
        for kind, description in KINDS.items():
            names = [name for name in section if report["rows"][name]["kind"] == kind]
            if not names:
                continue
            parts = []
            for metric in metrics:
                best = best_of(section, metric, names)
                row = compare(section, metric, subject, best)
                parts.append(
                    f"{row['verdict']} in {NAMES[metric]} ({best} {np.mean(section[best][metric]):.2f}; "
                    f"{row['difference']:+.2f}, 95% {row['low']:+.2f} to {row['high']:+.2f})"
                )
            text += f" Against {description}: {', '.join(parts)}."
        sentences.append(text)
    return sentences


def zoo_verdict(report: Mapping[str, Any]) -> list[str]:
    """
    A sentence for each number of examples: a generator of a zoo without conditions against the zoo itself, as they are
    and refined.
    """
    sentences = []
    for key, section in report["examples"].items():
        parts = []
        for suffix in ("", ", refined"):
            if ZOO_GENERATOR + suffix not in section:
                continue
            for metric in ("accuracy", "nll"):
                row = compare(section, metric, ZOO_GENERATOR + suffix, TRAINING_NETWORKS + suffix)
                what = f"{row['verdict']} in {NAMES[metric]}{' when both are refined' if suffix else ''}"
                parts.append(f"{what} ({row['difference']:+.2f}, 95% {row['low']:+.2f} to {row['high']:+.2f})")
        sentences.append(f"{key}: {', '.join(parts)}.")
    return sentences


def render_examples(report: Mapping[str, Any]) -> str:
    """Accuracy and NLL of every method with every number of labelled examples, with costs."""
    sections = report["examples"]
    last = list(sections.values())[-1]
    names = dict.fromkeys(name for section in sections.values() for name in section)
    rows = []
    for name in sorted(names, key=lambda name: float(np.mean(last[name]["nll"])) if name in last else np.inf):
        cells = [
            f"{np.mean(section[name]['accuracy']):.1f} / {np.mean(section[name]['nll']):.3f}"
            if name in section
            else "–"
            for section in sections.values()
        ]
        each = last[name]["passes"] if name in last else 0
        rows.append([name, *cells, passes(report["rows"][name]["once"]), passes(each)])
    return table(["method", *sections, "passes once", "passes a task, most examples"], rows)


def render_fields(report: Mapping[str, Any]) -> str:
    """Joint NLL of every method where fields are unknown, and accuracy."""
    sections = report["fields"]
    first = next(iter(sections.values()))
    rows = []
    for name in sorted(first, key=lambda name: float(np.mean(first[name]["joint_nll"]))):
        cells = [
            f"{np.mean(section[name]['joint_nll']):.1f} ({np.mean(section[name]['accuracy']):.1f})"
            for section in sections.values()
        ]
        rows.append([name, *cells, passes(report["rows"][name]["once"])])
    if report.get("ideal"):
        rows.append(["what the unknown bits cost at least", *(f"{report['ideal'][key]:.1f}" for key in sections), "–"])
    return table(["method", *sections, "passes once"], rows)


def render_validity(report: Mapping[str, Any]) -> str:
    """How good the networks of each prior are for the task that they are best for."""
    rows = [[name, f"{r['mean']:.1f} ± {r['std']:.1f}", str(r["n"])] for name, r in report["validity"].items()]
    return table(["prior", "accuracy on the nearest task", "networks"], rows)


def render_markdown(report: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    parts = [
        "### Labelled examples",
        "",
        render_examples(report),
        "",
        *(f"- {sentence}" for sentence in verdict(report, "examples", ("accuracy", "nll"))),
        "",
        "A zoo without conditions, against its own networks:",
        "",
        *(f"- {sentence}" for sentence in zoo_verdict(report)),
        "",
        "### Unknown fields: joint NLL of 20 queries (accuracy)",
        "",
        render_fields(report),
        "",
        *(f"- {sentence}" for sentence in verdict(report, "fields", ("joint_nll", "accuracy"))),
        "",
        "### Validity, first seed",
        "",
        render_validity(report),
        "",
        "Means over tasks; differences are paired over tasks, positive where the generator is better, with a 95% "
        "bootstrap interval. Passes are of one example through one network: forward counts 1, backward 2.",
    ]
    return "\n".join(parts) + "\n"
