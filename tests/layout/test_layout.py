"""Layout and selection: exact inverses for every type, and the paper's Table 6 from one rule."""

import json

import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    ConvNextConfig,
    ResNetConfig,
    ViTConfig,
)

from pdiff_hf.layout import EXACT_DTYPES, LayoutError, ParameterLayout
from pdiff_hf.selection import select_layout, select_parameters

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
        # Not every tensor is a plain row of numbers in memory.
        kind = draw(st.sampled_from(["plain", "transposed", "strided", "expanded", "negative zero"]))
        if kind == "transposed":
            tensors[name] = tensors[name].mT.contiguous().mT if len(shape) > 1 else tensors[name]
        elif kind == "strided":
            tensors[name] = torch.stack([tensors[name]] * 2, -1)[..., 0]
        elif kind == "expanded" and batch is None:
            tensors[name] = tensors[name].expand(2, *shape)
        elif kind == "negative zero" and dtype.is_floating_point:
            tensors[name] = torch.full_like(tensors[name], -0.0)
    return tensors


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype.is_floating_point:  # a NaN may change its payload on the way through float32, but stays a NaN
        numbers = ~a.isnan()
        if not torch.equal(numbers, ~b.isnan()) or not torch.equal(a[numbers].signbit(), b[numbers].signbit()):
            return False
        a, b = a[numbers], b[numbers]
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


def timm_model(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=10, **kwargs)


def transformers_model(config) -> nn.Module:
    auto = AutoModelForSequenceClassification if isinstance(config, BertConfig) else AutoModelForImageClassification
    with torch.device("meta"):
        return auto.from_config(config)


RESNET18 = ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic")
BERT = BertConfig(num_hidden_layers=3, hidden_size=32, num_attention_heads=2, intermediate_size=64, vocab_size=50)
MODELS = {
    "timm resnet18": lambda: timm_model("resnet18"),
    "timm resnet50": lambda: timm_model("resnet50"),
    "timm vit": lambda: timm_model("vit_tiny_patch16_224"),
    "timm convnext": lambda: timm_model("convnext_tiny"),
    "timm swin": lambda: timm_model("swin_tiny_patch4_window7_224"),
    "timm efficientnet": lambda: timm_model("efficientnet_b0"),
    "timm densenet": lambda: timm_model("densenet121"),
    "timm resnetv2": lambda: timm_model("resnetv2_50"),
    "transformers resnet18": lambda: transformers_model(RESNET18),
    "transformers convnext": lambda: transformers_model(ConvNextConfig()),
    "transformers vit": lambda: transformers_model(ViTConfig()),
    "transformers bert": lambda: transformers_model(BERT),
}


@pytest.mark.parametrize(
    ("model", "first", "last"),
    [
        ("timm resnet18", "layer1.0", "layer4.1"),  # the blocks of all four stages, though no stage has many
        ("timm resnet50", "layer1.0", "layer4.2"),
        ("timm vit", "blocks.0", "blocks.11"),
        ("timm convnext", "stages.0.blocks.0", "stages.3.blocks.2"),  # and not the stages around them
        ("timm swin", "layers.0.blocks.0", "layers.3.blocks.1"),
        ("timm efficientnet", "blocks.1.0", "blocks.6.0"),
        ("timm densenet", "features.denseblock1.denselayer1", "features.denseblock4.denselayer16"),
        # not its four stages, and not the convolution layers inside its blocks, which are twice as many
        ("transformers resnet18", "resnet.encoder.stages.0.layers.0", "resnet.encoder.stages.3.layers.1"),
        ("transformers convnext", "convnext.encoder.stages.0.layers.0", "convnext.encoder.stages.3.layers.2"),
        ("transformers vit", "vit.layers.0", "vit.layers.11"),
        ("transformers bert", "bert.encoder.layer.0", "bert.encoder.layer.2"),
    ],
)
def test_blocks_of_any_architecture(model, first, last):
    model = MODELS[model]()
    parameters = [name for name, _ in model.named_parameters()]
    if "vit.encoder.layer.0.layernorm_before.weight" in parameters:  # as older releases of transformers name them
        first, last = first.replace("vit.layers", "vit.encoder.layer"), last.replace("vit.layers", "vit.encoder.layer")
    expected = [name for name in parameters if name.startswith(f"{first}.")]
    assert list(select_parameters(model, "blocks[:1]")) == expected
    assert list(select_parameters(model, "blocks[-1:]")) == [n for n in parameters if n.startswith(f"{last}.")]
    both = select_parameters(model, ["blocks[:1]", "blocks[-1:]"])
    assert set(both) == set(select_parameters(model, ["blocks[0]", "blocks[-1]"]))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("timm resnet18", "fc"),
        ("timm convnext", "head.fc"),
        ("timm vit", "head"),
        ("timm resnetv2", "head.fc"),  # a convolution
        ("transformers resnet18", "classifier.1"),
        ("transformers bert", "classifier"),
    ],
)
def test_head_of_any_architecture(model, expected):
    assert select_parameters(MODELS[model](), "head") == (f"{expected}.weight", f"{expected}.bias")


def test_attention_of_any_architecture():
    names = select_parameters(MODELS["timm vit"](), "attention[-1]")
    assert names == tuple(f"blocks.11.attn.{n}.{p}" for n in ("qkv", "proj") for p in ("weight", "bias"))
    names = select_parameters(MODELS["transformers bert"](), "attention[0]", exclude="norm")
    assert len(names) == 8 and all(name.startswith("bert.encoder.layer.0.attention.") for name in names)
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert set(select_parameters(layer, "attention")) == {n for n, _ in layer.named_parameters() if "self_attn" in n}


def test_kinds_at_any_depth():
    # the paper's Table 3f takes single layers
    assert select_parameters(MODELS["timm resnet18"](), ["conv[0]", "conv[10]"]) == (
        "conv1.weight",
        "layer3.0.conv1.weight",
    )
    assert select_parameters(MODELS["timm vit"](), "linear[1]") == (
        "blocks.0.attn.proj.weight",
        "blocks.0.attn.proj.bias",
    )


def test_plain_networks_have_blocks_too():
    def block(width):
        return nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 4))

    assert select_parameters(nn.Sequential(block(2), nn.ReLU(), block(3)), "blocks[-1]", "norm") == (
        "2.0.weight",
        "2.0.bias",
        "2.2.weight",
        "2.2.bias",
    )
    with pytest.raises(LayoutError, match="'blocks.-1:.' selects no parameter"):
        select_parameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "blocks[-1:]")


def test_adapters_of_a_peft_model():
    peft = pytest.importorskip("peft")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    lora = peft.LoraConfig(r=2, target_modules=r".*\.(q_proj|v_proj|query|value)", modules_to_save=["classifier"])
    model = peft.get_peft_model(AutoModelForImageClassification.from_config(config), lora)
    layout = select_layout(model, "*.lora_*")
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
    assert layout.names == tuple(trainable) and layout.num_parameters == 2 * 2 * 2 * (16 * 2)
    assert len(select_parameters(model, "*.lora_A.*")) == len(select_parameters(model, "*.lora_*", "*.lora_B.*")) == 4
    assert len(select_parameters(model, ["*.lora_*", "head"])) == 10  # with the classifier that is trained beside them
    vector = torch.randn(layout.num_parameters)
    model.load_state_dict(layout.unflatten(vector), strict=False)
    assert torch.equal(layout.flatten(model.state_dict()), vector)


def test_ten_thousand_tensors():
    model = nn.Module()
    model.layers = nn.ParameterList([nn.Parameter(torch.full((2,), float(i))) for i in range(10_000)])
    layout = select_layout(model, "layers.*", exclude="layers.9999")
    vector = layout.flatten(model.state_dict())
    assert vector.shape == (2 * 9_999,) and layout.locate(19_997) == "layers.9998"
    assert torch.equal(layout.flatten(layout.unflatten(vector)), vector)
