"""One network for many: mean probabilities, what is shared, saving, casting, export, and what is refused."""

import copy

import pytest
import torch
from accelerate.utils import is_torch_version
from safetensors.torch import load_model, save_file, save_model
from support.networks import bert
from support.pipelines import make_pipeline
from transformers import AutoConfig, AutoModelForImageClassification

from pdiff_hf import LayoutError
from pdiff_hf.networks.ensemble import EnsembleModel
from pdiff_hf.selection import select_layout


def make_network(architecture="test_resnet", **kwargs):
    torch.manual_seed(0)
    config = AutoConfig.for_model("timm_wrapper", architecture=architecture, num_labels=4, **kwargs)
    return AutoModelForImageClassification.from_config(config).eval()


def make_ensemble(network, select, num_models=3) -> EnsembleModel:
    layout = select_layout(network, select)
    own = layout.flatten(network.state_dict())
    noise = torch.randn(num_models, layout.num_parameters, generator=torch.Generator().manual_seed(1))
    return EnsembleModel(network, layout, own + 0.1 * noise)


@torch.no_grad()
def mean_probabilities(ensemble, network, **inputs) -> torch.Tensor:
    """What the ensemble should say, from its networks one by one, each of them whole."""
    total = 0
    for row in ensemble.parameters_of_networks:
        one = copy.deepcopy(network)
        one.load_state_dict(one.state_dict() | ensemble.layout.unflatten(row))
        total = total + one(**inputs).logits.softmax(-1)
    return total / len(ensemble.parameters_of_networks)


@pytest.fixture(scope="module")
def network():
    return make_network()


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("version", ["0.1", "today"])
@torch.no_grad()
def test_saved_and_loaded(network, images, tmp_path, version):
    ensemble = make_ensemble(network, "norm[-2:]")
    save_model(ensemble, str(tmp_path / "ensemble.safetensors"))
    if version == "0.1":  # whose files have no weights
        state = {name: tensor.clone() for name, tensor in ensemble.state_dict().items() if name != "weights"}
        save_file(state, tmp_path / "ensemble.safetensors")
    loaded = EnsembleModel(make_network(), ensemble.layout, torch.zeros_like(ensemble.parameters_of_networks))
    loaded.weights.copy_(torch.tensor([1.0, 0.0, 0.0]))
    load_model(loaded, tmp_path / "ensemble.safetensors")
    assert torch.equal(loaded.weights, ensemble.weights)
    assert torch.equal(loaded(images).logits, ensemble(images).logits)


def test_a_pipelines_ensemble_is_the_mean_of_its_networks(network, images):
    pipe = make_pipeline(network)
    ensemble = pipe.ensemble(num_models=6, num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    models = pipe(6, 3, torch.Generator().manual_seed(0), output_type="model").parameters
    with torch.no_grad():
        probabilities = torch.stack([model(images).logits.softmax(-1) for model in models])
        logits = ensemble(pixel_values=images).logits
        assert torch.equal(ensemble(images).logits, logits)
    assert (probabilities[0] - probabilities[1]).abs().max() > 1e-4  # they do differ
    torch.testing.assert_close(logits.softmax(-1), probabilities.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.exp(), probabilities.mean(0), atol=1e-5, rtol=0)
    assert not any(module.training for module in ensemble.modules())


def test_a_pipeline_without_a_base_model_has_none(network):
    with pytest.raises(ValueError, match="needs a base model, and this pipeline has none"):
        make_pipeline(network, base_model=None).ensemble(2)


@pytest.mark.parametrize(
    ("architecture", "select", "side_by_side"),
    [
        ("test_resnet", "norm[-2:]", True),
        ("test_resnet", "all", False),  # convolutions differ
        ("test_resnet", "*.downsample.*", False),  # `x += shortcut`, where only the shortcut differs
        ("test_vit", "norm[-2:]", True),
        ("test_vit", "blocks[-1:]", True),
    ],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # attention has no batching rule
def test_any_selection(architecture, select, side_by_side, images):
    extra = {"model_args": {"img_size": 32}} if architecture == "test_vit" else {}
    network = make_network(architecture, **extra)
    ensemble = make_ensemble(network, select)
    with torch.no_grad():
        probabilities = ensemble(pixel_values=images).logits.softmax(-1)
    torch.testing.assert_close(
        probabilities, mean_probabilities(ensemble, network, pixel_values=images), atol=1e-5, rtol=0
    )
    assert (ensemble._runner._goes_under_vmap and not ensemble._runner.has_convolutions) == side_by_side


def test_a_text_classifier():
    network = bert(num_hidden_layers=2, num_labels=3)
    ensemble = make_ensemble(network, "norm[-2:]")
    inputs = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    with torch.no_grad():
        probabilities = ensemble(**inputs).logits.softmax(-1)
    torch.testing.assert_close(probabilities, mean_probabilities(ensemble, network, **inputs), atol=1e-5, rtol=0)


def test_what_is_shared_is_computed_once(network, images):
    calls = []
    ensemble = make_ensemble(network, "norm[-2:]", num_models=7)
    first = next(module for module in ensemble.base_model.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_hook(lambda module, args, output: calls.append(tuple(output.shape)))
    with torch.no_grad():
        ensemble(images)
    assert len(calls) == 1 and calls[0][0] == len(images)
    size = sum(tensor.numel() for tensor in ensemble.state_dict().values())
    assert size == 7 * (ensemble.layout.num_parameters + 1) + sum(t.numel() for t in network.state_dict().values())


@pytest.mark.parametrize(
    ("architecture", "select", "any_batch"),
    [("test_resnet", "*.downsample.*", True), ("test_vit", "norm[-2:]", False)],
)
@pytest.mark.skipif(is_torch_version("<", "2.7"), reason="torch.export cannot trace `vmap`")
def test_exported(architecture, select, any_batch, images, tmp_path):
    extra = {"model_args": {"img_size": 32}} if architecture == "test_vit" else {}
    ensemble = make_ensemble(make_network(architecture, **extra), select)
    shapes = {"kwargs": {"pixel_values": {0: torch.export.Dim("batch", max=64)}}} if any_batch else None
    program = torch.export.export(ensemble, (), {"pixel_values": images}, dynamic_shapes=shapes, strict=False)
    torch.export.save(program, tmp_path / "ensemble.pt2")
    loaded = torch.export.load(tmp_path / "ensemble.pt2").module()
    with torch.no_grad():
        for data in [images, images.repeat(3, 1, 1, 1)][: 2 if any_batch else 1]:
            logits = loaded(pixel_values=data).logits
            torch.testing.assert_close(logits, ensemble(data).logits, atol=1e-5, rtol=0)


def test_casting_it_leaves_the_base_model_alone(network, images):
    ensemble = make_ensemble(network, "norm[-2:]")
    with torch.no_grad():
        expected = ensemble(images).logits
        cast = ensemble.to(torch.bfloat16)(images.bfloat16()).logits
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, expected, atol=0.1, rtol=0)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(network, images):
    ensemble = make_ensemble(network, "norm[-2:]")
    with torch.no_grad():
        expected = ensemble(images).logits
        logits = ensemble.to("cuda")(images.to("cuda")).logits
    torch.testing.assert_close(logits.cpu(), expected, atol=1e-3, rtol=0)


def test_what_does_not_fit(network, images):
    layout = select_layout(network, "norm[-2:]")
    for shape in ((0, layout.num_parameters), (layout.num_parameters,), (2, 3)):
        with pytest.raises(LayoutError, match="needs parameters of shape"):
            EnsembleModel(network, layout, torch.zeros(shape))
    with pytest.raises(LayoutError, match="does not fit the base model"):
        EnsembleModel(make_network("test_vit"), layout, torch.zeros(2, layout.num_parameters))
    ensemble = make_ensemble(network, "norm[-2:]")
    with pytest.raises(RuntimeError, match="channels"):
        ensemble(images[:, :1])
    with torch.no_grad():
        ensemble(images)
    assert ensemble._runner._goes_under_vmap  # the wrong input has changed nothing
