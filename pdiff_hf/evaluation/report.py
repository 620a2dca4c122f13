"""The report of a run: how good the networks of each group are, and how alike."""

import json
import logging
import math
import os
from pathlib import Path

import torch

from .metrics import accuracy, iou_within, max_iou, r2_score
from .scoring import Scorer

logger = logging.getLogger(__name__)


def evaluate(scorer: Scorer, groups: dict[str, torch.Tensor], heldout: torch.Tensor) -> dict:
    """
    Scores groups of networks on the validation and the test split.

    Args:
        scorer (`Scorer`): For the base model and its task.
        groups (`dict[str, torch.Tensor]`): Parameters of shape `(N, D)` by name; `original` and `reconstructed` (of the
            same networks, in the same order) are among them.
        heldout (`torch.Tensor`): bool of shape `(K,)`: originals that no generator has seen.

    Returns:
        `dict`: What `report.json` holds. Accuracies are in percent on the test split. `accuracy_best` is the test
        accuracy of the network with the best validation accuracy; `accuracy_best_on_test`, the paper's own figure, is
        selected on the split that it reports, and so flatters every group, the larger ones more.
    """
    names = list(groups)
    sizes = [len(parameters) for parameters in groups.values()]
    stacked = torch.cat(list(groups.values()))
    scores = {split: scorer.score(split, stacked) for split in ("validation", "test")}
    accuracies = {split: accuracy(s.predictions, s.labels).split(sizes) for split, s in scores.items()}
    wrong = dict(zip(names, scores["test"].wrong.split(sizes), strict=True))

    rows = []
    for i, name in enumerate(names):
        validation, test = accuracies["validation"][i], accuracies["test"][i]
        similarity = max_iou(wrong[name], wrong["original"], exclude_self=name == "original")
        rows.append(
            {
                "name": name,
                "n": len(test),
                "accuracy_mean": test.mean().item(),
                "accuracy_std": test.std().item() if len(test) > 1 else 0.0,
                "accuracy_best": test[validation.argmax()].item(),
                "accuracy_best_on_test": test.max().item(),
                "validation_accuracy_mean": validation.mean().item(),
                "iou_self": _number(iou_within(wrong[name])),
                "iou_max": _number(similarity.mean().item()),
            }
        )
    original, reconstructed = groups["original"], groups["reconstructed"]
    mean = original[~heldout].double().mean(0).float()
    return {
        "num_parameters": stacked.shape[1],
        "splits": {split: s.predictions.shape[1] for split, s in scores.items()},
        "groups": rows,
        "reconstruction": {
            "r2_train": _number(r2_score(original[~heldout], reconstructed[~heldout], mean)),
            "r2_heldout": _number(r2_score(original[heldout], reconstructed[heldout], mean)) if heldout.any() else None,
        },
        "warnings": _warnings(rows, r2_score(original[~heldout], reconstructed[~heldout], mean)),
    }


def _warnings(rows: list[dict], r2: float) -> list[str]:
    by_name = {row["name"]: row for row in rows}
    lost = by_name["original"]["accuracy_mean"] - by_name["reconstructed"]["accuracy_mean"]
    warnings = []
    if lost > 1:
        warnings.append(
            f"The autoencoder's reconstructions lose {lost:.2f} points of accuracy: what is generated can hardly do "
            "better. Train the autoencoder longer, with a higher learning rate, or with a longer latent."
        )
    if r2 < 0.5:
        warnings.append(
            f"The autoencoder explains only {r2:.0%} of what differs between the snapshots: it returns little but "
            "their mean, so that every generated network is close to an average. Train it longer or with a higher "
            "learning rate."
        )
    return warnings


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def write_report(report: dict, folder: str | os.PathLike) -> None:
    """Writes `report.json` and `report.md` into `folder`."""
    Path(folder, "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    Path(folder, "report.md").write_text(format_report(report))


def format_report(report: dict) -> str:
    """The report as Markdown that can also be read in a terminal."""
    splits = report["splits"]
    header = ["group", "n", "accuracy", "best", "best on test", "IoU within", "max IoU to originals"]
    rows = [
        [
            row["name"],
            str(row["n"]),
            f"{row['accuracy_mean']:.2f} ± {row['accuracy_std']:.2f}",
            f"{row['accuracy_best']:.2f}",
            f"{row['accuracy_best_on_test']:.2f}",
            "–" if row["iou_self"] is None else f"{row['iou_self']:.3f}",
            "–" if row["iou_max"] is None else f"{row['iou_max']:.3f}",
        ]
        for row in report["groups"]
    ]
    r2_heldout = report["reconstruction"]["r2_heldout"]
    lines = [
        f"{report['num_parameters']:,} generated parameters. Accuracy in percent on {splits['test']:,} test examples, mean "
        f"± standard deviation over the n networks of a group; best is selected on {splits['validation']:,} validation "
        "examples; best on test is selected on the test examples themselves, as the paper does, and too high for it.",
        "",
        *format_table(header, rows),
        "",
        f"The autoencoder explains {report['reconstruction']['r2_train']:.1%} of the variance of the training snapshots "
        "around their mean" + (f", and {r2_heldout:.1%} of the held-out ones'." if r2_heldout is not None else "."),
        *(f"\nWARNING: {warning}" for warning in report["warnings"]),
    ]
    return "\n".join(lines) + "\n"


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
