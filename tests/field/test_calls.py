"""What people give to the call of a generator: conditions, and settings beside them."""

import math
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
import torch
from support.pipelines import EMBEDDING_DIM, LATENT_DIM, make_conditional_pipeline, sample

from pdiff_hf.models.condition import ConditionError

KNOWN = {"angle": 37.0, "blur": 1.0, "kind": "inverted", "bits": [1, 0, 1]}


@pytest.fixture(scope="module")
def pipe():
    return make_conditional_pipeline()


@pytest.fixture(scope="module")
def expected(pipe):
    return sample(pipe, 1, condition=KNOWN)


CERTAIN = {
    "a whole number": {"angle": 37},
    "a number of NumPy": {"angle": np.float64(37)},
    "a tensor of one element": {"angle": torch.tensor([37.0], requires_grad=True)},
    "a decimal": {"angle": Decimal(37)},
    "a number as text": {"angle": " 37 "},
    "a million turns": {"angle": 37 + 360e6},
    "a word of NumPy": {"kind": np.str_("inverted")},
    "a word of pandas": {"kind": pd.Categorical(["inverted"])[0]},
    "truth values": {"bits": [True, False, True]},
    "a Series": {"bits": pd.Series([1, 0, 1])},
}


@pytest.mark.parametrize("values", CERTAIN.values(), ids=CERTAIN)
def test_values_whose_meaning_is_certain(values, pipe, expected):
    assert torch.equal(sample(pipe, 1, condition=KNOWN | values), expected)


MANY = {
    "a tuple": (KNOWN, KNOWN),
    "a generator": (condition for condition in (KNOWN, KNOWN)),
    "a DataFrame": pd.DataFrame([KNOWN, KNOWN]),
    "an array of objects": np.array([KNOWN, KNOWN]),
    "values of a mapping": {"one": KNOWN, "other": KNOWN}.values(),
}


@pytest.mark.parametrize("conditions", MANY.values(), ids=MANY)
def test_several_conditions(conditions, pipe, expected):
    found = sample(pipe, 1, condition=conditions)
    assert len(found) == 2 and torch.equal(found[:1], expected)


UNCLEAR = {
    "a column for each field": ({"angle": [0, 10, 20]}, "not a number; for several tasks give a list of conditions"),
    "a tensor for each field": ({"angle": torch.arange(3)}, "for several tasks give a list of conditions"),
    "a number that is missing": (KNOWN | {"angle": math.nan}, "leave it out, or give None, if it is unknown"),
    "missing, of pandas": (KNOWN | {"angle": pd.NA}, "got <NA> .it is not a number"),
    "another case": (KNOWN | {"kind": "Inverted"}, "did you mean 'inverted'"),
    "the index of a word": (KNOWN | {"kind": 1}, "there is no such word"),
    "a name with a capital": ({"Angle": 37}, "did you mean 'angle'"),
    "JSON": ('{"angle": 37}', "condition is a mapping of fields"),
    "items": (list(KNOWN.items()), "a condition is a mapping of fields"),
    "a number": (37, "condition is a mapping of fields"),
    "embeddings that are not finite": (torch.full((1, EMBEDDING_DIM), math.nan), "embeddings must be finite"),
    "no rows": (pd.DataFrame([KNOWN])[:0], "an empty list"),
}


@pytest.mark.parametrize(("condition", "message"), UNCLEAR.values(), ids=UNCLEAR)
def test_what_can_be_meant_in_several_ways(condition, message, pipe):
    with pytest.raises(ConditionError, match=message):
        sample(pipe, 1, condition=condition)


@pytest.mark.parametrize("value", [np.float32(1), torch.tensor(1.0), np.array(1.0), 1, True])
def test_settings_of_any_type_of_numbers(value, pipe, expected):
    assert torch.equal(sample(pipe, 1, condition=KNOWN, temperature=value, guidance_scale=value), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, "1", [1.0]])
@pytest.mark.parametrize("setting", ["temperature", "guidance_scale"])
def test_settings_that_are_no_numbers(setting, value, pipe):
    with pytest.raises(ValueError, match=f"{setting} must be finite and at least 0, got"):
        sample(pipe, 1, condition=KNOWN, **{setting: value})


@pytest.mark.parametrize("latents", [np.zeros((1, LATENT_DIM)), [[0.0] * LATENT_DIM], torch.zeros(LATENT_DIM)])
def test_starting_noise_that_is_no_tensor(latents, pipe):
    with pytest.raises(ValueError, match=rf"latents must be a tensor of shape \(1, {LATENT_DIM}\), got"):
        sample(pipe, 1, condition=KNOWN, latents=latents)


def test_a_posterior_for_a_series(pipe):
    """It has four fields, and is one condition."""
    examples = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.arange(4)}

    def chosen(condition):
        generator = torch.Generator().manual_seed(0)
        few = {"num_candidates": 6, "num_models": 2, "num_inference_steps": 2}
        return pipe.posterior(examples, condition=condition, generator=generator, **few).parameters

    assert torch.equal(chosen(pd.Series(KNOWN)), chosen(KNOWN))
