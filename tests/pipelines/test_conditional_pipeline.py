"""A pipeline with conditions: what it takes, what it draws, guidance, saved folders, and what it refuses."""

import numpy as np
import pandas as pd
import pytest
import torch
from support.pipelines import LATENT_DIM, make_conditional_pipeline, make_network, make_pipeline, sample

from pdiff_hf import PDiffPipeline
from pdiff_hf.pipelines.conditions import embed_conditions, prepare_conditions

KNOWN = {"angle": 37.0, "blur": 0.4, "kind": "plain", "bits": [0, 1, 1]}


@pytest.fixture(scope="module")
def pipe() -> PDiffPipeline:
    return make_conditional_pipeline()


def test_one_condition_a_list_of_them_and_embeddings(pipe):
    other = KNOWN | {"angle": 211.0}
    both = sample(pipe, 3, condition=[KNOWN, other])
    assert both.shape == (6, pipe.autoencoder.layout.num_parameters)
    assert torch.equal(both[:3], sample(pipe, 3, condition=KNOWN))
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    again = [torch.Generator().manual_seed(i) for i in range(2)]
    one, two = (
        pipe(2, 3, generators, condition=KNOWN, output_type="pt").parameters,
        pipe(2, 3, again, condition=other, output_type="pt").parameters,
    )
    assert not torch.equal(one, two)  # the same noise, another task
    with torch.no_grad():
        embeddings = pipe.condition_encoder(pipe.condition_encoder.fields.table([KNOWN]))
    latents = torch.randn(2, LATENT_DIM, generator=torch.Generator().manual_seed(5))
    settings = {"latents": latents, "num_inference_steps": 3, "output_type": "pt"}
    given = pipe(2, condition=embeddings, **settings).parameters
    torch.testing.assert_close(given, pipe(2, condition=KNOWN, **settings).parameters)


def test_the_same_bits_whatever_the_number_of_networks(pipe):
    partly = {"angle": 37.0, "blur": None}
    many = sample(pipe, 50, condition=partly)
    for count in (1, 9, 41):
        assert torch.equal(sample(pipe, count, condition=partly), many[:count])


def test_what_is_not_known_is_drawn_from_the_seen_conditions(pipe):
    encoder = pipe.condition_encoder
    generators = [torch.Generator().manual_seed(i) for i in range(64)]
    table = prepare_conditions(encoder, {"angle": 5.0}, 64)
    drawn = []
    draw = encoder.complete
    encoder.complete = lambda *args: drawn.append(draw(*args)) or drawn[-1]  # what the pipeline uses
    try:
        embed_conditions(encoder, table, generators)
    finally:
        del encoder.complete
    rows = [row for block in drawn for row in encoder.fields.conditions(block)][:64]
    seen = encoder.fields.conditions(encoder.seen)
    assert all(row["angle"] == pytest.approx(5.0) for row in rows)
    others = [{key: value for key, value in row.items() if key != "angle"} for row in rows]
    known = [{key: value for key, value in row.items() if key != "angle"} for row in seen]
    assert all(other in known for other in others)
    assert len({str(other) for other in others}) == len(seen)  # all of them come up
    assert not torch.equal(sample(pipe, 2), sample(pipe, 2, condition=KNOWN))  # nothing known at all


def test_conditions_share_the_candidates_of_a_posterior(pipe):
    conditions = [KNOWN, KNOWN | {"angle": 211.0}]
    nothing = {"pixel_values": torch.zeros(0, 3, 32, 32), "labels": torch.zeros(0, dtype=torch.long)}
    settings = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)}
    found = pipe.posterior(nothing, 6, 6, conditions, **settings)
    expected = sample(pipe, 3, condition=conditions)
    torch.testing.assert_close(found.parameters, expected)  # without labels, each is drawn once
    torch.testing.assert_close(found.weights, torch.full((6,), 1 / 6))


def test_guidance_moves_away_from_the_prediction_without_a_condition(pipe):
    latents = torch.randn(3, LATENT_DIM, generator=torch.Generator().manual_seed(0))
    timestep = pipe.scheduler.config.num_train_timesteps - 1
    with torch.no_grad():
        embedding = pipe.condition_encoder(pipe.condition_encoder.fields.table([KNOWN] * 3))
        given = pipe.denoiser(latents, timestep, embedding).sample
        without = pipe.denoiser(latents, timestep).sample
    seen = []

    class Kept(type(pipe.scheduler)):
        def step(self, prediction, *args, **kwargs):
            seen.append(prediction)
            return super().step(prediction, *args, **kwargs)

    kept = PDiffPipeline(**pipe.components | {"scheduler": Kept.from_config(pipe.scheduler.config)})
    kept.set_progress_bar_config(disable=True)
    kept(3, 1, latents=latents, condition=KNOWN, guidance_scale=2.5, output_type="latent")
    torch.testing.assert_close(seen[-1], without + 2.5 * (given - without))
    plain = sample(pipe, 3, condition=KNOWN)
    assert torch.equal(sample(pipe, 3, condition=KNOWN, guidance_scale=1.0), plain)
    assert not torch.equal(sample(pipe, 3, condition=KNOWN, guidance_scale=2.0), plain)


def test_conditions_as_other_libraries_have_them(pipe):
    rows = [{"angle": 10, "blur": "0.5", "kind": np.str_("plain")}, {"kind": "inverted"}]
    expected = sample(pipe, 2, condition=[{"angle": 10.0, "blur": 0.5, "kind": "plain"}, {"kind": "inverted"}, {}])
    frame = pd.DataFrame([*rows, {}])
    assert frame["blur"].isna().tolist() == [False, True, True]
    assert torch.equal(sample(pipe, 2, condition=[*rows, None]), expected)
    assert torch.equal(sample(pipe, 2, condition=frame), expected)
    assert torch.equal(sample(pipe, 2, condition=frame.iloc[0]), sample(pipe, 2, condition=rows[0]))


def test_fields_that_are_drawn_are_said_once(caplog):
    pipe = make_conditional_pipeline()
    for condition in (KNOWN, {"blur": 1.0, "bits": [0, 0, 1]}, {"blur": 1.5, "bits": [0, 1, 1]}, {"blur": 1.0}):
        sample(pipe, 1, condition=condition)
    said = [record.getMessage() for record in caplog.records if "drawn" in record.getMessage()]
    assert said == [
        "drawn from the conditions seen in training: angle, kind",
        "drawn from the conditions seen in training: angle, kind, bits",
    ]


@pytest.mark.parametrize("dropout", [0.0, None])
def test_guidance_without_dropout_is_refused(pipe, tmp_path, dropout):
    denoiser = pipe.denoiser
    denoiser.register_to_config(condition_dropout=dropout)
    if dropout is None:  # as older releases saved it
        torch.nn.init.zeros_(denoiser.null_condition)
    pipe.save_pretrained(tmp_path)
    loaded = PDiffPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="guidance_scale must be 1, got 4.0: the denoiser was trained with condition_"):
        loaded(2, 3, condition=KNOWN, guidance_scale=4.0)
    assert sample(loaded, condition=KNOWN, guidance_scale=1.0).isfinite().all()


def test_a_saved_folder_knows_its_conditions(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = PDiffPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    for condition in (KNOWN, {"blur": 1.0}, None):
        assert torch.equal(sample(loaded, condition=condition), sample(pipe, condition=condition))
    ensemble = loaded.ensemble(4, 3, torch.Generator().manual_seed(0), condition=KNOWN)
    torch.testing.assert_close(ensemble.parameters_of_networks, sample(loaded, condition=KNOWN))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"condition": []}, "at least one condition"),
        ({"condition": [KNOWN, 3.0]}, "a condition is a mapping of fields, got 3.0"),
        ({"condition": {"blur": [0.5, None]}}, "'blur' must be a number from 0 to 2"),
        ({"condition": torch.zeros(2, 5)}, r"embeddings must have shape \(M, 12\), got \(2, 5\)"),
    ],
)
def test_wrong_conditions(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(2, **arguments)


def test_a_generator_without_conditions_takes_none(pipe):
    plain = make_pipeline(make_network())
    with pytest.raises(ValueError, match="without conditions"):
        plain(2, condition=KNOWN)
    with pytest.raises(ValueError, match="guidance_scale needs a generator with conditions"):
        plain(2, guidance_scale=2.0)
    with pytest.raises(ValueError, match="not trained together"):
        PDiffPipeline(**pipe.components | {"condition_encoder": None})
