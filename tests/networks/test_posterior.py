"""Networks that fit a few examples, against a brute-force count with one network after the other."""

import math

import pytest
import torch
from support.pipelines import make_network, make_pipeline
from torch import nn

from pdiff_hf.networks.ensemble import EnsembleModel
from pdiff_hf.networks.posterior import (
    check_examples,
    effective_sample_size,
    example_loss,
    log_likelihoods,
    posterior_weights,
    refine,
    resample,
)
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.selection import select_layout


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()


@pytest.fixture(scope="module")
def examples() -> dict:
    generator = torch.Generator().manual_seed(1)
    return {"points": torch.randn(5, 4, generator=generator), "labels": torch.tensor([0, 2, 1, 1, 0])}


def predict(call, batch):
    return call(batch["points"])


def candidates(model, count=40) -> torch.Tensor:
    own = select_layout(model, "all").flatten(model.state_dict())
    return own + torch.randn(count, len(own), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def brute_force(model, examples, rows) -> list[float]:
    layout, found = select_layout(model, "all"), []
    for row in rows:
        logits = torch.func.functional_call(model, layout.unflatten(row), (examples["points"],))
        probabilities = logits.double().softmax(-1)
        found.append(sum(math.log(p[label]) for p, label in zip(probabilities, examples["labels"], strict=True)))
    return found


def test_likelihoods_weights_and_effective_sample_size(model, examples):
    rows = candidates(model)
    expected = brute_force(model, examples, rows)
    found = log_likelihoods(NetworkRunner(model, select_layout(model, "all")), examples, rows, predict)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-5)
    total = sum(math.exp(value / 2) for value in expected)
    weights = [math.exp(value / 2) / total for value in expected]
    torch.testing.assert_close(posterior_weights(found, temperature=2), torch.tensor(weights), atol=1e-5, rtol=1e-4)
    size = 1 / sum(weight**2 for weight in weights)
    assert effective_sample_size(torch.tensor(weights)) == pytest.approx(size, rel=1e-4)
    nothing = {"points": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    assert not log_likelihoods(NetworkRunner(model, select_layout(model, "all")), nothing, rows, predict).any()


def test_a_network_without_a_likelihood_has_no_weight():
    weights = posterior_weights(torch.tensor([-1.0, math.nan, -1.0, -math.inf]))
    assert weights.tolist() == [0.5, 0.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="none of the networks"):
        posterior_weights(torch.tensor([math.nan]))


def test_resampling_draws_each_as_often_as_its_weight_says():
    weights = torch.tensor([0.5, 0.0, 0.125, 0.375])
    for seed in range(5):
        drawn = resample(weights, 64, torch.Generator().manual_seed(seed))
        assert torch.bincount(drawn, minlength=4).tolist() == [32, 0, 8, 24]


def test_refined_networks_are_trained_each_on_its_own(model, examples):
    rows, layout = candidates(model, 3), select_layout(model, "all")
    found = refine(model, layout, rows, examples, num_steps=4, learning_rate=0.01, predict=predict)
    for row, refined in zip(rows, found, strict=True):
        alone = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        alone.load_state_dict(layout.unflatten(row))
        optimizer = torch.optim.AdamW(alone.parameters(), lr=0.01, weight_decay=0)
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(alone(examples["points"]), examples["labels"]).backward()
            optimizer.step()
        torch.testing.assert_close(refined, layout.flatten(alone.state_dict()), atol=1e-5, rtol=1e-4)


def test_an_ensemble_says_what_its_networks_disagree_about(model, examples):
    rows, layout = candidates(model, 5), select_layout(model, "all")
    weights = torch.tensor([4.0, 0.0, 1.0, 2.0, 1.0])
    prediction = EnsembleModel(model, layout, rows, weights).predict(examples["points"])
    each = torch.stack([torch.func.functional_call(model, layout.unflatten(r), (examples["points"],)) for r in rows])
    each = each.detach().softmax(-1)
    share = weights / 8
    mean = (share.view(-1, 1, 1) * each).sum(0)
    torch.testing.assert_close(prediction.probabilities, mean)
    entropy = torch.distributions.Categorical(mean).entropy()
    torch.testing.assert_close(prediction.total_uncertainty, entropy)
    inside = (share.view(-1, 1) * torch.distributions.Categorical(each).entropy()).sum(0)
    torch.testing.assert_close(prediction.mutual_information, entropy - inside, atol=1e-6, rtol=1e-4)
    same = EnsembleModel(model, layout, rows[:1].repeat(3, 1)).predict(examples["points"])
    torch.testing.assert_close(same.mutual_information, torch.zeros(5), atol=1e-6, rtol=0)


def test_a_pipeline_draws_networks_for_examples(caplog):
    pipe = make_pipeline(make_network())
    examples = {"pixel_values": torch.randn(3, 3, 32, 32), "labels": torch.tensor([0, 1, 2])}
    settings = {"num_candidates": 12, "num_models": 8, "num_inference_steps": 2}
    found = pipe.posterior(examples, generator=torch.Generator().manual_seed(0), **settings)
    again = pipe.posterior(examples, generator=torch.Generator().manual_seed(0), **settings)
    assert torch.equal(found.parameters, again.parameters) and found.weights.sum() == 1
    assert 1 <= found.effective_sample_size <= 12 and len(found.parameters) == len(found.weights) <= 8
    sampled = pipe(12, 2, torch.Generator().manual_seed(0), output_type="pt").parameters
    assert all(torch.isclose(row, sampled, atol=1e-6).all(1).any() for row in found.parameters)
    refined = pipe.posterior(examples, generator=torch.Generator().manual_seed(0), refine_steps=3, **settings)
    models = NetworkRunner(pipe.base_model, pipe.autoencoder.layout)
    after = log_likelihoods(models, examples, refined.parameters)
    assert (after > refined.log_likelihoods).all()
    with caplog.at_level("WARNING"):
        pipe.posterior(examples, temperature=1e-4, **settings)
    assert "effective sample size is" in caplog.text


def test_given_candidates_count_as_sampled_ones():
    pipe = make_pipeline(make_network())
    nothing = {"pixel_values": torch.zeros(0, 3, 32, 32), "labels": torch.zeros(0, dtype=torch.long)}
    given = torch.zeros(2, pipe.autoencoder.layout.num_parameters)
    found = pipe.posterior(nothing, 6, 64, candidates=given, num_inference_steps=2)
    assert found.weights[(found.parameters == 0).all(1)].sum().item() == pytest.approx(2 / 8, abs=1 / 64)
    assert found.effective_sample_size == pytest.approx(8)


def test_candidates_are_decoded_a_few_at_a_time(monkeypatch):
    pipe = make_pipeline(make_network())
    examples = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    sizes, decode = [], pipe.autoencoder.decode
    monkeypatch.setattr(pipe.autoencoder, "decode", lambda rows, *rest: sizes.append(len(rows)) or decode(rows, *rest))
    pipe.posterior(examples, 300, 4, num_inference_steps=2)
    assert max(sizes) <= 100 and sum(sizes) >= 300


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"labels": None}, {}, "examples need labels, whole numbers of shape"),
        ({"labels": torch.tensor([0, 1])}, {}, r"2 labels, but pixel_values has the shape \(3, 3, 32, 32\)"),
        ({"labels": torch.tensor([0, 1, 9])}, {}, r"labels must lie between 0 and 3, got \[0, 1, 9\]"),
        ({}, {"temperature": math.nan}, "temperature must be above 0 and finite, got nan"),
        ({}, {"refine_steps": -1}, "refine_steps must be a whole number of at least 1"),
        ({}, {"num_models": 0}, "num_models must be a whole number of at least 1"),
        ({}, {"refine_learning_rate": 0.0}, "refine_learning_rate must be above 0 and finite, got 0.0"),
        ({}, {"condition": [{}, {}, {}]}, "4 candidates cannot be shared by 3 conditions evenly"),
        ({}, {"candidates": torch.zeros(2, 5)}, r"candidates must have shape \(M, 64\), got \(2, 5\)"),
    ],
)
def test_wrong_examples_and_arguments(changes, arguments, message):
    pipe = make_pipeline(make_network())
    message = message.replace("64", str(pipe.autoencoder.layout.num_parameters))
    examples = {"pixel_values": torch.randn(3, 3, 32, 32), "labels": torch.tensor([0, 1, 2])} | changes
    with pytest.raises(ValueError, match=message):
        pipe.posterior(examples, 4, **{"num_models": 2} | arguments, num_inference_steps=2)


def test_values_are_labels_with_a_gaussian_error():
    """Half of a datum: the known values weigh networks as a Gaussian of their squared error says."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    layout = select_layout(model, ["all"])
    parameters = torch.randn(5, layout.num_parameters)
    points, labels, sigma = torch.randn(7, 2), torch.randn(7, 1), 0.3
    examples = {"input": points, "labels": labels}
    errors = (parameters[:, :2] @ points.T + parameters[:, 2:] - labels.T) / sigma  # weight before bias
    expected = -errors.square().sum(1) / 2
    found = log_likelihoods(NetworkRunner(model, layout), examples, parameters, sigma=sigma)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    losses = example_loss(model, layout, examples, sigma=sigma)(parameters.requires_grad_())
    torch.testing.assert_close(losses, -expected, rtol=1e-4, atol=1e-4)
    assert losses.requires_grad
    with pytest.raises(ValueError, match=r"examples need labels, floats of shape \(B, C\), got torch.int64"):
        check_examples({"labels": torch.ones(7, dtype=torch.long)}, "mse", sigma)


@pytest.mark.parametrize(("loss", "sigma"), [("mse", None), ("nll", 0.5), ("mse", 0.0)])
def test_squared_errors_need_a_sigma_and_classes_have_none(loss, sigma):
    with pytest.raises(ValueError, match="loss='mse' needs sigma, above 0"):
        check_examples({}, loss, sigma)
