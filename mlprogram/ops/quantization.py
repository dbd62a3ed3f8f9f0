"""Affine quantization of values at run time: round half to even, then saturate."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mlprogram.errors import ProgramError
from mlprogram.kernel import arithmetic

_RANGES = {"int8": (-128, 127, torch.int8), "uint8": (0, 255, torch.uint8)}


@arithmetic("quantize", alike=("input", "scale"))
def quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: Literal["int8", "uint8"],
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """clip(round(input / scale) + zero_point)"""
    low, high, dtype = _RANGES[output_dtype]
    positive(scale)
    steps = (input / along(scale, input, axis)).round()
    if zero_point is not None:
        if zero_point.dtype != dtype:
            raise ProgramError(f"a zero point of {zero_point.dtype} for {output_dtype}")
        steps = steps + along(zero_point, input, axis).to(steps.dtype)
    if bool(steps.isnan().any()):
        raise ProgramError("quantization of a value that is not a number")
    return steps.clamp(low, high).to(dtype)


@arithmetic("dequantize", alike=("input", "zero_point"))
def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None) -> Tensor:
    """scale * (input - zero_point)"""
    positive(scale)
    steps = input.float()
    if zero_point is not None:
        steps = steps - along(zero_point, input, axis).float()
    return steps * along(scale, input, axis)


def positive(scale: Tensor, *, or_zero: bool = False) -> None:
    """ProgramError for a scale that is negative or not a number: no quantizer writes it, and nothing says what a device
    makes of it. A weight of zeros may have the scale 0."""
    if not bool(((scale >= 0) if or_zero else (scale > 0)).all()):
        raise ProgramError("a scale that is not positive")


def along(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """A scalar, or one number for each place along `axis` of `x`, in a shape that broadcasts to `x`."""
    if parameter.dim() == 0:
        return parameter
    if parameter.dim() != 1 or axis is None or not -x.dim() <= axis < x.dim():
        raise ProgramError(f"a scale or zero point of {list(parameter.shape)} along axis {axis} of {list(x.shape)}")
    if parameter.shape[0] != x.shape[axis]:
        raise ProgramError(f"{parameter.shape[0]} scales or zero points for {x.shape[axis]} places along axis {axis}")
    return parameter.view([-1 if at == axis % x.dim() else 1 for at in range(x.dim())])
