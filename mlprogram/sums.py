"""Sums as hardware that accumulates in fp16 makes them, to see what depends on it.

Nothing says in which order a device adds. Here runs of `STEP` terms are added in fp32 and each partial sum is rounded
to fp16 when the next run is added to it: the order of Apple GPUs' 8x8 matrix instruction with fp16 accumulators (Metal
Shading Language, `simdgroup_half8x8`). It is a model of the risk, not of a chip.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mlprogram.kernel import Accumulate

STEP = 8


def add_up(parts: Iterable[Tensor]) -> Tensor:
    """The sum of `parts` in their order, rounded to fp16 after each; fp32."""
    result: Tensor | None = None
    for part in parts:
        result = (part if result is None else result + part).half().float()
    assert result is not None
    return result


def total(x: Tensor, axes: Sequence[int], *, keep_dims: bool, accumulate: Accumulate) -> Tensor:
    """Sum of fp32 values over `axes`."""
    dims = sorted({axis % x.dim() for axis in axes})
    if not dims:
        return x
    if accumulate == "fp32":
        return x.sum(dims, keepdim=keep_dims)
    kept = [one for one in range(x.dim()) if one not in dims]
    flat = x.permute(*kept, *dims).flatten(len(kept))
    result = add_up(run.sum(-1) for run in torch.split(flat, STEP, -1))
    return result.view([1 if one in dims else x.shape[one] for one in range(x.dim())]) if keep_dims else result


def mean(x: Tensor, axes: Sequence[int], *, keep_dims: bool, accumulate: Accumulate) -> Tensor:
    """Mean of fp32 values over `axes`."""
    count = 1
    for axis in {axis % x.dim() for axis in axes}:
        count *= x.shape[axis]
    return total(x, axes, keep_dims=keep_dims, accumulate=accumulate) / count


def product(x: Tensor, y: Tensor, accumulate: Accumulate) -> Tensor:
    """Matrix product of fp32 values, numpy's rules."""
    if accumulate == "fp32" or not x.is_floating_point():
        return torch.matmul(x, y)
    axis = -2 if y.dim() > 1 else -1
    runs = zip(torch.split(x, STEP, -1), torch.split(y, STEP, axis), strict=True)
    return add_up(torch.matmul(one, other) for one, other in runs)
