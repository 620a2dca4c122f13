"""Kernel ridge regression from conditions that can be said in several ways."""

import torch

from pdiff_hf.models.condition import Fields
from pdiff_hf.models.kernel_ridge import KernelRidge

FIELDS = Fields({"place": {"type": "vector", "length": 2}})


def test_all_ways_to_say_a_condition_have_its_parameters():
    generator = torch.Generator().manual_seed(0)
    ways, parameters = torch.randn(5, 3, 2, generator=generator), torch.randn(5, 4, generator=generator)
    new = torch.randn(6, 2, generator=generator)
    flat = KernelRidge(FIELDS, ways.flatten(0, 1), parameters.repeat_interleave(3, 0), 0.1, [1.0])
    torch.testing.assert_close(KernelRidge(FIELDS, ways, parameters, 0.1, [1.0])(new), flat(new))


def test_samples_differ_as_predictions_without_a_network_do_from_it():
    generator = torch.Generator().manual_seed(0)
    ways, parameters = torch.randn(5, 2, 2, generator=generator), torch.randn(5, 4, generator=generator)
    ridge = KernelRidge(FIELDS, ways, parameters, 0.1, [1.0])
    left_out = []
    for i in range(5):
        rest = [j for j in range(5) if j != i]
        other = KernelRidge(FIELDS, ways[rest], parameters[rest], 0.1, [1.0])
        other.moves, other.mean = (parameters[rest] - ridge.mean).double(), ridge.mean  # the mean is of all
        left_out.append((parameters[i] - other(ways[i])).mean(0))
    left_out = torch.stack(left_out)
    samples = ridge.sample(ways[:1, 0], 20_000, generator)[0]
    torch.testing.assert_close(samples.T.cov(), left_out.T @ left_out / 5, rtol=0.05, atol=0.05)
