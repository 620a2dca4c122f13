"""What a report says in words: a few sentences, and warnings."""

import math
from collections import Counter

from .frontier import CONFIDENCE
from .render import number

FEW_ERRORS = 20  # with fewer, one error more or less moves an IoU by 5 points
EXPLAINS_LITTLE = 0.5  # of the variance: reconstructions are little but the mean
LATENT_TOO_SHORT = 0.9  # of the variance: what principal components of the latent's length should explain
ALMOST_LINEAR = 0.05  # an autoencoder within this of the principal components cannot do much better


def write_verdict(report: dict) -> str:
    """
    Whether the generated networks are as good as the snapshots, and what to change if they are not; how they compare
    with the baselines; and if the generator was tuned, with those that got the same feedback.
    """
    sentences = [_against_snapshots(report), _against_baselines(report)]
    if "tuning" in report:
        sentences.append(_against_tuned_baselines(report))
    return " ".join(sentences)


def _against_snapshots(report: dict) -> str:
    groups = {row["name"]: row for row in report["groups"]}
    metric, difference = report["metric"], report["difference"]
    means = [groups[name]["score_mean"] for name in ("generated", "snapshots")]
    if None in means:
        return f"The mean {metric['name']} of the generated networks or of the snapshots is not defined."
    relation = {
        "better": "better than the snapshots",
        "worse": "worse than the snapshots",
        "undecided": "as good as the snapshots within the sampling error",
    }[difference["verdict"]]
    low, high = difference["interval"] or (None, None)
    unit = _unit(metric)
    direction = "" if metric["higher_is_better"] else ", lower is better"
    interval = f"{number(low, '+.2f')} to {number(high, '+.2f')}"
    sentence = (
        f"The generated networks are {relation}: mean {metric['name']} {means[0]:.2f} against {means[1]:.2f}{unit}"
        f"{direction} (difference {number(difference['difference'], '+.2f')}, {CONFIDENCE:.0%} interval {interval})"
    )
    return sentence + (f"; {_what_to_change(report)}." if difference["verdict"] == "worse" else ".")


def _what_to_change(report: dict) -> str:
    """Of networks that are worse than the snapshots: where it is lost, as far as the report has measured it."""
    explained = report["reconstruction"]
    if explained is None:
        return "a report on networks alone cannot say where it is lost"
    sign = 1 if report["metric"]["higher_is_better"] else -1
    lost = -sign * (report["difference"]["difference"] or 0.0)
    by_autoencoder = -sign * (explained["score_difference"] or 0.0)
    if by_autoencoder >= lost / 2:
        heldout = explained["r2_heldout"] is not None
        r2, linear = (explained[f"{kind}r2_{'heldout' if heldout else 'train'}"] for kind in ("", "linear_"))
        where = (
            f"the autoencoder loses {by_autoencoder:.2f} of it (it explains {number(r2, '.0%')} of the variance of "
            f"{'held-out' if heldout else 'the'} snapshots, as many principal components {number(linear, '.0%')}): "
        )
        if None not in (r2, linear) and linear < LATENT_TOO_SHORT and r2 > linear - ALMOST_LINEAR:
            return where + "raise --latent_dim"
        return where + "raise --autoencoder_steps or --autoencoder_learning_rate"
    where = f"the autoencoder loses {max(0.0, by_autoencoder):.2f} of it, the denoiser the rest: "
    more = report.get("more_steps")
    if more is not None and more["score_mean"] is not None:
        generated = next(row for row in report["groups"] if row["name"] == "generated")
        gained = sign * (more["score_mean"] - (generated["score_mean"] or 0.0))
        if gained > lost / 2:
            return where + f"raise --num_inference_steps ({more['num_inference_steps']} reach {more['score_mean']:.2f})"
        where = where[:-2] + f", and {more['num_inference_steps']} denoising steps reach {more['score_mean']:.2f}: "
    return where + "raise --denoiser_steps"


def _against_baselines(report: dict) -> str:
    rows = report["frontier"]["rows"]
    plain = [row for row in rows[1:] if not row["tuned"]]
    if not plain:
        return "They were compared with no baseline."
    counts = Counter(row["verdict"] for row in plain)
    measure = report["metric"]["name"] + (" and novelty together" if rows[0]["max_iou"] is not None else "")
    return (
        f"Of {len(plain)} settings of trivial generators they are better than {counts['better']} and worse than "
        f"{counts['worse']}, and {counts['undecided']} are undecided ({measure}, at {CONFIDENCE:.0%} confidence)."
    )


def _against_tuned_baselines(report: dict) -> str:
    cost = (
        f"The generator was tuned on the task, in {report['tuning']['passes']:,} passes of an image through a network"
    )
    tuned = [row for row in report["frontier"]["rows"][1:] if row["tuned"]]
    if not tuned:
        return f"{cost}; no trivial generator with the same feedback was compared with it."
    counts = Counter(row["verdict"] for row in tuned)
    worse = [row["name"] for row in tuned if row["verdict"] == "worse"]
    sentence = (
        f"{cost}; of {len(tuned)} settings of trivial generators with the same feedback it is better than "
        f"{counts['better']} and worse than {counts['worse']}{f' ({_list(worse)})' if worse else ''}, and "
        f"{counts['undecided']} are undecided."
    )
    entries = report["tuning"]["break_even"]
    if entries:
        first, last = (pick(entries, key=lambda entry: entry["num_models"]) for pick in (min, max))
        sentence += f" Against {first['name']} its cost is paid back after {first['num_models']:,} networks"
        sentence += f", against {last['name']} after {last['num_models']:,}." if last is not first else "."
    return sentence


def _unit(metric: dict) -> str:
    """To be written behind a score."""
    return f" {metric['unit']}" if metric["unit"] else ""


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def break_even(report: dict) -> list[dict]:
    """
    After how many networks a tuned generator has taken fewer passes than the groups that take some for every network.

    Returns:
        `list[dict]`: `name`, `num_models`, and the `verdict` on the group, seen from the generator.
    """
    verdicts = {row["name"]: row["verdict"] for row in report["frontier"]["rows"]}
    rows = {row["name"]: row["feedback"] for row in report["groups"] if "feedback" in row}
    spent = rows["generated"]["once"]
    return [
        {
            "name": name,
            "num_models": max(0, math.ceil((spent - cost["once"]) / cost["each"])),
            "verdict": verdicts[name],
        }
        for name, cost in rows.items()
        if cost["each"]
    ]


def find_warnings(report: dict) -> list[str]:
    """What a reader has to know before believing the numbers."""
    groups = {row["name"]: row for row in report["groups"]}
    warnings = []
    undefined, count = groups["generated"]["num_undefined"], groups["generated"]["n"]
    if undefined:
        what = "predictions that are not finite" if "nll" in groups["generated"] else "no score"
        warnings.append(f"{undefined} of {count} generated networks have {what}.")
    generated_audit = next(row for row in report["audit"]["rows"] if row["name"] == "generated")
    if generated_audit["copies"]:
        warnings.append(
            f"Copies of snapshots are among the {count} generated networks: too near to a snapshot are "
            f"{generated_audit['num_too_near']} (by chance may be {generated_audit['num_allowed']}), nearly identical "
            f"to one {generated_audit['num_near_identical']}."
        )
    snapshots, metric = groups["snapshots"], report["metric"]
    if snapshots["n"] > 1 and snapshots["score_std"] == 0:
        score = f"{metric['name']}, {snapshots['score_mean']:.2f}{_unit(metric)}"
        warnings.append(
            f"All {snapshots['n']} snapshots have the same {score}: comparing generated networks with them says "
            "nothing. Has the base model learned more than chance? If it has, take more test data, or snapshots that "
            "differ more (--collect_learning_rate)."
        )
    if "nll" in snapshots:
        num_test = report["splits"]["test"]
        errors = num_test * (1 - (snapshots["score_mean"] or 0.0) / 100)
        if errors < FEW_ERRORS:
            warnings.append(
                f"A snapshot errs on only {errors:.1f} of {num_test} test examples: the similarity of wrong "
                "predictions can hardly tell networks apart here. For more than a try-out, take a harder task or more "
                "test data."
            )
    explained = report["reconstruction"]
    if explained is not None and (explained["r2_train"] or 0.0) < EXPLAINS_LITTLE:
        warnings.append(
            f"The autoencoder explains only {max(0.0, explained['r2_train'] or 0.0):.0%} of what differs between the "
            "snapshots: it returns little but their mean, so that every generated network is close to an average. "
            "Train it longer or with a higher learning rate."
        )
    return warnings
