"""Statistics of batch norm for many networks at once, against torch's own way for one."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from pdiff_hf.networks.batch_norm import recompute_batch_norm
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
    ("make", "select", "shape"),
    [
        (plain, "linear", (4,)),
        (tied, "linear", (4,)),
        (Unmappable, "linear", (4,)),
        (lambda: timm.create_model("test_resnet", num_classes=3), "norm[-2:]", (3, 16, 16)),
        (lambda: timm.create_model("test_resnet", num_classes=3), "conv[1]", (3, 16, 16)),
    ],
)
def test_each_network_gets_what_update_bn_gives_it(make, select, shape):
    torch.manual_seed(0)
    model = make().train()
    layout = select_layout(model, select)
    parameters = layout.flatten(model.state_dict()) + 0.2 * torch.randn(5, layout.num_parameters)
    data = [torch.randn(8, *shape) for _ in range(3)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = recompute_batch_norm(
        model, layout, (lambda call, x=x: call(x) for x in data), parameters, networks_at_once=3
    )
    for i, row in enumerate(parameters):
        network = copy.deepcopy(model)
        network.load_state_dict(layout.unflatten(row), strict=False)
        update_bn(data, network)
        expected = {name: t for name, t in network.state_dict().items() if "running_" in name}
        torch.testing.assert_close({n: t[i] for n, t in found.items()}, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and all(module.training for module in model.modules())


def test_nothing_to_compute():
    layout = select_layout(nn.Linear(2, 2), "all")
    assert recompute_batch_norm(nn.Linear(2, 2), layout, [], torch.zeros(1, 6)) == {}
    with pytest.raises(ValueError, match="no batches of data"):
        recompute_batch_norm(plain(), select_layout(plain(), "head"), [], torch.zeros(1, 14))
