"""The forward pass of many networks that share all but a few tensors, without computing the shared part again."""

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.modules.conv import _ConvNd

from ..layout import ParameterLayout
from ..utils.memory import halve, is_out_of_memory
from .replacement import Replacement
from .replay import FirstUse, Prefix, Recorder, Replayer

logger = logging.getLogger(__name__)

# What networks that run side by side compute may take this much memory. On a CPU more is slower, because it no longer
# stays in the cache (scripts/benchmarks/scoring.py); a GPU needs more to be busy.
CPU_MEMORY_BUDGET = 32 * 2**20
GPU_MEMORY_BUDGET = 2**30
# A `PrefixCache` may take this much.
CACHE_BUDGET = 2**29

# A forward pass: what it gets takes the place of the model, what it returns is the output.
Forward = Callable[[Callable], torch.Tensor]


class BatchedModels:
    """
    Runs N networks that differ in the tensors of `layout` and share everything else.

    What is computed before the first of those tensors is used (the frozen prefix: for the last two norms of a
    ResNet-18, 94% of the operations) is computed once for a batch of data, and the rest runs for many networks at once
    under `torch.func.vmap`. One network runs after the other, and only the prefix is shared, where that is no slower:
    convolutions whose weights differ would become grouped ones, and networks whose activations alone exceed the memory
    budget leave nothing to gain. That choice depends on the network and the batch, never on a clock, and a network's
    output does not depend on which others share the pass.

    Args:
        model (`nn.Module`): The base model; it is put in eval mode. Nothing of it is ever written to.
        layout (`ParameterLayout`): The tensors that differ.

    Raises:
        LayoutError: if the layout does not fit the model.
    """

    def __init__(self, model: nn.Module, layout: ParameterLayout):
        layout.check_fits(model.state_dict())
        self._replacement = Replacement(model, layout.names)
        self.model = model.eval()
        self.layout = layout
        self._has_prefix = True
        self._written: list[int] = []
        self._side_by_side = 0  # not known yet

    @torch.no_grad()
    def __call__(self, forward: Forward, parameters: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """
        Args:
            forward (`Callable`): `forward(call)` runs a network on one batch of data, where `call` takes the place of
                the model, and returns a tensor. It is called several times and must do the same each time.
            parameters (`torch.Tensor`): Shape `(N, D)`.

        Yields:
            `tuple[slice, torch.Tensor]`: Consecutive networks, and their outputs stacked: shape `(n, *output)`.
        """
        if not self._side_by_side:
            self._probe(forward)
        prefix = self.record(forward)
        start = 0
        while start < len(parameters):
            rows = parameters[start : start + self._side_by_side]
            try:
                output = self._run(forward, rows, prefix)
            except Exception as error:
                if len(rows) == 1 or not is_out_of_memory(error):
                    raise
                output = None
            if output is None:
                self._side_by_side = halve(len(rows), "networks")
                continue
            yield slice(start, start + len(rows)), output
            start += len(rows)
        if prefix.written():
            raise RuntimeError(
                f"{type(self.model).__name__} writes in place, for some batches only, to what its networks share"
            )

    def _probe(self, forward: Forward) -> None:
        """Finds out, on the first batch, what this model allows, and how many networks run side by side."""
        other = self._other_row()
        tensors = self.tensors(other)
        with Recorder(tensors) as recorder:
            expected = self._call(forward, tensors)
        self._written = recorder.finish().written()
        try:
            output = self._one(forward, other, self.record(forward))
            self._has_prefix = torch.allclose(output, expected, rtol=1e-3, atol=1e-5, equal_nan=True)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            logger.debug("the replay failed", exc_info=error)
            self._has_prefix = False
        if not self._has_prefix:
            logger.warning("%s does not repeat its own results: nothing is shared", type(self.model).__name__)
            self._written = []
        budget = CPU_MEMORY_BUDGET if expected.device.type == "cpu" else GPU_MEMORY_BUDGET
        self._side_by_side = max(1, budget // max(1, recorder.num_bytes))
        owners = {name.rpartition(".")[0] for name in self.layout.names}
        if any(isinstance(self.model.get_submodule(owner), _ConvNd) for owner in owners):
            self._side_by_side = 1
        if self._side_by_side > 1:
            try:
                self._run(forward, other.expand(2, -1), self.record(forward))
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                logger.debug("vmap failed", exc_info=error)
                logger.warning("%s does not run under vmap: one network at a time", type(self.model).__name__)
                self._side_by_side = 1

    def tensors(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """What takes the place of the model's tensors, from parameters of shape `(D,)` or `(n, D)`."""
        return self._replacement.tensors(self.model, self.layout.unflatten(rows))

    def _own_row(self) -> torch.Tensor:
        state_dict = self.model.state_dict()
        return torch.cat([state_dict[name].float().flatten() for name in self.layout.names])  # (D,)

    def _other_row(self) -> torch.Tensor:
        """Parameters unlike those that prefixes are recorded with: a prefix must not depend on them."""
        return 1.1 * self._own_row() + 0.1  # (D,)

    def _call(self, forward: Forward, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return forward(lambda *args, **kwargs: functional_call(self.model, tensors, args, kwargs, tie_weights=False))

    def record(self, forward: Forward) -> Prefix:
        """The prefix of `forward` on one batch of data: what comes before the first use of a tensor that differs."""
        if not self._has_prefix:
            return Prefix([])
        base = self.tensors(self._own_row())
        recorder = Recorder(base, stop=True)
        with contextlib.suppress(FirstUse), recorder:
            recorder.output = self._call(forward, base)
        return recorder.finish()

    def _run(self, forward: Forward, rows: torch.Tensor, prefix: Prefix) -> torch.Tensor:
        """`(n, D)` to `(n, *output)`."""
        if self._side_by_side == 1:
            return torch.stack([self._one(forward, row, prefix) for row in rows])
        copies = [prefix.memory(i).repeat(len(rows), 1) for i in self._written]

        def one(tensors: dict[str, torch.Tensor], copies: list[torch.Tensor]) -> torch.Tensor:
            with prefix.replay(dict(zip(self._written, copies, strict=True))):
                return self._call(forward, tensors)

        return vmap(one, randomness="error")(self.tensors(rows), copies)

    def _one(self, forward: Forward, row: torch.Tensor, prefix: Prefix) -> torch.Tensor:
        tensors = self.tensors(row)
        with prefix.replay({i: prefix.memory(i).clone() for i in self._written}):
            return self._call(forward, tensors)


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
        cls, models: BatchedModels, forward: Callable[[torch.Tensor], Forward], num_examples: int, batch_size: int
    ) -> "PrefixCache | None":
        """
        Args:
            models (`BatchedModels`): Of the model that will run.
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
            prefix = models.record(forward(indices))
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
        tensors = models.tensors(models._other_row())
        expected, replay = models._call(check, tensors), cache.replay(indices)
        try:
            with replay:
                output = models._call(check, tensors)
        except Exception as error:
            logger.debug("the replay failed", exc_info=error)
            logger.warning("%s cannot be replayed: its frozen part is computed anew", type(models.model).__name__)
            return None
        return cache if torch.allclose(output, expected, rtol=1e-5, atol=1e-6) and not first.written() else None
