"""A report as Markdown: the summary that a terminal, a page and a model card show, and the whole of `report.md`."""

import math
from collections.abc import Iterable, Sequence

from ..utils.reports import FIGURES
from .metrics import METRICS, GroupMetric

MAX_SUMMARY_ROWS = 8
CURVE = "generated at other temperatures"  # a family of groups that is no baseline


def metric_title(metric: dict) -> str:
    """The metric with its unit, such as `accuracy (%)`."""
    return f"{metric['name']} ({metric['unit']})" if metric["unit"] else metric["name"]


def summarise(report: dict) -> dict:
    """
    The few rows that a reader wants first: the groups that are no baselines, and then the setting of every family that
    is best on validation data, the best families first.

    Returns:
        `dict`: `header` and `rows`, texts, and `about`, which explains the columns.
    """
    metric, splits = report["metric"], report["splits"]
    similar = report["frontier"]["rows"][0]["max_iou"] is not None
    verdicts = {row["name"]: row["verdict"] for row in report["frontier"]["rows"]}
    verdicts |= {"snapshots": report["difference"]["verdict"]}
    key, title = ("max_iou", "max IoU") if similar else ("distance_to_mean", "to mean")
    rows = [row for row in report["groups"] if row["family"] is None] + best_of_families(report)
    shown = rows[:MAX_SUMMARY_ROWS]
    sampled, count = report["num_generated"], next(row["n"] for row in shown if row["name"] == "generated")
    sample = f" A sample of {count:,} of the {sampled:,} generated networks was scored." if count < sampled else ""
    more = f" {len(rows) - len(shown)} more families are in the tables of the report." if len(rows) > len(shown) else ""
    columns = "max IoU is the similarity of wrong predictions to the nearest snapshot's"
    if not similar:
        columns = "to mean is the distance to the snapshots' mean in units of their own"
    return {
        "header": ["group", "n", metric_title(metric), "best", title, "generated are"],
        "rows": [
            [
                row["name"],
                count_of(row),
                spread_of(row),
                number(row["score_best"], ".2f"),
                number(row[key], ".3f" if similar else ".2f"),
                verdicts.get(row["name"]) or "–",
            ]
            for row in shown
        ],
        "about": f"{report['num_parameters']:,} generated parameters. {metric['name'].capitalize()} is the mean ± "
        f"standard deviation over n networks on {splits['test']:,} test examples"
        f"{'' if metric['higher_is_better'] else ', lower is better'}; best is chosen on {splits['validation']:,} "
        f"validation examples; {columns}; the last column compares the generated networks with the row. Of each family "
        f"of baselines the setting that is best on validation.{sample}{more}",
    }


def best_of_families(report: dict) -> list[dict]:
    """Of every family of baselines the group with the best mean on validation data, the best family first."""
    sign = 1 if report["metric"]["higher_is_better"] else -1

    def rank(row: dict) -> float:
        mean = row["validation_score_mean"]
        return float("-inf") if mean is None else sign * mean

    best: dict[str, dict] = {}
    for row in report["groups"]:
        if row["family"] not in (None, CURVE) and (row["family"] not in best or rank(row) > rank(best[row["family"]])):
            best[row["family"]] = row
    return sorted(best.values(), key=rank, reverse=True)


def format_summary(report: dict) -> str:
    """The verdict, the small table and the warnings, as Markdown that can also be read in a terminal."""
    summary = report["summary"]
    parts = [f"**Verdict:** {report['verdict']}", table(summary["header"], summary["rows"])]
    parts += [f"> **Warning:** {warning}" for warning in report["warnings"]]
    return "\n\n".join(parts) + "\n"


def format_report(report: dict, figures: Iterable[str] = ()) -> str:
    """The whole report as Markdown: the summary with the main figure, then folded up everything that it rests on."""
    shown = [figure(name) for name in FIGURES if name in set(figures)]
    sections = ["# Report", format_summary(report).rstrip(), *shown[:1]]
    sections.append(report["summary"]["about"])
    sections += [folded(title, about, text) for title, about, text in _tables(report)]
    if shown[1:]:
        sections.append(folded("Figures", *shown[1:]))
    return "\n\n".join(sections) + "\n"


def figure(name: str) -> str:
    return f"![{FIGURES[name]}]({name})\n\n*{FIGURES[name]}.*"


def folded(title: str, *parts: str) -> str:
    return "\n\n".join([f"<details>\n<summary>{title}</summary>", *parts, "</details>"])


def _tables(report: dict) -> Iterable[tuple[str, str, str]]:
    """Title, explanation and table of everything that the summary leaves out."""
    groups, explained = report["groups"], report["reconstruction"]
    yield (
        "All groups",
        "Best on test is selected on the examples that it is reported on, as the paper does, and so flatters every "
        "group, the larger ones more. IoU is the similarity of wrong predictions; NLL is in nats; NLL and ECE are "
        "means over networks, with a dash where they are not finite. Distances are L2, in units of the snapshots' own: "
        "to the nearest snapshot (median) and to their mean (root mean square). `mean` is one network, the mean of all "
        "snapshots.",
        _group_table("scores", groups, report["metric"]),
    )
    if explained is not None:
        yield (
            "Reconstruction",
            "Share of the snapshots' variance around their mean that the autoencoder explains, and that as many "
            f"principal components do. Reconstructions score {number(explained['score_difference'], '+.2f')} against "
            "the snapshots that they are of.",
            table(
                ["", "seen snapshots", "held-out snapshots"],
                [
                    [title, *(number(explained[f"{kind}r2_{of}"], ".1%") for of in ("train", "heldout"))]
                    for title, kind in (("autoencoder", ""), ("principal components", "linear_"))
                ],
            ),
        )
    if len(report["frontier"]["rows"]) > 1:
        yield (
            "Against every baseline",
            f"{report['frontier']['sentence']} In brackets are 95% intervals. `better` is the share of resamples in "
            "which the generated networks are nowhere worse than the row, in score and similarity, and somewhere "
            "better; `worse` the reverse; a verdict needs 95%.",
            _frontier_table(report),
        )
    if "tuning" in report:
        yield "The same feedback for trivial generators", _about_tuning(report), _tuned_table(report)
    if "temperatures" in report:
        yield (
            "Temperatures",
            "The generator with its starting noise multiplied by other numbers, and how many settings of trivial "
            "generators it is better than, worse than, and undecided against.",
            _temperature_table(report),
        )
    yield (
        "Memorisation",
        f"{report['audit']['verdict']} A group copies if more of its networks than chance allows are too near to a "
        "snapshot, or one is nearly identical. Alike is the share whose wrong predictions are more like a snapshot's "
        "than 95% of the snapshots' are like another's.",
        _audit_table(report["audit"]["rows"]),
    )
    yield (
        "Coverage of the snapshots",
        "By nearest neighbours in the space of parameters (k = 5): precision is the share of the group that lies among "
        "the snapshots, recall the share of the snapshots that lies among the group, density and coverage the same "
        "with multiplicity and with the snapshots' balls only. Coverage grows with n; recall flatters a group of "
        "few or far-apart networks, whose balls are large.",
        _group_table("coverage", groups[1:], report["metric"]),
    )
    if "ensembles" in groups[0]:
        yield (
            "Prediction ensembles",
            "Accuracy (NLL, ECE) of the averaged probabilities of n networks of a group, mean over up to 10 ensembles.",
            _ensemble_table(groups),
        )


def _about_tuning(report: dict) -> str:
    tuning = report["tuning"]
    objective = tuning["objective"]
    return (
        f"The generator was tuned in {tuning['num_steps']} steps, each on {tuning['num_networks']} networks and "
        f"{tuning['num_examples']} training examples, on the likelihood of ensembles of {objective['ensemble_size']}, "
        f"with {objective['diversity']:g} times the overlap of their errors and {objective['penalty']:g} times the "
        f"distance to the untuned generator; its temperature is {tuning['temperature']:g}. Passes are forward passes "
        "of an image through a network, of which a backward pass counts as two. Tuned mean: the snapshots' mean, "
        "trained with as many passes, and the snapshots' Gaussian around it. Tuned Gaussian: one over the generator's "
        "own latents, tuned on the same objective. SWAG: its samples, each trained for some steps, or the best of some "
        "on validation data. Validation chooses learning rates, whose trial is counted for the tuned ones alone. "
        "Break-even: after so many networks the generator has taken fewer passes."
    )


def _tuned_table(report: dict) -> str:
    verdicts = {row["name"]: row["verdict"] for row in report["frontier"]["rows"]}
    paid = {entry["name"]: entry["num_models"] for entry in report["tuning"]["break_even"]}
    header = ["group", metric_title(report["metric"]), "max IoU", "generated are", "passes once", "passes each"]
    return table(
        [*header, "break-even"],
        [
            [
                row["name"],
                spread_of(row),
                number(row["max_iou"]),
                verdicts.get(row["name"]) or "–",
                f"{row['feedback']['once']:,}",
                f"{row['feedback']['each']:,}",
                f"{paid[row['name']]:,}" if row["name"] in paid else "–",
            ]
            for row in report["groups"]
            if "feedback" in row
        ],
    )


def _temperature_table(report: dict) -> str:
    header = ["temperature", "n", metric_title(report["metric"]), "max IoU", "plain: better / worse / undecided"]
    tuned = "tuning" in report
    rows = [
        [
            number(row["value"], "g"),
            str(row["num_models"]),
            number(row["score"], ".2f"),
            number(row["max_iou"]),
            *(" / ".join(map(str, row[kind].values())) for kind in (("plain", "tuned") if tuned else ("plain",))),
        ]
        for row in report["temperatures"]
    ]
    return table([*header, "tuned: better / worse / undecided"] if tuned else header, rows)


def _group_table(kind: str, rows: Sequence[dict], metric: dict) -> str:
    metrics = [m for m in METRICS if m.table == kind and m.key in rows[0] and m.key not in ("score_mean", "score_std")]
    header, cells = ["group", "n"], [[row["name"], count_of(row)] for row in rows]
    if kind == "scores":
        header.append(metric_title(metric))
        cells = [[*line, spread_of(row)] for line, row in zip(cells, rows, strict=True)]
    header += [m.title for m in metrics]
    return table(
        header,
        [[*line, *(_cell(m, row) for m in metrics)] for line, row in zip(cells, rows, strict=True)],
    )


def _cell(metric: GroupMetric, row: dict) -> str:
    return number(row[metric.key], metric.format)


def _frontier_table(report: dict) -> str:
    header = ["group", "n", metric_title(report["metric"]), "95%", "max IoU", "95% of it", "better", "worse", "verdict"]
    return table(
        header,
        [
            [
                row["name"],
                str(row["num_models"]),
                number(row["score"], ".2f"),
                _interval(row["score_interval"], ".2f"),
                number(row["max_iou"], ".3f"),
                _interval(row["max_iou_interval"], ".3f"),
                number(row["better"], ".0%"),
                number(row["worse"], ".0%"),
                row["verdict"] or "–",
            ]
            for row in report["frontier"]["rows"]
        ],
    )


def _audit_table(rows: Sequence[dict]) -> str:
    header = ["group", "n", "to nearest", "to mean", "too near (allowed)", "near identical", "alike", "copies"]
    return table(
        header,
        [
            [
                row["name"],
                str(len(row["distance"])),
                number(row["distance_relative"], ".2f"),
                number(row["to_mean_relative"], ".2f"),
                f"{row['num_too_near']} ({row['num_allowed']})",
                str(row["num_near_identical"]),
                number(row["fraction_alike"], ".0%"),
                "–" if row["name"] == "snapshots" else "yes" if row["copies"] else "no",
            ]
            for row in rows
        ],
    )


def _ensemble_table(rows: Sequence[dict]) -> str:
    sizes = sorted({entry["size"] for row in rows for entry in row["ensembles"][:-1]} | {1})
    lines = []
    for row in rows:
        cells = {
            entry["size"]: f"{number(entry['accuracy'], '.2f')} ({number(entry['nll'])}, {number(entry['ece'])})"
            for entry in row["ensembles"]
        }
        lines.append([row["name"], str(row["n"]), *(cells.get(size, "–") for size in sizes), cells[row["n"]]])
    return table(["group", "n", *(str(size) for size in sizes), "all n"], lines)


def count_of(row: dict) -> str:
    """The size of a group, and how many of its networks have no score or no finite predictions."""
    return f"{row['n']:,}" + (f" ({row['num_undefined']} not finite)" if row["num_undefined"] else "")


def spread_of(row: dict) -> str:
    """The mean ± the standard deviation of a group."""
    mean, std = number(row["score_mean"], ".2f"), number(row["score_std"], ".2f")
    return mean if row["score_mean"] is None or row["n"] == 1 else f"{mean} ± {std}"


def number(value: float | None, format: str = ".3f") -> str:
    """A number, or a dash where there is none; a huge one, of a network that has diverged, in few digits."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{format}}" if abs(value) < 1e6 else f"{value:.1e}"


def _interval(bounds: Sequence[float | None] | None, format: str) -> str:
    return "–" if bounds is None else f"[{number(bounds[0], format)}, {number(bounds[1], format)}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is aligned left, the others right."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]  # a rule needs three characters
    padded = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    padded.insert(1, ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
