"""Cropped convolutions give what whole ones give, with fewer operations."""

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.utils.flop_counter import FlopCounterMode

from pdiff_hf.networks.cropping import CroppedConvolutions, useful_taps
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.selection import select_layout


def test_every_small_convolution_along_one_axis():
    """float64, so that a wrong tap shows and the order of summation does not."""
    torch.manual_seed(0)
    num_cropped = 0
    settings = itertools.product((1, 2, 3, 5), (1, 2, 3, 4, 5, 7), (1, 2, 3), (0, 1, 2, 3), (1, 2, 3))
    for size, kernel, stride, padding, dilation in settings:
        if size + 2 * padding < dilation * (kernel - 1) + 1:
            continue
        x = torch.randn(2, 4, size, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(6, 2, kernel, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
        expected = F.conv1d(x, weight, bias, stride, padding, dilation, 2)
        with CroppedConvolutions():
            output = F.conv1d(x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=2)
        torch.testing.assert_close(output, expected)
        grads = [torch.autograd.grad(y.square().sum(), (x, weight, bias)) for y in (output, expected)]
        torch.testing.assert_close(*grads)
        first, last = useful_taps(size, kernel, stride, padding, dilation)
        num_cropped += last - first < kernel
    assert num_cropped > 50


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation", "taps"),
    [
        (1, 3, 1, 1, 1, (1, 2)),  # the last stage of a ResNet for 32 pixels
        (2, 3, 2, 1, 1, (1, 3)),  # the step into it
        (2, 7, 1, 3, 1, (2, 5)),  # a ConvNeXt's
        (8, 3, 1, 12, 12, (1, 2)),  # DeepLab's
        (2, 3, 1, 1, 1, (0, 3)),
        (224, 7, 2, 3, 1, (0, 7)),
    ],
)
def test_taps_that_can_meet_data(size, kernel, stride, padding, dilation, taps):
    assert useful_taps(size, kernel, stride, padding, dilation) == taps


@pytest.mark.parametrize("padding", [1, (1,), (1, 1), "same", "valid", (0, 1)])
def test_all_ways_to_say_how_much_padding(padding):
    x, weight = torch.randn(3, 2, 1, 4, dtype=torch.float64), torch.randn(5, 2, 1, 3, dtype=torch.float64)
    for inputs in (x, x[0]):  # a batch, and one example
        expected = F.conv2d(inputs, weight, padding=padding)
        with CroppedConvolutions():
            torch.testing.assert_close(F.conv2d(inputs, weight, None, 1, padding), expected)


def operations(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_a_training_step_of_a_resnet_takes_the_same_step_with_fewer_operations():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10, channels=(32, 64, 128, 256)).double()
    x, labels = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4)

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(model(x), labels), tuple(model.parameters()))

    expected, whole = step(), operations(step)
    with CroppedConvolutions():
        torch.testing.assert_close(step(), expected)
        assert operations(step) < whole / 2.5


def test_under_vmap_and_with_replaced_weights():
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)).double().eval()
    )
    x = torch.randn(2, 3, 1, 1, dtype=torch.float64)
    stacked = {name: torch.randn(5, *tensor.shape, dtype=torch.float64) for name, tensor in model.named_parameters()}
    expected = vmap(lambda tensors: functional_call(model, tensors, (x,)))(stacked)
    with CroppedConvolutions():
        torch.testing.assert_close(vmap(lambda tensors: functional_call(model, tensors, (x,)))(stacked), expected)


def test_an_export_is_cropped_where_sizes_are_known():
    class Cropped(nn.Conv2d):
        def forward(self, x):
            with CroppedConvolutions():
                return super().forward(x)

    model, x = Cropped(3, 4, 3, padding=1), torch.randn(2, 3, 1, 1)
    batch, height = torch.export.Dim("batch", max=64), torch.export.Dim("height", min=2, max=64)
    fixed = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}}, strict=False)
    assert "conv2d" not in fixed.graph_module.code  # one tap meets data: a product of matrices
    x = torch.randn(5, 3, 1, 1)
    torch.testing.assert_close(fixed.module()(x), model(x))
    shapes = {"x": {0: batch, 2: height}}
    free = torch.export.export(model, (torch.randn(2, 3, 4, 1),), dynamic_shapes=shapes, strict=False)
    x = torch.randn(5, 3, 9, 1)
    torch.testing.assert_close(free.module()(x), model(x))


def test_scored_networks_are_cropped():
    model = timm.create_model("resnet18", num_classes=5, channels=(8, 16, 32, 64)).eval()
    layout = select_layout(model, "norm[-2:]")
    models, x = NetworkRunner(model, layout), torch.randn(4, 3, 32, 32)
    rows = layout.flatten(model.state_dict()).repeat(2, 1)
    list(models(lambda call: call(x), rows))
    batch = 2 * len(x)  # the last convolution, 64 to 64 channels on 1 × 1, and the classifier
    prefix = operations(lambda: models.record(lambda call: call(x)))
    assert operations(lambda: list(models(lambda call: call(x), rows))) - prefix == 2 * batch * (64 * 64 + 64 * 5)
