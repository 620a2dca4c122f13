"""What a report of posteriors says follows from its numbers."""

import re

import torch
from benchmarks.masked_conditions import MaskedConditions
from benchmarks.posterior_report import (
    GENERATOR,
    TRAINING_NETWORKS,
    ZOO_GENERATOR,
    best_of,
    compare,
    pool_reports,
    render_markdown,
    verdict,
    zoo_verdict,
)
from support.families import make_family

KINDS = {
    GENERATOR: "generator",
    TRAINING_NETWORKS: "closed form",
    "kernel ridge": "closed form",
    "trained on the task": "oracle",
    ZOO_GENERATOR: "zoo",
}


def make_report(seed: int = 0) -> dict:
    def scores(accuracy: float, nll: float) -> dict:
        spread = [0.0, 1.0, 2.0, 3.0]
        return {
            "accuracy": [accuracy + s for s in spread],
            "nll": [nll + s / 10 for s in spread],
            "joint_nll": [20 * nll + s for s in spread],
            "passes": 2048,
            "choice": "temperature 1",
        }

    methods = {
        GENERATOR: scores(70, 0.8),
        TRAINING_NETWORKS: scores(60, 0.9),
        "kernel ridge": scores(65, 1.0),
        "trained on the task": scores(70.5, 0.7),
        ZOO_GENERATOR: scores(59, 0.85),
    }
    return {
        "settings": {"seed": seed},
        "rows": {name: {"kind": kind, "once": 2_000_000} for name, kind in KINDS.items()},
        "examples": {"10 examples": methods},
        "fields": {"angle unknown": dict(methods)},
        "ideal": {},
        "validity": {GENERATOR: {"mean": 71.0, "std": 2.0, "n": 64}},
    }


def test_comparisons_are_positive_where_the_first_is_better():
    section = make_report()["examples"]["10 examples"]
    assert compare(section, "accuracy", GENERATOR, "kernel ridge")["difference"] == 5
    row = compare(section, "nll", GENERATOR, "kernel ridge")
    assert abs(row["difference"] - 0.2) < 1e-9 and row["verdict"] == "better"
    assert best_of(section, "accuracy", ["kernel ridge", TRAINING_NETWORKS]) == "kernel ridge"
    assert best_of(section, "nll", ["kernel ridge", TRAINING_NETWORKS]) == TRAINING_NETWORKS


def test_the_verdict_names_the_best_opponent_in_each_metric():
    (sentence,) = verdict(make_report(), "examples", ("accuracy", "nll"))
    assert sentence.startswith("10 examples: 71.50 / 0.95 (accuracy / NLL, 4 tasks).")
    assert "every closed-form opponent: better in accuracy (kernel ridge 66.50; +5.00" in sentence
    assert "better in NLL (training networks 1.05; +0.10" in sentence
    assert "trained on the task: worse in accuracy (trained on the task 72.00; -0.50" in sentence
    (sentence,) = zoo_verdict(make_report())
    assert sentence.startswith("10 examples: worse in accuracy (-1.00") and "better in NLL (+0.05" in sentence


def test_seeds_are_pooled_and_everything_is_in_the_tables():
    first, second = make_report(0), make_report(1)
    second["examples"]["10 examples"].pop("kernel ridge")
    pooled = pool_reports([first, second])
    assert (
        "kernel ridge" not in pooled["examples"]["10 examples"] and "kernel ridge" in pooled["fields"]["angle unknown"]
    )
    assert len(pooled["examples"]["10 examples"][GENERATOR]["accuracy"]) == 8
    assert pooled["examples"]["10 examples"][GENERATOR]["passes"] == 2048
    text = re.sub(" +", " ", render_markdown(pooled))
    assert "| generator | 71.5 / 0.950 | 2M | 2.05k |" in text
    assert "| generator | 17.5 (71.5) | 2M |" in text and "| generator | 71.0 ± 2.0 | 64 |" in text


def test_what_is_unknown_makes_no_difference_to_masked_conditions():
    for kind in ("transformed", "grouped"):
        fields = make_family(kind).fields
        table = fields.table(make_family(kind).conditions(5, seed=0))
        encoder = MaskedConditions(fields, 8)
        other = table.clone()
        other[:, 1:3] = table.roll(1, 0)[:, 1:3]  # blur and inversion, or two bits
        assert not torch.equal(encoder(table), encoder(other))
        hidden = torch.zeros_like(table, dtype=torch.bool)
        hidden[:, 1:3] = True
        one, two = (encoder(torch.where(hidden, torch.nan, rows)) for rows in (table, other))
        assert torch.equal(one, two) and not torch.equal(one, encoder(table))
        everything = encoder(torch.full_like(table, torch.nan))
        assert everything.isfinite().all() and (everything == everything[0]).all()
