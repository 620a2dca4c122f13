"""Families: what a condition does to the examples, splits by task that do not leak, and what is refused."""

import pytest
import torch
from support.families import make_family

from pdiff_hf.models import ConditionError
from pdiff_hf.tasks.family import as_family

PLAIN = {"angle": 0.0, "blur": 0.0, "invert": "no", "occlude": "none"}


def change(**values) -> tuple[torch.Tensor, torch.Tensor]:
    """An image of 8×8 pixels, and what the family makes of it."""
    family = make_family()
    images = torch.rand(1, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    conditions = family.fields.named(family.fields.table([PLAIN | values]))
    return images[0, 0, 0], family.change(conditions, images, torch.zeros(1, 1, dtype=torch.long))[0][0, 0, 0]


def test_what_a_condition_does_to_an_image():
    image, plain = change()
    torch.testing.assert_close(plain, image, atol=1e-5, rtol=0)
    for angle, turns in ((90.0, 1), (180.0, 2), (270.0, 3)):
        torch.testing.assert_close(change(angle=angle)[1], torch.rot90(image, turns), atol=1e-5, rtol=0)
    torch.testing.assert_close(change(invert="yes")[1], 1 - image, atol=1e-5, rtol=0)
    hidden = change(occlude="left")[1]
    assert (hidden[:, :3] == 0).all() and torch.allclose(hidden[:, 3:], image[:, 3:], atol=1e-5)
    # A Gaussian on a line of pixels, whose weights add up to 1 at the border too.
    weights = torch.exp(-0.5 * (torch.arange(8.0).view(-1, 1) - torch.arange(8.0)).square())
    weights = weights / weights.sum(1, keepdim=True)
    torch.testing.assert_close(change(blur=1.0)[1], weights @ image @ weights.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["transformed", "grouped"])
def test_many_tasks_at_once_are_those_one_by_one(kind):
    family = make_family(kind)
    conditions = family.conditions(3, seed=0)
    indices = torch.tensor([[5, 1], [0, 3], [7, 7]])
    batch = family.batch("train", family.fields.table(conditions), indices)
    same = family.batch("train", family.fields.table(conditions), indices[0])
    for t, condition in enumerate(conditions):
        task = family.task(condition)
        one = task.collate(task.load_split("train").__getitems__(indices[t].tolist()))
        torch.testing.assert_close(one["pixel_values"], batch["pixel_values"][t])
        assert torch.equal(one["labels"], batch["labels"][t])
        shared = task.load_split("train").__getitems__(indices[0].tolist())
        torch.testing.assert_close(shared["pixel_values"], same["pixel_values"][t])


def test_equal_groups_and_complements_are_on_one_side_of_the_split():
    family = make_family("grouped")
    sets = family.split({"train": 300, "validation": 100, "test": 111}, seed=0)
    groups = [frozenset(i for i, bit in enumerate(row["positive"]) if bit) for rows in sets.values() for row in rows]
    assert len(set(groups)) == 511  # all of them: 2^9 - 1
    assert not any(frozenset(range(10)) - group in groups for group in groups)
    assert family.key({"positive": [1, 0] * 5}) == family.key({"positive": [0, 1] * 5})
    labels = family.batch("train", family.fields.table(sets["test"][:1]), torch.arange(50))["labels"][0]
    digits = family.base.load_split("train").labels[:50].tolist()
    assert labels.tolist() == [int(sets["test"][0]["positive"][digit]) for digit in digits]
    assert family.load_base_model().config.num_labels == 2
    with pytest.raises(ValueError, match="fewer than 1 tasks outside its test sets besides 511 others: found 0"):
        family.conditions(1, seed=1, without={family.key(row) for rows in sets.values() for row in rows})


def test_regions_are_kept_for_the_test_sets():
    family = make_family(hold_out=("combinations", "extrapolation"))
    sets = family.split({"train": 60, "test": 20, "combinations": 10, "extrapolation": 10}, seed=0)
    for name in ("train", "test"):
        assert all(row["blur"] <= 1.2 for row in sets[name])
        assert not any(row["invert"] == "yes" and row["occlude"] in ("right", "bottom") for row in sets[name])
    assert all(row["invert"] == "yes" and row["occlude"] in ("right", "bottom") for row in sets["combinations"])
    assert all(row["blur"] > 1.2 for row in sets["extrapolation"])
    assert family.split({"train": 60}, seed=0)["train"] == sets["train"]
    keys = [family.key(row) for rows in sets.values() for row in rows]
    assert len(set(keys)) == len(keys)
    with pytest.raises(ValueError, match="there is no set of tasks 'tests'; there are train, validation, test, comb"):
        family.split({"tests": 3}, seed=0)


def test_ranges():
    family = make_family(ranges={"angle": [0, 90], "blur": None, "occlude": ["none", "top"]})
    rows = family.conditions(50, seed=0)
    assert set(rows[0]) == {"angle", "invert", "occlude"} and {row["occlude"] for row in rows} == {"none", "top"}
    assert all(0 <= row["angle"] <= 90 for row in rows)
    with pytest.raises(ConditionError, match="no field 'zoom'; it has angle, blur, invert, occlude"):
        make_family(ranges={"zoom": [1, 2]})
    with pytest.raises(ConditionError, match="'occlude' can be none, left, right, top, bottom, not 'middle'"):
        make_family(ranges={"occlude": ["none", "middle"]})


def test_a_single_task_is_a_family_of_one_without_fields():
    task = make_family().base
    family = as_family(task)
    assert as_family(family) is family and not family.fields and family.fields.width == 0
    assert family.split({"train": 5, "test": 5}, seed=0) == {"train": [{}], "validation": [{}], "test": [{}]}
    table = family.fields.table([{}, {}])
    assert table.shape == (2, 0) and family.fields.conditions(table) == [{}, {}]
    assert family.fields.known(table).all(1).tolist() == [True, True] and family.fields.features(table).shape == (2, 0)
    assert family.task({}) is family.mixture(table) is task and family.fingerprint("test") == task.fingerprint("test")
    batch = family.batch("train", table, torch.tensor([3, 1]))
    one = task.collate(task.load_split("train").__getitems__([3, 1]))
    for values in batch["pixel_values"]:
        assert torch.equal(values, one["pixel_values"])
    assert batch["labels"].tolist() == [one["labels"].tolist()] * 2
    with pytest.raises(ConditionError, match="no field 'angle'; there is none"):
        family.task({"angle": 3.0})
