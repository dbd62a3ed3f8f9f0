"""Tensors made from little: filled, counted, sorted, selected, summed along an axis."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mlprogram.errors import ProgramError
from mlprogram.kernel import arithmetic, exact
from mlprogram.ops.layout import bounded

Ints = tuple[int, ...]


@exact("fill")
def fill(shape: Ints, value: Tensor) -> Tensor:
    return _filled(shape, value)


@exact("fill_like")
def fill_like(ref_tensor: Tensor, value: Tensor) -> Tensor:
    return _filled(tuple(ref_tensor.shape), value)


@exact("shape")
def shape(x: Tensor, output_dtype: Literal["int32", "int16", "uint16"] = "int32") -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int16 if output_dtype == "int16" else torch.int32)


@arithmetic("range_1d", alike=("start", "end", "step"))
def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    first, last, by = start.item(), end.item(), step.item()
    if not by or not math.isfinite(first + last + by):
        raise ProgramError(f"range from {first} to {last} by {by}")
    count = max(0, math.ceil((last - first) / by))
    bounded([count], 8)
    return start + torch.arange(count, dtype=start.dtype) * step


@exact("one_hot", alike=("on_value", "off_value"))
def one_hot(indices: Tensor, one_hot_vector_size: int, on_value: Tensor, off_value: Tensor, axis: int = -1) -> Tensor:
    """An index that is outside has no place that is on."""
    bounded([*indices.shape, one_hot_vector_size], 8)
    axis = axis % (indices.dim() + 1)
    places = torch.arange(one_hot_vector_size).view(-1, *(1,) * (indices.dim() - axis))
    return torch.where(indices.unsqueeze(axis) == places, on_value, off_value)


@exact("argsort")
def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    return torch.argsort(x, dim=axis, descending=not ascending, stable=True).to(torch.int32)


@exact("topk")
def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: Literal["int32", "uint16"] = "int32",
) -> tuple[Tensor, ...]:
    """All elements for k = -1. Of equals the first ones, sorted always: both allowed, neither promised."""
    values, places = torch.sort(x, dim=axis, descending=not ascending, stable=True)
    count = x.shape[axis] if k == -1 else k
    if not 0 < count <= x.shape[axis]:
        raise ProgramError(f"top {k} of {x.shape[axis]} elements")
    values, places = values.narrow(axis, 0, count), places.narrow(axis, 0, count)
    return (values, places.to(torch.int32)) if return_indices else (values,)


@exact("non_zero")
def non_zero(x: Tensor) -> Tensor:
    return x.nonzero().to(torch.int32)


@arithmetic("cumsum")
def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    if reverse:
        x = x.flip(axis)
    sums = x.cumsum(axis, dtype=x.dtype)
    if exclusive:
        sums = torch.cat([torch.zeros_like(sums.narrow(axis, 0, 1)), sums.narrow(axis, 0, x.shape[axis] - 1)], axis)
    return sums.flip(axis) if reverse else sums


@exact("read_state")
def read_state(input: Tensor) -> Tensor:
    """What a state holds now; a later write puts another value there and does not change this one."""
    return input


@exact("write_state", alike=("input", "data"))
def write_state(input: Tensor, data: Tensor) -> Tensor:
    """`data`, which becomes the state's value (coremltools' `coreml_update_state` is this, then `read_state`)."""
    return data


def _filled(shape: Ints, value: Tensor) -> Tensor:
    if any(one < 0 for one in shape):
        raise ProgramError(f"a tensor of shape {list(shape)}")
    bounded(list(shape), value.element_size())
    return value.reshape(()).expand(shape)
