"""Batch-norm statistics of many networks, recomputed in one pass over data, as SWAG does (arXiv 1902.02476)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..layout import ParameterLayout
from .runner import Forward, NetworkRunner


class RecomputedStatistics:
    """
    Gives networks that differ in the tensors of a layout running statistics of their own: those that training examples
    have in them, the mean over batches of each batch's mean and unbiased variance, as `torch.optim.swa_utils.update_bn`
    has it. They follow from a network's tensors, so that a network with its statistics is a row of a longer layout, for
    which everything works as for a shorter one.

    Layers that come before all tensors of the layout see the same in all networks. They keep the base model's
    statistics, and what they compute is shared.

    Args:
        model (`nn.Module`): The base model, on the device to compute on; it is left as it was, in eval mode.
        layout (`ParameterLayout`): The tensors that differ.
        batches (`Callable`): `batches()` goes through the data: for each batch a forward pass `forward(call)`, where
            `call` takes the place of the model.

    Attributes:
        layout (`ParameterLayout`): The tensors that differ, and then `running_mean` and `running_var` of the layers
            behind them.

    Raises:
        ValueError: if no such layer has statistics to recompute, or there are no batches.
    """

    def __init__(self, model: nn.Module, layout: ParameterLayout, batches: Callable[[], Iterable[Forward]]):
        self.models, self.batches = NetworkRunner(model, layout), batches
        self.names = [
            name
            for name, module in model.named_modules()
            if isinstance(module, _NormBase)
            and module.running_mean is not None
            and f"{name}.running_mean" not in layout.names
        ]
        first = next(iter(batches()), None)
        if first is None:
            raise ValueError("there are no batches of data to compute the statistics of batch norm from")
        if self.names:
            rows = torch.stack([self.models.base_parameters(), self.models.other_parameters()])
            sizes = [2 * len(model.get_buffer(f"{name}.running_mean")) for name in self.names]
            own, other = (found[0].split(sizes) for found in self._statistics_of(first, rows).split(1))
            self.names = [name for name, a, b in zip(self.names, own, other, strict=True) if not torch.equal(a, b)]
            self.models = NetworkRunner(model, layout)  # afresh: with other layers, other things can be shared
        if not self.names:
            raise ValueError(
                f"{type(model).__name__} has no batch norm behind the tensors that are generated, so that there are no "
                "statistics to recompute"
            )
        names = [f"{name}.{statistic}" for name in self.names for statistic in ("running_mean", "running_var")]
        added = ParameterLayout.from_state_dict(model.state_dict(), names)
        self.layout = ParameterLayout(
            layout.names + added.names,
            layout.shapes + added.shapes,
            layout.dtypes + added.dtypes,
            layout.aliases + added.aliases,
        )

    @torch.no_grad()
    def __call__(self, parameters: torch.Tensor) -> torch.Tensor:
        """Networks, shape `(N, D)`, to the same with their statistics, shape `(N, D + S)`, on the same device."""
        rows = parameters.to(next(self.models.model.parameters()).device)
        total = torch.zeros(len(rows), self.layout.num_parameters - parameters.shape[1], device=rows.device)
        num_batches = 0
        for forward in self.batches():
            num_batches += 1
            total += self._statistics_of(forward, rows)
        return torch.cat([parameters, (total / num_batches).to(parameters.device)], dim=1)

    def _statistics_of(self, forward: Forward, rows: torch.Tensor) -> torch.Tensor:
        """Means and variances in one batch, layer by layer: `(N, D)` to `(N, S)`."""
        modules = self.models.modules()
        with _normalising_by_batch([modules.get_submodule(name) for name in self.names]) as seen:

            def statistics(call: Callable) -> torch.Tensor:
                for found in seen.values():
                    found.clear()
                forward(call)
                # A layer that is called several times has the mean of what it saw.
                return torch.cat([torch.stack(found).mean(0) for found in seen.values()])

            return torch.cat([output for _, output in self.models(statistics, rows)])


@contextmanager
def _normalising_by_batch(layers: Sequence[Any]) -> Iterator[dict[nn.Module, list[torch.Tensor]]]:
    """Within the block the layers normalise by their batch; it gets the mean and variance of all that they see."""
    seen: dict[nn.Module, list[torch.Tensor]] = {layer: [] for layer in layers}

    def look(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        values = args[0].transpose(0, 1).flatten(1)  # (C, everything else)
        variance, mean = torch.var_mean(values.float(), dim=1)
        seen[layer].append(torch.cat([mean, variance]))

    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    tracked = [layer.track_running_stats for layer in layers]
    for layer in layers:
        layer.training, layer.track_running_stats = True, False
    try:
        yield seen
    finally:
        for hook, layer, value in zip(hooks, layers, tracked, strict=True):
            hook.remove()
            layer.training, layer.track_running_stats = False, value
