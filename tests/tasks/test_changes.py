"""Families of one's own: what their `change` gets, what it may do, and what is said of a wrong one."""

import pytest
import torch
from support.families import make_family

from pdiff_hf.models.condition import Fields
from pdiff_hf.tasks.draws import ExampleGenerator
from pdiff_hf.tasks.image_families import ImageFamily

INDICES = torch.arange(20)


class Own(ImageFamily):
    fields = Fields(
        {
            "width": {"type": "scalar", "low": 0, "high": 6},
            "shade": {"type": "category", "values": ["dark", "light"]},
        }
    )

    def change(self, conditions, images, labels):
        columns = torch.arange(images.shape[-1])
        hidden = columns < conditions.over(images).width
        return images.masked_fill(hidden, 0) * torch.where(conditions.over(images)["shade"] == "dark", 0.5, 1.0), labels


def own(change=None, cls=Own) -> ImageFamily:
    if change is not None:
        cls = type("Mine", (cls,), {"change": change})
    return cls(make_family().base)


def batch(family, *conditions, split="train"):
    return family.batch(split, family.fields.table(conditions), INDICES)


def test_fields_in_the_order_of_declaration_and_drawn_by_themselves():
    family = own()
    assert list(family.fields) == ["width", "shade"]
    drawn = family.conditions(20, seed=0)
    assert all(set(condition) == {"width", "shade"} and 0 <= condition["width"] <= 6 for condition in drawn)
    assert {condition["shade"] for condition in drawn} == {"dark", "light"}
    family.check()
    pixels = batch(family, {"width": 3, "shade": "light"}, {"width": 0, "shade": "light"})["pixel_values"]
    assert (pixels[0, ..., :3] == pixels.min()).all() and torch.equal(pixels[0, ..., 3:], pixels[1, ..., 3:])
    assert family.curve(3) == ("width", [{"width": w, "shade": "dark"} for w in (0.0, 3.0, 6.0)])


def noise(self, conditions, images, labels, generator):
    return images + 0.1 * conditions.over(images).width * generator.randn_like(images), labels


def test_random_changes_belong_to_task_and_example():
    family, conditions = own(noise), [{"width": 1, "shade": "dark"}, {"width": 6, "shade": "dark"}]
    together = batch(family, *conditions)["pixel_values"]
    assert torch.equal(together, batch(own(noise), *conditions)["pixel_values"])
    torch.testing.assert_close(batch(family, conditions[1])["pixel_values"], together[1:])
    table = family.fields.table(conditions)
    other = family.batch("train", table.flip(0), torch.tensor([[7, 3], [3, 9]]))["pixel_values"]
    torch.testing.assert_close(other[0], together[1, [7, 3]])
    torch.testing.assert_close(other[1], together[0, [3, 9]])
    steps = [torch.Generator().manual_seed(seed) for seed in (5, 5, 6)]  # a training sees other noise at every step
    first, again, later = (family.training_batch(table, INDICES, step)["pixel_values"] for step in steps)
    assert torch.equal(first, again) and not torch.equal(first, later) and not torch.equal(first, together)
    torch.testing.assert_close(first.mean(), later.mean(), rtol=0.05, atol=0.02)
    with pytest.raises(ValueError, match="the field 'shade' of Mine .one of dark, light. changes no image"):
        family.check()


def test_numbers_of_examples_are_random():
    generator = ExampleGenerator(torch.rand(20, 2), torch.arange(50))
    normal, uniform, whole = generator.randn(8, 8), generator.rand(8, 8), generator.randint(3, 8)
    assert normal.shape == uniform.shape == (20, 50, 8, 8) and whole.shape == (20, 50, 8)
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02 and normal.isfinite().all()
    assert abs(uniform.mean() - 0.5) < 0.01 and uniform.min() >= 0 and uniform.max() < 1
    assert whole.unique().tolist() == [0, 1, 2]
    flat = torch.cat([normal.flatten(1), generator.randn(8, 8).flatten(1)])  # tasks, draws
    assert (torch.corrcoef(flat) - torch.eye(40)).abs().max() < 0.1
    other = ExampleGenerator(torch.rand(20, 2), torch.arange(50), stream=1)
    assert not torch.equal(other.rand(2), ExampleGenerator(torch.rand(20, 2), torch.arange(50)).rand(2))


def returns(value):
    return lambda self, conditions, images, labels: value(conditions, images, labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (returns(lambda c, x, y: None), "must return two tensors, `images, labels`, and returns a NoneType"),
        (returns(lambda c, x, y: x), "must return two tensors, `images, labels`, and returns a Tensor"),
        (returns(lambda c, x, y: (x, y, c)), "must return two tensors, `images, labels`, and returns 3 values"),
        (returns(lambda c, x, y: (x[..., :4], y)), r"images of shape \(2, 20, 1, 8, 8\), .* returns \(2, 20, 1, 8, 4"),
        (returns(lambda c, x, y: (x, y[0])), r"must return labels of shape \(2, 20\), .* returns \(20,\)"),
        (returns(lambda c, x, y: ((255 * x).byte(), y)), "images as floats from 0 to 1, and returns torch.uint8"),
        (returns(lambda c, x, y: (255 * x, y)), "must return images about 0 to 1, and returns values from 0 to 255"),
        (returns(lambda c, x, y: (x / 0, y)), "must return images about 0 to 1, and returns values from nan to nan"),
        (returns(lambda c, x, y: (x, y.float())), "must return labels as whole numbers, and returns torch.float32"),
        (returns(lambda c, x, y: (x, y + 9)), "must return labels from 0 to 9, and returns some from 9 to 18"),
        (returns(lambda c, x, y: (x, y - 1)), "must return labels from 0 to 9, and returns some from -1 to 8"),
        (returns(lambda c, x, y: (x.to("meta"), y)), "images on cpu, where it gets them, and returns them on meta"),
        (returns(lambda c, x, y: (x * c["widht"], y)), r"no field 'widht' \(did you mean 'width'\?\)"),
        (returns(lambda c, x, y: (x * c[:, 0], y)), r"conditions have columns by name, such as conditions\['width'\]"),
        (returns(lambda c, x, y: (x * c.width, y)), "RuntimeError: The size of tensor"),
        (
            returns(lambda c, x, y: (x * c["shade"][:, 1], y)),
            r"IndexError: too many indices.* conditions.one_hot\('shade'\), shape \(T, number of words\)",
        ),
        (returns(lambda c, x, y: (x * (c.shade == "Dark"), y)), r"no word 'Dark' \(did you mean 'dark'\?\)"),
    ],
)
def test_a_wrong_change_is_said_with_its_line(change, message):
    family = own(change)
    conditions = [{"width": 1, "shade": "dark"}, {"width": 6, "shade": "light"}]
    with pytest.raises(ValueError, match=rf"^Mine.change \(test_changes.py, line \d+\).*{message}"):
        batch(family, *conditions)


def test_the_line_is_that_of_the_error():
    def change(self, conditions, images, labels):
        images = images + 0
        return images * conditions.nothing, labels

    line = change.__code__.co_firstlineno + 2
    with pytest.raises(ValueError, match=rf"Mine.change \(test_changes.py, line {line}\): AttributeError"):
        batch(own(change), {"width": 1, "shade": "dark"})


def test_other_whole_numbers_and_floats_are_taken():
    family = own(returns(lambda c, x, y: (x.double(), (y > 4).to(torch.uint8))))
    found = batch(family, {"width": 1, "shade": "dark"})
    assert found["pixel_values"].dtype == torch.float32 and found["labels"].dtype == torch.int64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (returns(lambda c, x, y: (x * c.over(x).width / 6, y)), "the field 'shade' of Mine .* changes no image"),
        (returns(lambda c, x, y: (x + torch.rand(x.shape), y)), "Mine gives other examples a second time"),
        (
            returns(lambda c, x, y: (x * (c.over(x).width - c.width.mean()) * (1 + c.over(x).shade), y)),
            "Mine gives a task other examples where there are other tasks",
        ),
        # a category taken for one-hot
        (
            returns(lambda c, x, y: (x * c.over(x).width / 6 / (1 + c.shade.argmax(-1)), y)),
            "Mine gives a task other examples",
        ),
    ],
)
def test_what_a_look_at_a_few_tasks_finds(change, message):
    with pytest.raises(ValueError, match=message):
        own(change).check()


@pytest.mark.parametrize("kind", ["transformed", "grouped"])
def test_our_own_families_pass(kind):
    make_family(kind).check()
