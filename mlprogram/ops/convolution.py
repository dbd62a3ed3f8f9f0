"""Convolutions and their transposes in one, two and three dimensions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from mlprogram.errors import ProgramError
from mlprogram.kernel import Accumulate, arithmetic
from mlprogram.ops.layout import parts
from mlprogram.sums import STEP, add_up

Ints = tuple[int, ...]
PadType = Literal["valid", "same", "same_lower", "custom"]


def padding(
    pad_type: str, pad: Ints | None, size: Sequence[int], kernel: Sequence[int], strides: Ints, dilations: Ints
) -> list[int]:
    """Elements to add before and after each spatial dimension: [before 0, after 0, before 1, ...].

    "same" makes ceil(size / stride) outputs and puts what is odd after, "same_lower" before (coremltools
    `aggregated_pad`).
    """
    if pad_type == "valid":
        return [0] * (2 * len(size))
    if pad_type == "custom":
        if pad is None or len(pad) != 2 * len(size) or min(pad) < 0:
            raise ProgramError(f"custom padding {pad} for {len(size)} dimensions")
        return list(pad)
    amounts: list[int] = []
    for length, width, stride, dilation in zip(size, kernel, strides, dilations, strict=True):
        amount = max(0, stride * math.ceil(length / stride) - length + (width - 1) * dilation + 1 - stride)
        low, high = amount // 2, amount - amount // 2
        amounts += [low, high] if pad_type == "same" else [high, low]
    return amounts


def padded(x: Tensor, amounts: Sequence[int], value: float = 0.0) -> Tensor:
    """`x` with its last dimensions extended; `amounts` as `padding` gives them."""
    if not any(amounts):
        return x
    pairs = [amounts[one : one + 2] for one in range(0, len(amounts), 2)]
    return F.pad(x, [one for pair in reversed(pairs) for one in pair], value=value)


def spatial(x: Tensor, name: str, values: Ints | None) -> Ints:
    """`values`, one for each spatial dimension of `x`, 1 where none are given."""
    rank = x.dim() - 2
    if values is None:
        return (1,) * rank
    if len(values) != rank or min(values) < 1:
        raise ProgramError(f"{name} {list(values)} for {rank} dimensions")
    return values


@arithmetic("conv", alike=("x", "weight", "bias"))
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Ints | None = None,
    pad_type: PadType = "valid",
    pad: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
    accumulate: Accumulate = "fp32",
) -> Tensor:
    rank = _rank(x, weight)
    strides, dilations = spatial(x, "strides", strides), spatial(x, "dilations", dilations)
    amounts = padding(pad_type, pad, x.shape[2:], weight.shape[2:], strides, dilations)
    _groups(groups, x.shape[1], weight.shape[0])
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    if accumulate == "fp32":
        if all(one == other for one, other in zip(amounts[::2], amounts[1::2], strict=True)):
            return function(x, weight, bias, strides, amounts[::2], dilations, groups)
        return function(padded(x, amounts), weight, bias, strides, 0, dilations, groups)
    x = padded(x, amounts)
    result = add_up(_runs(x, weight, strides, dilations, groups))
    return result if bias is None else result + bias.view(-1, *(1,) * rank)


def _runs(x: Tensor, weight: Tensor, strides: Ints, dilations: Ints, groups: int) -> list[Tensor]:
    """The convolution in pieces of one position of the kernel and `STEP` channels."""
    function = (F.conv1d, F.conv2d, F.conv3d)[len(strides) - 1]
    outputs = [
        (size - (width - 1) * dilation - 1) // stride + 1
        for size, width, stride, dilation in zip(x.shape[2:], weight.shape[2:], strides, dilations, strict=True)
    ]
    parted = parts(x, 1, groups, -1)
    runs = []
    for position in itertools.product(*(range(one) for one in weight.shape[2:])):
        seen = parted
        picked = weight
        for axis, (at, count, stride, dilation) in enumerate(zip(position, outputs, strides, dilations, strict=True)):
            seen = seen.narrow(3 + axis, at * dilation, (count - 1) * stride + 1)
            picked = picked.narrow(2 + axis, at, 1)
        for start in range(0, weight.shape[1], STEP):
            channels = seen[:, :, start : start + STEP].flatten(1, 2)
            runs.append(function(channels, picked[:, start : start + STEP], None, strides, groups=groups))
    return runs


@arithmetic("conv_transpose", alike=("x", "weight", "bias"))
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Ints | None = None,
    output_shape: Ints | None = None,
    pad_type: Literal["valid", "same", "custom"] = "valid",
    strides: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
    accumulate: Accumulate = "fp32",
) -> Tensor:
    """`output_shape` is for outputs that the other parameters leave open; with custom padding it may add at the end."""
    rank = _rank(x, weight)
    strides, dilations = spatial(x, "strides", strides), spatial(x, "dilations", dilations)
    _groups(groups, x.shape[1], x.shape[1])
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    whole = [
        (size - 1) * stride + (width - 1) * dilation + 1
        for size, stride, width, dilation in zip(x.shape[2:], strides, weight.shape[2:], dilations, strict=True)
    ]
    if pad_type == "same":
        wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
        before = [max(0, one - other) // 2 for one, other in zip(whole, wanted, strict=True)]
    else:
        amounts = padding(pad_type, pad, x.shape[2:], weight.shape[2:], strides, dilations)
        before = amounts[::2]
        wanted = [one - low - high for one, low, high in zip(whole, amounts[::2], amounts[1::2], strict=True)]
    if output_shape is not None:
        fixed = (x.shape[0], weight.shape[1] * groups)
        if len(output_shape) != rank + 2 or output_shape[:2] != fixed:
            raise ProgramError(f"output shape {list(output_shape)} of a transposed convolution of {list(x.shape)}")
        if pad_type == "same" and list(output_shape[2:]) != wanted:
            raise ProgramError(f"output shape {list(output_shape)} with padding `same`, which does not place it")
        wanted = list(output_shape[2:])
    if any(one < 1 for one in wanted):
        raise ProgramError(f"spatial output of {wanted}")
    if accumulate == "fp32":
        result = function(x, weight, None, strides, 0, 0, groups, dilations)
    else:
        # Positions of the kernel that meet in one output are added in fp32: a few, where channels are many.
        inputs, filters = parts(x, 1, groups, -1), parts(weight, 0, groups, -1)
        result = add_up(
            function(
                inputs[:, :, start : start + STEP].flatten(1, 2),
                filters[:, start : start + STEP].flatten(0, 1),
                None,
                strides,
                groups=groups,
                dilation=dilations,
            )
            for start in range(0, inputs.shape[2], STEP)
        )
    for axis, (low, count) in enumerate(zip(before, wanted, strict=True)):
        missing = low + count - result.shape[2 + axis]
        if missing > 0:  # beyond what any input reaches there is the bias alone
            result = F.pad(result, [0, 0] * (rank - 1 - axis) + [0, missing])
        result = result.narrow(2 + axis, low, count)
    return result if bias is None else result + bias.view(-1, *(1,) * rank)


def _rank(x: Tensor, weight: Tensor) -> int:
    rank = x.dim() - 2
    if rank not in (1, 2, 3) or weight.dim() != x.dim():
        raise ProgramError(f"convolution of {list(x.shape)} with weights {list(weight.shape)}")
    return rank


def _groups(groups: int, channels: int, outputs: int) -> None:
    if groups < 1 or channels % groups or outputs % groups:
        raise ProgramError(f"{groups} groups for {channels} channels in and {outputs} out")
