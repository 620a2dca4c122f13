"""Damaged layouts, tensors of every kind, and selections of any text; see `support/damage.py`."""

import json

import torch
from hypothesis import given, strategies as st
from support.damage import changed, fuzz, only
from transformers import AutoModelForImageClassification, ResNetConfig

from pdiff_hf import LayoutError, ParameterLayout, select_parameters


def test_damaged_layouts(room, full):
    whole = ParameterLayout(("a.weight", "ü/b"), ((2, 3), (4,)), ("float32", "int8")).to_dict()

    @given(changed(whole))
    def test(case):
        with only(LayoutError):
            layout = ParameterLayout.from_dict(case)
            assert ParameterLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
            if layout.num_parameters < 10**6:
                vector = torch.zeros(2, layout.num_parameters)
                assert torch.equal(layout.flatten(layout.unflatten(vector)), vector)

    fuzz(test, 2000, full)


def test_selections_of_any_text(full):
    network = AutoModelForImageClassification.from_config(
        ResNetConfig(embedding_size=4, hidden_sizes=[8], depths=[1], layer_type="basic")
    )
    kinds = ["norm", "all", "blocks", "head", "conv", "bias", "linear", "attention", "resnet", "weight", "*", "?"]
    kinds = st.sampled_from([*kinds, "re:", "[!", "(", ")", ".", "+", "\\", "\0", "ü"])
    slices = st.sampled_from(
        ["", "[0]", "[-1]", "[-2:]", "[:1]", "[:]", "[]", "[-]", "[-:-]", f"[{'9' * 25}]", "[²]", "]"]
    )
    entries = (
        st.tuples(kinds, slices).map("".join) | st.lists(kinds | slices, max_size=6).map("".join) | st.text(max_size=10)
    )

    @given(entries | st.lists(entries, max_size=3), st.lists(entries, max_size=1))
    def test(select, exclude):
        with only(LayoutError):
            names = select_parameters(network, select, exclude)
            assert names and set(names) <= set(network.state_dict())

    fuzz(test, 1000, full)
