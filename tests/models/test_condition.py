"""Conditions: fields and what they refuse, unknown fields, embeddings, and how a denoiser uses them."""

import math

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
    assert FIELDS.known(table).tolist() == [[True] * 4, [False, True, True, False]]
    assert FIELDS.table([{}]).isnan().all()
    assert Fields(FIELDS.to_dict()).to_dict() == FIELDS.to_dict()


def test_features():
    features = FIELDS.features(FIELDS.table(CONDITIONS[:1]))
    expected = [math.sqrt(2), 0, 0, 1, 1, -math.sqrt(3) / 2, 0, math.sqrt(2)]  # in alphabetical order
    torch.testing.assert_close(features, torch.tensor([expected]), atol=1e-6, rtol=0)
    assert FIELDS.feature_fields().tolist() == [0, 0, 1, 1, 1, 2, 3, 3]
    other = FIELDS.features(FIELDS.table([CONDITIONS[0] | {"angle": 90.0 - 360.0}]))
    torch.testing.assert_close(features, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (
            {"angel": 3.0},
            r"no field 'angel'; there is 'angle' \(an angle with period 360\); 'bits' \(3",
        ),
        ({"blur": 2.5}, r"'blur' must be a number from 0 to 2, got 2.5 \(it is out of range\); there is 'angle'"),
        ({"blur": "much"}, "'blur' must be a number from 0 to 2, got 'much'"),
        ({"angle": math.inf}, "'angle' must be an angle with period 360, got inf"),
        ({"invert": "maybe"}, "'invert' must be one of no, yes, got 'maybe'"),
        ({"bits": [1.0, 0.0]}, r"'bits' must be 3 numbers, got \[1.0, 0.0\] \(it has shape \(2,\)"),
    ],
)
def test_a_wrong_condition_is_refused(condition, message):
    with pytest.raises(ConditionError, match=message):
        FIELDS.table([condition])


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
    nearest = FIELDS.conditions(encoder.complete(asked[:2], torch.tensor([0.0, 0.99]), num_neighbors=2))
    assert [row["angle"] for row in nearest] == [70.0, 80.0]
    nothing = FIELDS.conditions(encoder.complete(FIELDS.table([{}]), torch.tensor([0.99]), num_neighbors=2))
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
