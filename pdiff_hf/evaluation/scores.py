"""What scoring gives: how many networks do on a split, and what they are judged by."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .metrics import accuracy


@dataclass(frozen=True)
class Metric:
    """
    What networks are judged by.

    Args:
        name (`str`): Such as `accuracy`.
        unit (`str`): Such as `%`; empty if it has none.
        higher_is_better (`bool`): Whether the best network is the one with the largest value.
    """

    name: str
    unit: str = ""
    higher_is_better: bool = True

    @property
    def sign(self) -> int:
        """What values are multiplied with, so that larger is better."""
        return 1 if self.higher_is_better else -1


class Scores:
    """
    How N networks do on a split; what it holds has a row a network.

    Attributes:
        values (`torch.Tensor`): float64 of shape `(N,)`, the metric; nan where it is not defined.
        undefined (`torch.Tensor`): bool of shape `(N,)`: networks whose metric, or some of whose predictions, are not
            defined.
    """

    shared: ClassVar[tuple[str, ...]] = ()  # what all networks have in common
    values: Tensor

    @property
    def undefined(self) -> Tensor:
        return self.values.isnan()


@dataclass
class MeasuredScores(Scores):
    """The metric alone."""

    values: Tensor

    def __getitem__(self, rows: slice) -> "MeasuredScores":
        return MeasuredScores(self.values[rows])


@dataclass
class ClassifierScores(Scores):
    """
    What N classifiers say about the M examples of a split; `values` are accuracies in percent.

    Args:
        predictions (`torch.Tensor`): int16 of shape `(N, M)`, the predicted classes; -1, which is never right, where
            the logits of an example are not finite.
        log_probs (`torch.Tensor`): float16 of shape `(N, M, C)`. Not the source of `predictions`: classes that are
            nearly as probable as each other may round to the same number.
        labels (`torch.Tensor`): int64 of shape `(M,)`.
    """

    shared: ClassVar[tuple[str, ...]] = ("labels",)
    predictions: Tensor
    log_probs: Tensor
    labels: Tensor

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return accuracy(self.predictions, self.labels)

    @property
    def undefined(self) -> Tensor:
        return (self.predictions < 0).any(1)

    @property
    def wrong(self) -> Tensor:
        """bool of shape `(N, M)`, where a network errs."""
        return self.predictions != self.labels

    def __getitem__(self, rows: slice) -> "ClassifierScores":
        return ClassifierScores(self.predictions[rows], self.log_probs[rows], self.labels)
