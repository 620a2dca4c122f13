import pytest
import timm
import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models import ConvNeXt
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

import pdiff_hf.networks  # noqa: F401  registers the minis with timm

# Shape of forward_features for one image, and width of the classifier's input.
FEATURES = {
    "convnet_mini": ((4, 4, 4), 16),
    "mlp_mini": ((16,), 16),
    "resnet_mini": ((8, 4, 4), 16),
    "vit_mini": ((64, 64), 64),
    "convnext_mini": ((32, 2, 2), 32),
    "cnn3_mini": ((4, 3, 3), 20),
}
NAMES = list(FEATURES)


def images(model: nn.Module, num_images: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    in_chans, *size = timm.data.resolve_data_config({}, model=model)["input_size"]
    return torch.randn(num_images, in_chans, *size, generator=generator)


def create(name: str, seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs).eval()


def build_in_transformers(name: str, num_labels: int = 10, **kwargs) -> nn.Module:
    config = AutoConfig.for_model("timm_wrapper", architecture=name, num_labels=num_labels, **kwargs)
    return AutoModelForImageClassification.from_config(config).eval()


def test_timm_lists_them():
    assert sorted(timm.list_models(module="mini")) == sorted([*NAMES, "perceptron_mini"])
    assert sum(p.numel() for p in timm.create_model("cnn3_mini", in_chans=3).parameters()) == 2_864
    assert type(timm.create_model("convnext_mini")) is ConvNeXt


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg(name):
    model = timm.create_model(name)
    cfg = model.default_cfg
    channels, size = (1, 28) if name == "cnn3_mini" else (3, 64)
    assert cfg["input_size"] == (channels, size, size)
    assert cfg["num_classes"] == model.num_classes == 10
    assert cfg["mean"] == cfg["std"] == (0.5,) * channels
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    if cfg["first_conv"] is not None:
        assert model.get_submodule(cfg["first_conv"]) is next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    else:
        assert not any(isinstance(module, nn.Conv2d) for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_features_then_head(name):
    model = create(name, num_classes=7)
    x = images(model)
    features = model.forward_features(x)
    feature_shape, head_hidden_size = FEATURES[name]
    assert features.shape == (4, *feature_shape)
    assert model.num_features in feature_shape
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (4, head_hidden_size) and model.head_hidden_size == head_hidden_size
    logits = model.forward_head(features)
    assert logits.shape == (4, 7)
    torch.testing.assert_close(model.get_classifier()(hidden), logits)
    torch.testing.assert_close(model(x), logits)


@pytest.mark.parametrize("name", NAMES)
def test_in_chans(name):
    for in_chans in (1, 3, 4):
        model = create(name, in_chans=in_chans)
        assert model(torch.randn(2, in_chans, *model.default_cfg["input_size"][1:])).shape == (2, 10)


# ConvNeXt is timm's own, and older releases lose the type.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "convnext_mini"])
def test_reset_classifier(name):
    model = create(name).to(torch.float64)
    x = images(model).double()
    hidden = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model.get_classifier().weight.dtype == torch.float64 and not model.get_classifier().training
    assert model(x).shape == (4, 3)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(model(x), hidden)
    with pytest.raises(ValueError, match="no other pooling .*'max'"):
        create(name).reset_classifier(3, global_pool="max")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "convnext_mini"])
def test_img_size(name):
    model = create(name)
    expected = (1, 28, 28) if name == "cnn3_mini" else (3, 64, 64)
    for wrong in ((expected[0], 32, 32), (2, *expected[1:])):
        with pytest.raises(ValueError) as error:
            model(torch.randn(2, *wrong))
        assert f"built for images of shape {expected}" in str(error.value) and f"got {wrong}" in str(error.value)
    model = create(name, img_size=(32, 48))
    assert model(torch.randn(2, model.in_chans, 32, 48)).shape == (2, 10)
    with pytest.raises(ValueError, match="multiples of"):
        timm.create_model(name, img_size=33)
    if name == "cnn3_mini":
        assert create("cnn3_mini", img_size=20)(torch.randn(2, 1, 20, 20)).shape == (2, 10)
        with pytest.raises(ValueError, match="at least 20"):
            timm.create_model("cnn3_mini", img_size=16)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_all_parameters_equals_a_loop(name):
    models = [create(name, seed=seed) for seed in range(3)]
    x = images(models[0])
    parameters = {key: torch.stack([dict(m.named_parameters())[key] for m in models]) for key in models[0].state_dict()}
    with torch.no_grad():
        together = torch.func.vmap(lambda p: torch.func.functional_call(models[0], p, (x,)))(parameters)
        one_by_one = torch.stack([model(x) for model in models])
    assert together.shape == (3, 4, 10)
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=0)
    assert (one_by_one[0] - one_by_one[1]).abs().max() > 1e-3  # the models differ, so the comparison says something


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name):
    model = create(name).train()
    F.cross_entropy(model(images(model, num_images=16)), torch.arange(16) % 10).backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


CHANGED = [(name, 10, {"img_size": 32, "in_chans": 2}) for name in NAMES if name != "convnext_mini"]


@pytest.mark.parametrize(("name", "num_labels", "model_args"), [(name, 7, {}) for name in NAMES] + CHANGED)
def test_round_trip_through_transformers(name, num_labels, model_args, tmp_path):
    model = build_in_transformers(name, num_labels, model_args=model_args)
    pixel_values = torch.randn(4, 2, 32, 32) if model_args else images(model.timm_model)
    logits = model(pixel_values=pixel_values).logits
    assert logits.shape == (4, num_labels)
    torch.testing.assert_close(logits, model.timm_model(pixel_values))

    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.num_labels == num_labels
    torch.testing.assert_close(loaded(pixel_values=pixel_values).logits, logits, atol=0, rtol=0)
    buffers = dict(loaded.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    for key, buffer in model.named_buffers():
        torch.testing.assert_close(buffers[key], buffer, atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_pooled_features_in_transformers(name):
    config = AutoConfig.for_model("timm_wrapper", architecture=name)
    model = AutoModel.from_config(config).eval()
    feature_shape, head_hidden_size = FEATURES[name]
    output = model(pixel_values=images(model.timm_model))
    assert output.last_hidden_state.shape == (4, *feature_shape)
    assert output.pooler_output.shape == (4, head_hidden_size)


def test_positions_of_vit_mini_survive_the_meta_device(tmp_path):
    positions = build_sincos2d_pos_embed((8, 8), dim=64)
    model = timm.create_model("vit_mini")
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(model.pos_embed, positions, atol=0, rtol=0)
    with torch.device("meta"):
        model = timm.create_model("vit_mini")
    model = model.to_empty(device="cpu")
    model.pos_embed.fill_(float("nan"))
    model.init_non_persistent_buffers()
    torch.testing.assert_close(model.pos_embed, positions, atol=0, rtol=0)

    # A checkpoint for 10 classes that is loaded for 7: transformers initialises the new head and nothing else.
    original = build_in_transformers("vit_mini")
    original.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    torch.testing.assert_close(loaded.timm_model.pos_embed, positions, atol=0, rtol=0)
    x = images(loaded.timm_model)
    torch.testing.assert_close(loaded.timm_model.forward_features(x), original.timm_model.forward_features(x))
    assert loaded(pixel_values=x).logits.shape == (4, 7)


def test_positions_of_vit_mini_tell_patches_apart():
    model = create("vit_mini")
    x = images(model, num_images=1)
    swapped = torch.cat([x[..., 8:, :], x[..., :8, :]], dim=-2)  # whole rows of patches change places
    assert (model(x) - model(swapped)).abs().max() > 1e-4
    model.pos_embed.zero_()
    torch.testing.assert_close(model(x), model(swapped), atol=1e-5, rtol=0)


def test_order_of_the_layers():
    x = torch.randn(2, 3, 64, 64)
    stage = create("convnet_mini").stages[0]
    torch.testing.assert_close(stage(x), F.max_pool2d(F.leaky_relu(stage.norm(stage.conv(x))), 2))
    stem, stage = create("resnet_mini").stages[:2]
    x = stem(x)
    block = stage.block
    residual = F.leaky_relu(block.conv2(F.leaky_relu(block.conv1(x))))
    torch.testing.assert_close(stage(x), F.max_pool2d(stage.norm(x + residual), 2))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(stem(x), F.max_pool2d(stem.norm(F.leaky_relu(stem.conv(x))), 2))
