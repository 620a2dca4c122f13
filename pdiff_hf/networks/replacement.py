"""Tensors of a parameter vector in the place of a network's own."""

import copy
import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..tensor_names import View, named_tensors, shared_tensors


class Replacement:
    """
    What takes the place of a network's tensors when some of them get other values: all names of their memory, so that
    tied tensors, views of one another included, stay tied.

    Args:
        model (`nn.Module`): The base model; it is only read, and not kept.
        names (`Iterable[str]`): Those of the tensors that get other values.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]):
        modules, views = dict(model.named_modules(remove_duplicate=False)), shared_tensors(model)
        taken: set[tuple[int, str]] = set()  # a module under two names has one place for a tensor

        def take(name: str) -> bool:
            module, _, attribute = name.rpartition(".")
            place = (id(modules[module]), attribute)
            is_free = place not in taken
            taken.add(place)
            return is_free

        self._names: list[str] = []
        chosen: dict[str, str] = {}  # by the source of some memory, the name whose values count
        for name in sorted(names, key=lambda name: name in views):  # sources first
            view = views.get(name)
            source = name if view is None else view.source
            if source in chosen or not take(name):
                continue
            self._names.append(name)
            if view is None or not view.order:
                chosen[source] = name
        sources = {source: View(source, (), (), 0, ()) for source in chosen}
        self._views = {
            name: dataclasses.replace(view, source=chosen[view.source])
            for name, view in (sources | views).items()
            if view.source in chosen and view.order is not None and take(name)
        }

    def tensors(self, model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        The new tensors under all of their names; `functional_call` takes them with `tie_weights=False`.

        Args:
            model (`nn.Module`): The base model, or a copy of it. The tensors get the types and devices of its own.
            state_dict (`Mapping[str, torch.Tensor]`): The tensors, or those of N networks with a leading N.
        """
        new = {name: state_dict[name].to(_get(model, name)) for name in self._names}
        memories: dict[str, torch.Tensor] = {}  # in which the views of each source lie
        for source, order in {view.source: view.order for view in self._views.values() if view.order}.items():
            lead = new[source].ndim - len(order)
            dims = [*range(lead), *(lead + dim for dim in order)]
            memories[source] = new[source].permute(dims).contiguous()
            new[source] = memories[source].permute([dims.index(dim) for dim in range(len(dims))])
        for name, view in self._views.items():
            new[name] = new[view.source]
            if view.order:
                memory, lead = memories[view.source], new[name].ndim - len(view.order)
                shape, stride = (*memory.shape[:lead], *view.shape), (*memory.stride()[:lead], *view.stride)
                new[name] = memory.as_strided(shape, stride, memory.storage_offset() + view.offset)
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
    found: Any = functools.reduce(getattr, name.split("."), model)  # older torch.export knows no `get_submodule`
    return found
