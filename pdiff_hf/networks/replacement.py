"""Tensors of a parameter vector in the place of a network's own."""

import copy
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..tensor_names import named_tensors, tied_names


class Replacement:
    """
    What takes the place of a network's tensors when some of them get other values: all of their names, so that tied
    tensors stay tied.

    Args:
        model (`nn.Module`): The base model; it is only read, and not kept.
        names (`Iterable[str]`): Those of the tensors that get other values.

    Raises:
        LayoutError: if one of these tensors shares a part of its memory with another one.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]):
        modules, tied = dict(model.named_modules(remove_duplicate=False)), tied_names(model, names)
        taken: set[tuple[int, str]] = set()  # a module under two names has one place for a tensor

        def take(name: str) -> bool:
            module, _, attribute = name.rpartition(".")
            place = (id(modules[module]), attribute)
            is_free = place not in taken
            taken.add(place)
            return is_free

        self._names: list[str] = []
        chosen: dict[str, str] = {}  # by the first name of a tensor, the one whose values count
        for name in sorted(names, key=lambda name: name in tied):  # first names first
            first = tied.get(name, name)
            if first not in chosen and take(name):
                self._names.append(name)
                chosen[first] = name
        firsts = {first: first for first in chosen} | tied
        self._tied = {name: chosen[first] for name, first in firsts.items() if first in chosen and take(name)}

    def tensors(self, model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        The new tensors under all of their names; `functional_call` takes them with `tie_weights=False`.

        Args:
            model (`nn.Module`): The base model, or a copy of it. The tensors get the types and devices of its own.
            state_dict (`Mapping[str, torch.Tensor]`): The tensors, or those of N networks with a leading N.
        """
        new = {name: state_dict[name].to(_get(model, name)) for name in self._names}
        return new | {name: new[chosen] for name, chosen in self._tied.items()}

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
