"""Families that people write: what `change` and `draw` do, and may not do."""

import importlib
import random
import sys

import numpy as np
import pytest
import torch

from pdiff_hf import Fields, ImageClassificationTask
from pdiff_hf.tasks.image_families import ImageFamily
from pdiff_hf.training import make_sampling_scheduler

RATE = Fields({"rate": {"type": "scalar", "low": 0, "high": 8}})
WORD = Fields({"kind": {"type": "category", "values": ["plain", "inverted"]}})
PAIR = Fields({"pair": {"type": "vector", "length": 2}})
INDICES = torch.arange(20)


@pytest.fixture(scope="module")
def digits() -> ImageClassificationTask:
    arguments = {"in_chans": 1, "img_size": 8}
    return ImageClassificationTask("mlp_mini", "digits", image_size=8, model_args=arguments, max_train_samples=64)


def make(digits, fields=RATE, **methods) -> ImageFamily:
    return type("Own", (ImageFamily,), {"fields": fields, **methods})(digits)


def brightness(self, conditions, images, labels):
    return images * conditions.over(images).rate / 8, labels


def in_radians(self, conditions, images, labels):
    rate = conditions.over(images).rate
    rate /= 8  # in place
    return images * rate, labels


def whole_table(self, conditions, images, labels):
    conditions.table.div_(8)
    return images * conditions.over(images).rate, labels


def shifted_labels(self, conditions, images, labels):
    for task, rate in enumerate(conditions.rate.round().int().tolist()):
        labels[task] = (labels[task] + rate) % 10
        images[task, ..., :rate] = 0
    return images, labels


@pytest.mark.parametrize("change", [in_radians, whole_table, shifted_labels])
def test_what_is_written_in_place_changes_nothing_else(change, digits):
    family = make(digits, change=change)
    family.check()
    table = family.fields.table([{"rate": rate} for rate in (0, 8, 3)])
    given, together = table.clone(), family.batch("train", table, INDICES)
    assert torch.equal(table, given)
    for task in range(3):
        alone = family.batch("train", table[task : task + 1], INDICES)
        assert all(torch.equal(alone[name][0], together[name][task]) for name in alone)
    again = family.batch("train", table, INDICES)
    assert all(torch.equal(again[name], together[name]) for name in again)


def test_a_draw_that_fills_in_one_object_again_and_again(digits):
    condition, pair = {}, [0.0, 0.0]

    def draw(self, generator):
        condition["rate"] = 8 * torch.rand((), generator=generator).item()
        return condition

    def draw_pair(self, generator):
        pair[:] = torch.rand(2, generator=generator).tolist()
        return {"pair": pair}

    def offset(self, conditions, images, labels):
        return images + conditions.pair.mean(1).view(-1, 1, 1, 1, 1), labels

    for family in (make(digits, change=brightness, draw=draw), make(digits, PAIR, change=offset, draw=draw_pair)):
        family.check()
        drawn = family.conditions(4, seed=0)
        assert len({str(condition) for condition in drawn}) == 4


GLOBAL = {
    "random": lambda self, generator: {"rate": 8 * random.random()},
    "NumPy": lambda self, generator: {"rate": 8 * np.random.rand()},
    "torch": lambda self, generator: {"rate": 8 * torch.rand(()).item()},
}


@pytest.mark.parametrize("draw", GLOBAL.values(), ids=GLOBAL)
def test_a_draw_from_a_global_generator(draw, digits):
    with pytest.raises(ValueError, match="Own.draw gives other conditions a second time.*argument `generator`"):
        make(digits, change=brightness, draw=draw).check()


@pytest.mark.parametrize("value", [{}, {"rate": None}])
def test_a_draw_that_leaves_a_field_out(value, digits):
    with pytest.raises(ValueError, match="Own.draw must give a value of each field: 'rate'"):
        make(digits, change=brightness, draw=lambda self, generator: value).check()


@pytest.mark.parametrize("fields", [dict(RATE.to_dict()), None])
def test_fields_that_are_none(fields, digits):
    with pytest.raises(ValueError, match=r"Own needs `fields = Fields\({...}\)`"):
        make(digits, fields, change=brightness).check()


@pytest.mark.parametrize("values", [lambda column: column.tolist(), list])
def test_a_category_compared_number_by_number(values, digits):
    """Its numbers are equal to no word, so that nothing is ever changed."""

    def change(self, conditions, images, labels):
        for task, kind in enumerate(values(conditions.kind)):
            if kind == "inverted":
                images[task] = 1 - images[task]
        return images, labels

    with pytest.raises(ValueError, match=r"changes no image.*use conditions\['kind'\] == 'inverted'"):
        make(digits, WORD, change=change).check()


RETURNS = {
    "half the examples": (lambda images, labels: (images[:, ::2], labels[:, ::2]), "images of shape"),
    "labels and images": (lambda images, labels: (labels, images), r"returns \(8, 32\)"),
    "a mapping": (lambda images, labels: {"images": images, "labels": labels}, "two tensors.*returns a dict"),
    "arrays": (lambda images, labels: (images.numpy(), labels.numpy()), "two tensors"),
    "one-hot labels": (lambda images, labels: (images, torch.eye(10)[labels]), r"labels of shape \(8, 32\)"),
}


@pytest.mark.parametrize(("result", "message"), RETURNS.values(), ids=RETURNS)
def test_other_results_of_a_change(result, message, digits):
    with pytest.raises(ValueError, match=f"Own.change .test_families.py, line .*{message}"):
        make(digits, change=lambda self, conditions, images, labels: result(images, labels)).check()


def test_a_file_that_was_written_for_the_last_version_is_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "pdiff_hf.tasks.families", raising=False)
    with pytest.warns(FutureWarning, match="import ImageFamily from pdiff_hf"):
        families = importlib.import_module("pdiff_hf.tasks.families")
    assert families.ImageFamily is ImageFamily
    assert importlib.import_module("pdiff_hf.run.stages").make_sampling_scheduler is make_sampling_scheduler
