"""Tensors of a parameter vector in the place of a network's own."""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..selection import is_part, named_tensors, tied_names


class Replacement:
    """
    What takes the place of a network's tensors when some of them get other values: all names of their memory, so that
    tied tensors, views of one another included, stay tied.

    Args:
        model (`nn.Module`): The base model; it is only read, and not kept.
        names (`Iterable[str]`): Those of the tensors that get other values.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]):
        tensors, tied = named_tensors(model), tied_names(model)
        modules = dict(model.named_modules(remove_duplicate=False))
        taken: set[tuple[int, str]] = set()  # a module under two names has one place for a tensor

        def take(name: str) -> bool:
            module, _, attribute = name.rpartition(".")
            place = (id(modules[module]), attribute)
            is_free = place not in taken
            taken.add(place)
            return is_free

        self._names: list[str] = []
        # Other names of these, and where their values lie: shape, strides and offset of a view, or None for all of it.
        self._aliases: list[tuple[str, str, tuple[tuple[int, ...], tuple[int, ...], int] | None]] = []
        # The name that stands for its memory comes first: its values count where several names are given.
        for name in sorted(names, key=lambda name: tied[name][0] != name):
            whole = tensors[name]
            if not take(name):
                continue
            self._names.append(name)
            for other in tied[name]:
                part = tensors[other]
                if is_part(part, whole) and take(other):
                    view = (tuple(part.shape), part.stride(), part.storage_offset() - whole.storage_offset())
                    same = view == (tuple(whole.shape), whole.stride(), 0)
                    self._aliases.append((other, name, None if same else view))

    def tensors(self, model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        The new tensors under all of their names; `functional_call` takes them with `tie_weights=False`.

        Args:
            model (`nn.Module`): The base model, or a copy of it. The tensors get the types and devices of its own.
            state_dict (`Mapping[str, torch.Tensor]`): The tensors, or those of N networks with a leading N.
        """
        own = {name: _get(model, name) for name in self._names}
        new = {name: state_dict[name].to(tensor) for name, tensor in own.items()}
        for name, of, view in self._aliases:
            whole = new[of] = new[name] = new[of].contiguous()
            if view is not None:
                shape, stride, first = view
                lead = whole.ndim - own[of].ndim
                shape, stride = (*whole.shape[:lead], *shape), (*whole.stride()[:lead], *stride)
                new[name] = whole.as_strided(shape, stride, whole.storage_offset() + first)
        return new

    def network(self, model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> nn.Module:
        """The base model with other tensors, in eval mode. What is not replaced is shared with it, not copied."""
        old = named_tensors(model)
        network = copy.deepcopy(model, memo={id(tensor): tensor for tensor in old.values()})
        made: dict[int, nn.Parameter] = {}
        for name, tensor in self.tensors(model, state_dict).items():
            if isinstance(old[name], nn.Parameter):
                tensor = made.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
            owner, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(owner), attribute, tensor)
        return network.eval()


def _get(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute)
