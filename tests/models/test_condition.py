"""Conditions: fields and what they refuse, unknown fields, embeddings, and how a denoiser uses them."""

import json
import math

import datasets
import numpy as np
import pytest
import torch

from pdiff_hf import LatentDenoiser
from pdiff_hf.models import DENOISER_PRESETS, ConditionEncoder, ConditionError, Fields

FIELDS = Fields(
    {
        "angle": {"type": "angle", "period": 360.0},
        "blur": {"type": "scalar", "low": 0.0, "high": 2.0},
        "invert": {"type": "category", "values": ["no", "yes"]},
        "bits": {"type": "vector", "length": 3},
    }
)
CONDITIONS = [
    {"angle": 90.0, "blur": 0.5, "invert": "yes", "bits": [0.0, 1.0, 1.0]},
    {"angle": None, "blur": 1.0, "invert": None, "bits": [1.0, 0.0, 0.0]},
]


def test_conditions_survive_the_table():
    table = FIELDS.table(CONDITIONS)
    assert table.shape == (2, 6)
    assert FIELDS.conditions(table) == CONDITIONS
    assert FIELDS.known(table).tolist() == [[True] * 4, [False, True, False, True]]
    assert FIELDS.table([{}]).isnan().all()
    assert Fields(FIELDS.to_dict()).to_dict() == FIELDS.to_dict()


def test_features():
    features = FIELDS.features(FIELDS.table(CONDITIONS[:1]))
    expected = [math.sqrt(2), 0, -math.sqrt(3) / 2, 0, math.sqrt(2), 0, 1, 1]  # in the order of declaration
    torch.testing.assert_close(features, torch.tensor([expected]), atol=1e-6, rtol=0)
    assert FIELDS.feature_fields().tolist() == [0, 0, 1, 2, 2, 3, 3, 3]
    other = FIELDS.features(FIELDS.table([CONDITIONS[0] | {"angle": 90.0 - 360.0}]))
    torch.testing.assert_close(features, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (
            {"angel": 3.0},
            r"no field 'angel' \(did you mean 'angle'\?\); there is 'angle' \(an angle with period 360\); 'blur' \(a",
        ),
        ({"blur": 2.5}, r"'blur' must be a number from 0 to 2, got 2.5 \(it is out of range\)"),
        ({"blur": "much"}, "'blur' must be a number from 0 to 2, got 'much'"),
        ({"angle": math.inf}, "'angle' must be an angle with period 360, got inf"),
        ({"invert": "maybe"}, "'invert' must be one of no, yes, got 'maybe' .there is no such word.$"),
        (
            {"invert": " Yes"},
            r"'invert' must be one of no, yes, got ' Yes' \(there is no such word \(did you mean 'yes'",
        ),
        ({"In Vert": "yes"}, r"a condition has no field 'In Vert' \(did you mean 'invert'\?\)"),
        ("yes", r"a condition is a mapping of fields, got 'yes'; there is 'angle'"),
        ({"bits": [0.0, None, 1.0]}, r"'bits' must be 3 numbers, got \[0.0, None, 1.0\] \(it is not finite"),
        ({"bits": [1.0, 0.0]}, r"'bits' must be 3 numbers, got \[1.0, 0.0\] \(it has shape \(2,\)"),
    ],
)
def test_a_wrong_condition_is_refused(condition, message):
    with pytest.raises(ConditionError, match=message):
        FIELDS.table([condition])


@pytest.mark.parametrize(("value", "word"), [(1, "1"), (2.0, "2"), (np.int64(1), "1"), (True, "true")])
def test_words_that_look_like_numbers(value, word):
    fields = Fields({"label": {"type": "category", "values": ["1", "2", "true"]}})
    assert fields.conditions(fields.table([{"label": value}])) == [{"label": word}]


def test_many_words_are_shown_in_part():
    field = Fields({"x": {"type": "category", "values": [f"word-{i}" for i in range(500)]}})["x"]
    assert str(field).startswith("one of word-0, word-1, ") and str(field).endswith("… (500 words)")
    assert len(str(field)) < 120


def test_fields_keep_their_order_where_json_loses_it(tmp_path):
    fields = {"zoom": {"type": "scalar", "low": 0.0, "high": 1.0}, "angle": {"type": "angle"}}
    encoder = ConditionEncoder(fields, embedding_dim=8)
    encoder.remember(encoder.fields.table([{"zoom": 0.5, "angle": 90.0}, {"zoom": 0.25, "angle": 10.0}]))
    assert encoder.seen.tolist() == [[0.5, 90.0], [0.25, 10.0]]
    encoder.save_pretrained(tmp_path)
    loaded = ConditionEncoder.from_pretrained(tmp_path)
    assert list(loaded.fields) == ["zoom", "angle"]
    assert loaded.fields.conditions(loaded.seen)[0] == {"zoom": 0.5, "angle": 90.0}
    # what older releases wrote: a mapping, whose columns are in the order of the alphabet, as its sorted keys are
    config = json.loads((tmp_path / "config.json").read_text())
    config["fields"] = {field.pop("name"): field for field in config["fields"]}
    (tmp_path / "config.json").write_text(json.dumps(config, sort_keys=True))
    assert list(ConditionEncoder.from_pretrained(tmp_path).fields) == ["angle", "zoom"]


def test_there_may_be_no_fields():
    fields = Fields({})
    assert not fields and fields.width == 0
    table = fields.table([{}, {}])
    assert table.shape == (2, 0) and fields.conditions(table) == [{}, {}]
    assert fields.known(table).shape == fields.features(table).shape == (2, 0)
    assert fields.known(table).all() and fields.perturb(table, table).shape == (2, 0)
    assert fields.feature_fields().shape == (0,)


def test_columns_by_name():
    named = FIELDS.named(FIELDS.table([CONDITIONS[0], CONDITIONS[0] | {"angle": 10.0, "invert": "no"}]))
    assert named["angle"].tolist() == named.angle.tolist() == [90.0, 10.0]
    assert (named["invert"] == "yes").tolist() == [True, False] and (named.invert != "yes").tolist() == [False, True]
    assert named["invert"].tolist() == [1, 0] and named["invert"].dtype == torch.int64
    assert named.one_hot("invert").tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert named["bits"].tolist() == [[0.0, 1.0, 1.0]] * 2
    images = torch.rand(2, 5, 1, 8, 8)
    assert torch.equal(images * named.over(images).blur, images * 0.5)
    assert list(named) == list(FIELDS) and named.num_tasks == 2 and "blur" in named and "hue" not in named
    with pytest.raises(TypeError, match=r"conditions have columns by name, such as conditions\['angle'\]"):
        named[:, 0]
    with pytest.raises(AttributeError, match=r"no field 'angel' \(did you mean 'angle'"):
        named.angel  # noqa: B018
    with pytest.raises(ConditionError, match=r"a category has no word 'Yes' \(did you mean 'yes'"):
        named.invert == "Yes"  # noqa: B015
    with pytest.raises(ConditionError, match="there is no category 'blur'"):
        named.one_hot("blur")


def test_fields_draw_show_and_store_themselves():
    generator = torch.Generator().manual_seed(0)
    drawn = [{name: FIELDS[name].sample(generator) for name in ("angle", "blur", "invert")} for _ in range(200)]
    assert FIELDS.table(drawn).shape == (200, 6)  # all of them are in range
    assert {row["invert"] for row in drawn} == {"no", "yes"}
    assert 0.9 < sum(row["blur"] for row in drawn) / 200 < 1.1
    with pytest.raises(ConditionError, match="3 numbers cannot be drawn at random; a family with such a field needs"):
        FIELDS["bits"].sample(generator)
    assert FIELDS["angle"].line(4) == [0.0, 90.0, 180.0, 270.0] and FIELDS["blur"].line(3) == [0.0, 1.0, 2.0]
    examples = {name: field.example() for name, field in FIELDS.items()}
    assert examples == {"angle": 36.0, "blur": 0.5, "invert": "no", "bits": [1.0, 0.0, 0.0]}
    features = datasets.Features({name: field.feature() for name, field in FIELDS.items()})
    stored = datasets.Dataset.from_list([examples], features=features)
    assert torch.equal(FIELDS.table(stored), FIELDS.table([examples]))


@pytest.mark.parametrize(
    "field", [{}, {"type": "word"}, {"type": "scalar", "low": 1, "high": 1}, {"type": "category", "values": []}, 3]
)
def test_what_is_no_field_is_refused(field):
    with pytest.raises(ConditionError, match="field 'x' of a condition cannot be made from .* one of scalar, angle"):
        Fields({"x": field})


def make_encoder() -> ConditionEncoder:
    torch.manual_seed(0)
    encoder = ConditionEncoder(FIELDS.to_dict(), embedding_dim=16)
    encoder.remember(
        FIELDS.table(
            {"angle": 10.0 * i, "blur": 0.1 * i, "invert": "no" if i < 5 else "yes", "bits": [i % 2, 0, 1]}
            for i in range(10)
        )
    )
    return encoder.eval()


def test_unknown_fields_come_from_the_seen_conditions_together():
    encoder = make_encoder()
    asked = FIELDS.table([{"blur": 0.72}] * 4)
    # Which one follows from the draw: they are in the order of their distance in the known field.
    drawn = FIELDS.conditions(encoder.complete(asked, torch.tensor([0.0, 0.31, 0.99, 0.31])))
    assert [row["blur"] for row in drawn] == pytest.approx([0.72] * 4)
    assert [row["angle"] for row in drawn] == [70.0, 90.0, 0.0, 90.0]
    assert [row["invert"] for row in drawn] == ["yes", "yes", "no", "yes"]
    nothing = FIELDS.conditions(encoder.complete(FIELDS.table([{}]), torch.tensor([0.99])))
    assert nothing[0]["angle"] == 90.0
    complete = FIELDS.table(CONDITIONS[:1])
    assert torch.equal(encoder.complete(complete, torch.zeros(1)), complete)
    with pytest.raises(ConditionError, match="no seen conditions are kept; give 'angle'"):
        ConditionEncoder(FIELDS.to_dict()).complete(asked, torch.zeros(4))


def test_an_encoder_is_saved_with_the_seen_conditions(tmp_path):
    encoder = make_encoder()
    encoder.save_pretrained(tmp_path)
    loaded = ConditionEncoder.from_pretrained(tmp_path)
    table = loaded.complete(FIELDS.table([{"angle": 5.0}]), torch.tensor([0.5]))
    assert torch.equal(table, encoder.complete(FIELDS.table([{"angle": 5.0}]), torch.tensor([0.5])))
    torch.testing.assert_close(loaded(table), encoder(table))  # other addresses, other kernels, other last bits


@pytest.mark.parametrize("preset", ["small", "mlp"])
def test_a_condition_has_no_effect_until_it_is_trained(preset):
    torch.manual_seed(0)
    denoiser = LatentDenoiser(6, **DENOISER_PRESETS[preset] | {"bottleneck_dim": 8}, embedding_dim=16, condition_dim=4)
    last = denoiser.conv_out if preset == "small" else denoiser.layer_out
    torch.nn.init.normal_(last.weight)
    sample, conditions = torch.randn(2, 6), torch.randn(2, 4)
    assert torch.equal(denoiser(sample, 3, conditions).sample, denoiser(sample, 3).sample)
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.1)
    for _ in range(2):
        denoiser(sample, 3, conditions).sample.square().sum().backward()
        optimizer.step()
    assert not torch.equal(denoiser(sample, 3, conditions).sample, denoiser(sample, 3).sample)
    with pytest.raises(ValueError, match=r"condition must have shape \(2, 4\), got \(2, 3\)"):
        denoiser(sample, 3, torch.randn(2, 3))


def test_perturbed_conditions_are_near_and_in_range():
    table = FIELDS.table(CONDITIONS[:1]).repeat(20_000, 1)
    noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
    moved = FIELDS.perturb(table, 0.1 * noise) - table
    columns = {name: moved[:, part] for name, part in FIELDS.columns.items()}
    assert columns["angle"].std().item() == pytest.approx(0.1 * 360 / math.sqrt(12), rel=0.05)
    assert columns["blur"].std().item() == pytest.approx(0.1 * 2 / math.sqrt(12), rel=0.05)
    assert columns["bits"].std().item() == pytest.approx(0.1, rel=0.05)
    assert not columns["invert"].any()
    assert FIELDS.features(FIELDS.perturb(table, 9 * noise)).isfinite().all()
    assert FIELDS.table(FIELDS.conditions(FIELDS.perturb(table[:50], 9 * noise[:50]))).isfinite().all()
