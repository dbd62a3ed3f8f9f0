"""Pooling in one, two and three dimensions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mlprogram.errors import ProgramError
from mlprogram.kernel import arithmetic
from mlprogram.ops.convolution import Ints, PadType, padded, padding, spatial


@arithmetic("avg_pool")
def avg_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: PadType,
    strides: Ints | None = None,
    pad: Ints | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    return _average(x, kernel_sizes, pad_type, strides, pad, ceil_mode, exclude_padding_from_average)


@arithmetic("l2_pool")
def l2_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: PadType,
    strides: Ints | None = None,
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """Square root of the sum of squares in the window."""
    squares = _average(x * x, kernel_sizes, pad_type, strides, pad, ceil_mode, False)
    return torch.sqrt(squares * math.prod(kernel_sizes))


@arithmetic("max_pool")
def max_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: PadType,
    strides: Ints | None = None,
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    sizes, steps, amounts = _window(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.dim() - 3]
    result: Tensor = function(padded(x, amounts, -math.inf), sizes, steps)
    return result


def _average(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: PadType,
    strides: Ints | None,
    pad: Ints | None,
    ceil_mode: bool,
    exclude_padding: bool,
) -> Tensor:
    sizes, steps, amounts = _window(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.dim() - 3]
    result = function(padded(x, amounts), sizes, steps)
    if exclude_padding and any(amounts):
        result = result / function(padded(torch.ones_like(x[:1, :1]), amounts), sizes, steps)
    return result


def _window(
    x: Tensor, sizes: Ints, strides: Ints | None, pad_type: str, pad: Ints | None, ceil_mode: bool
) -> tuple[Ints, Ints, list[int]]:
    if x.dim() not in (3, 4, 5):
        raise ProgramError(f"pooling of a value of rank {x.dim()}")
    if ceil_mode:
        raise ProgramError("ceil_mode, whose padded positions are not documented")
    sizes, steps = spatial(x, "kernel_sizes", sizes), spatial(x, "strides", strides)
    return sizes, steps, padding(pad_type, pad, x.shape[2:], sizes, steps, (1,) * len(sizes))
