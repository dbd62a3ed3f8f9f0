"""Reading and writing at indices. An index outside is refused: what a device does then is not defined."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mlprogram.errors import ProgramError
from mlprogram.kernel import arithmetic, exact

Mode = Literal["update", "add", "sub", "mul", "div", "max", "min"]


@exact("gather")
def gather(x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    axis = _axis(axis, x)
    if not 0 <= batch_dims <= min(axis, indices.dim()) or x.shape[:batch_dims] != indices.shape[:batch_dims]:
        raise ProgramError(f"gather over {batch_dims} batch dimensions of {list(x.shape)} at {list(indices.shape)}")
    places = _inside(indices, x.shape[axis])
    if not batch_dims:
        flat = x.index_select(axis, places.flatten())
        return flat.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    count = math.prod(x.shape[:batch_dims])
    rows, at = x.reshape(count, *x.shape[batch_dims:]), places.reshape(count, -1)
    picked = [one.index_select(axis - batch_dims, where) for one, where in zip(rows, at, strict=True)]
    return torch.stack(picked).reshape(*x.shape[:axis], *indices.shape[batch_dims:], *x.shape[axis + 1 :])


@exact("gather_along_axis")
def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False) -> Tensor:
    axis = _axis(axis, x)
    _same_but(x, indices, axis)
    return torch.gather(x, axis, _inside(indices, x.shape[axis]))


@exact("gather_nd")
def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    depth = indices.shape[-1]
    if depth + batch_dims > x.dim() or x.shape[:batch_dims] != indices.shape[:batch_dims]:
        raise ProgramError(f"gather of {list(x.shape)} at {list(indices.shape)}, {batch_dims} batch dimensions")
    # Batches as indices of their own, in the shape of the indices but for what they do not vary along.
    places = [
        torch.arange(size).view([-1 if axis == at else 1 for axis in range(indices.dim() - 1)])
        for at, size in enumerate(x.shape[:batch_dims])
    ]
    places += [_inside(indices[..., at], x.shape[batch_dims + at]) for at in range(depth)]
    return x[tuple(places)]


@arithmetic("scatter", alike=("data", "updates"))
def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: Mode = "add",
    validate_indices: bool = False,
) -> Tensor:
    axis = _axis(axis, data)
    places = _inside(indices, data.shape[axis])
    if updates.shape != (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]) or indices.dim() != 1:
        raise ProgramError(f"scatter of {list(updates.shape)} to {list(indices.shape)} in {list(data.shape)}")
    return _write(data.movedim(axis, 0), (places,), updates.movedim(axis, 0), mode).movedim(0, axis)


@arithmetic("scatter_along_axis", alike=("data", "updates"))
def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: Mode = "add",
    validate_indices: bool = False,
) -> Tensor:
    axis = _axis(axis, data)
    _same_but(data, indices, axis)
    if updates.shape != indices.shape:
        raise ProgramError(f"scatter of {list(updates.shape)} to {list(indices.shape)}")
    grid = list(torch.meshgrid(*(torch.arange(one) for one in indices.shape), indexing="ij"))
    grid[axis] = _inside(indices, data.shape[axis])
    return _write(data, tuple(grid), updates, mode)


@arithmetic("scatter_nd", alike=("data", "updates"))
def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: Mode = "add", validate_indices: bool = False
) -> Tensor:
    depth = indices.shape[-1]
    if depth > data.dim() or updates.shape != (*indices.shape[:-1], *data.shape[depth:]):
        raise ProgramError(f"scatter of {list(updates.shape)} to {list(indices.shape)} in {list(data.shape)}")
    return _write(data, tuple(_inside(indices[..., at], data.shape[at]) for at in range(depth)), updates, mode)


def _write(data: Tensor, places: tuple[Tensor, ...], updates: Tensor, mode: Mode) -> Tensor:
    """`data` with `updates` at `places`, indices into its first dimensions."""
    rows = torch.zeros(places[0].shape, dtype=torch.int64)
    for one, size in zip(places, data.shape, strict=False):
        rows = rows * size + one
    flat = data.reshape(math.prod(data.shape[: len(places)]), -1).clone()
    at, values = rows.flatten(), updates.reshape(rows.numel(), -1)
    if mode in ("update", "div") and at.numel() and int(at.bincount().max()) > 1:
        raise ProgramError(f"scatter with mode `{mode}` to one place twice, whose order is not defined")
    if mode == "update":
        flat[at] = values
    elif mode in ("add", "sub"):
        flat.index_add_(0, at, values, alpha=1 if mode == "add" else -1)
    elif mode == "div":
        if not data.is_floating_point():
            raise ProgramError("division of integers without a rounding rule")
        flat[at] = flat[at] / values
    else:
        reduce = {"mul": "prod", "max": "amax", "min": "amin"}[mode]
        flat.scatter_reduce_(0, at.view(-1, 1).expand_as(values), values, reduce)
    return flat.view(data.shape)


def _axis(axis: int, x: Tensor) -> int:
    if not -x.dim() <= axis < x.dim():
        raise ProgramError(f"axis {axis} of a value of rank {x.dim()}")
    return axis % x.dim()


def _same_but(x: Tensor, indices: Tensor, axis: int) -> None:
    if x.dim() != indices.dim() or any(
        one != other for at, (one, other) in enumerate(zip(x.shape, indices.shape, strict=True)) if at != axis
    ):
        raise ProgramError(f"indices {list(indices.shape)} along axis {axis} of {list(x.shape)}")


def _inside(indices: Tensor, size: int) -> Tensor:
    """Indices as int64, those from the end counted from the start (iOS 17 no longer defines them, iOS 15 does)."""
    places = indices.long()
    if places.numel() and not bool(((places >= -size) & (places < size)).all()):
        raise ProgramError(f"an index outside of {size} elements")
    return torch.where(places < 0, places + size, places)
