"""Records what a forward pass calls before it uses one of some tensors, and gives that back in later passes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import TensorWeakRef

from .cropping import CroppedConvolutions


class Prefix:
    """
    What a forward pass calls before it first uses one of the tensors that differ, and what those calls returned.

    Args:
        calls (`list[tuple[Callable, Any]]`): The functions of torch, in order, with their results.
    """

    def __init__(self, calls: list[tuple[Callable, Any]]):
        self.calls = calls
        # Tensors that share memory stay together: what is written to one of them in place must be seen in the others.
        groups: dict[tuple, dict[int, torch.Tensor]] = {}
        for _, result in calls:
            for tensor in _tensors(result):
                groups.setdefault((tensor.untyped_storage()._cdata, tensor.dtype), {})[id(tensor)] = tensor
        self.groups = [list(group.values()) for group in groups.values()]
        self.tensors = [tensor for group in self.groups for tensor in group]
        self._versions = self._current_versions()

    def _current_versions(self) -> list[list[int]]:
        return [[tensor._version for tensor in group] for group in self.groups]

    def written(self) -> list[int]:
        """The groups that were written to since this was recorded."""
        return [i for i, (a, b) in enumerate(zip(self._versions, self._current_versions(), strict=True)) if a != b]

    def memory(self, i: int) -> torch.Tensor:
        """All memory of group i as one vector."""
        first = self.groups[i][0]
        return first.as_strided((first.untyped_storage().nbytes() // first.element_size(),), (1,), 0)

    def structure(self) -> list[tuple]:
        """All but the values of the tensors."""
        return [(f, tree_map_only(torch.Tensor, lambda t: (t.shape, t.dtype), result)) for f, result in self.calls]

    def replay(self, copies: Mapping[int, torch.Tensor]) -> "Replayer":
        """A context in which the same calls return what they returned; `copies` stand in for the memory of groups."""
        replaced = {
            id(tensor): copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            for i, copy in copies.items()
            for tensor in self.groups[i]
        }
        return Replayer(self.calls, replaced)


class Recorder(CroppedConvolutions):
    """
    Records the calls of torch until one of them uses one of `tensors`. There it raises `FirstUse`, with `stop`, or
    else lets the forward pass go on, and counts the memory that its results take. Convolutions are cropped, here and in
    a replay: both call what they do not give back as `CroppedConvolutions` does.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], stop: bool = False):
        self.used = {id(tensor) for tensor in tensors.values()}
        self.stop = stop
        self.calls: list[tuple[Callable, Any]] = []
        self.prefix: Prefix | None = None
        self.num_bytes = 0
        self.output: torch.Tensor | None = None  # where no tensor is used at all, it must be kept as well

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        if self.prefix is None and any(id(tensor) in self.used for tensor in inputs):
            is_metadata = func.__name__ == "__get__" and not isinstance(func(*args), torch.Tensor)  # such as its dtype
            if not is_metadata:
                self.finish()
                if self.stop:
                    raise FirstUse
        result = super().__torch_function__(func, types, args, kwargs)
        if self.prefix is not None:
            old = {tensor.untyped_storage()._cdata for tensor in inputs}
            new = [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in old]
            self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in new)
        elif not _is_setting(inputs, result):
            self.calls.append((func, tree_map_only(torch.Tensor, TensorWeakRef, result)))
        return result

    def finish(self) -> Prefix:
        """
        The prefix. Of its tensors it keeps those that something still refers to when it ends: the rest of the network
        cannot need the others.
        """
        if self.prefix is None:
            gone = torch.empty(0)

            def resolve(reference: TensorWeakRef) -> torch.Tensor:
                tensor = reference()
                return gone if tensor is None else tensor

            self.prefix = Prefix([(func, tree_map_only(TensorWeakRef, resolve, result)) for func, result in self.calls])
        return self.prefix


class Replayer(CroppedConvolutions):
    """Returns what was recorded instead of computing it, until nothing is left."""

    def __init__(self, calls: list[tuple[Callable, Any]], replaced: dict[int, torch.Tensor]):
        self.calls = iter(calls)
        self.replaced = replaced
        self.next = next(self.calls, None)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.next is None:
            return super().__torch_function__(func, types, args, kwargs)
        recorded, result = self.next
        if func != recorded:
            result = super().__torch_function__(func, types, args, kwargs)
            if not _is_setting(_tensors((args, kwargs)), result):
                raise ReplayError(f"expected a call of {recorded}, got {func}")
            return result
        self.next = next(self.calls, None)
        if isinstance(result, torch.Tensor):
            return self.replaced.get(id(result), result)
        if isinstance(result, (tuple, list, dict)):
            return tree_map_only(torch.Tensor, lambda tensor: self.replaced.get(id(tensor), tensor), result)
        return result


class ReplayError(RuntimeError):
    """A forward pass calls something else than the one that was recorded."""


class FirstUse(Exception):
    """Ends a forward pass where the first tensor of the layout would be used."""


def _is_setting(inputs: list[torch.Tensor], result: Any) -> bool:
    """Whether a call changed a setting of torch, such as the grad mode: those take place again in a replay."""
    return result is None and not inputs


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
