"""What a generator of networks on demand is compared with at equal feedback."""

from functools import cache

import pytest
import torch
from accelerate import Accelerator
from support.families import make_family, make_networks
from torch import nn

from pdiff_hf.evaluation.member_score import MemberScorer
from pdiff_hf.evaluation.opponents import Regime
from pdiff_hf.scripts.opponents import BasisNetworks, ConditionedNetwork, shared_networks, wider_network
from pdiff_hf.training.tune import TuneArguments, fresh_tasks


@cache
def world():
    """A family, its base model, and tables of members."""
    family = make_family()
    split = family.split({"train": 12, "validation": 4, "test": 6}, seed=0)
    return family, make_networks(family), {name: family.fields.table(rows) for name, rows in split.items()}


@pytest.mark.parametrize("mode", ["plain", "input", "FiLM"])
def test_a_conditioned_network_starts_as_the_base_model_and_learns_what_it_is_told(mode):
    family, networks, tables = world()
    batch = family.batch("train", tables["train"][:3], torch.arange(5))
    fields = None if mode == "plain" else family.fields
    options = {"image_shape": (1, 8, 8)} if mode == "input" else {"film": mode == "FiLM"}
    torch.manual_seed(0)
    module = ConditionedNetwork(networks.model, family.predict, networks.layout.names, fields, **options)
    start = networks.stack(family.predict, networks.base_parameters().expand(3, -1), batch)
    logits = module(tables["train"][:3], batch, torch.Generator())
    torch.testing.assert_close(logits, start)
    nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
    trained = {name for name, value in module.named_parameters() if value.grad is not None and value.grad.any()}
    assert any(name.startswith("network.") for name in trained)
    assert any(name.startswith(("image", "film")) for name in trained) is (mode != "plain")
    wide = wider_network(family, 4)
    assert sum(p.numel() for p in wide.parameters()) > 3 * sum(p.numel() for p in networks.model.parameters())


def test_a_search_leaves_rates_that_are_far_too_low(monkeypatch):
    family, networks, tables = world()
    device = Accelerator().device
    batches = lambda args: fresh_tasks(family, args, set(), device)  # noqa: E731
    regime = Regime(family, networks, Accelerator(), batches, 12, tables["validation"], 0)
    monkeypatch.setattr("pdiff_hf.scripts.opponents.NETWORK_RATES", (1e-5, 2e-5, 4e-5, 8e-5))  # planted
    some = TuneArguments(num_steps=40, num_tasks=8, num_examples=16)
    name, make = next(shared_networks(regime, some, 0))
    group = make()
    assert name == "one network for all tasks" and max(float(k.split()[0]) for k in group.tried) > 1e-3
    in_full = {float(name.split()[0]): loss for name, loss in group.tried.items() if name.endswith("in full")}
    assert len(in_full) >= 2 and group.cost.once > 0
    assert min(in_full, key=in_full.__getitem__) < max(float(name.split()[0]) for name in group.tried)


def test_basis_networks():
    family, networks, tables = world()
    torch.manual_seed(0)
    module = BasisNetworks(networks, family.predict, networks.base_parameters(), family.fields, num_basis=3)
    assert module.sample_parameters(tables["test"]).shape == (6, networks.layout.num_parameters)
    assert MemberScorer(family, networks, tables["test"], 20).score("test", module).values.shape == (6, 1)
