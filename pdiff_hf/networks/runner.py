"""
One way to run N networks that share all but a few tensors: what they share is computed once, and the rest side by side.
"""

import contextlib
import copy
import logging
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..layout import ParameterLayout
from ..utils.memory import InParts, is_out_of_memory
from .cropping import ConvolutionsAsProducts
from .replacement import Replacement
from .replay import FirstUse, Prefix, Recorder, ReplayError

logger = logging.getLogger(__name__)

# What networks that run side by side compute may take this much memory. On a CPU more is slower, because it no longer
# stays in the cache; a GPU needs more to be busy.
CPU_MEMORY_BUDGET = 32 * 2**20
GPU_MEMORY_BUDGET = 2**30

# Of networks of so many parameters, only one at a time keeps what gradients need.
LARGE_NETWORK = 2**28

# A forward pass: what it gets takes the place of the model, what it returns is the output.
Forward = Callable[[Callable], torch.Tensor]

# What torch says of operations that `vmap` does not know.
REFUSALS = re.compile(r"vmap|functorch|batching rule|data-dependent|Tensor that doesn't have storage", re.IGNORECASE)


def is_refused_by_vmap(error: BaseException) -> bool:
    """Whether an error says that an operation does not go under `vmap`, and not that it fails at all."""
    return isinstance(error, ReplayError) or (isinstance(error, RuntimeError) and bool(REFUSALS.search(str(error))))


class _SharedTensors(TorchFunctionMode):
    """A context in which a deep copy has the very tensors of the original, wherever these are kept."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is torch.Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy with the same tensors; what of a module cannot be copied, such as a lock, is shared too."""
    with _SharedTensors():
        try:
            return copy.deepcopy(model, dict(memo))
        except Exception:  # a class that cannot be copied raises what it likes
            inside_first = reversed([*model.modules()])
            for value in (v for module in inside_first for name, v in vars(module).items() if name != "_modules"):
                try:
                    copy.deepcopy(value, dict(memo))
                except Exception:
                    memo[id(value)] = value
            return copy.deepcopy(model, memo)


class _Own(threading.local):
    """What a thread has for itself, as long as it lives: the modules of each runner, with the tensors in them."""

    def __init__(self) -> None:
        self.modules: weakref.WeakKeyDictionary[NetworkRunner, tuple[list, nn.Module]] = weakref.WeakKeyDictionary()


_OWN = _Own()


class NetworkRunner:
    """
    Runs N networks that differ in the tensors of `layout` and share everything else, in one of two ways:

    - `runner(forward, parameters)`, without gradients, for one batch of data that all networks see. What is computed
      before the first of those tensors is used (the frozen prefix: for the last two norms of a ResNet-18, 94% of the
      operations) is computed once, and the rest runs for many networks at once under `torch.func.vmap`, as many as fit
      into the memory budget. One network runs after the other, and only the prefix is shared, where that is no slower:
      convolutions whose weights differ would become grouped ones, and networks whose activations alone exceed the
      budget leave nothing to gain. That choice depends on the network and the batch, never on a clock, and a network's
      output does not depend on which others share the pass.
    - [`stack`], with gradients, all at once, where each network may have a batch of its own.

    Networks that `vmap` refuses run one after the other. Where memory runs out, fewer run at once. Several threads may
    use one runner, or several of one model, at the same time: each has modules of its own (see [`modules`]).

    Args:
        model (`nn.Module`): The base model; it is put in eval mode. Nothing of it is ever written to.
        layout (`ParameterLayout`): The tensors that differ.
        replacement (`Replacement`, *optional*): Of a network whose tensors share memory as those of `model` should; by
            default of `model` itself. A copy does not share memory everywhere.

    Attributes:
        has_convolutions (`bool`): Whether weights of convolutions differ.

    Raises:
        LayoutError: if the layout does not fit the model.
    """

    def __init__(self, model: nn.Module, layout: ParameterLayout, replacement: Replacement | None = None):
        layout.check_fits(model.state_dict())
        self._replacement = replacement or Replacement(model, layout.names)
        self.model = model.eval()
        self.layout = layout
        owners = {name.rpartition(".")[0] for name in layout.names}
        self.has_convolutions = any(isinstance(model.get_submodule(owner), _ConvNd) for owner in owners)
        self._has_prefix, self._goes_under_vmap = True, True
        self._is_large = sum(parameter.numel() for parameter in model.parameters()) >= LARGE_NETWORK
        self._written: list[int] = []
        self._side_by_side = 0  # not known yet
        self._in_parts = InParts("networks")

    def modules(self) -> nn.Module:
        """
        The model with modules of this thread's own, and with the memory of the model's tensors, which have no gradients
        there. What takes the place of tensors while a network runs is seen by nobody else.
        """
        tensors = [*self.model.parameters(), *self.model.buffers()]
        current = [(id(tensor), tensor.untyped_storage()._cdata) for tensor in tensors]
        known, modules = _OWN.modules.get(self, (None, self.model))
        if known != current:  # none yet, or the model has moved to another device
            frozen = {id(t): nn.Parameter(t.detach(), False) if t.requires_grad else t for t in tensors}
            modules = _copied(self.model, frozen)
            _OWN.modules[self] = current, modules
        return modules

    def base_parameters(self) -> torch.Tensor:
        """Those of the base model, shape `(D,)`."""
        return self.layout.flatten(self.model.state_dict())

    def tensors(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """What takes the place of the model's tensors, from parameters of shape `(D,)` or `(n, D)`."""
        return self._replacement.tensors(self.model, self.layout.unflatten(rows))

    def call(self, forward: Forward, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """`forward` of one network, with `tensors` in the place of the model's; after [`modules`] in this thread."""
        _, modules = _OWN.modules[self]
        return forward(lambda *args, **kwargs: functional_call(modules, tensors, args, kwargs, tie_weights=False))

    def stack(
        self,
        predict: Callable[[Callable, Any], torch.Tensor],
        parameters: torch.Tensor,
        batch: Mapping[str, Any],
        shared: bool = False,
        side_by_side: bool = True,
    ) -> torch.Tensor:
        """
        Runs N networks at once, with gradients with respect to `parameters` alone. Of large ones, one after the other,
        each is run again for its gradients, so that memory holds what one of them computes (gradient checkpointing).

        Args:
            predict (`Callable`): `predict(call, batch)` runs one network, in whose place it gets `call`, on its batch.
            parameters (`torch.Tensor`): Shape `(N, D)`.
            batch (`Mapping[str, torch.Tensor]`): Tensors of shape `(N, ...)`.
            shared (`bool`, *optional*, defaults to `False`): All networks run on the same batch, whose tensors then
                have the shape `(...)`. What they compute alike is computed once.
            side_by_side (`bool`, *optional*, defaults to `True`): Under `vmap`, where that goes.

        Returns:
            `torch.Tensor`: What `predict` returns, stacked: shape `(N, *output)`.
        """

        def one(tensors: dict[str, torch.Tensor], inputs: Mapping[str, Any]) -> torch.Tensor:
            return self.call(lambda call: predict(call, inputs), tensors)

        self.modules()
        tensors, batch, refusal = self.tensors(parameters), dict(batch), None
        with ConvolutionsAsProducts():
            if side_by_side and self._goes_under_vmap and not self._is_large:
                try:
                    return vmap(one, in_dims=(0, None if shared else 0), randomness="different")(tensors, batch)
                except Exception as error:
                    if not is_refused_by_vmap(error):
                        raise
                    refusal = error
            rows = [{name: tensor[i] for name, tensor in tensors.items()} for i in range(len(parameters))]
            batches = [batch if shared else {name: v[i] for name, v in batch.items()} for i in range(len(parameters))]
            run = partial(checkpoint, one, use_reentrant=False) if self._is_large and torch.is_grad_enabled() else one
            output = torch.stack([run(*each) for each in zip(rows, batches, strict=True)])
        if refusal is not None:  # only now: what fails for one network as well says nothing about vmap
            self._note_refusal(refusal)
        return output

    def _note_refusal(self, error: Exception) -> None:
        logger.debug("vmap failed", exc_info=error)
        logger.warning("%s does not run under vmap: one network at a time", type(self.model).__name__)
        self._goes_under_vmap = False

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
        self.modules()  # before anything is recorded
        if not self._side_by_side:
            self._probe(forward)
        prefix, start = self.record(forward), 0
        for rows in parameters.split(self._side_by_side) if len(parameters) else ():
            yield slice(start, start + len(rows)), self._in_parts(lambda part: self._run(forward, part, prefix), rows)
            start += len(rows)
        if prefix.written():
            raise RuntimeError(
                f"{type(self.model).__name__} writes in place, for some batches only, to what its networks share"
            )

    def _probe(self, forward: Forward) -> None:
        """Finds out, on the first batch, what this model allows, and how many networks run side by side."""
        other = self.other_parameters()
        tensors = self.tensors(other)
        with Recorder(tensors) as recorder:
            expected = self.call(forward, tensors)
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
        at_once = 1 if self.has_convolutions else max(1, budget // max(1, recorder.num_bytes))
        self._side_by_side = at_once if self._goes_under_vmap else 1
        if self._side_by_side > 1:
            try:
                self._run(forward, other.expand(2, -1), self.record(forward))
            except Exception as error:
                if not is_refused_by_vmap(error):
                    raise
                self._note_refusal(error)
                self._side_by_side = 1

    def other_parameters(self) -> torch.Tensor:
        """Parameters, `(D,)`, unlike those that prefixes are recorded with: a prefix must not depend on them."""
        return 1.1 * self.base_parameters() + 0.1

    def record(self, forward: Forward) -> Prefix:
        """The prefix of `forward` on one batch of data: what comes before the first use of a tensor that differs."""
        self.modules()
        if not self._has_prefix:
            return Prefix([])
        base = self.tensors(self.base_parameters())
        recorder = Recorder(base, stop=True)
        with contextlib.suppress(FirstUse), recorder:
            recorder.output = self.call(forward, base)
        return recorder.finish()

    def _run(self, forward: Forward, rows: torch.Tensor, prefix: Prefix) -> torch.Tensor:
        """`(n, D)` to `(n, *output)`."""
        if self._side_by_side == 1:
            return torch.stack([self._one(forward, row, prefix) for row in rows])
        copies = [prefix.memory(i).repeat(len(rows), 1) for i in self._written]

        def one(tensors: dict[str, torch.Tensor], copies: list[torch.Tensor]) -> torch.Tensor:
            with prefix.replay(dict(zip(self._written, copies, strict=True))):
                return self.call(forward, tensors)

        return vmap(one, randomness="error")(self.tensors(rows), copies)

    def _one(self, forward: Forward, row: torch.Tensor, prefix: Prefix) -> torch.Tensor:
        tensors = self.tensors(row)
        with prefix.replay({i: prefix.memory(i).clone() for i in self._written}):
            return self.call(forward, tensors)
