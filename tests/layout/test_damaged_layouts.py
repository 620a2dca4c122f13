"""Damaged layouts, tensors of every kind, and selections of any text; see `support/damage.py`."""

import json
import math

import torch
from hypothesis import given, strategies as st
from safetensors.torch import save_file
from support.damage import NAMES, changed, fuzz, only
from transformers import AutoModelForImageClassification, ResNetConfig

from pdiff_hf import LayoutError, ParameterLayout, select_parameters
from pdiff_hf.layout import EXACT_DTYPES
from pdiff_hf.snapshots.files import read_networks


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


def test_tensors_of_every_kind_come_back_bit_for_bit(room, full):
    """Also those that are no plain rows of numbers in memory, and numbers that are none."""
    special = st.sampled_from([0.0, -0.0, 1.0, -2.5, 1e-45, -1e-40, 65504.0, 3e38, math.inf, -math.inf, math.nan])

    @st.composite
    def tensors(draw):
        shape = draw(st.lists(st.integers(0, 3), max_size=4))
        values = draw(st.lists(special, min_size=math.prod(shape), max_size=math.prod(shape)))
        tensor = torch.tensor(values, dtype=torch.float32).nan_to_num(7.0, 100.0, -100.0).reshape(shape)
        dtype = EXACT_DTYPES[draw(st.sampled_from(sorted(EXACT_DTYPES)))]
        if dtype.is_floating_point:
            tensor = torch.tensor(values, dtype=torch.float32).reshape(shape).to(dtype)
        else:
            tensor = tensor.clamp(0, 100).to(dtype)
        kind = draw(st.sampled_from(["plain", "transposed", "strided", "expanded", "shifted"]))
        if kind == "transposed":
            tensor = tensor.permute(tuple(range(tensor.ndim))[::-1])
        elif kind == "strided" and tensor.ndim:
            tensor = tensor[::2]
        elif kind == "expanded":
            tensor = tensor.expand(2, *tensor.shape)
        elif kind == "shifted":
            tensor = torch.cat([torch.ones(1, dtype=dtype), tensor.flatten()])[1:].reshape(tensor.shape)
        return tensor

    @given(st.dictionaries(NAMES, tensors(), min_size=1, max_size=4))
    def test(state_dict):
        layout = ParameterLayout.from_state_dict(state_dict)
        back = layout.unflatten(layout.flatten(state_dict))
        for name, tensor in state_dict.items():
            assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
            # NaNs are equal to nothing, and their bits are no part of the promise.
            torch.testing.assert_close(back[name], tensor, rtol=0, atol=0, equal_nan=True)
            if tensor.dtype.is_floating_point:
                numbers = ~tensor.isnan()
                assert torch.equal(back[name].signbit()[numbers], tensor.signbit()[numbers])
        if layout.num_parameters and layout.flatten(state_dict).isfinite().all():
            # what safetensors can write is read as it was
            save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, "t.safetensors")
            assert torch.equal(read_networks("t.safetensors", layout)[0], layout.flatten(state_dict))

    fuzz(test, 1000, full)


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
