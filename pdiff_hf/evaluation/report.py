"""The report on a generator: how good the networks of each group are, how alike, and how near to the snapshots."""

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..utils.files import replacing, without_nan
from ..utils.seeds import derive_seed
from .audit import AuditRow, audit_group, audit_verdict
from .frontier import CONFIDENCE, FrontierGroup, FrontierRow, frontier, frontier_sentence
from .metrics import (
    accuracy,
    chunks,
    distances,
    ensemble_metrics,
    expected_calibration_error,
    iou_within,
    negative_log_likelihood,
    precision_recall_density_coverage,
    r2_score,
)
from .scoring import Scorer

logger = logging.getLogger(__name__)

SUMMARISED = (None, "VAE", "hyper-representations")  # families; the settings of sweeps are in the frontier
FEW_ERRORS = 20  # with fewer, one error more or less moves an IoU by 5 points

FIGURES = {
    "accuracy_vs_similarity.png": "Accuracy against the similarity to the originals (paper, figure 4)",
    "scores.png": "Distribution of the metric in each group",
    "max_similarity.png": "Maximum similarity to the originals (paper, figure 5c)",
    "reverse_process.png": "Accuracy along the reverse process (paper, figure 5b)",
    "parameters.png": "Parameters of originals and generated networks",
    "latents.png": "Latents on the originals' first two principal components",
    "losses.png": "Losses in training",
}


@dataclass(frozen=True)
class Group:
    """
    Networks that are reported together.

    Args:
        name (`str`): Unique; `original` and `generated` have to be there, `reconstructed` is known too.
        parameters (`torch.Tensor`): Shape `(N, D)`.
        family (`str`, *optional*): Of a baseline: what the settings of one sweep have in common.
        value (`float | str`, *optional*): Of a baseline: its setting.
    """

    name: str
    parameters: torch.Tensor
    family: str | None = None
    value: float | str | None = None


def evaluate(scorer: Scorer, groups: Sequence[Group], heldout: torch.Tensor, seed: int = 0) -> dict:
    """
    Scores groups of networks on the validation and the test split, and compares the generated one with the others.

    Args:
        scorer (`Scorer`): For the base model and its task.
        groups (`Sequence[Group]`): `original` first. `reconstructed`, if given, holds the same networks in the same
            order.
        heldout (`torch.Tensor`): bool of shape `(K,)`: originals that no generator has seen.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.

    Returns:
        `dict`: What `report.json` holds. Accuracies are in percent on the test split, NLL in nats. `accuracy_best` is
        the test accuracy of the network with the best validation accuracy; `accuracy_best_on_test`, the paper's own
        figure, is selected on the split that it reports, and so flatters every group, the larger ones more. Distances
        are relative to the snapshots' own: `distance_nearest` is a median, `distance_to_mean` a root mean square.
        `audit` and `ensembles` are described in `audit.py` and `metrics.py`, `frontier` in `frontier.py`.

    Raises:
        ValueError: if the scores would not fit into memory.
    """
    originals = groups[0].parameters
    vectors = [row for group in groups for row in group.parameters]
    bounds = torch.tensor([0, *(len(group.parameters) for group in groups)]).cumsum(0).tolist()
    rows_of = {group.name: slice(*bounds[i : i + 2]) for i, group in enumerate(groups)}
    for split in ("validation", "test"):
        scorer.check_memory(split, len(vectors))
    validation_scores = scorer.score("validation", vectors)
    validation_accuracy = accuracy(validation_scores.predictions, validation_scores.labels)
    num_validation = len(validation_scores.labels)
    del validation_scores  # its probabilities are not needed, and may take gigabytes
    scores = scorer.score("test", vectors)
    wrong = scores.wrong
    wrong_originals = wrong[rows_of["original"]]

    rows, audits = [], {}
    for group in groups:
        own = group.name == "original"
        validation, test = validation_accuracy[rows_of[group.name]], scores[rows_of[group.name]]
        accuracies = accuracy(test.predictions, test.labels)
        place = distances(group.parameters, originals, exclude_self=own)
        audit = audit_group(group.name, place, test.wrong, wrong_originals, exclude_self=own)
        audits[group.name] = audit
        rows.append(
            {
                "name": group.name,
                "family": group.family,
                "value": group.value,
                "n": len(accuracies),
                "accuracy_mean": accuracies.mean().item(),
                "accuracy_std": accuracies.std().item() if len(accuracies) > 1 else 0.0,
                "accuracy_best": accuracies[validation.argmax()].item(),
                "accuracy_best_on_test": accuracies.max().item(),
                "validation_accuracy_mean": validation.mean().item(),
                "nll": negative_log_likelihood(test.log_probs, test.labels).mean().item(),
                "ece": expected_calibration_error(test.log_probs, test.labels).mean().item(),
                "iou_self": iou_within(test.wrong),
                "iou_max": sum(audit.iou) / len(audit.iou),
                "distance_nearest": audit.distance_relative,
                "distance_to_mean": audit.to_mean_relative,
                # A set covers itself, whatever it is.
                **({} if own else precision_recall_density_coverage(originals, group.parameters)),
                "ensembles": ensemble_metrics(test.log_probs, test.labels),
                "accuracies": accuracies.tolist(),
            }
        )

    baselines = [group for group in groups if group.family is not None]
    frontier_rows = frontier(
        FrontierGroup("generated", "generated", None, wrong[rows_of["generated"]]),
        [FrontierGroup(g.name, g.family, g.value, wrong[rows_of[g.name]]) for g in baselines],
        wrong_originals,
        torch.Generator().manual_seed(derive_seed(seed, *b"bootstrap")),
    )
    reconstruction = explained_variance({group.name: group.parameters for group in groups}, heldout)
    return without_nan(
        {
            "num_parameters": originals.shape[1],
            "splits": {"validation": num_validation, "test": len(scores.labels)},
            "groups": rows,
            "reconstruction": reconstruction,
            "frontier": {"sentence": frontier_sentence(frontier_rows), "rows": [asdict(row) for row in frontier_rows]},
            "audit": {
                "verdict": audit_verdict(audits["generated"], [audits[group.name] for group in baselines]),
                "rows": [asdict(audit) | {"copies": audit.copies} for audit in audits.values()],
            },
            "verdict": _verdict(frontier_rows, audits["generated"]),
            "warnings": _warnings({row["name"]: row for row in rows}, reconstruction, len(scores.labels)),
        }
    )


def _verdict(rows: Sequence[FrontierRow], audit: AuditRow) -> str:
    """The two answers in one line."""
    verdicts = Counter(row.verdict for row in rows[1:])
    copies = "copies of snapshots are among them" if audit.copies else "no copies of snapshots are among them"
    if not verdicts:
        return f"{copies}; they were compared with no baseline.".capitalize()
    return (
        f"Of {len(rows) - 1} settings of trivial generators, {verdicts['dominated']} are better than the generated "
        f"networks in accuracy and novelty together, {verdicts['dominates']} are worse, and for {verdicts['neither']} "
        f"neither can be said at {CONFIDENCE:.0%} confidence; {copies}."
    )


def explained_variance(parameters: Mapping[str, torch.Tensor], heldout: torch.Tensor) -> dict | None:
    """Share of the snapshots' variance around their mean that the autoencoder explains; None without one."""
    if "reconstructed" not in parameters:
        return None
    original, reconstructed = parameters["original"], parameters["reconstructed"]
    mean = torch.empty(original.shape[1])
    for columns in chunks(original.shape[1], 8 * len(original)):
        mean[columns] = original[:, columns][~heldout].double().mean(0)
    seen = slice(None) if not heldout.any() else ~heldout  # a mask would copy what may be long vectors
    return {
        "r2_train": r2_score(original[seen], reconstructed[seen], mean),
        "r2_heldout": r2_score(original[heldout], reconstructed[heldout], mean) if heldout.any() else None,
    }


def _warnings(rows: Mapping[str, dict], reconstruction: dict | None, num_test: int) -> list[str]:
    warnings = []
    errors = num_test * (1 - rows["original"]["accuracy_mean"] / 100)
    if errors < FEW_ERRORS:
        warnings.append(
            f"An original errs on only {errors:.1f} of {num_test} test examples: the similarity of wrong predictions "
            "can hardly tell networks apart here. For more than a try-out, take a harder task or more test data."
        )
    if reconstruction is None:
        return warnings
    lost = rows["original"]["accuracy_mean"] - rows["reconstructed"]["accuracy_mean"]
    if lost > 1:
        warnings.append(
            f"The autoencoder's reconstructions lose {lost:.2f} points of accuracy: what is generated can hardly do "
            "better. Train the autoencoder longer, with a higher learning rate, or with a longer latent."
        )
    return warnings + reconstruction_warnings(reconstruction)


def reconstruction_warnings(reconstruction: Mapping[str, float | None]) -> list[str]:
    """Whether the autoencoder explains too little for a generator to learn from."""
    if reconstruction["r2_train"] < 0.5:
        return [
            f"The autoencoder explains only {max(0, reconstruction['r2_train']):.0%} of what differs between the "
            "snapshots: it returns little but their mean, so that every generated network is close to an average. "
            "Train it longer or with a higher learning rate."
        ]
    return []


def write_report(report: dict, folder: str | os.PathLike) -> None:
    """Writes `report.json` and `report.md` into `folder`; the latter shows the figures that are there."""
    folder = Path(folder)
    with replacing(folder / "report.json") as part:
        part.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    figures = [name for name in FIGURES if (folder / name).is_file()]
    with replacing(folder / "report.md") as part:
        part.write_text(format_report(report, figures))


def format_summary(report: dict) -> str:
    """What a person wants to know first, as Markdown that can also be read in a terminal."""
    lines = _measured_groups(report) if "metric" in report else _classifier_groups(report)
    reconstruction = report["reconstruction"]
    if reconstruction is not None:
        heldout = reconstruction["r2_heldout"]
        lines += [
            "",
            f"The autoencoder explains {reconstruction['r2_train']:.1%} of the variance of the training snapshots "
            "around their mean" + (f", and {heldout:.1%} of the held-out ones'." if heldout is not None else "."),
        ]
        if "linear_r2_train" in reconstruction:
            heldout = reconstruction["linear_r2_heldout"]
            lines[-1] += (
                " The control, as many principal components as the latent has coordinates, explains "
                f"{reconstruction['linear_r2_train']:.1%}" + (f" and {heldout:.1%}." if heldout is not None else ".")
            )
    for warning in report["warnings"]:
        lines += ["", f"WARNING: {warning}"]
    lines += ["", f"**Verdict:** {report['verdict']}"]
    if len(report.get("frontier", {}).get("rows", ())) > 1:
        lines += ["", f"**Against the baselines:** {report['frontier']['sentence']}"]
    lines += ["", f"**Memorisation:** {report['audit']['verdict']}"]
    return "\n".join(lines) + "\n"


def _measured_groups(report: dict) -> list[str]:
    splits, metric = report["splits"], report["metric"]
    header = ["group", "n", metric["name"], "best", "best on test", "to nearest", "to mean"]
    rows = [
        [
            row["name"],
            str(row["n"]) + (f" ({row['num_undefined']} undefined)" if row["num_undefined"] else ""),
            "–" if row["score_mean"] is None else f"{row['score_mean']:.2f} ± {row['score_std']:.2f}",
            _number(row["score_best"], 2),
            _number(row["score_best_on_test"], 2),
            _number(row["distance_nearest"], 2),
            _number(row["distance_to_mean"], 2),
        ]
        for row in report["groups"]
    ]
    return [
        f"{report['num_parameters']:,} generated parameters. {metric['name']} "
        f"({'higher' if metric['higher_is_better'] else 'lower'} is better) on {splits['test']:,} test examples, mean "
        f"± standard deviation over the n networks of a group; best is selected on {splits['validation']:,} validation "
        "examples; best on test is selected on the test examples themselves, and too good for it. Distances to the "
        "nearest snapshot (median) and to their mean (root mean square) are L2, in units of the snapshots' own. "
        "`ensemble` is one network, the mean of all originals.",
        "",
        *format_table(header, rows),
    ]


def _classifier_groups(report: dict) -> list[str]:
    splits = report["splits"]
    header = ["group", "n", "accuracy", "best", "best on test", "IoU within", "max IoU to originals", "NLL", "ECE"]
    rows = [
        [
            row["name"],
            str(row["n"]),
            f"{row['accuracy_mean']:.2f} ± {row['accuracy_std']:.2f}",
            _number(row["accuracy_best"], 2),
            _number(row["accuracy_best_on_test"], 2),
            _number(row["iou_self"]),
            _number(row["iou_max"]),
            _number(row["nll"]),
            _number(row["ece"]),
        ]
        for row in report["groups"]
        if row["family"] in SUMMARISED
    ]
    return [
        f"{report['num_parameters']:,} generated parameters. Accuracy in percent on {splits['test']:,} test examples, "
        "mean ± standard deviation over the n networks of a group; best is selected on "
        f"{splits['validation']:,} validation examples; best on test is selected on the test examples themselves, as "
        "the paper does, and too high for it. IoU is the similarity of wrong predictions; NLL (nats) and ECE are means "
        "over networks. `ensemble` is one network, the mean of all originals.",
        "",
        *format_table(header, rows),
    ]


def format_report(report: dict, figures: Sequence[str] = ()) -> str:
    """The whole report as Markdown: the summary, then everything that it rests on."""
    classifies = "metric" not in report
    sections = [format_summary(report).rstrip()]
    if classifies:
        sections += [
            "### Frontier: accuracy against similarity",
            "Up and left is better: more accurate and less similar to the originals. In brackets are 95% intervals of "
            "a bootstrap over networks and test examples. `dominated` is the share of resamples in which the setting "
            "is at least as accurate and at most as similar as the generated networks and better in one of these, "
            "`dominates` the reverse; a verdict needs 95%.",
            _frontier_table(report["frontier"]["rows"]),
        ]
    sections += [
        "### Memorisation",
        "Distances are L2, in units of the snapshots' own: to the nearest snapshot (median; 1 is how near snapshots "
        "lie to each other) and to their mean (root mean square; below 0.9 a group has contracted towards it). A group "
        "copies if more of its networks than chance allows are too near to a snapshot, or one is nearly identical. "
        "Alike is the share whose wrong predictions are more like an original's than 95% of the originals' are, for "
        "classifiers.",
        _audit_table(report["audit"]["rows"]),
        "### Coverage of the originals",
        "By nearest neighbours in the space of parameters (k = 5): precision is the share of the group that lies among "
        "the originals, recall the share of the originals that lies among the group, density and coverage the same "
        "with multiplicity and with the originals' balls only. Coverage grows with n; recall flatters a group of "
        "few or far-apart networks, whose balls are large.",
        _coverage_table(report["groups"]),
    ]
    if classifies:
        sections += [
            "### Prediction ensembles",
            "Accuracy (NLL, ECE) of the averaged probabilities of n networks of a group, mean over up to 10 ensembles.",
            _ensemble_table(report["groups"]),
        ]
    if figures:
        sections.append("### Figures")
        sections += [f"![{FIGURES[name]}]({name})\n\n*{FIGURES[name]}.*" for name in figures]
    return "\n\n".join(sections) + "\n"


def _frontier_table(rows: Sequence[dict]) -> str:
    header = ["group", "n", "accuracy", "95%", "max IoU", "95% ", "dominated", "dominates", "verdict"]
    return _table(
        header,
        [
            [
                row["name"],
                str(row["num_models"]),
                _number(row["accuracy"], 2),
                "[{:.2f}, {:.2f}]".format(*row["accuracy_interval"]),
                _number(row["max_iou"]),
                "[{:.3f}, {:.3f}]".format(*row["max_iou_interval"]),
                _percent(row["dominated"]),
                _percent(row["dominates"]),
                row["verdict"] or "–",
            ]
            for row in rows
        ],
    )


def _audit_table(rows: Sequence[dict]) -> str:
    header = ["group", "n", "to nearest", "to mean", "too near (allowed)", "near identical", "alike", "copies"]
    return _table(
        header,
        [
            [
                row["name"],
                str(len(row["distance"])),
                _number(row["distance_relative"], 2),
                _number(row["to_mean_relative"], 2),
                f"{row['num_too_near']} ({row['num_allowed']})",
                str(row["num_near_identical"]),
                _percent(row["fraction_alike"]),
                "–" if row["name"] == "original" else "yes" if row["copies"] else "no",
            ]
            for row in rows
        ],
    )


def _coverage_table(rows: Sequence[dict]) -> str:
    names = ("precision", "recall", "density", "coverage")
    return _table(
        ["group", "n", *names],
        [[row["name"], str(row["n"]), *(_number(row[n], 2) for n in names)] for row in rows if "precision" in row],
    )


def _ensemble_table(rows: Sequence[dict]) -> str:
    sizes = sorted({entry["size"] for row in rows for entry in row["ensembles"][:-1]} | {1})
    table = []
    for row in rows:
        cells = {
            entry["size"]: f"{entry['accuracy']:.2f} ({entry['nll']:.3f}, {entry['ece']:.3f})"
            for entry in row["ensembles"]
        }
        table.append([row["name"], str(row["n"]), *(cells.get(size, "–") for size in sizes), cells[row["n"]]])
    return _table(["group", "n", *(str(size) for size in sizes), "all n"], table)


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(format_table(header, rows))


def format_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; the first column is aligned left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells):
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w if i == 0 else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
    return [line(header), line(rule), *map(line, rows)]
