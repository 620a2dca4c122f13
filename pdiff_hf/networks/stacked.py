"""Many networks with parameters of their own, each on data of its own, in one pass with gradients."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._C._functorch import is_batchedtensor
from torch.func import functional_call, vmap
from torch.nn.modules.utils import _pair

from ..layout import ParameterLayout
from .cropping import CroppedConvolutions


class StackedNetworks:
    """
    Runs T networks that differ in the tensors of `layout`, network t on batch t.

    Args:
        model (`nn.Module`): The base model, put in eval mode; all other tensors are its own, and frozen.
        layout (`ParameterLayout`): The tensors that differ; float32, so that gradients reach them.

    Raises:
        LayoutError: if the layout does not fit the model.
    """

    def __init__(self, model: nn.Module, layout: ParameterLayout):
        layout.check_fits(model.state_dict())
        self.model = model.eval().requires_grad_(False)
        self.layout = layout

    def base_parameters(self) -> torch.Tensor:
        """Those of the base model, shape `(D,)`."""
        return self.layout.flatten(self.model.state_dict())

    def __call__(
        self,
        predict: Callable[[Callable, Any], torch.Tensor],
        parameters: torch.Tensor,
        batch: Mapping[str, Any],
        shared: bool = False,
    ) -> torch.Tensor:
        """
        Args:
            predict (`Callable`): `predict(call, batch)` runs one network, in whose place it gets `call`, on its batch.
            parameters (`torch.Tensor`): Shape `(T, D)`.
            batch (`Mapping[str, torch.Tensor]`): Tensors of shape `(T, ...)`.
            shared (`bool`, *optional*, defaults to `False`): All networks run on the same batch, whose tensors then
                have the shape `(...)`. What they compute alike is computed once.

        Returns:
            `torch.Tensor`: What `predict` returns, stacked: shape `(T, *output)`.
        """

        def one(tensors: dict[str, torch.Tensor], inputs: dict[str, Any]) -> torch.Tensor:
            return predict(lambda *args, **kwargs: functional_call(self.model, tensors, args, kwargs), inputs)

        with _ConvolutionsAsProducts():
            return vmap(one, in_dims=(0, None if shared else 0), randomness="different")(
                self.layout.unflatten(parameters), dict(batch)
            )


class _ConvolutionsAsProducts(CroppedConvolutions):
    """Convolutions with weights of their own are a grouped convolution for vmap, and as matrix products much faster."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.conv2d and is_batchedtensor(args[1] if len(args) > 1 else (kwargs or {})["weight"]):
            return _conv2d(*args, **kwargs or {})
        return super().__torch_function__(func, types, args, kwargs)


def _conv2d(images, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> torch.Tensor:
    if groups != 1 or isinstance(padding, str):
        return F.conv2d(images, weight, bias, stride, padding, dilation, groups)
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    columns = F.unfold(images, weight.shape[-2:], dilation, padding, stride)  # (B, C kh kw, positions)
    output = weight.flatten(1) @ columns  # (B, O, positions)
    if bias is not None:
        output = output + bias.unsqueeze(1)
    sizes = (
        (size + 2 * pad - dil * (kernel - 1) - 1) // step + 1
        for size, pad, dil, kernel, step in zip(
            images.shape[-2:], padding, dilation, weight.shape[-2:], stride, strict=True
        )
    )
    return output.unflatten(-1, tuple(sizes))
