"""The frozen prefixes of all examples of a data set, for trainings that run the network over them again and again."""

import logging
from collections.abc import Callable

import torch

from .replay import Prefix, Replayer
from .runner import Forward, NetworkRunner

logger = logging.getLogger(__name__)

# A `PrefixCache` may take this much memory.
CACHE_BUDGET = 2**29


class PrefixCache:
    """
    The prefixes of all examples of a data set, for what runs the network over them again and again: training of the
    tensors that differ needs the rest of the network only. Gradients flow as they would without it.

    Made by `PrefixCache.build`.
    """

    def __init__(self, prefix: Prefix, rows: dict[int, torch.Tensor]):
        self._prefix = prefix
        self._rows = rows  # for the tensors of the prefix of one batch, by their id: the same of all examples

    def replay(self, indices: torch.Tensor) -> Replayer:
        """A context in which a forward pass over the examples `indices` does not compute its prefix."""
        return Replayer(self._prefix.calls, {i: rows[indices.to(rows.device)] for i, rows in self._rows.items()})

    @classmethod
    @torch.no_grad()
    def build(
        cls, runner: NetworkRunner, forward: Callable[[torch.Tensor], Forward], num_examples: int, batch_size: int
    ) -> "PrefixCache | None":
        """
        Args:
            runner (`NetworkRunner`): Of the model that will run.
            forward (`Callable`): `forward(indices)` makes the forward pass over the examples `indices`.
            num_examples (`int`): Indices are below this.
            batch_size (`int`): The number of indices in every pass.

        Returns:
            `PrefixCache` or `None`: None if it would exceed `CACHE_BUDGET`, or if the prefix of a batch is more than
            one row for each example, or depends on chance (augmentation).
        """
        first: Prefix | None = None
        rows: dict[int, torch.Tensor] = {}
        for start in range(0, num_examples, batch_size):
            # The last batch is filled up, so that shapes stay the same and no kernel computes in another order.
            indices = torch.arange(start, start + batch_size) % num_examples
            prefix = runner.record(forward(indices))
            if first is None:
                first = prefix
                whole = [tensor for tensor in first.tensors if tensor.shape[:1] == (batch_size,)]
                if sum(tensor.nbytes for tensor in whole) / batch_size * num_examples > CACHE_BUDGET:
                    return None
                rows = {id(tensor): tensor.new_empty(num_examples, *tensor.shape[1:]) for tensor in whole}
            elif prefix.structure() != first.structure():
                return None
            for tensor, like in zip(prefix.tensors, first.tensors, strict=True):
                if id(like) in rows:
                    rows[id(like)][indices] = tensor
                elif not torch.equal(tensor, like):
                    return None
        # Other companions than in the batches above: what depends on them, or on chance, comes out differently.
        if first is None:
            return None
        shuffled = torch.randperm(num_examples, generator=torch.Generator().manual_seed(0))
        indices = shuffled[torch.arange(batch_size) % num_examples]
        check, cache = forward(indices), cls(first, rows)
        tensors = runner.tensors(runner.other_parameters())
        expected, replay = runner.call(check, tensors), cache.replay(indices)
        try:
            with replay:
                output = runner.call(check, tensors)
        except Exception as error:
            logger.debug("the replay failed", exc_info=error)
            logger.warning("%s cannot be replayed: its frozen part is computed anew", type(runner.model).__name__)
            return None
        return cache if torch.allclose(output, expected, rtol=1e-5, atol=1e-6) and not first.written() else None
