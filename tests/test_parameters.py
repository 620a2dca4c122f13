"""Layout and selection: exact inverses for every type, and the paper's Table 6 from one rule."""

import json

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pdiff_hf.parameters import EXACT_DTYPES, LayoutError, ParameterLayout, select_parameters

NAMES = st.text(alphabet="abz.0_/ü ", min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def state_dicts(draw, batch: int | None = None):
    """A state dict of random names, shapes and types; every value fits its type, NaN and infinity included."""
    names = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    lead = () if batch is None else (batch,)
    tensors = {}
    for name in names:
        shape, dtype = lead + draw(SHAPES), EXACT_DTYPES[draw(st.sampled_from(sorted(EXACT_DTYPES)))]
        bits = torch.randint(0, 256, (*shape, 4), generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
        bits = bits.to(torch.uint8)
        if dtype == torch.bool:
            tensors[name] = bits[..., 0] > 127
        else:
            size = torch.empty((), dtype=dtype).element_size()
            tensors[name] = bits[..., :size].contiguous().view(dtype).reshape(shape)
    return tensors


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype.is_floating_point:  # a NaN may change its payload on the way through float32, but stays a NaN
        return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])
    return torch.equal(a, b)


@settings(deadline=None, max_examples=150)
@given(state_dicts())
def test_flatten_and_unflatten_are_inverse(state_dict):
    layout = ParameterLayout.from_state_dict(state_dict)
    vector = layout.flatten(state_dict)
    assert vector.shape == (layout.num_parameters,) and vector.dtype == torch.float32
    back = layout.unflatten(vector)
    assert list(back) == list(state_dict)
    for name, tensor in state_dict.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert same_bits(back[name], tensor)
    assert same_bits(layout.flatten(back), vector)
    assert ParameterLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


@settings(deadline=None, max_examples=50)
@given(state_dicts(batch=3))
def test_a_batch_is_the_same_as_one_by_one(batched):
    one = [{name: tensor[i] for name, tensor in batched.items()} for i in range(3)]
    layout = ParameterLayout.from_state_dict(one[0])
    vectors = layout.flatten(batched)
    assert same_bits(vectors, torch.stack([layout.flatten(state_dict) for state_dict in one]))
    for name, tensor in layout.unflatten(vectors).items():
        assert same_bits(tensor, batched[name])


def test_non_contiguous_tensors_and_gradients():
    weight = nn.Parameter(torch.arange(12.0).reshape(3, 4))
    layout = ParameterLayout.from_state_dict({"w": weight.t()})
    vector = layout.flatten({"w": weight.t()})
    assert not vector.requires_grad
    assert torch.equal(vector, weight.detach().t().reshape(-1))


def test_integers_are_rounded_and_clamped():
    layout = ParameterLayout(("a", "b"), ((2,), (2,)), ("int8", "bool"))
    tensors = layout.unflatten(torch.tensor([1.6, 300.0, 0.2, 0.9]))
    assert tensors["a"].tolist() == [2, 127] and tensors["b"].tolist() == [False, True]


def test_offsets_and_locate_with_empty_tensors():
    layout = ParameterLayout(("a", "e", "b"), ((2,), (0, 3), ()), ("float32",) * 3)
    assert (layout.sizes, layout.offsets, layout.num_parameters) == ((2, 0, 1), (0, 2, 2), 3)
    assert [layout.locate(i) for i in range(3)] == ["a", "a", "b"]
    with pytest.raises(LayoutError, match="coordinate 3"):
        layout.locate(3)


def test_errors_name_the_tensor():
    state_dict = {"conv.weight": torch.zeros(2, 3), "conv.bias": torch.zeros(2)}
    layout = ParameterLayout.from_state_dict(state_dict)
    with pytest.raises(LayoutError, match="conv.bias"):
        layout.flatten({"conv.weight": torch.zeros(2, 3)})
    with pytest.raises(LayoutError, match=r"conv.weight.*\(3, 2\).*\(2, 3\)"):
        layout.flatten({**state_dict, "conv.weight": torch.zeros(3, 2)})
    with pytest.raises(LayoutError, match="conv.bias.*float16"):
        layout.flatten({**state_dict, "conv.bias": torch.zeros(2).half()})
    with pytest.raises(LayoutError, match="conv.bias.*batch of 4"):
        layout.flatten({"conv.weight": torch.zeros(4, 2, 3), "conv.bias": torch.zeros(5, 2)})
    with pytest.raises(LayoutError, match=r"8 parameters.*got \(7,\)"):
        layout.unflatten(torch.zeros(7))
    with pytest.raises(LayoutError, match="int64"):
        ParameterLayout.from_state_dict({"steps": torch.zeros(1, dtype=torch.int64)})
    with pytest.raises(LayoutError, match="at least one tensor"):
        ParameterLayout((), (), ())
    with pytest.raises(LayoutError, match="more than once"):
        ParameterLayout(("a", "a"), ((1,), (1,)), ("float32",) * 2)
    with pytest.raises(LayoutError, match="conv.wieght.*conv.weight"):
        ParameterLayout.from_state_dict(state_dict, ["conv.wieght"])
    with pytest.raises(LayoutError, match="does not fit the base model.*conv.bias"):
        layout.check_fits({"conv.weight": torch.zeros(2, 3), "conv.bias": torch.zeros(5)})
    with pytest.raises(LayoutError, match="names, shapes and dtypes"):
        ParameterLayout.from_dict({"names": ["a"]})


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("resnet18", 2048),
        ("resnet50", 5120),
        ("vit_tiny_patch16_224", 768),
        ("vit_base_patch16_224", 3072),
        ("convnext_tiny", 3072),
        ("convnext_base", 4096),
    ],
)
def test_last_two_normalization_layers_are_table_6(architecture, expected):
    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=10)
    names = select_parameters(model, "norm[-2:]")
    layout = ParameterLayout.from_state_dict(model.state_dict(), names)
    assert len(names) == 4 and layout.num_parameters == expected
    assert not any("running" in name for name in names)


class Net(nn.Module):
    base_model_prefix = "body"

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3))
        self.plain = nn.LayerNorm(4, elementwise_affine=False)
        self.head = nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("select", "exclude", "expected"),
    [
        ("norm", (), ["body.1.weight", "body.1.bias", "body.3.weight", "body.3.bias"]),
        ("norm[-1]", (), ["body.3.weight", "body.3.bias"]),  # the layer without parameters does not count
        ("norm[:1]", (), ["body.1.weight", "body.1.bias"]),
        ("conv[1:]", (), ["body.2.weight", "body.2.bias"]),
        ("conv[0]", "bias", ["body.0.weight"]),
        (["linear", "norm[0]"], "*.bias", ["body.1.weight", "head.weight"]),
        ("bias", "re:body.*", ["head.bias"]),
        ("0.*", (), ["body.0.weight", "body.0.bias"]),  # the prefix may be left out
        ("re:body\\.[02]\\.weight", (), ["body.0.weight", "body.2.weight"]),
        ("all", "body.*", ["head.weight", "head.bias"]),
    ],
)
def test_selection(select, exclude, expected):
    assert list(select_parameters(Net(), select, exclude)) == expected


@pytest.mark.parametrize(
    ("select", "exclude", "message"),
    [
        ("boddy.0.*", (), "boddy.0.*selects no parameter of Net.*similar"),
        ("norm[7]", (), "norm.7.*selects no parameter"),
        ("re:(", (), "not a regular expression"),
        ("bias", "all", "nothing is left"),
        ([], (), "at least one kind or pattern"),
        ("body.1.running_mean", (), "selects no parameter"),
        (["norm", "nothing"], (), "'nothing' selects no parameter"),
    ],
)
def test_selection_errors(select, exclude, message):
    with pytest.raises(LayoutError, match=message):
        select_parameters(Net(), select, exclude)


def test_tied_parameters_are_selected_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert select_parameters(model, "linear") == ("0.weight", "0.bias", "1.bias")
