"""Statistics of batch norm for many networks at once, against torch's own way for one."""

import copy

import pytest
import timm
import torch
from torch import nn

from pdiff_hf.networks.batch_norm import RecomputedStatistics
from pdiff_hf.selection import select_layout


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 2)
    )


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None))
    model[2].weight = model[0].weight
    return model


class Unmappable(nn.Module):
    """Looks at its values, which vmap refuses."""

    def __init__(self):
        super().__init__()
        self.net = plain()

    def forward(self, x):
        x = self.net(x)
        return x if x.sum().item() > 0 else -x


@pytest.mark.parametrize(
    ("make", "select", "shape", "first"),
    [
        (plain, "linear", (4,), "1"),
        (plain, "linear[1:]", (4,), "4"),  # the batch norm before it is the same in all networks
        (tied, "linear", (4,), "1"),
        (Unmappable, "linear", (4,), "net.1"),
        (lambda: timm.create_model("test_resnet", num_classes=3), "norm[-4:]", (3, 16, 16), None),
        (lambda: timm.create_model("test_resnet", num_classes=3), "conv[1]", (3, 16, 16), None),
    ],
)
def test_each_network_gets_what_torch_averages_in_training_mode(make, select, shape, first):
    torch.manual_seed(0)
    model = make().eval()
    layout = select_layout(model, select)
    parameters = layout.flatten(model.state_dict()) + 0.2 * torch.randn(5, layout.num_parameters)
    data = [torch.randn(8, *shape) for _ in range(3)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    statistics = RecomputedStatistics(model, layout, lambda: (lambda call, x=x: call(x) for x in data))
    found = statistics(parameters)
    assert torch.equal(found[:, : layout.num_parameters], parameters)
    added = statistics.layout.names[len(layout.names) :]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    behind = [name for name in names if f"{name}.running_mean" in added]
    assert behind == names[len(names) - len(behind) :] and (first is None or behind[0] == first)
    for row, own in zip(parameters, found, strict=True):
        network = copy.deepcopy(model)
        network.load_state_dict(layout.unflatten(row), strict=False)
        for name in behind:
            layer = network.get_submodule(name)
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average
            layer.train()
        for x in data:
            network(x)
        expected = {name: network.state_dict()[name] for name in added}
        tensors = statistics.layout.unflatten(own)
        torch.testing.assert_close({name: tensors[name] for name in added}, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    layers = [model.get_submodule(name) for name in names]
    assert all(layer.track_running_stats and not layer._forward_pre_hooks for layer in layers)


@pytest.mark.parametrize(
    ("model", "select", "batches", "message"),
    [
        (nn.Linear(2, 2), "all", [1], "no batch norm behind the tensors"),
        (plain(), "head", [1], "no batch norm behind the tensors"),
        (plain(), "all", [], "no batches of data"),
    ],
)
def test_nothing_to_compute(model, select, batches, message):
    data = torch.randn(4, model[0].in_features if isinstance(model, nn.Sequential) else 2)
    with pytest.raises(ValueError, match=message):
        RecomputedStatistics(model, select_layout(model, select), lambda: [lambda call: call(data) for _ in batches])
