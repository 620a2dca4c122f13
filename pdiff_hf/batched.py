"""The forward pass of many networks that share all but a few tensors, without computing the shared part again."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map_only

from .parameters import ParameterLayout

# Activations of the networks that run side by side may take this much memory.
MEMORY_BUDGET = 256 * 2**20


class BatchedModels:
    """
    Runs N networks that differ in the tensors of `layout` and share everything else.

    What is computed before the first of those tensors is used (the frozen prefix: for the last two norms of a
    ResNet-18, 94% of the operations) runs once for a batch of data, its results are replayed for every network, and the
    rest runs for many networks at once under `torch.func.vmap`. Where there is no such prefix, nothing is shared,
    `vmap` would turn every convolution into a slow grouped one, and the networks run one after the other.

    Args:
        model (`nn.Module`): The base model; it is put in eval mode.
        layout (`ParameterLayout`): The tensors that differ.

    Raises:
        LayoutError: if the layout does not fit the model.
    """

    def __init__(self, model: nn.Module, layout: ParameterLayout):
        layout.check_fits(model.state_dict())
        self.model = model.eval()
        self.layout = layout
        self._prefix: list[str] | None = None
        self._bytes_per_model = 0

    @torch.no_grad()
    def __call__(
        self, forward: Callable[[Callable], torch.Tensor], parameters: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """
        Args:
            forward (`Callable`): `forward(call)` runs a network on one batch of data, where `call` takes the place of
                the model, and returns a tensor.
            parameters (`torch.Tensor`): Shape `(N, D)`.

        Yields:
            `tuple[slice, torch.Tensor]`: Consecutive networks, and their outputs stacked: shape `(n, *output)`.
        """
        if self._prefix is None:
            self._find_prefix(forward)
        if not self._prefix:
            for i, row in enumerate(parameters):
                yield slice(i, i + 1), self._run(forward, self.layout.unflatten(row)).unsqueeze(0)
            return
        run_all = vmap(lambda tensors: self._run(forward, tensors), randomness="error")
        num_side_by_side = max(1, MEMORY_BUDGET // max(1, self._bytes_per_model))
        with self._replay(self._record(forward)):
            for start in range(0, len(parameters), num_side_by_side):
                rows = parameters[start : start + num_side_by_side]
                yield slice(start, start + len(rows)), run_all(self.layout.unflatten(rows))

    def _run(self, forward: Callable, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return forward(lambda *args, **kwargs: functional_call(self.model, tensors, args, kwargs))

    def _find_prefix(self, forward: Callable) -> None:
        """
        Which modules finish before the first use of a tensor of the layout, and what the others keep in memory.

        A module that starts only after all those have finished may depend on the tensors, whatever it is; a module that
        has finished before cannot. The first use is taken to be the call of the module that owns the tensor, which errs
        on the safe side for a parameter that belongs to an outer module, such as a class token.
        """
        owners = {name.rpartition(".")[0] for name in self.layout.names}
        finished: list[str] = []
        state = {"started": False, "bytes": 0}
        handles = []
        for name, module in self.model.named_modules():
            if name in owners:
                handles.append(module.register_forward_pre_hook(lambda *_: state.update(started=True)))

            def after(module, args, output, name=name):
                if state["started"]:
                    finished[:] = [n for n in finished if n != name]  # it is called again with other inputs
                    state["bytes"] += sum(t.numel() * t.element_size() for t in _tensors(output))
                else:
                    finished.append(name)

            handles.append(module.register_forward_hook(after))
        try:
            forward(self.model)
        finally:
            for handle in handles:
                handle.remove()
        done = set(finished)
        self._prefix = [name for name in dict.fromkeys(finished) if not any(p in done for p in _parents(name))]
        self._bytes_per_model = state["bytes"]

    def _record(self, forward: Callable) -> dict[str, list[Any]]:
        """Outputs of the prefix, one for each call. Copies: what follows may write into them in place."""
        outputs: dict[str, list[Any]] = {name: [] for name in self._prefix}
        handles = [
            self.model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: outputs[name].append(_copy(output))
            )
            for name in self._prefix
        ]
        owners = {name.rpartition(".")[0] for name in self.layout.names}
        handles += [self.model.get_submodule(name).register_forward_pre_hook(_stop) for name in owners]
        try:
            forward(self.model)
        except _FirstUse:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    @contextmanager
    def _replay(self, outputs: dict[str, list[Any]]):
        """Makes every module of the prefix return what it returned when it was recorded."""
        for name, values in outputs.items():
            again = itertools.cycle(values)
            self.model.get_submodule(name).forward = lambda *args, again=again, **kwargs: _copy(next(again))
        try:
            yield
        finally:
            for name in outputs:
                del self.model.get_submodule(name).forward


class _FirstUse(Exception):
    """Ends a forward pass where the first tensor of the layout would be used."""


def _stop(*_):
    raise _FirstUse


def _parents(name: str) -> Sequence[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _copy(tree):
    return tree_map_only(torch.Tensor, torch.clone, tree)
