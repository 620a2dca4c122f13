"""Convolutions whose kernel reaches beyond their input compute with the taps that can meet data, and no others."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch._C._functorch import is_batchedtensor
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


class CroppedConvolutions(TorchFunctionMode):
    """
    A context in which no convolution multiplies by padding that none of its outputs needs.

    With a 3×3 kernel and padding 1, eight of nine products are with padding where the input is 1×1 (the last stage of
    a ResNet for images of 32 pixels), five of nine where it is 2×2 and the stride is 2. There the kernel is cropped to
    the taps that can meet data: the centre, and the lower right four. Where a kernel then covers its input once, the
    convolution is a product of matrices, which is twice as fast. Results are equal but for the order of summation
    (1e-7); gradients, `vmap`, `functional_call`, `torch.export` and every device work as they do without. Sizes that an
    export leaves open are not looked at.
    """

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in CONVOLUTIONS:
            return convolve(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def convolve(
    function: Callable[..., torch.Tensor],
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """What one of `CONVOLUTIONS` returns for these arguments, with the smallest kernel that gives it."""
    num_dims = CONVOLUTIONS[function]
    sizes, kernel = input.shape[-num_dims:], weight.shape[2:]
    strides, dilations = _for_each_axis(stride, num_dims), _for_each_axis(dilation, num_dims)
    if isinstance(padding, str):
        sums = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilations, strict=True)]
        # An odd sum is padded more on one side, which one number an axis cannot say.
        paddings = (0,) * num_dims if any(total % 2 for total in sums) else tuple(total // 2 for total in sums)
    else:
        paddings = _for_each_axis(padding, num_dims)
    taps = [
        useful_taps(*axis) if isinstance(axis[0], int) else (0, axis[1])
        for axis in zip(sizes, kernel, strides, paddings, dilations, strict=True)
    ]
    if all(last - first == k for (first, last), k in zip(taps, kernel, strict=True)):
        return function(input, weight, bias, stride, padding, dilation, groups)
    for axis, (first, last) in enumerate(taps, start=2):
        weight = weight.narrow(axis, first, last - first)
    paddings = tuple(p - first * d for p, (first, _), d in zip(paddings, taps, dilations, strict=True))
    covers_input = not any(paddings) and all(
        isinstance(size, int) and size == last - first and (size == 1 or d == 1)
        for size, (first, last), d in zip(sizes, taps, dilations, strict=True)
    )
    if covers_input and groups == 1:
        output = F.linear(input.flatten(-num_dims - 1), weight.flatten(1), bias)  # (*, C_out)
        return output[(..., *[None] * num_dims)]
    return function(input, weight, bias, stride, paddings, dilation, groups)


def _for_each_axis(value: int | Sequence[int], num_dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * num_dims if len(values) == 1 else values


@functools.cache
def useful_taps(size: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[int, int]:
    """The first tap of a kernel along an axis that meets data at some place, and the one after the last."""
    reach = dilation * (kernel - 1) + 1
    if padding == 0 or size + 2 * padding < reach:
        return 0, kernel
    count = (size + 2 * padding - reach) // stride + 1
    starts = range(-padding, count * stride - padding, stride)
    meeting = [tap for tap in range(kernel) if any(0 <= start + tap * dilation < size for start in starts)]
    if not meeting:
        return 0, kernel
    first, last = meeting[0], meeting[-1] + 1
    # What is left of the padding has to be the same on both sides, and give as many outputs.
    left = padding - first * dilation
    same = left >= 0 and (size + 2 * left - dilation * (last - first - 1) - 1) // stride + 1 == count
    return (first, last) if same else (0, kernel)


class ConvolutionsAsProducts(CroppedConvolutions):
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
    height = (images.shape[-2] + 2 * padding[0] - dilation[0] * (weight.shape[-2] - 1) - 1) // stride[0] + 1
    return output.unflatten(-1, (height, -1))
