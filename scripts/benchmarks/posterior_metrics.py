"""What a weighted set of networks says about a task: joint and marginal likelihoods, validity, mixtures of priors."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pdiff_hf.evaluation.member_score import MemberScorer
from pdiff_hf.networks.runner import NetworkRunner
from pdiff_hf.tasks.family import Family
from pdiff_hf.tasks.task import Batch, Split

NUM_QUERIES = 20  # τ
TEMPERATURES = (1.0, 1.5, 2.0, 4.0)  # of likelihoods


def marginal_nll(probabilities: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    Mean cross-entropy of probabilities that are sharpened or softened: p^(1 / temperature), normalised.

    Args:
        probabilities (`torch.Tensor`): Shape `(..., B, C)`.
        labels (`torch.Tensor`): Shape `(..., B)`.

    Returns:
        `torch.Tensor`: In nats, shape `(...)`.
    """
    logits = probabilities.clamp_min(1e-12).log() / temperature
    return -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1).mean(-1)


def fit_temperature(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature, of a hundred from 0.25 to 8, with the lowest mean of [`marginal_nll`]; on validation data."""
    options = torch.logspace(math.log10(0.25), math.log10(8), 100).tolist()
    return min(options, key=lambda value: marginal_nll(probabilities, labels, value).mean().item())


def validity(
    family: Family,
    networks: NetworkRunner,
    parameters: torch.Tensor,
    table: torch.Tensor,
    split: Split = "test",
    num_examples: int = 500,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How good each network is for the task of a family that it is best for.

    Args:
        parameters (`torch.Tensor`): Shape `(N, D)`.
        table (`torch.Tensor`): The conditions of the tasks, shape `(T, width)`.

    Returns:
        `tuple`: Accuracy in percent and index of that task, both of shape `(N,)`.
    """
    scorer = MemberScorer(family, networks, table, num_examples)
    rows = [scorer.score(split, row.expand(len(table), -1)).values.squeeze(1) for row in parameters]
    return torch.stack(rows).max(1)


def expected_unknown_nll(num_classes: int, num_known: int, num_queries: int = NUM_QUERIES) -> float:
    """
    The joint NLL of queries, in nats, that nobody can go below who does not know `num_classes - num_known` of the bits
    of a grouped task but makes no error otherwise: log 2 for each class without a known bit among the queries. The
    classes of queries are independent and equally likely, so that each is among them with 1 − (1 − 1 / C)^τ.
    """
    return (num_classes - num_known) * (1 - (1 - 1 / num_classes) ** num_queries) * math.log(2)


@dataclass
class WeighedSet:
    """
    What a set of candidates says about one task after some labelled examples; E numbers of examples, K temperatures.

    Args:
        log_evidence (`torch.Tensor`): Logarithm of the mean of likelihood^(1 / temperature), shape `(E, K)`.
        log_square (`torch.Tensor`): Logarithm of the sum of squared shares in that mean, for effective sample sizes.
        probabilities (`torch.Tensor`): Weighted mean for M queries, shape `(E, K, M, C)`.
        joint (`torch.Tensor`): Weighted likelihood of sets of queries, logarithm, shape `(E, K, S)`.
    """

    log_evidence: torch.Tensor
    log_square: torch.Tensor
    probabilities: torch.Tensor
    joint: torch.Tensor

    def at(self, e: int, k: int) -> "WeighedSet":
        """With one number of examples and one temperature, without these two dimensions."""
        return WeighedSet(*(value[e, k] for value in vars(self).values()))


@torch.no_grad()
def weigh(
    models: NetworkRunner,
    predict: Callable,
    parameters: torch.Tensor,
    examples: Batch,
    queries: Batch,
    num_examples: Sequence[int],
    temperatures: Sequence[float] = TEMPERATURES,
    log_prior: torch.Tensor | None = None,
) -> WeighedSet:
    """
    Weighs candidates by the likelihood of the first so many examples, for several numbers of them at once.

    Args:
        parameters (`torch.Tensor`): Shape `(N, D)`.
        examples (`dict`), queries (`dict`): Batches of the task; the number of queries is a multiple of `NUM_QUERIES`.
        log_prior (`torch.Tensor`, *optional*): Of the candidates, shape `(N,)`; the same for all by default.
    """

    def label_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(-1).gather(-1, labels.expand(len(logits), -1).unsqueeze(-1)).squeeze(-1)

    known = torch.cat(
        [label_log_probs(out, examples["labels"]) for _, out in models(lambda c: predict(c, examples), parameters)]
    )  # (N, B)
    total = torch.cat([torch.zeros(len(known), 1), known.cumsum(1)], dim=1)[:, list(num_examples)]  # (N, E)
    prior = torch.full((len(known),), -math.log(len(known))) if log_prior is None else log_prior.log_softmax(0)
    scores = total.T.unsqueeze(1) / torch.tensor(temperatures).view(1, -1, 1) + prior  # (E, K, N)
    scores = scores.nan_to_num(nan=-math.inf)
    log_evidence = scores.logsumexp(-1)
    log_weights = scores - log_evidence.unsqueeze(-1)
    weights = log_weights.exp().flatten(0, 1)  # (E K, N)
    probabilities: torch.Tensor | float = 0.0
    joints = []
    for rows, logits in models(lambda call: predict(call, queries), parameters):  # (n, M, C)
        probabilities = probabilities + weights[:, rows] @ logits.softmax(-1).flatten(1)
        joints.append(label_log_probs(logits, queries["labels"]).unflatten(1, (-1, NUM_QUERIES)).sum(2))
        shape = logits.shape[1:]
    assert isinstance(probabilities, torch.Tensor)
    joint = torch.cat(joints)  # (N, S)
    highest = joint.amax(0)
    joint = (weights.double() @ (joint - highest).double().exp()).log() + highest
    return WeighedSet(
        log_evidence,
        (2 * scores).logsumexp(-1),
        probabilities.unflatten(0, log_evidence.shape).unflatten(-1, shape),
        joint.unflatten(0, log_evidence.shape),
    )


def mix(parts: Sequence[WeighedSet], shares: Sequence[float]) -> WeighedSet:
    """What a prior says that is one of several sets of candidates with these probabilities."""
    kept = [(part, math.log(share)) for part, share in zip(parts, shares, strict=True) if share > 0]
    each = torch.stack([part.log_evidence + log_share for part, log_share in kept])  # (P, E, K)
    total = each.logsumexp(0)
    weights = (each - total).exp()
    return WeighedSet(
        total,
        torch.stack([part.log_square + 2 * log_share for part, log_share in kept]).logsumexp(0),
        sum(w[..., None, None] * part.probabilities for w, (part, _) in zip(weights, kept, strict=True)),
        torch.stack(
            [part.joint + (e - total).unsqueeze(-1) for e, (part, _) in zip(each, kept, strict=True)]
        ).logsumexp(0),
    )


def summarize(evidence: WeighedSet, labels: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """
    Scores of a prediction, each of shape `(E, K)`, or a scalar after [`WeighedSet.at`]: `accuracy` in percent, `nll`
    and `joint_nll` in nats, and `effective_sample_size`.
    """
    right = evidence.probabilities.argmax(-1) == labels
    return {
        "accuracy": 100 * right.float().mean(-1),
        "nll": marginal_nll(evidence.probabilities, labels.expand(right.shape)),
        "joint_nll": -evidence.joint.mean(-1),
        "effective_sample_size": (2 * evidence.log_evidence - evidence.log_square).exp(),
    }
