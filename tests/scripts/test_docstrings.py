"""The questions of the recipe for adapters: which tasks there are, what is said of them, and what is asked."""

import torch

from pdiff_hf.scripts.docstrings import ANSWERS, NUM_TASKS, PACKAGES, descriptions, questions, tasks


def test_no_task_is_another_one_or_its_opposite():
    found = tasks()
    assert len(found) == NUM_TASKS == len({min(bits, tuple(1 - bit for bit in bits)) for bits in found})


def test_the_last_description_has_words_of_its_own():
    for bits in tasks()[:20]:
        *seen, last = descriptions(bits, torch.Generator().manual_seed(0))
        chosen = [phrases for bit, phrases in zip(bits, PACKAGES.values(), strict=True) if bit]
        assert all(phrases[-1] in last for phrases in chosen) and last.startswith("answer yes when")
        assert not any(phrases[-1] in text for phrases in PACKAGES.values() for text in seen)


def test_both_answers_are_equally_frequent():
    texts = {package: [f"{package} {i}" for i in range(3)] for package in PACKAGES}
    rows = list(questions(texts, 8, torch.Generator().manual_seed(0)))
    assert len(rows) == 8 * NUM_TASKS
    for row in rows:
        package = row["prompt"].split()[0]
        assert row["answer"] == (package in row["task"].split()) and row["choices"] == ANSWERS
        assert row["packages"] == [float(name in row["task"].split()) for name in PACKAGES]
    answers = torch.tensor([row["answer"] for row in rows]).view(NUM_TASKS, 8)
    assert (answers.sum(1) == 4).all()
