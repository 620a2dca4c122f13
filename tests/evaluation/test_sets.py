"""Sets of data: how far two are apart, what trivial generators draw, and what is refused."""

import pytest
import torch
from support.waves import Waves

from pdiff_hf import evaluate
from pdiff_hf.evaluation import Group
from pdiff_hf.evaluation.placing import Judge, Placed, Resampled, frechet, two_sample, with_root
from pdiff_hf.evaluation.sets import trivial
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.selection import select_layout


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    model = Waves().load_base_model()
    return NetworkRunner(model, select_layout(model, ["all"]))


def test_the_frechet_distance_of_gaussians_that_commute():
    one, other = torch.tensor([1.0, 4.0]).double(), torch.tensor([9.0, 1.0]).double()
    mean = torch.tensor([[3.0, 0.0]]).double()
    found = frechet(mean, torch.diag(one)[None], *with_root(torch.zeros(1, 2).double(), torch.diag(other)[None]))
    assert found.item() == pytest.approx(100 * (9 + (1 - 3) ** 2 + (2 - 1) ** 2) / 10)


def test_moments_of_a_set_are_those_of_torch():
    resampled = Resampled(Judge(Waves(), 0), 0)
    features = resampled.judge.real
    mean, covariance = resampled._moments(features, torch.ones(1, len(features)).double())
    torch.testing.assert_close(mean[0], features.mean(0))
    torch.testing.assert_close(covariance[0], torch.cov(features.T))
    placed = resampled.place(Waves().signals("test"))
    assert placed.measures["score_mean"] == pytest.approx(0, abs=1e-3)
    assert placed.measures["nearness"] == pytest.approx(1) and placed.measures["two_sample"] == 0


def test_sets_of_other_sizes_are_told_apart_by_chance_where_data_are_sorted():
    generator = torch.Generator().manual_seed(0)
    real = torch.cat([torch.randn(200, 2, generator=generator), 9 + torch.randn(200, 2, generator=generator)])
    drawn = torch.randn(200, 2, generator=generator) + 9.0 * (torch.arange(200) % 2)[:, None]
    assert two_sample(drawn, real) == pytest.approx(0.5, abs=0.06)


def test_a_gaussian_of_each_class_leaves_rows_without_a_class_out():
    rows = torch.cat([torch.full((4, 2), 5.0), torch.full((4, 2), -5.0), torch.full((4, 2), 99.0)])
    classes = torch.tensor([0.0] * 4 + [1.0] * 4 + [torch.nan] * 4)
    drawn = {name: (found, told) for name, _, found, told in trivial(rows, classes, 30, 0, "weights")}
    found, told = drawn["Gaussian of each class"]
    assert told.unique().tolist() == [0, 1]
    assert torch.equal(found[:, 0], torch.where(told == 0, 5.0, -5.0))
    nothing = {name for name, *_ in trivial(rows, torch.full((12,), torch.nan), 30, 0, "weights")}
    assert drawn.keys() - nothing == {"Gaussian of each class"}


def report_on(networks, snapshots, generated, **options):
    where = {"base_model": networks.model, "layout": networks.layout}
    return evaluate(generated, Waves(), snapshots=snapshots, **where, **options)


def test_all_sets_are_as_large_as_a_given_one(networks):
    snapshots = networks.base_parameters() + 0.1 * torch.randn(30, 97, generator=torch.Generator().manual_seed(0))
    extra = [Group("the same", snapshots[:12]), ("data", lambda: Group("data", Waves().signals("train")[:12]))]
    report = report_on(networks, snapshots, snapshots[:12], num_models=25, extra_groups=extra)
    assert {row.n for row in report.groups} == {12}
    for key in ("score_mean", "nearness", "copies"):
        assert report.group("the same").measures[key] == report.generated.measures[key]
    assert report.group("data").measures["nearness"] == 0


def test_what_is_refused_before_any_work(networks):
    snapshots = networks.base_parameters().repeat(30, 1)
    with pytest.raises(ValueError, match="needs more than 5 training data.*there are 5;"):
        report_on(networks, snapshots[:5], snapshots)
    with pytest.raises(ValueError, match="at least 2, with finite parameters"):
        report_on(networks, snapshots, snapshots * torch.nan)


def test_a_lower_distance_of_data_that_are_as_new_is_better():
    def placed(distance: float, novelty: float) -> Placed:
        return Placed({"score_mean": distance}, torch.full((9,), distance), torch.full((9,), novelty))

    own = placed(2.0, 0.95)
    verdicts = [Resampled.compare(own, placed(*other)).verdict for other in ((3.0, 0.95), (3.0, 0.5), (3.0, 1.4))]
    assert verdicts == ["better"] * 3
    assert Resampled.compare(own, placed(1.0, 0.5)).verdict == "too close to call"  # nearer, but a copy
    assert Resampled.compare(own, placed(1.0, 0.92)).verdict == "worse"
    assert Resampled.compare(placed(2.0, 0.5), placed(3.0, 0.95)).verdict == "too close to call"
