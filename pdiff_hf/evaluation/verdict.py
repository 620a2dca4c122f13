"""What a report says in words: three short lines, and warnings."""

import math

from ..utils.reports import TEST
from .compare import BETTER, WORSE
from .report_data import GroupRow, Kind, ReportData

FEW_ERRORS = 20  # with fewer, one error more or less moves an IoU by 5 points
EXPLAINS_LITTLE = 0.5  # of the variance: reconstructions are little but the mean
LATENT_TOO_SHORT = 0.9  # of the variance: what principal components of the latent's length should explain
ALMOST_LINEAR = 0.05  # an autoencoder within this of the principal components cannot do much better
MOST_COPIES = 2.0  # percent of a set of data, beyond which there is a warning
SPACES = ("weights", "latents", "data")  # in which trivial generators of sets of data draw
AS_GOOD = 0.5  # points: networks for other conditions that are surely as near say that conditions do not count


def write_verdict(report: ReportData) -> list[str]:
    """Against the snapshots, free alternatives, and opponents with feedback: three lines of 40 words in all at most."""
    free = report.of_kind(Kind.BASELINE)
    if report.is_of_sets:
        own, counts = report.generated, []
        for space in SPACES:
            rows = [row for row in free if space_of(row) == space]
            better, worse = (sum(row.verdict == word for row in rows) for word in (BETTER, WORSE))
            counts += [f"{space} {better}, {worse} of {len(rows)}"] if rows else []
        return [
            f"Fréchet distance {number(own.mean(), '.1f')}% at nearness {number(own.measures['nearness'], '.2f')} "
            f"(held-out data: 1), {number(own.measures.get('copies'), '.1f')}% copies.",
            f"Better, worse than trivial generators: {'; '.join(counts)}.",
            *(f"Generated vs. {row.name}: {row.verdict} ({_place(row)})." for row in report.of_kind(Kind.OPPONENT)),
        ]
    lines = [
        _line(report, "Against the snapshots", report.of_kind(Kind.SNAPSHOTS)),
        _line(report, "Against free alternatives", free),
        _line(report, "With equal feedback", report.of_kind(Kind.OPPONENT, Kind.ORACLE)),
    ]
    if report.fields:
        best = report.best([*report.of_kind(Kind.SNAPSHOTS), *free])
        if best is not None and best.verdict == WORSE:
            lines[1] += f" Use {best.name}."
    return lines


def space_of(row: GroupRow) -> str:
    """In which of `SPACES` a trivial generator of sets draws."""
    return row.name.rpartition(", ")[2]


def _place(row: GroupRow) -> str:
    return f"{number(row.mean(), '.1f')}% at nearness {number(row.measures.get('nearness'), '.2f')}"


def _line(report: ReportData, title: str, groups: list[GroupRow]) -> str:
    groups = [group for group in groups if TEST in group.comparisons]
    best = report.best(groups)
    if best is None:
        return f"{title}: not compared."
    if best.comparisons[TEST].better is not None:  # similarity counts, which one difference does not show
        counts = [sum(group.verdict == word for group in groups) for word in (BETTER, WORSE)]
        what = f"{report.metric.name} and novelty"
        return f"{title}: better than {counts[0]}, worse than {counts[1]} of {len(groups)} ({what})."
    comparison, means = best.comparisons[TEST], [number(one.mean(), ".2f") for one in (report.generated, best)]
    what = f"{means[0]} and {means[1]}{unit(report)}"
    name = "" if best.name == "snapshots" else f"{best.name}, "
    return f"{title}: {comparison.verdict}, {number(comparison.difference, '+.2f')} ({name}{what})."


def unit(report: ReportData) -> str:
    """To be written behind a score."""
    return f" {report.metric.unit}" if report.metric.unit else ""


def number(value: float | None, format: str = ".3f") -> str:
    """A number, or a dash where there is none; a huge one, of a network that has diverged, in few digits."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:{format}}" if abs(value) < 1e6 else f"{value:.1e}"
    return text.replace("-", "+" if "+" in format else "") if not text.strip("+-0.%") else text  # no negative zero


def what_to_change(report: ReportData) -> str | None:
    """Of networks that are worse than the snapshots: where it is lost, as far as the report has measured it."""
    explained = report.reconstruction
    snapshots = report.of_kind(Kind.SNAPSHOTS)
    if explained is None or not snapshots or snapshots[0].verdict != WORSE:
        return None
    sign = report.metric.sign
    lost = -sign * (snapshots[0].comparisons[TEST].difference or 0.0)
    by_autoencoder = -sign * (explained["score_difference"] or 0.0)
    if by_autoencoder >= lost / 2:
        heldout = explained["r2_heldout"] is not None
        r2, linear = (explained[f"{kind}r2_{'heldout' if heldout else 'train'}"] for kind in ("", "linear_"))
        where = (
            f"The autoencoder loses {by_autoencoder:.2f} of {lost:.2f} (it explains {number(r2, '.0%')} of the "
            f"variance of {'held-out' if heldout else 'the'} snapshots, as many principal components "
            f"{number(linear, '.0%')}): "
        )
        if None not in (r2, linear) and linear < LATENT_TOO_SHORT and r2 > linear - ALMOST_LINEAR:
            return where + "raise --latent_dim."
        return where + "raise --autoencoder_steps or --autoencoder_learning_rate."
    where = f"The autoencoder loses {max(0.0, by_autoencoder):.2f} of {lost:.2f}, the denoiser the rest: "
    more = report.more_steps
    if more is not None and more["score_mean"] is not None:
        gained = sign * (more["score_mean"] - (report.generated.mean() or 0.0))
        reached = f"{more['num_inference_steps']} denoising steps reach {more['score_mean']:.2f}"
        if gained > lost / 2:
            return where + f"raise --num_inference_steps ({reached})."
        where += f"{reached}, so "
    return where + "raise --denoiser_steps."


def find_warnings(report: ReportData) -> list[str]:
    """What a reader has to know before believing the numbers, where something has happened."""
    generated, warnings = report.generated, []
    if generated.num_undefined:
        what = "predictions that are not finite" if generated.ensembles else "no score"
        warnings.append(f"{generated.num_undefined} of {generated.n} generated networks have {what}.")
    copies = generated.memorisation
    if copies is not None and copies["copies"]:
        warnings.append(
            f"Of {generated.n} generated networks {copies['num_too_near']} are closer to a snapshot than allowed (up "
            f"to {copies['num_allowed']} expected by chance), and {copies['num_near_identical']} nearly identical to "
            "one."
        )
    for group in report.of_kind(Kind.CONTROL) if report.fields else ():
        interval = group.comparisons[TEST].interval
        if max(report.metric.sign * end for end in interval) < AS_GOOD:
            warnings.append(
                f"Networks for other conditions are as good ({number(group.mean(), '.2f')}{unit(report)} against "
                f"{number(generated.mean(), '.2f')}): the generator ignores what it is told."
            )
        elif group.verdict != BETTER:
            ends = " to ".join(number(end, "+.1f") for end in interval)
            warnings.append(
                f"{len(report.conditions[TEST])} tasks cannot decide whether the generator ignores what it is told "
                f"(its networks less those for other conditions: {ends}, 95%): raise --num_test_tasks."
            )
    for group in report.of_kind(Kind.VARIANT) if report.fields else ():
        if group.name == "generator by weights" and group.verdict == WORSE:
            warnings.append(
                f"The generator was better before tuning ({number(group.mean(), '.2f')}{unit(report)} against "
                f"{number(generated.mean(), '.2f')}): lower --tune_learning_rate, or raise --tune_steps."
            )
    if change := what_to_change(report):
        warnings.append(change)
    if report.is_of_sets:
        copied = generated.measures.get("copies") or 0.0
        if copied > MOST_COPIES:
            warnings.append(
                f"{copied:.1f}% of the generated data are closer to a training datum than 1% of held-out data are: the "
                "generator copies. A shorter training of the denoiser or longer latents copy less."
            )
        for row in report.of_kind(Kind.BASELINE, Kind.OPPONENT):
            if row.verdict == WORSE:
                warnings.append(f"Generated networks are worse than {row.name} ({_place(row)}).")
    if report.fields or report.is_of_sets:
        return warnings
    snapshots = report.of_kind(Kind.SNAPSHOTS)[0]
    if snapshots.n > 1 and snapshots.measures["score_std"] == 0:
        score = f"{report.metric.name}, {number(snapshots.mean(), '.2f')}{unit(report)}"
        warnings.append(
            f"All {snapshots.n} snapshots have the same {score}: comparing generated networks with them says nothing. "
            "Has the base model learned more than chance? If it has, take more test data, or snapshots that differ "
            "more (--collect_learning_rate)."
        )
    if snapshots.ensembles:
        num_test = report.splits["test"]
        errors = num_test * (1 - (snapshots.mean() or 0.0) / 100)
        if errors < FEW_ERRORS:
            warnings.append(
                f"A snapshot errs on only {errors:.1f} of {num_test} test examples: the similarity of wrong "
                "predictions can hardly tell networks apart. For more than a try-out, take a harder task or "
                "more test data."
            )
    explained = report.reconstruction
    if explained is not None and (explained.get("r2_train", 1.0) or 0.0) < EXPLAINS_LITTLE:
        warnings.append(
            f"The autoencoder explains only {max(0.0, explained['r2_train'] or 0.0):.0%} of what differs between the "
            "snapshots, so every generated network is close to an average. Train it longer or with a higher learning "
            "rate."
        )
    return warnings
