"""Scores: equal to a plain loop over whole networks; kept by content; one pass in chunks; bounded memory."""

import copy

import pytest
import torch
from support.evaluation import regression, snapshots_around
from torch import nn

from pdiff_hf.evaluation.report_data import Metric
from pdiff_hf.evaluation.score import Scorer
from pdiff_hf.layout import ParameterLayout
from pdiff_hf.selection import select_layout
from pdiff_hf.tasks import ImageClassificationTask


class CountingTask(ImageClassificationTask):
    """Digits, and how often a network was run."""

    calls = 0

    def predict(self, call, batch):
        self.calls += 1
        return super().predict(call, batch)


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, ParameterLayout, torch.Tensor]:
    """An MLP for digits, the layout of its last two norms, and 7 networks around it."""
    torch.manual_seed(0)
    model = make_task().load_base_model().eval()
    layout = select_layout(model, ["norm[-2:]"], [])
    parameters = layout.flatten(model.state_dict()) + 0.5 * torch.randn(7, layout.num_parameters)
    return model, layout, parameters


def make_task(**changes) -> CountingTask:
    return CountingTask(**{"model": "mlp_mini", "max_train_samples": 100, "max_eval_samples": 60} | changes)


def test_scores_are_those_of_a_plain_loop_over_whole_networks(made):
    model, layout, parameters = made
    task = make_task()
    scorer = Scorer(task, copy.deepcopy(model), layout)
    assert scorer.metric == Metric("accuracy", "%", higher_is_better=True) and scorer.classifies
    scores = scorer.score("test", parameters)
    split = task.load_split("test")
    batch = split.__getitems__(list(range(len(split))))
    assert scores.predictions.shape == (7, 60) and scores.log_probs.shape == (7, 60, 10)
    assert torch.equal(scores.labels, batch["labels"]) and not scores.undefined.any()
    for i, row in enumerate(parameters):
        network = copy.deepcopy(model)
        network.load_state_dict(layout.unflatten(row), strict=False)
        with torch.no_grad():
            logits = network(pixel_values=batch["pixel_values"]).logits
        assert torch.equal(scores.predictions[i].long(), logits.argmax(-1))
        wrong = logits.argmax(-1) != batch["labels"]
        assert torch.equal(scores.wrong[i], wrong)
        assert scores.values[i] == pytest.approx(100 - 100 * wrong.double().mean().item())
        torch.testing.assert_close(scores.log_probs[i].float(), logits.log_softmax(-1), rtol=1e-3, atol=1e-3)


def test_predictions_that_are_not_finite_are_never_right(made):
    model, layout, parameters = made
    scores = Scorer(make_task(), model, layout).score("test", torch.stack([parameters[0], parameters[1] * 1e38]))
    assert scores.undefined.tolist() == [False, True]
    assert (scores.predictions[1] == -1).any() and scores.wrong[1][scores.predictions[1] == -1].all()
    assert scores.values[1].isfinite()


def test_rows_of_several_tensors_repeated_networks_and_chunks(made):
    model, layout, parameters = made
    scorer = Scorer(make_task(), model, layout)
    expected = scorer.score("test", parameters)
    scorer.chunk_size = 3
    rows = [*parameters[4:], parameters[0], *parameters[:4], parameters[0]]
    scores = scorer.score("test", rows)
    order = [4, 5, 6, 0, 0, 1, 2, 3, 0]
    assert torch.equal(scores.predictions, expected.predictions[order])
    torch.testing.assert_close(scores.log_probs, expected.log_probs[order], rtol=2e-3, atol=2e-3)


def test_what_was_scored_is_not_scored_again_and_a_kill_loses_no_more_than_a_chunk(made, tmp_path):
    model, layout, parameters = made
    scorer = Scorer(make_task(), model, layout, tmp_path)
    scorer.chunk_size = 2
    compute, chunks = scorer._compute, []

    def killed_in_the_third(split, new, keys):
        chunks.append(len(new))
        if len(chunks) == 3:
            raise KeyboardInterrupt
        return compute(split, new, keys)

    scorer._compute = killed_in_the_third
    with pytest.raises(KeyboardInterrupt):
        scorer.score("test", parameters)
    task = make_task()
    scorer = Scorer(task, model, layout, tmp_path)
    first = scorer.score("test", parameters[[3, 1]])
    assert task.calls == 1  # one example, for the number of classes: 4 of the 7 had been written
    scores = scorer.score("test", parameters)
    plain = Scorer(make_task(), model, layout).score("test", parameters)
    assert torch.equal(scores.predictions, plain.predictions) and torch.equal(scores.labels, plain.labels)
    assert torch.equal(first.predictions, plain.predictions[[3, 1]])


@pytest.mark.parametrize("what", ("base model", "data", "split", "parameters"))
def test_the_cache_does_not_mistake_one_thing_for_another(made, tmp_path, what):
    model, layout, parameters = made
    Scorer(make_task(), model, layout, tmp_path).score("test", parameters[:2])
    model, task, split, parameters = copy.deepcopy(model), make_task(), "test", parameters[:2].clone()
    if what == "base model":
        frozen = next(name for name in model.state_dict() if name not in layout.names)
        model.state_dict()[frozen].view(-1)[0] += 1e-6
    elif what == "data":
        task = make_task(max_eval_samples=59)
    elif what == "split":
        split = "validation"
    else:
        parameters[:, 0] += 1e-3
    Scorer(task, model, layout, tmp_path).score(split, parameters)
    assert task.calls > 1


def test_what_does_not_fit_into_memory_is_refused_before_any_work(made):
    model, layout, _ = made
    task = make_task()
    with pytest.raises(ValueError, match=r"need 1,200,000,000,000,000 bytes, more than half of .*--max_eval_samples"):
        Scorer(task, model, layout).check_memory("test", 10**12)
    assert task.calls == 1


def test_every_network_is_measured_once_and_kept_by_content(tmp_path):
    scorer = regression(tmp_path)
    task, size = scorer.task, scorer.chunk_size
    assert scorer.metric == Metric("MSE", "", higher_is_better=False) and not scorer.classifies
    parameters = snapshots_around(scorer, size + 6)
    rows = [*parameters, parameters[3], parameters[3] + 1e6]
    values = scorer.score("test", rows).values
    assert values[3] == values[size + 6] and values[-1].isnan() and not values[:-1].isnan().any()
    assert task.measured == [("test", size), ("test", 7)]
    again = regression(tmp_path)
    assert torch.equal(again.score("test", parameters[5:9]).values, values[5:9])
    assert again.score("test", rows[-1:]).undefined.all() and not again.task.measured  # not measured again
    again.score("validation", parameters[:1])
    assert again.task.measured == [("validation", 1)]
    model = scorer.models.model
    for i in (0, size + 5):
        with torch.no_grad():
            model.load_state_dict(scorer.layout.unflatten(parameters[i]), strict=False)
            batch = task.collate(list(task.load_split("test")))
            torch.testing.assert_close(task.loss(model, batch).double(), values[i], rtol=1e-5, atol=1e-6)
