"""Many networks in one pass with gradients: the same as one after the other."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.func import functional_call

import pdiff_hf.networks  # noqa: F401  registers the minis
from pdiff_hf import ParameterLayout
from pdiff_hf.networks.stacked import StackedNetworks

NETWORKS = {
    "perceptron_mini": {"img_size": 8, "hidden_size": 5},
    "cnn3_mini": {},
    "convnext_mini": {"in_chans": 1, "img_size": 32},  # strides, and depthwise convolutions
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_and_gradients_are_those_one_by_one(name):
    torch.manual_seed(0)
    arguments = dict(NETWORKS[name])
    size = arguments.pop("img_size", 28)
    if name == "perceptron_mini":
        arguments["img_size"] = size
    model = timm.create_model(name, num_classes=3, **arguments)
    layout = ParameterLayout.from_state_dict(model.state_dict(), [name for name, _ in model.named_parameters()])
    networks = StackedNetworks(model, layout)
    parameters = networks.base_parameters() * (1 + 0.1 * torch.randn(3, layout.num_parameters))
    images, labels = torch.randn(3, 4, 1, size, size), torch.randint(3, (3, 4))
    stacked = parameters.clone().requires_grad_()
    logits = networks(lambda call, batch: call(batch["x"]), stacked, {"x": images})
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for t in range(3):
        row = parameters[t].clone().requires_grad_()
        expected = functional_call(model, layout.unflatten(row), (images[t],))
        F.cross_entropy(expected, labels[t], reduction="sum").backward()
        torch.testing.assert_close(logits[t], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(stacked.grad[t], row.grad, atol=1e-5, rtol=1e-3)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_shared_batch_is_the_same_as_a_copy_for_each():
    torch.manual_seed(0)
    model = timm.create_model("cnn3_mini", num_classes=3)
    layout = ParameterLayout.from_state_dict(model.state_dict(), [name for name, _ in model.named_parameters()][-4:])
    networks = StackedNetworks(model, layout)
    parameters = networks.base_parameters() * (1 + 0.1 * torch.randn(3, layout.num_parameters))
    images = torch.randn(4, 1, 28, 28)
    gradients = []
    for shared in (True, False):
        rows = parameters.clone().requires_grad_()
        batch = {"x": images if shared else images.expand(3, -1, -1, -1, -1)}
        logits = networks(lambda call, batch: call(batch["x"]), rows, batch, shared=shared)
        logits.square().sum().backward()
        gradients.append((logits.detach(), rows.grad))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)
