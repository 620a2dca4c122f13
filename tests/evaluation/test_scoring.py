"""Scores: equal to a plain loop over whole networks; kept by content; one pass in chunks; bounded memory."""

import copy

import pytest
import torch
from torch import nn

from pdiff_hf.evaluation import scoring
from pdiff_hf.evaluation.scoring import Scorer, check_memory
from pdiff_hf.layout import ParameterLayout
from pdiff_hf.selection import select_parameters
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
    layout = ParameterLayout.from_state_dict(model.state_dict(), select_parameters(model, "norm[-2:]"))
    parameters = layout.flatten(model.state_dict()) + 0.5 * torch.randn(7, layout.num_parameters)
    return model, layout, parameters


def make_task(**changes) -> CountingTask:
    return CountingTask(**{"model": "mlp_mini", "max_train_samples": 100, "max_eval_samples": 60} | changes)


def test_scores_are_those_of_a_plain_loop_over_whole_networks(made):
    model, layout, parameters = made
    task = make_task()
    scores = Scorer(task, copy.deepcopy(model), layout).score("test", parameters)
    split = task.load_split("test")
    batch = split.__getitems__(list(range(len(split))))
    assert scores.predictions.shape == (7, 60) and scores.log_probs.shape == (7, 60, 10)
    assert torch.equal(scores.labels, batch["labels"])
    for i, row in enumerate(parameters):
        network = copy.deepcopy(model)
        network.load_state_dict(layout.unflatten(row), strict=False)
        with torch.no_grad():
            logits = network(pixel_values=batch["pixel_values"]).logits
        assert torch.equal(scores.predictions[i].long(), logits.argmax(-1))
        assert torch.equal(scores.wrong[i], logits.argmax(-1) != batch["labels"])
        torch.testing.assert_close(scores.log_probs[i].float(), logits.log_softmax(-1), rtol=1e-3, atol=1e-3)


def test_rows_of_several_tensors_repeated_networks_and_chunks(made, monkeypatch):
    model, layout, parameters = made
    scorer = Scorer(make_task(), model, layout)
    expected = scorer.score("test", parameters)
    monkeypatch.setattr(scoring, "CHUNK_SIZE", 3)
    rows = [*parameters[4:], parameters[0], *parameters[:4], parameters[0]]
    scores = scorer.score("test", rows)
    order = [4, 5, 6, 0, 0, 1, 2, 3, 0]
    assert torch.equal(scores.predictions, expected.predictions[order])
    torch.testing.assert_close(scores.log_probs, expected.log_probs[order], rtol=2e-3, atol=2e-3)


def test_what_was_scored_is_not_scored_again(made, tmp_path):
    model, layout, parameters = made
    task = make_task()
    first = Scorer(task, model, layout, tmp_path).score("test", parameters[:5])
    calls = task.calls
    assert calls > 0
    again = Scorer(task, model, layout, tmp_path).score("test", parameters[[3, 1]])
    assert torch.equal(again.log_probs, first.log_probs[[3, 1]]) and torch.equal(again.labels, first.labels)
    assert task.calls == calls + 1  # one example, for the number of classes
    written = []
    scorer = Scorer(task, model, layout, tmp_path)
    compute = scorer._compute
    scorer._compute = lambda split, new, keys: written.append(len(new)) or compute(split, new, keys)
    scorer.score("test", parameters)
    assert written == [2]


def test_a_kill_loses_no_more_than_a_chunk(made, tmp_path, monkeypatch):
    model, layout, parameters = made
    monkeypatch.setattr(scoring, "CHUNK_SIZE", 2)
    task = make_task()
    scorer = Scorer(task, model, layout, tmp_path)
    compute, chunks = scorer._compute, []

    def killed_in_the_third(split, new, keys):
        chunks.append(len(new))
        if len(chunks) == 3:
            raise KeyboardInterrupt
        return compute(split, new, keys)

    scorer._compute = killed_in_the_third
    with pytest.raises(KeyboardInterrupt):
        scorer.score("test", parameters)
    chunks.clear()
    scorer._compute = lambda split, new, keys: chunks.append(len(new)) or compute(split, new, keys)
    scores = scorer.score("test", parameters)
    assert chunks == [2, 1]  # 4 of the 7 had been written
    assert torch.equal(scores.predictions, Scorer(task, model, layout).score("test", parameters).predictions)


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
    scorer = Scorer(task, model, layout, tmp_path)
    calls = task.calls
    scorer.score(split, parameters)
    assert task.calls > calls + 1


def test_what_does_not_fit_into_memory_is_refused_before_any_work(made):
    check_memory(10, 100, 10)
    with pytest.raises(ValueError, match=r"need 2,200,000,000,000,000 bytes.*--max_eval_samples"):
        check_memory(1100, 1_000_000_000, 1000)
    model, layout, _ = made
    task = make_task()
    scorer = Scorer(task, model, layout)
    with pytest.raises(ValueError, match="more than half of the"):
        scorer.check_memory("test", 10**12)
    assert task.calls == 1
