"""Scores of weighted sets of networks, against sums over one network, example and label after the other."""

import itertools
import math

import pytest
import torch
from benchmarks.posterior_metrics import (
    NUM_QUERIES,
    expected_unknown_nll,
    fit_temperature,
    marginal_nll,
    mix,
    summarize,
    validity,
    weigh,
)
from support.families import make_family, make_networks

from pdiff_hf.networks.posterior import effective_sample_size
from pdiff_hf.networks.runner import NetworkRunner

COUNTS, TEMPERATURES = (0, 2, 5), (1.0, 3.0)


@pytest.fixture(scope="module")
def case():
    family = make_family()
    networks = make_networks(family)
    table = family.fields.table(family.conditions(3, seed=0))
    batches = [family.batch("test", table[:1], torch.arange(*ends)) for ends in ((0, 5), (5, 45))]
    examples, queries = ({name: values[0] for name, values in batch.items()} for batch in batches)
    noise = torch.randn(6, networks.layout.num_parameters, generator=torch.Generator().manual_seed(0))
    return family, networks, table, examples, queries, networks.base_parameters() + 0.3 * noise


@torch.no_grad()
def label_probabilities(case, batch) -> list[list[list[float]]]:
    """Of network, example and class."""
    family, networks, *_, parameters = case
    found = []
    for row in parameters:
        logits = torch.func.functional_call(networks.model, networks.layout.unflatten(row), (batch["pixel_values"],))
        found.append(logits.logits.double().softmax(-1).tolist())
    return found


def brute_force(case, prior, count, temperature):
    """Probabilities `(M, C)`, joint NLL and effective sample size, in plain Python."""
    examples, queries = case[3:5]
    known, asked = label_probabilities(case, examples), label_probabilities(case, queries)
    weights = []
    for share, network in zip(prior, known, strict=True):
        likelihood = math.prod(network[b][examples["labels"][b]] for b in range(count))
        weights.append(share * likelihood ** (1 / temperature))
    weights = [weight / sum(weights) for weight in weights]
    num_examples, num_classes = len(asked[0]), len(asked[0][0])
    mean = [
        [sum(w * network[m][c] for w, network in zip(weights, asked, strict=True)) for c in range(num_classes)]
        for m in range(num_examples)
    ]
    joint = []
    for start in range(0, num_examples, NUM_QUERIES):
        each = [
            math.prod(network[m][queries["labels"][m]] for m in range(start, start + NUM_QUERIES)) for network in asked
        ]
        joint.append(-math.log(sum(w * p for w, p in zip(weights, each, strict=True))))
    return weights, mean, joint, 1 / sum(weight**2 for weight in weights)


def test_weights_predictions_and_scores_are_those_of_a_plain_sum(case):
    family, networks, _, examples, queries, parameters = case
    models = NetworkRunner(networks.model, networks.layout)
    first = weigh(models, family.predict, parameters[:2], examples, queries, COUNTS, TEMPERATURES)
    rest = weigh(models, family.predict, parameters[2:], examples, queries, COUNTS, TEMPERATURES)
    prior = [0.35, 0.35] + 4 * [0.075]
    all_at_once = weigh(
        models, family.predict, parameters, examples, queries, COUNTS, TEMPERATURES, torch.tensor(prior).log()
    )
    labels = queries["labels"]
    for evidence in (mix([first, rest], [0.7, 0.3]), all_at_once):
        scores = summarize(evidence, labels)
        for (e, count), (k, temperature) in itertools.product(enumerate(COUNTS), enumerate(TEMPERATURES)):
            weights, mean, joint, size = brute_force(case, prior, count, temperature)
            torch.testing.assert_close(evidence.probabilities[e, k], torch.tensor(mean), atol=1e-5, rtol=1e-4)
            right = [row.index(max(row)) == label for row, label in zip(mean, labels.tolist(), strict=True)]
            assert scores["accuracy"][e, k].item() == pytest.approx(100 * sum(right) / len(right))
            losses = [-math.log(row[label]) for row, label in zip(mean, labels.tolist(), strict=True)]
            assert scores["nll"][e, k].item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
            assert scores["joint_nll"][e, k].item() == pytest.approx(sum(joint) / len(joint), rel=1e-4)
            assert scores["effective_sample_size"][e, k].item() == pytest.approx(size, rel=1e-3)
            assert effective_sample_size(torch.tensor(weights)) == pytest.approx(size)
    without = mix([first, rest], [1.0, 0.0])
    assert torch.equal(without.probabilities, first.probabilities)


def test_temperature_scaling_finds_the_temperature():
    generator = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(4000, 5, generator=generator)
    labels = torch.multinomial(true.softmax(1), 1, generator=generator).squeeze(1)
    sharp = (3 * true).softmax(1)
    assert fit_temperature(sharp, labels) == pytest.approx(3, rel=0.1)
    expected = torch.nn.functional.cross_entropy(true, labels)
    torch.testing.assert_close(marginal_nll(sharp, labels, 3.0), expected, atol=1e-4, rtol=1e-4)


def test_a_network_is_valid_for_the_task_that_it_is_best_for(case):
    family, networks, table, _, _, parameters = case
    found, best = validity(family, networks, parameters[:2], table)
    for n, row in enumerate(parameters[:2]):
        networks_of_tasks = []
        for t in range(len(table)):
            batch = family.batch("test", table[t : t + 1], torch.arange(family.num_examples("test")))
            call = torch.func.functional_call(
                networks.model, networks.layout.unflatten(row), (batch["pixel_values"][0],)
            )
            networks_of_tasks.append(100 * (call.logits.argmax(-1) == batch["labels"][0]).double().mean().item())
        assert found[n].item() == pytest.approx(max(networks_of_tasks))
        assert networks_of_tasks[best[n]] == pytest.approx(max(networks_of_tasks))


def test_what_unknown_bits_cost_at_least_is_that_of_the_exact_mixture():
    num_classes, num_known, num_queries = 4, 1, 3
    total = 0.0
    for classes in itertools.product(range(num_classes), repeat=num_queries):
        unknown = {c for c in classes if c >= num_known}
        # All tasks that agree with the known bits, of which those with the right answers are a part.
        tasks = list(itertools.product((0, 1), repeat=num_classes - num_known))
        right = sum(all(task[c - num_known] == 1 for c in unknown) for task in tasks)
        total -= math.log(right / len(tasks)) / num_classes**num_queries
    assert expected_unknown_nll(num_classes, num_known, num_queries) == pytest.approx(total)
