"""A report for people: in a terminal, as Markdown and as HTML."""

import base64
import html
import math
import textwrap
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..utils.reports import FIGURES, TEST
from .report_data import GroupRow, Kind, ReportData
from .summary import (
    ABOUT_SETS,
    COVERAGE,
    MEASURES,
    SET_MEASURES,
    Columns,
    Table,
    columns_of,
    count_of,
    difference_of,
    metric_title,
    spread_of,
    table_of,
    verdict_of,
)
from .verdict import number

COLUMNS = 80
SIMILARITY = "similarity to the nearest snapshot, lower is newer"
KIND_WORDS = {
    Kind.GENERATED: "generated networks",
    Kind.SNAPSHOTS: "snapshots",
    Kind.BASELINE: "free: needs no feedback from tasks",
    Kind.OPPONENT: "trained on feedback, as the generator is",
    Kind.ORACLE: "trained on the unseen task itself",
    Kind.VARIANT: "the generator otherwise",
    Kind.CONTROL: "a control",
}


def to_terminal(report: ReportData) -> str:
    """Verdict, small table and warnings, in lines of 80 columns at most."""
    header, rows = report.summary["header"], report.summary["rows"]
    if report.fields:
        test = next(i for i, title in enumerate(header) if title.startswith(f"{TEST} ("))
        groups = {row.name: row for row in report.groups}
        header = ["networks", header[test], ""]
        rows = [[row[0], row[test], difference_of(groups[row[0]], with_interval=False)] for row in rows]
    lines = [[*header[:-1], "generated vs. this"], *rows]
    room = COLUMNS - sum(2 + max(map(len, column)) for column in list(zip(*lines, strict=True))[1:])
    cut = [[name if len(name) <= room else f"{name[: room - 1]}…", *cells] for name, *cells in lines]
    shown = ["  ".join(cells).rstrip() for cells in _padded(cut)]
    shown.insert(1, "-" * max(map(len, shown)))
    parts = ["\n".join(textwrap.fill(line, COLUMNS) for line in report.verdict), "\n".join(shown)]
    parts += [textwrap.fill(f"Warning: {warning}", COLUMNS, break_on_hyphens=False) for warning in report.warnings]
    return "\n\n".join(parts) + "\n"


def to_markdown(report: ReportData, figures: Sequence[str] = ()) -> str:
    """The whole report: the summary with the main figure, then folded up everything that it rests on."""
    shown = [f"![{FIGURES[name]}]({name})\n\n*{FIGURES[name]}.*" for name in FIGURES if name in set(figures)]
    parts = ["# Report", summary_markdown(report).rstrip(), *shown[:1], report.summary["about"]]
    for title, about, lines in sections(report):
        parts.append(_folded(title, about, table(*lines)))
    if shown[1:]:
        parts.append(_folded("Figures", *shown[1:]))
    return "\n\n".join(parts) + "\n"


def summary_markdown(report: ReportData) -> str:
    """Verdict, small table and warnings."""
    parts = ["\n".join(f"- {line}" for line in report.verdict), table(report.summary["header"], report.summary["rows"])]
    parts += [f"> **Warning:** {warning}" for warning in report.warnings]
    return "\n\n".join(parts) + "\n"


def _folded(title: str, *parts: str) -> str:
    return "\n\n".join([f"<details>\n<summary>{title}</summary>", *parts, "</details>"])


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 0.9em; display: block; overflow-x: auto; }
th, td { padding: 0.25em 0.7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { white-space: normal; } th:first-child, td:first-child { text-align: left; } tr.generated { font-weight: 600; }
.verdict { font-size: 1.15em; } .warning { border-left: 4px solid #d55e00; padding-left: 0.8em; }
figure { margin: 1em 0; } figure img { max-width: 100%; } figcaption, .about { color: #555; font-size: 0.9em; }
details { margin: 0.8em 0; } summary { cursor: pointer; font-weight: 600; }
"""


def to_html(report: ReportData, folder: Path) -> str:
    """One page with everything in it, figures of `folder` too: it needs no other file and no network."""
    figures = [_html_figure(folder / name, FIGURES[name]) for name in FIGURES if (folder / name).is_file()]
    name = report.generated.name
    body = ["<h1>Report</h1>", f'<div class="verdict">{"<br>".join(map(html.escape, report.verdict))}</div>']
    body += [f'<p class="warning">{html.escape(warning)}</p>' for warning in report.warnings]
    body += [_html_table(report.summary["header"], report.summary["rows"], name), *figures[:1]]
    body.append(f'<p class="about">{html.escape(report.summary["about"])}</p>')
    for title, about, lines in sections(report):
        body.append(
            f"<details><summary>{html.escape(title)}</summary><p class='about'>{html.escape(about)}</p>"
            f"{_html_table(*lines, name)}</details>"
        )
    body += figures[1:]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Report</title>'
    head += f"<style>{STYLE}</style>"
    text = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{text}\n</body></html>\n'


def _html_figure(path: Path, caption: str) -> str:
    data, caption = base64.b64encode(path.read_bytes()).decode(), html.escape(caption)
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]], generated: str) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        mark = ' class="generated"' if cells[0] == generated else ""
        return f"<tr{mark}>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


# ------------------------------------------------------------------------------------------------------------- sections


def sections(report: ReportData) -> Iterable[tuple[str, str, Table]]:
    """Title, explanation and table of everything that the summary leaves out."""
    groups, title = report.groups, metric_title(report.metric)
    name: Columns = {"group": lambda row: row.name}
    if report.is_of_sets:
        accuracy = report.settings.get("classifier_accuracy")
        of = f" The classifier is right about {accuracy:.1f}% of held-out data." if accuracy is not None else ""
        columns: Columns = {
            "data of": name["group"],
            "n": count_of,
            "Fréchet (%)": lambda row: number(row.mean(), ".2f"),
        }
        columns["95%"] = lambda row: _interval(row.measures.get("score_interval"), ".2f")
        columns |= columns_of(SET_MEASURES, groups) | {"generated vs. this": verdict_of}
        yield (
            "All sets",
            f"{ABOUT_SETS} 1-NN is how often the nearest neighbour is of the same set (0.5 is ideal); precision, "
            "recall, density and coverage are by 5 nearest neighbours among the features of held-out data; class is "
            "how often the classifier sees the class that was asked for; dB is the signal-to-noise ratio against the "
            f"data.{of} The Fréchet distance falls with the size of a set.",
            table_of(groups, columns),
        )
        return
    r = report.reconstruction or {}
    words = {"agreement": "equal predictions (%)", "loss": "loss", "snapshots": "loss of snapshots"}
    if computed := {word: number(r[key]) for key, word in words.items() if key in r}:
        yield (
            "Outputs of reconstructions",
            "What networks compute that are decoded from the latents of snapshots, held-out ones if there are any, on "
            "validation data.",
            (list(computed), [list(computed.values())]),
        )
    if report.fields:
        yield (
            "What the rows are",
            "What each is to the generator, and what validation tasks have chosen.",
            table_of(groups, name | {"kind": lambda row: KIND_WORDS[row.kind], "chosen": lambda row: row.note or "–"}),
        )
        if tried := [row for row in groups if row.tried]:
            yield (
                "What was tried",
                "Settings, such as learning rates, with their loss on validation tasks in nats.",
                table_of(tried, name | {"setting: validation loss": _settings_of}),
            )
        return
    scores: Columns = {"n": count_of, title: spread_of}
    yield (
        "All groups",
        "Best is the network chosen on validation; best on test is selected on the examples that it is reported on, as "
        "the paper does, and so flatters every group, the larger ones more. IoU within a group and similarity are "
        "those of wrong predictions; NLL is in nats; NLL and ECE are means over networks, with a dash where they are "
        "not finite. Distances are L2, in units of the snapshots' own: to the nearest snapshot (median) and to their "
        "mean (root mean square).",
        table_of(groups, name | scores | columns_of(MEASURES, groups)),
    )
    if "r2_train" in r:
        columns = {"": lambda kind: "principal components" if kind else "autoencoder"}
        columns["seen snapshots"] = lambda kind: number(r[f"{kind}r2_train"], ".1%")
        columns["held-out snapshots"] = lambda kind: number(r[f"{kind}r2_heldout"], ".1%")
        yield (
            "Reconstruction",
            "Share of the snapshots' variance around their mean that the autoencoder explains, and that as many "
            f"principal components do. Reconstructions score {number(r['score_difference'], '+.2f')} against the "
            "snapshots that they are of.",
            table_of(("", "linear_"), columns),
        )
    similarity: Columns = {"similarity": lambda row: number(row.measures.get("max_iou"))}
    if report.of_kind(Kind.BASELINE, Kind.OPPONENT):
        columns = name | {"n": lambda row: str(row.n), title: lambda row: number(row.mean(), ".2f")}
        columns["95%"] = lambda row: _interval(row.measures.get("score_interval"), ".2f")
        columns |= similarity | {"95% of it": lambda row: _interval(row.measures.get("max_iou_interval"), ".3f")}
        columns |= {word: partial(_share, word) for word in ("better", "worse")}
        columns["verdict"] = verdict_of
        yield (
            "Against every baseline and opponent",
            "In brackets are 95% intervals. `better` is the share of resamples of networks and test examples in which "
            "the generated networks are nowhere worse than the row, in score and similarity, and somewhere better; "
            "`worse` the reverse; a verdict needs 95%.",
            table_of([report.generated, *report.of_kind(Kind.BASELINE, Kind.OPPONENT, Kind.ORACLE)], columns),
        )
    if report.tuning is not None:
        columns = name | {title: spread_of, SIMILARITY: similarity["similarity"]}
        columns["generated vs. this row"] = verdict_of
        columns |= {"passes once": lambda row: f"{row.cost.once:,}", "passes each": lambda row: f"{row.cost.each:,}"}
        columns["break-even"] = partial(_break_even, report.generated)
        rows = [row for row in groups if row.cost is not None]
        yield "The same feedback for trivial generators", _about_tuning(report.tuning), table_of(rows, columns)
    audited = [row for row in groups if row.memorisation is not None]
    yield (
        "Memorisation, and coverage of the snapshots",
        "A group copies if more of its networks than chance allows are too near to a snapshot, or one is nearly "
        "identical. Alike is the share whose wrong predictions are more like a snapshot's than 95% of the snapshots' "
        "are like another's. By nearest neighbours in the space of parameters (k = 5), precision is the share of the "
        "group that lies among the snapshots, recall the share of the snapshots that lies among the group, density and "
        "coverage the same with multiplicity and with the snapshots' balls only. Coverage grows with n; recall "
        "flatters a group of few or far-apart networks, whose balls are large.",
        table_of(audited, name | {"n": count_of} | MEMORISATION | columns_of(COVERAGE, audited)),
    )
    if groups[0].ensembles:
        sizes = sorted({entry["size"] for row in groups for entry in row.ensembles[:-1]} | {1})
        columns = name | {"n": lambda row: str(row.n)} | {str(size): partial(_ensemble, size) for size in sizes}
        yield (
            "Prediction ensembles",
            "Accuracy (NLL, ECE) of the averaged probabilities of n networks of a group, mean over up to 10 ensembles.",
            table_of(groups, columns | {"all n": lambda row: _ensemble(row.n, row)}),
        )


MEMORISATION: Columns = {
    "too near (allowed)": lambda row: f"{row.memorisation['num_too_near']} ({row.memorisation['num_allowed']})",
    "near identical": lambda row: str(row.memorisation["num_near_identical"]),
    "alike": lambda row: number(row.memorisation["fraction_alike"], ".0%"),
    "copies": lambda row: "–" if row.kind == Kind.SNAPSHOTS else "yes" if row.memorisation["copies"] else "no",
}


def _about_tuning(tuning: dict[str, Any]) -> str:
    objective = tuning["objective"]
    return (
        f"The generator was tuned in {tuning['num_steps']} steps, each on {tuning['num_networks']} networks and "
        f"{tuning['num_examples']} training examples, on the likelihood of ensembles of {objective['ensemble_size']}, "
        f"with {objective['diversity']:g} times the overlap of their errors and {objective['penalty']:g} times the "
        "distance to the untuned generator. Passes are of one example through one network: forward counts 1, backward "
        "2. Tuned mean: the snapshots' mean, trained with as many passes, and the snapshots' Gaussian around it. Tuned "
        "Gaussian: one over the generator's own latents, tuned on the same objective. SWAG: its samples, each trained "
        "for some steps, or the best of some on validation data. Validation chooses learning rates, whose trial is "
        "counted. Break-even: the number of networks from which the generator has taken fewer passes."
    )


def _break_even(own: GroupRow, row: GroupRow) -> str:
    """After how many networks the generator has taken fewer passes."""
    if own.cost is None or row.cost is None or not row.cost.each:
        return "–"
    return f"{max(0, math.ceil((own.cost.once - row.cost.once) / row.cost.each)):,}"


def _settings_of(row: GroupRow) -> str:
    return ", ".join(f"{name}: {number(loss)}" for name, loss in row.tried.items())


def _share(word: str, row: GroupRow) -> str:
    return number(getattr(row.comparisons.get(TEST), word, None), ".0%")


def _ensemble(size: int, row: GroupRow) -> str:
    entry = next((entry for entry in row.ensembles if entry["size"] == size), None)
    return f"{number(entry['accuracy'], '.2f')} ({number(entry['nll'])}, {number(entry['ece'])})" if entry else "–"


def _interval(bounds: Sequence[float | None] | None, format: str) -> str:
    return "–" if bounds is None else f"[{number(bounds[0], format)}, {number(bounds[1], format)}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is aligned left, the others right."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    rule = ["---", *["--:"] * (len(header) - 1)]
    head, dashes, *rest = _padded([lines[0], rule, *lines[1:]])
    dashes = ["-" * len(dashes[0]), *("-" * (len(cell) - 1) + ":" for cell in dashes[1:])]
    padded = [head, dashes, *rest]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _padded(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """Columns of one width each, the first aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
