"""What people read: Markdown that a real parser reads as meant, whatever numbers are missing, and one screen of it."""

import copy
import re

import torch
from support.evaluation import digits_snapshots
from support.markdown import check_markdown, tables

from pdiff_hf.evaluation.figures import draw_figures
from pdiff_hf.evaluation.render import best_of_families, format_report, format_summary, summarise, table
from pdiff_hf.evaluation.verdict import find_warnings, write_verdict


def test_a_report_opens_with_one_screen_and_folds_the_rest(whole):
    report, folder = whole
    text = (folder / "report.md").read_text()
    check_markdown(text, folder)
    opening, _, rest = text.partition("<details>")
    assert opening.startswith(f"# Report\n\n{format_summary(report).rstrip()}") and len(opening.split()) < 400
    assert report["summary"]["about"] in opening and opening.count("![") == 1
    assert rest.count("![") == 5 and report["frontier"]["sentence"] in rest and report["audit"]["verdict"] in rest
    assert all(f"| {row['name']} " in rest for row in report["groups"])  # every setting is in the folded tables
    outside = re.sub("<details>.*?</details>", "", text, flags=re.DOTALL)
    assert outside.strip() == opening.strip()


def test_the_summary_has_at_most_eight_rows_and_the_best_setting_of_a_family(whole):
    report, _ = whole
    (shown,) = tables(format_summary(report))
    header, *rows = shown
    assert header[:3] == ["group", "n", "accuracy (%)"] and 4 < len(rows) <= 8
    assert [row[0] for row in rows[:4]] == ["snapshots", "mean", "reconstructed", "generated"]
    best = best_of_families(report)
    for row in best:
        same = [other for other in report["groups"] if other["family"] == row["family"]]
        assert row["validation_score_mean"] == max(other["validation_score_mean"] for other in same)
    means = [row["validation_score_mean"] for row in best]
    assert means == sorted(means, reverse=True) and [row["name"] for row in best[:4]] == [row[0] for row in rows[4:]]
    verdicts = {row["name"]: row["verdict"] for row in report["frontier"]["rows"]}
    assert all(row[-1] == verdicts[row[0]] for row in rows[4:])
    lower = copy.deepcopy(report) | {"metric": report["metric"] | {"higher_is_better": False}}
    means = [row["validation_score_mean"] for row in best_of_families(lower)]
    assert means == sorted(means)


def test_tables_of_any_width_are_tables():
    header, rows = ["", "n"], [["a", "1"], ["b|c", "2"], ["", "–"]]
    text = table(header, rows)
    check_markdown(text)
    assert tables(text) == [[header, ["a", "1"], ["b|c", "2"], ["", "–"]]]


def leaves(values, path=()):
    """Paths to all numbers that may be missing."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from leaves(value, (*path, key))
    elif isinstance(values, list):
        for i, value in enumerate(values[:2]):  # more of the same
            yield from leaves(value, (*path, i))
    elif isinstance(values, float):
        yield path


def without(report: dict, paths) -> dict:
    report = copy.deepcopy(report)
    for *path, last in paths:
        part = report
        for key in path:
            part = part[key]
        part[last] = None
    return report


def rendered(report: dict) -> str:
    report["warnings"] = find_warnings(report)
    report["verdict"] = write_verdict(report)
    report["summary"] = summarise(report)
    return format_report(report, ["accuracy_vs_similarity.png"])


def test_any_number_may_be_missing(whole):
    """One at a time, all of one kind, and all together."""
    report, _ = whole
    report = copy.deepcopy(report) | {"difference": report["difference"] | {"verdict": "worse"}}
    report["groups"], report["frontier"]["rows"] = report["groups"][:6], report["frontier"]["rows"][:3]
    report["audit"]["rows"] = report["audit"]["rows"][:6]
    paths = list(leaves(report))
    kinds = {path[-1] if isinstance(path[-1], str) else path[-2] for path in paths}
    choices = [[path] for path in paths[:: max(1, len(paths) // 60)]]
    choices += [[path for path in paths if kind in path] for kind in kinds] + [paths]
    for missing in choices:
        text = rendered(without(report, missing))
        check_markdown(text)
        assert not re.search(r"\b(None|nan|inf)\b", text), missing


def test_figures_of_a_report_without_numbers(whole, tmp_path):
    report, _ = whole
    snapshots = digits_snapshots()
    empty = without(report, list(leaves_of_all(report)))
    empty["groups"][0]["score_mean"] = 90.0  # an accuracy is always defined
    generated = torch.cat([snapshots[:2], torch.full_like(snapshots[:1], torch.inf)])
    for given in (report, empty):
        draw_figures(given, tmp_path, snapshots=snapshots, generated=generated, tensor_sizes=[80, 80])
        assert len(list(tmp_path.glob("*.png"))) == 4


def leaves_of_all(report: dict):
    """Paths to every value of every network."""
    for i, row in enumerate(report["groups"]):
        yield from (("groups", i, "scores", j) for j in range(len(row["scores"])))
        yield from (("audit", "rows", i, "iou", j) for j in range(len(report["audit"]["rows"][i]["iou"])))
