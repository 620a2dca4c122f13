"""A report on sets of data in words, tables and a picture."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from ..tasks.data_task import DataTask
from .compare import BETTER, WORSE
from .report_data import GroupRow, Kind, ReportData
from .verdict import number

SHEET_COLUMNS, SHEET_HEIGHT, SHEET_GAP, SHEET_LABEL = 12, 40, 4, 190
# Rows of the picture, below the generated data and the nearest training data.
SHEET_ROWS = ("Gaussian, weights", "KDE 0.3, weights", "KDE 0.4, latents", "denoiser on the data")
MOST_COPIES = 2.0  # percent, beyond which there is a warning
SPACES = ("weights", "latents", "data")
COLUMNS = {
    "nearness": ("nearness", ".2f"),
    "copies": ("copies (%)", ".1f"),
    "two_sample": ("1-NN", ".2f"),
    "precision": ("precision", ".2f"),
    "recall": ("recall", ".2f"),
    "density": ("density", ".2f"),
    "coverage": ("coverage", ".2f"),
    "class_accuracy": ("class (%)", ".1f"),
    "decibels": ("dB", ".1f"),
}
ABOUT = (
    "Sets of data are compared with held-out data. The Fréchet distance is that of features (of a classifier of the "
    "data set, unless others were given), in percent of their variance; lower is better. Nearness is the median "
    "distance to the nearest training datum over that of held-out data: 1 is natural, less is closer to copies. Copies "
    "are data nearer than the nearest 1% of held-out data. The last column says how generated networks compare with "
    "the row: better is a lower Fréchet distance of data that are as new (nearness up to 0.9, within 0.05), in 95% of "
    "the resamples."
)


def is_of_sets(report: ReportData) -> bool:
    """Whether a report is on sets of data."""
    return "nearness" in report.generated.measures


def _space(row: GroupRow) -> str:
    return row.name.rpartition(", ")[2]


def describe(report: ReportData) -> None:
    """Puts the numbers into words: verdict, warnings and the small table."""
    own, baselines = report.generated, report.of_kind(Kind.BASELINE)
    m = own.measures
    verdict = [
        f"Fréchet distance {number(own.mean(), '.1f')}% at nearness {number(m.get('nearness'), '.2f')} (held-out data: "
        f"1), {number(m.get('copies'), '.1f')}% copies."
    ]
    counts = []
    for space in SPACES:
        rows = [row for row in baselines if _space(row) == space]
        better, worse = (sum(row.verdict == word for row in rows) for word in (BETTER, WORSE))
        counts += [f"{space} {better}, {worse} of {len(rows)}"] if rows else []
    verdict.append(f"Better, worse than trivial generators: {'; '.join(counts)}.")
    for row in report.of_kind(Kind.OPPONENT):
        there = f"{number(row.mean(), '.1f')}% at {number(row.measures.get('nearness'), '.2f')}"
        verdict.append(f"{own.name.capitalize()} vs. {row.name}: {row.verdict} ({there}).")
    warnings = []
    if (m.get("copies") or 0.0) > MOST_COPIES:
        warnings.append(
            f"{m['copies']:.1f}% of the generated data are closer to a training datum than 1% of held-out data are: "
            "the generator copies. A shorter training of the denoiser or longer latents copy less."
        )
    for row in [*baselines, *report.of_kind(Kind.OPPONENT)]:
        if row.verdict == WORSE:
            where = f"{number(row.mean(), '.1f')}% at nearness {number(row.measures.get('nearness'), '.2f')}"
            warnings.append(f"Generated networks are worse than {row.name} ({where}).")
    report.verdict, report.warnings = verdict, warnings
    keys = [key for key in ("nearness", "copies") if key in m]
    shown = [own, *report.of_kind(Kind.SNAPSHOTS)]
    for space in SPACES:  # the best that are as new as data are, by the Fréchet distance
        rows = [row for row in baselines if _space(row) == space and row.verdict != BETTER]
        rows = rows or [row for row in baselines if _space(row) == space]
        shown += sorted(rows, key=lambda row: row.mean() or float("inf"))[:2]
    shown += report.of_kind(Kind.OPPONENT)
    report.summary = {
        "header": ["data of", "Fréchet (%)", *(COLUMNS[key][0] for key in keys), "generated vs. this row"],
        "rows": [
            [row.name, number(row.mean(), ".2f"), *(_cell(row, key) for key in keys), row.verdict or "–"]
            for row in shown
        ],
        "about": f"{report.num_parameters:,} generated parameters a network. {ABOUT}",
    }


def _cell(row: GroupRow, key: str) -> str:
    return number(row.measures.get(key), COLUMNS[key][1])


def sections(report: ReportData) -> Iterator[tuple[str, str, tuple[Sequence[str], Sequence[Sequence[str]]]]]:
    """Title, explanation and table of everything."""
    keys = [key for key in COLUMNS if any(row.measures.get(key) is not None for row in report.groups)]
    lines = []
    for row in report.groups:
        low, high = row.measures.get("score_interval") or (None, None)
        cells = [number(row.mean(), ".2f"), f"[{number(low, '.2f')}, {number(high, '.2f')}]"]
        lines.append([row.name, str(row.n), *cells, *(_cell(row, key) for key in keys), row.verdict or "–"])
    accuracy = report.settings.get("classifier_accuracy")
    of = f" The classifier is right about {accuracy:.1f}% of held-out data." if accuracy is not None else ""
    header = ["data of", "n", "Fréchet (%)", "95%", *(COLUMNS[key][0] for key in keys), "generated vs. this"]
    yield (
        "All sets",
        f"{ABOUT} 1-NN is how often the nearest neighbour is of the same set (0.5 is ideal); precision, recall, "
        "density and coverage are by 5 nearest neighbours among the features of held-out data; class is how often the "
        f"classifier sees the class that was asked for; dB is the signal-to-noise ratio against the data.{of} The "
        "Fréchet distance falls with the size of a set.",
        (header, lines),
    )


def draw_sheet(task: DataTask, sets: Mapping[str, Tensor], nearest: Tensor, path: Path) -> None:
    """A picture: a row of data for each of some sets, below the generated ones those that they are nearest to."""
    rows = {"generated": sets["generated"], "nearest training datum": nearest}
    rows |= {name: sets[name] for name in SHEET_ROWS if name in sets}
    pictures: dict[str, Any] = {name: task.images(outputs[:SHEET_COLUMNS]) for name, outputs in rows.items()}
    if any(picture is None for picture in pictures.values()):
        return
    height, width = next(iter(pictures.values())).shape[-2:]
    scale = max(1, SHEET_HEIGHT // height)
    size = (scale * width + SHEET_GAP, scale * height + SHEET_GAP)
    sheet = Image.new("RGB", (SHEET_LABEL + SHEET_COLUMNS * size[0], len(rows) * size[1]), "white")
    for i, (name, images) in enumerate(pictures.items()):
        ImageDraw.Draw(sheet).text((4, i * size[1] + size[1] // 2 - 6), name, fill="black")
        for j, image in enumerate(images):
            pixels = (255 * image.nan_to_num()).round().byte().permute(1, 2, 0).squeeze(-1).numpy()
            one = Image.fromarray(pixels).resize((scale * width, scale * height), Image.Resampling.NEAREST)
            sheet.paste(one.convert("RGB"), (SHEET_LABEL + j * size[0], i * size[1]))
    sheet.save(path)
