"""Many networks in one pass against the plain loop: load the state dict, run."""

import contextlib
import copy
import threading
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from pdiff_hf.layout import LayoutError, ParameterLayout
from pdiff_hf.networks import prefix_cache, runner
from pdiff_hf.networks.prefix_cache import PrefixCache
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.selection import select_parameters
from pdiff_hf.snapshots.collect import CollectArguments, collect_snapshots
from pdiff_hf.snapshots.dataset import load_snapshots, parameter_matrix
from pdiff_hf.tasks import ImageClassificationTask

IMAGES = (6, 3, 32, 32)


class InPlaceNet(nn.Module):
    """Writes to what its trunk returned, and to a view of it, after the selected tensors were used."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.trunk(x)
        pairs = x.view(len(x), 2, 6)
        y = self.norm(x)
        x += y
        pairs[:, 0].relu_()
        x.mul_(2)
        return self.head(x) + pairs.sum((1, 2)).unsqueeze(-1)


class TwiceNet(nn.Module):
    """Calls modules before and after the selected tensors were used, one in training code under `enable_grad`."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x):
        with torch.enable_grad():
            x = self.linear(x).relu()
        first, second = F.relu(x), x.sigmoid()
        x = self.norm(self.linear(first)) + self.shift * second
        return self.linear(self.norm(x))


class Net(nn.Module):
    """Parts with names, and the function of them and of an input that they compute."""

    def __init__(self, compute, **parts):
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.compute(self, x)


def tied():
    net = Net(lambda m, x: m.decode(m.encode(x.exp()).tanh()), encode=nn.Linear(8, 8), decode=nn.Linear(8, 8))
    net.decode.weight = net.encode.weight
    return net


def traced(layer):
    """A part that no Python code calls piece by piece cannot be recorded."""
    return torch.jit.trace(nn.Sequential(layer, nn.ReLU()).eval(), torch.randn(2, 8))


def scripted():
    return Net(lambda m, x: m.norm(m.trunk(x * 2)), trunk=traced(nn.Linear(8, 8)), norm=nn.LayerNorm(8))


def scripted_norm():
    """Uses the selected tensors where no Python code sees it, before something that can be recorded."""
    return Net(lambda m, x: m.head(m.norm(x * 2)).relu(), norm=traced(nn.LayerNorm(8)), head=nn.Linear(8, 4))


def branching():
    """Takes a decision on the values of a tensor, which vmap refuses."""
    decide = lambda m, x: y if (y := m.norm(m.trunk(x))).sum() > 0 else -y  # noqa: E731
    return Net(decide, trunk=nn.Linear(8, 8), norm=nn.LayerNorm(8))


def scaled():
    return Net(lambda m, x: m.linear(x) * m.scale, linear=nn.Linear(8, 4), scale=nn.Parameter(torch.ones(())))


def unused():
    return Net(lambda m, x: m.linear(x), linear=nn.Linear(8, 4), norm=nn.LayerNorm(8))


def resnet():
    return timm.create_model("resnet18", num_classes=5, channels=(8, 16, 32, 64))


def vit():
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, depth=3)


def transformers_vit():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Linear(16, 5))


CASES = {
    "resnet18, last two norms": (resnet, "norm[-2:]", IMAGES),
    "resnet18, norm in a shortcut": (resnet, "norm[-3:]", IMAGES),
    "resnet18, convolution": (resnet, "conv[-1]", IMAGES),
    "vit, last two norms": (vit, "norm[-2:]", IMAGES),
    "vit, class token": (vit, ["cls_token", "norm[-1]"], IMAGES),
    "vit, attention": (vit, "blocks.2.attn.*", IMAGES),
    "convnext, last two norms": (lambda: timm.create_model("convnext_atto", num_classes=5), "norm[-2:]", IMAGES),
    "transformers vit": (transformers_vit, "norm[-2:]", IMAGES),
    "transformers vit, all": (transformers_vit, "all", IMAGES),
    "mlp, all": (mlp, "all", (6, 8)),
    "mlp, head": (mlp, "4.*", (6, 8)),
    "in place": (InPlaceNet, "norm", (6, 8)),
    "in place, and more tensors": (InPlaceNet, ["norm", "head.*"], (6, 8)),
    "called twice": (TwiceNet, "norm.*", (6, 8)),
    "owned by the whole": (TwiceNet, "shift", (6, 8)),
    "tied": (tied, "encode.*", (6, 8)),
    "one number": (scaled, "scale", (6, 8)),
    "scripted": (scripted, "norm", (6, 8)),
    "scripted, selected": (scripted_norm, "norm.*", (6, 8)),
    "branching": (branching, "norm", (6, 8)),
    "unused": (unused, "norm", (6, 8)),
}


def make(case: str, num_models: int = 5):
    """The model, its layout, N networks around it, and a batch."""
    torch.manual_seed(0)
    build, select, shape = CASES[case]
    model = build().eval()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    layout = ParameterLayout.from_state_dict(model.state_dict(), select_parameters(model, select))
    parameters = layout.flatten(model.state_dict())
    return model, layout, parameters + 0.1 * torch.randn(num_models, len(parameters)), torch.randn(shape)


def predict(call, x):
    output = call(x)
    return output if isinstance(output, torch.Tensor) else output.logits


@torch.no_grad()
def plain_loop(model, layout, parameters, x):
    model = copy.deepcopy(model)
    outputs = []
    for row in parameters:
        model.load_state_dict(layout.unflatten(row), strict=False)
        outputs.append(predict(model, x))
    return torch.stack(outputs)


def run(models: NetworkRunner, parameters, x):
    pieces = list(models(lambda call: predict(call, x), parameters))
    assert [i for rows, _ in pieces for i in range(rows.start, rows.stop)] == list(range(len(parameters)))
    return torch.cat([output for _, output in pieces])


@pytest.mark.parametrize("case", CASES)
def test_the_outputs_are_those_of_a_plain_loop(case):
    model, layout, parameters, x = make(case)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = x.clone()
    models = NetworkRunner(model, layout)
    for batch in (x, x.flip(0)[:4]):  # the second time with what was found out on the first batch, and a smaller one
        expected = plain_loop(model, layout, parameters, batch)
        output = run(models, parameters, batch)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(output.argmax(-1), expected.argmax(-1))
    assert torch.equal(x, data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "case", ["resnet18, last two norms", "vit, class token", "in place", "mlp, all", "vit, attention"]
)
def test_nothing_depends_on_which_networks_share_a_pass(case, monkeypatch):
    model, layout, parameters, x = make(case)
    together = run(NetworkRunner(model, layout), parameters, x)
    alone = torch.cat([run(NetworkRunner(model, layout), row[None], x) for row in parameters])
    torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-6)
    reverse = run(NetworkRunner(model, layout), parameters.flip(0), x).flip(0)
    torch.testing.assert_close(reverse, together, rtol=1e-6, atol=1e-6)
    models = NetworkRunner(model, layout)
    run(models, parameters[:1], x)
    monkeypatch.setattr(models, "_side_by_side", 2)
    torch.testing.assert_close(run(models, parameters, x), together, rtol=1e-6, atol=1e-6)
    # One network of nonsense does not reach its neighbours.
    spoilt = torch.cat([torch.full_like(parameters[:1], torch.nan), parameters])
    torch.testing.assert_close(run(NetworkRunner(model, layout), spoilt, x)[1:], together, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["resnet18, last two norms", "resnet18, norm in a shortcut", "vit, last two norms"])
def test_what_is_frozen_is_computed_once_for_a_batch(case):
    """The inputs of the first layer are seen by torch's own operators, not only by Python."""
    model, layout, parameters, x = make(case)
    models = NetworkRunner(model, layout)
    run(models, parameters[:1], x)
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    with torch.profiler.profile(record_shapes=True) as profile:
        run(models, parameters, x)
    shapes = [list(x.shape), list(first.weight.shape)]
    assert sum(event.name == "aten::conv2d" and event.input_shapes[:2] == shapes for event in profile.events()) == 1


def test_only_what_the_rest_needs_is_kept():
    model, layout, parameters, x = make("resnet18, last two norms")
    models = NetworkRunner(model, layout)
    run(models, parameters, x)
    with torch.no_grad():
        prefix = models.record(lambda call: call(x))
    kept = sum(group[0].untyped_storage().nbytes() for group in prefix.groups)
    # Inputs of the last stage, and of its last block before and after the first convolution.
    assert kept == 4 * len(x) * (32 * 2 * 2 + 2 * 64)


@pytest.mark.parametrize("case", ["in place", "resnet18, convolution", "branching"])
def test_where_vmap_does_not_pay_or_work_the_prefix_is_still_shared(case):
    """Shared results that are written to are no reason."""
    model, layout, parameters, x = make(case)
    models = NetworkRunner(model, layout)
    run(models, parameters, x)
    assert models._has_prefix and (models._side_by_side > 1) == bool(models._written) == (case == "in place")


def test_networks_beyond_the_memory_budget_run_in_turn(monkeypatch):
    monkeypatch.setattr(runner, "CPU_MEMORY_BUDGET", 10_000)
    model, layout, parameters, x = make("vit, last two norms")
    models = NetworkRunner(model, layout)
    torch.testing.assert_close(run(models, parameters, x), plain_loop(model, layout, parameters, x))
    assert models._side_by_side == 1


def test_a_bfloat16_model():
    torch.manual_seed(0)
    model = mlp().to(torch.bfloat16).eval()
    layout = ParameterLayout.from_state_dict(model.state_dict(), select_parameters(model, "all"))
    parameters = layout.flatten(model.state_dict()) + 0.1 * torch.randn(4, layout.num_parameters)
    x = torch.randn(6, 8, dtype=torch.bfloat16)
    output = run(NetworkRunner(model, layout), parameters, x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, plain_loop(model, layout, parameters, x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("when", ["first", "later"])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(when):
    model, layout, parameters, x = make("resnet18, last two norms")
    expected = predict(model, x)
    models = NetworkRunner(model, layout)
    if when == "later":
        run(models, parameters, x)

    def forward(call):
        call(x)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(models(forward, parameters))
    with pytest.raises(RuntimeError, match="channels"):
        list(models(lambda call: call(x[:, :2]), parameters))
    outputs = models(lambda call: call(x), parameters)
    next(outputs)
    outputs.close()  # whoever asks for a few networks only
    assert "forward" not in vars(model)
    assert torch.equal(predict(model, x), expected)
    torch.testing.assert_close(run(models, parameters, x), plain_loop(model, layout, parameters, x))


def test_random_forward_passes_are_not_shared():
    """What cannot be repeated must not be replayed: here every call draws new noise."""
    model, layout, parameters, x = make("mlp, head")
    models = NetworkRunner(model, layout)
    outputs = models(lambda call: call(x + torch.rand(())), parameters)
    assert sum(len(output) for _, output in outputs) == len(parameters)


def test_a_layout_that_does_not_fit_is_refused():
    model, layout, _, _ = make("mlp, head")
    with pytest.raises(LayoutError, match="does not fit"):
        NetworkRunner(nn.Linear(3, 3), layout)


def train(model, layout, data, labels, cached: bool, num_steps: int = 4, batch_size: int = 5):
    """Trains the tensors of the layout; returns the parameters after each step, and whether there was a cache."""
    trained = [parameter for name, parameter in model.named_parameters() if name in layout.names]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is p for p in trained))
    optimizer = torch.optim.AdamW(trained, lr=0.03)

    def forward(indices):
        x, y = data[indices], labels[indices]
        return lambda call: F.cross_entropy(predict(call, x), y)

    cache = PrefixCache.build(NetworkRunner(model, layout), forward, len(data), batch_size) if cached else None
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(num_steps):
        indices = torch.randperm(len(data), generator=generator)[:batch_size]
        step = forward(indices)
        with cache.replay(indices) if cache else contextlib.nullcontext():
            loss = step(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rows.append(layout.flatten(model.state_dict()))
    return torch.stack(rows), cache is not None


TRAINABLE = [case for case in CASES if not case.startswith(("in place", "scripted", "unused"))]


@pytest.mark.parametrize("case", TRAINABLE)
def test_training_with_cached_prefixes_takes_the_same_steps(case):
    model, layout, _, x = make(case)
    data = torch.randn(13, *x.shape[1:])  # not a multiple of the batch size
    labels = torch.randint(0, 4, (13,))
    expected, _ = train(copy.deepcopy(model), layout, data, labels, cached=False)
    output, was_cached = train(model, layout, data, labels, cached=True)
    assert was_cached
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", ["in place", "scripted", "scripted, selected", "mlp, head"])
def test_prefixes_that_cannot_be_replayed_by_example_or_exceed_the_memory_are_not_cached(case, monkeypatch):
    model, layout, _, x = make(case)
    models = NetworkRunner(model, layout)

    def cache(noise: float = 0.0):
        def forward(indices):
            batch = x[indices] + noise * torch.randn(len(indices), 1)
            return lambda call: call(batch).square().mean()

        return PrefixCache.build(models, forward, len(x), 4)

    assert (cache() is not None) == (case == "mlp, head")
    assert cache(noise=1.0) is None  # it depends on chance
    monkeypatch.setattr(prefix_cache, "CACHE_BUDGET", 100)
    assert cache() is None


def test_snapshots_are_the_same_with_and_without_cached_prefixes(tmp_path, monkeypatch):
    torch.manual_seed(0)
    task = ImageClassificationTask("test_resnet", image_size=32, max_train_samples=40, max_eval_samples=20)
    model = task.load_base_model()
    layout = ParameterLayout.from_state_dict(model.state_dict(), select_parameters(model, "norm[-2:]"))
    args = CollectArguments(num_snapshots=6, batch_size=16)
    builds = []
    build = PrefixCache.build
    monkeypatch.setattr(PrefixCache, "build", lambda *args: builds.append(build(*args)) or builds[-1])
    for name, budget in (("cached", prefix_cache.CACHE_BUDGET), ("plain", 0)):
        monkeypatch.setattr(prefix_cache, "CACHE_BUDGET", budget)
        collect_snapshots(Accelerator(cpu=True), task, model, layout, tmp_path / name, args, seed=0)
    assert builds[0] is not None
    assert builds[1] is None
    rows = [parameter_matrix(*load_snapshots(tmp_path / name)) for name in ("cached", "plain")]
    torch.testing.assert_close(*rows, rtol=1e-6, atol=1e-7)
    assert not torch.equal(rows[0][0], rows[0][1])


def test_threads_that_share_a_model_do_not_see_each_others_networks():
    """One stops in the middle of its networks, with their tensors in place, while others run."""
    model, layout, parameters, x = make("mlp, head")
    expected = plain_loop(model, layout, parameters, x)
    first, second, own = NetworkRunner(model, layout), NetworkRunner(model, layout), predict(model, x)
    inside, goes_on, found = threading.Event(), threading.Event(), []

    def forward(call):
        def stopped(*_):
            if threading.current_thread() is thread:
                inside.set()
                assert goes_on.wait(600)

        with first.modules().register_forward_hook(stopped):
            return call(x)

    def work():
        found.extend(output for _, output in first(forward, parameters))
        found.append(first.modules())

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(600)
    for runner_of_others in (first, second):
        torch.testing.assert_close(run(runner_of_others, parameters, x), expected)
    assert torch.equal(predict(model, x), own)
    goes_on.set()
    thread.join()
    left = weakref.ref(found.pop())
    torch.testing.assert_close(torch.cat(found), expected)
    assert left() is None  # modules go with their thread


def test_modules_that_hold_a_lock_are_run():
    model, layout, parameters, x = make("mlp, head")
    expected = plain_loop(model, layout, parameters, x)
    model.lock = next(model.children()).lock = threading.Lock()
    torch.testing.assert_close(run(NetworkRunner(model, layout), parameters, x), expected)
    assert NetworkRunner(model, layout).modules().lock is model.lock


def test_a_runner_follows_its_model():
    """Where the model gets other tensors, so do the modules that a runner has run."""
    model, layout, parameters, x = make("mlp, head")
    models = NetworkRunner(model, layout)
    run(models, parameters, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter + 1
    torch.testing.assert_close(run(models, parameters, x), plain_loop(model, layout, parameters, x))
