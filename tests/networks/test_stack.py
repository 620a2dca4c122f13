"""Many networks in one pass with gradients: the same as one after the other."""

from typing import ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch.func import functional_call

import pdiff_hf.networks  # noqa: F401  registers the minis
from pdiff_hf import ParameterLayout
from pdiff_hf.networks import runner
from pdiff_hf.networks.ensemble import EnsembleModel
from pdiff_hf.networks.runner import NetworkRunner

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
    networks = NetworkRunner(model, layout)
    parameters = networks.base_parameters() * (1 + 0.1 * torch.randn(3, layout.num_parameters))
    images, labels = torch.randn(3, 4, 1, size, size), torch.randint(3, (3, 4))
    stacked = parameters.clone().requires_grad_()
    logits = networks.stack(lambda call, batch: call(batch["x"]), stacked, {"x": images})
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for t in range(3):
        row = parameters[t].clone().requires_grad_()
        expected = functional_call(model, layout.unflatten(row), (images[t],))
        F.cross_entropy(expected, labels[t], reduction="sum").backward()
        torch.testing.assert_close(logits[t], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(stacked.grad[t], row.grad, atol=1e-5, rtol=1e-3)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_large_networks_are_run_again_for_their_gradients(monkeypatch):
    torch.manual_seed(0)
    model, calls = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), []
    layout = ParameterLayout.from_state_dict(model.state_dict())
    parameters, inputs = torch.randn(3, layout.num_parameters), {"x": torch.randn(3, 5, 3)}

    def gradients() -> torch.Tensor:
        rows = parameters.clone().requires_grad_()
        NetworkRunner(model, layout).stack(predict, rows, inputs).square().sum().backward()
        return rows.grad

    def predict(call, batch):
        calls.append(1)
        return call(batch["x"])

    expected, side_by_side = gradients(), len(calls)
    monkeypatch.setattr(runner, "LARGE_NETWORK", 1)
    torch.testing.assert_close(gradients(), expected)
    assert (side_by_side, len(calls) - side_by_side) == (1, 6)


def test_a_shared_batch_is_the_same_as_a_copy_for_each():
    torch.manual_seed(0)
    model = timm.create_model("cnn3_mini", num_classes=3)
    layout = ParameterLayout.from_state_dict(model.state_dict(), [name for name, _ in model.named_parameters()][-4:])
    networks = NetworkRunner(model, layout)
    parameters = networks.base_parameters() * (1 + 0.1 * torch.randn(3, layout.num_parameters))
    images = torch.randn(4, 1, 28, 28)
    gradients = []
    for shared in (True, False):
        rows = parameters.clone().requires_grad_()
        batch = {"x": images if shared else images.expand(3, -1, -1, -1, -1)}
        logits = networks.stack(lambda call, batch: call(batch["x"]), rows, batch, shared=shared)
        logits.square().sum().backward()
        gradients.append((logits.detach(), rows.grad))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


class Odd(nn.Module):
    """A linear layer, and behind it what `kind` says."""

    rows: ClassVar[list[bool]] = []  # whether it ran under vmap

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.kind = nn.Linear(4, 3), kind

    def forward(self, x):
        hidden = self.linear(x)
        self.rows.append(is_batchedtensor(hidden))
        if self.kind == "branches" and hidden.sum() > 0:
            return hidden + 1
        if self.kind == "item":
            return hidden * hidden.sum().item()
        if self.kind == "numpy":
            return hidden + torch.from_numpy(hidden.detach().numpy())
        if self.kind == "own function":
            return Doubled.apply(hidden)
        if self.kind == "out of memory" and is_batchedtensor(hidden) and len(get_unwrapped(hidden)) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        if self.kind == "broken" and is_batchedtensor(hidden):
            raise RuntimeError("cuBLAS has a bad day")
        return hidden


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def odd_networks(kind: str) -> tuple[Odd, ParameterLayout, torch.Tensor, torch.Tensor]:
    model = Odd(kind)
    layout = ParameterLayout.from_state_dict(model.state_dict(), ["linear.weight", "linear.bias"])
    return model, layout, torch.randn(5, 15), torch.randn(6, 4)


@pytest.mark.parametrize("kind", ["branches", "item", "numpy", "own function"])
def test_what_vmap_refuses_runs_one_by_one(kind, caplog):
    model, layout, parameters, x = odd_networks(kind)
    expected = torch.stack([functional_call(model, layout.unflatten(row), (x,)) for row in parameters])
    runner, rows = NetworkRunner(model, layout), parameters.clone().requires_grad_()
    for shared, batch in ((True, {"x": x}), (False, {"x": x.expand(5, -1, -1)})):
        output = runner.stack(lambda call, batch: call(batch["x"]), rows, batch, shared=shared)
        torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert rows.grad.abs().amin(1).min() >= 0 and rows.grad.abs().sum() > 0
    assert caplog.text.count("does not run under vmap") == 1  # it is tried once
    ensemble = EnsembleModel(model, layout, parameters)
    torch.testing.assert_close(ensemble(x).logits.exp(), expected.softmax(-1).mean(0))


def test_an_error_that_is_not_vmaps_is_no_reason_to_be_slow():
    model, layout, parameters, x = odd_networks("broken")
    runner = NetworkRunner(model, layout)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a bad day"):
            runner.stack(lambda call, batch: call(x), parameters, {}, shared=True)
    with pytest.raises(RuntimeError, match="a bad day"):
        EnsembleModel(model, layout, parameters)(x)
    with pytest.raises(RuntimeError, match="a bad day"):
        list(runner(lambda call: call(x), parameters))


def test_where_memory_runs_out_fewer_networks_run_side_by_side(caplog):
    model, layout, parameters, x = odd_networks("out of memory")
    expected = torch.stack([functional_call(model, layout.unflatten(row), (x,)) for row in parameters])
    ensemble = EnsembleModel(model, layout, parameters)
    for _ in range(2):
        torch.testing.assert_close(ensemble(x).logits.exp(), expected.softmax(-1).mean(0))
    assert "out of memory with 5 networks at once: going on with 3" in caplog.text
    assert caplog.text.count("out of memory") == 2 and "vmap" not in caplog.text  # 5 to 3 to 2, once
    assert Odd.rows[-3:] == [True, True, True]
    output = torch.cat([rows for _, rows in NetworkRunner(model, layout)(lambda call: call(x), parameters)])
    torch.testing.assert_close(output, expected)
    assert Odd.rows[-2:] == [True, True]
