"""Reductions."""

from __future__ import annotations

import torch
from torch import Tensor

from mlprogram.errors import ProgramError
from mlprogram.kernel import Accumulate, arithmetic, exact
from mlprogram.sums import mean, total

Axes = tuple[int, ...]


def _sum(x: Tensor, axes: Axes | None, keep_dims: bool, accumulate: Accumulate) -> Tensor:
    if not x.is_floating_point():
        return x.sum(_axes(x, axes), keepdim=keep_dims, dtype=x.dtype)
    return total(x, _axes(x, axes), keep_dims=keep_dims, accumulate=accumulate)


@arithmetic("reduce_sum")
def reduce_sum(x: Tensor, axes: Axes | None = None, keep_dims: bool = False, accumulate: Accumulate = "fp32") -> Tensor:
    return _sum(x, axes, keep_dims, accumulate)


@arithmetic("reduce_mean")
def reduce_mean(
    x: Tensor, axes: Axes | None = None, keep_dims: bool = False, accumulate: Accumulate = "fp32"
) -> Tensor:
    if not x.is_floating_point():
        # value_inference: numpy's mean in fp64, cut to the integer type
        return x.double().mean(_axes(x, axes), keepdim=keep_dims).trunc().to(x.dtype)
    return mean(x, _axes(x, axes), keep_dims=keep_dims, accumulate=accumulate)


@arithmetic("reduce_l1_norm")
def reduce_l1_norm(
    x: Tensor, axes: Axes | None = None, keep_dims: bool = False, accumulate: Accumulate = "fp32"
) -> Tensor:
    return _sum(x.abs(), axes, keep_dims, accumulate)


@arithmetic("reduce_l2_norm")
def reduce_l2_norm(
    x: Tensor, axes: Axes | None = None, keep_dims: bool = False, accumulate: Accumulate = "fp32"
) -> Tensor:
    _floats(x)
    return _sum(x * x, axes, keep_dims, accumulate).sqrt()


@arithmetic("reduce_sum_square")
def reduce_sum_square(
    x: Tensor, axes: Axes | None = None, keep_dims: bool = False, accumulate: Accumulate = "fp32"
) -> Tensor:
    return _sum(x * x, axes, keep_dims, accumulate)


@arithmetic("reduce_log_sum")
def reduce_log_sum(
    x: Tensor, axes: Axes | None = None, keep_dims: bool = False, accumulate: Accumulate = "fp32"
) -> Tensor:
    _floats(x)
    return _sum(x, axes, keep_dims, accumulate).log()


@arithmetic("reduce_log_sum_exp")
def reduce_log_sum_exp(
    x: Tensor, axes: Axes | None = None, keep_dims: bool = False, accumulate: Accumulate = "fp32"
) -> Tensor:
    _floats(x)
    if accumulate == "fp32":
        return torch.logsumexp(x, _axes(x, axes), keepdim=keep_dims)
    top = x.amax(_axes(x, axes), keepdim=True)
    result = _sum((x - top).exp(), axes, True, accumulate).log() + top
    return result if keep_dims else result.squeeze(_axes(x, axes))


@arithmetic("reduce_max")
def reduce_max(x: Tensor, axes: Axes | None = None, keep_dims: bool = False) -> Tensor:
    return x.amax(_axes(x, axes), keepdim=keep_dims)


@arithmetic("reduce_min")
def reduce_min(x: Tensor, axes: Axes | None = None, keep_dims: bool = False) -> Tensor:
    return x.amin(_axes(x, axes), keepdim=keep_dims)


@arithmetic("reduce_prod")
def reduce_prod(x: Tensor, axes: Axes | None = None, keep_dims: bool = False) -> Tensor:
    dtype = x.dtype
    for axis in sorted(_axes(x, axes), reverse=True):
        x = x.prod(axis, keepdim=keep_dims, dtype=dtype)
    return x


@exact("reduce_argmax")
def reduce_argmax(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    """The first of equals; documented as any of them."""
    return _index(x.argmax(axis, keepdim=keep_dims), output_dtype)


@exact("reduce_argmin")
def reduce_argmin(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    """The first of equals; documented as any of them."""
    return _index(x.argmin(axis, keepdim=keep_dims), output_dtype)


def _index(found: Tensor, output_dtype: str) -> Tensor:
    if output_dtype not in ("int32", "uint16"):
        raise ProgramError(f"indices as {output_dtype}")
    return found.to(torch.int32)


def _axes(x: Tensor, axes: Axes | None) -> tuple[int, ...]:
    found = tuple(range(x.dim())) if axes is None else axes
    if any(not -x.dim() <= one < x.dim() for one in found):
        raise ProgramError(f"axes {list(found)} of a value of rank {x.dim()}")
    return tuple(sorted({one % x.dim() for one in found}))


def _floats(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ProgramError("this reduction of integers has no documented rounding")
