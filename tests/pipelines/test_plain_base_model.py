"""A base model that is a plain `nn.Module`, of no library that could save it."""

import pytest
import torch
from support.pipelines import make_pipeline, sample
from torch import nn

from pdiff_hf import PDiffPipeline


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))


def test_all_that_a_pipeline_makes(network):
    pipe = make_pipeline(network, select="all").to("cpu")
    inputs = torch.randn(3, 4)
    models = sample(pipe, output_type="model")
    probabilities = torch.stack([model(inputs).softmax(-1) for model in models]).mean(0)
    assert torch.allclose(pipe.ensemble(4, 3, torch.Generator().manual_seed(0))(inputs).logits.exp(), probabilities)
    examples = {"inputs": inputs, "labels": torch.tensor([0, 1, 0])}
    loss_fn = pipe.example_loss(examples, predict=lambda call, batch: call(batch["inputs"]))
    steered = sample(pipe, loss_fn=loss_fn, num_models=16)
    assert loss_fn(steered).mean() < loss_fn(sample(pipe, num_models=16)).mean()


def test_casting_leaves_its_types(network):
    pipe = make_pipeline(network, select="all").to(torch.float64)
    assert pipe.denoiser.dtype == torch.float64 and network[0].weight.dtype == torch.float32


def test_saved_without_it_and_loaded_with_it(network, tmp_path):
    pipe = make_pipeline(network, select="all")
    pipe.save_pretrained(tmp_path)
    loaded = PDiffPipeline.from_pretrained(tmp_path, base_model=network)
    loaded.set_progress_bar_config(disable=True)
    inputs = torch.randn(3, 4)
    assert torch.equal(sample(loaded, output_type="model")[0](inputs), sample(pipe, output_type="model")[0](inputs))
    without = PDiffPipeline.from_pretrained(tmp_path)
    assert without.base_model is None and torch.equal(sample(without), sample(pipe))
