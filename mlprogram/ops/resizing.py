"""Resizing of the last two axes."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mlprogram.errors import ProgramError
from mlprogram.kernel import arithmetic, exact
from mlprogram.ops.layout import bounded

Sampling = Literal["STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS"]


@exact("upsample_nearest_neighbor")
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1) -> Tensor:
    return _repeat(x, _scaled(x, -2, scale_factor_height), _scaled(x, -1, scale_factor_width))


@exact("resize_nearest_neighbor")
def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    return _repeat(x, target_size_height, target_size_width)


@arithmetic("upsample_bilinear")
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """`half_pixel_centers` (iOS 16) follows from `align_corners` where it is not given; both false is `DEFAULT`."""
    centres = not align_corners if half_pixel_centers is None else half_pixel_centers
    if align_corners and centres:
        raise ProgramError("align_corners together with half_pixel_centers")
    mode: Sampling = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if centres else "DEFAULT"
    return _linear(x, _scaled(x, -2, scale_factor_height), _scaled(x, -1, scale_factor_width), mode)


@arithmetic("resize_bilinear")
def resize_bilinear(
    x: Tensor, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: Sampling = "DEFAULT"
) -> Tensor:
    return _linear(x, target_size_height, target_size_width, sampling_mode)


@arithmetic("resize")
def resize(
    x: Tensor,
    shape: tuple[int, ...],
    resized_dims: int,
    interpolation_mode: Literal["LINEAR", "NEAREST_NEIGHBOR"] = "LINEAR",
    sampling_mode: Sampling = "DEFAULT",
) -> Tensor:
    """The last `resized_dims` sizes of `shape`; 0 keeps the size of `x`."""
    if resized_dims not in (1, 2) or len(shape) < resized_dims or x.dim() < resized_dims:
        raise ProgramError(f"resize of {resized_dims} dimensions of {x.dim()} to {list(shape)}")
    sizes = [one or x.shape[at - resized_dims] for at, one in enumerate(shape[len(shape) - resized_dims :])]
    image = x.unsqueeze(-2) if resized_dims == 1 else x
    height, width = (1, sizes[0]) if resized_dims == 1 else sizes
    if interpolation_mode == "LINEAR":
        result = _linear(image, height, width, sampling_mode)
    elif sampling_mode in ("DEFAULT", "UNALIGN_CORNERS"):
        result = _repeat(image, height, width)
    else:
        raise ProgramError(f"nearest neighbour with {sampling_mode}, whose rounding is not documented")
    return result.squeeze(-2) if resized_dims == 1 else result


def _scaled(x: Tensor, axis: int, factor: float) -> int:
    if x.dim() < 3 or not factor > 0 or not math.isfinite(factor):
        raise ProgramError(f"scale {factor} of a value of rank {x.dim()}")
    return math.floor(x.shape[axis] * factor)


def _repeat(x: Tensor, height: int, width: int) -> Tensor:
    """Each element as often as the size grows. Any other ratio depends on a rounding that is not documented."""
    if x.dim() < 2 or height < 1 or width < 1 or height % x.shape[-2] or width % x.shape[-1]:
        raise ProgramError(f"nearest neighbour from {list(x.shape[-2:])} to [{height}, {width}], not a whole factor")
    bounded([*x.shape[:-2], height, width], x.element_size())
    return x.repeat_interleave(height // x.shape[-2], -2).repeat_interleave(width // x.shape[-1], -1)


def _linear(x: Tensor, height: int, width: int, mode: Sampling) -> Tensor:
    if x.dim() < 2 or height < 1 or width < 1 or not x.numel():
        raise ProgramError(f"resize of {list(x.shape)} to [{height}, {width}]")
    if not x.is_floating_point():
        raise ProgramError("interpolation of integers, whose rounding is not documented")
    bounded([*x.shape[:-2], height, width], x.element_size())
    for axis, size in ((-2, height), (-1, width)):
        points = grid(x.shape[axis], size, mode)
        low = points.floor().long()
        share = (points - low).to(x.dtype)
        if axis == -2:
            share = share.unsqueeze(-1)
        below, above = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=x.shape[axis] - 1))
        x = below + (above - below) * share
    return x


def grid(size: int, outputs: int, mode: Sampling) -> Tensor:
    """Where in an axis of `size` elements the `outputs` are sampled; fp64 (documentation of `resize_bilinear`)."""
    at = torch.arange(outputs, dtype=torch.float64)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if outputs == 1:
            points = at + ((size - 1) / 2 if mode == "ALIGN_CORNERS" else 0.0)
        else:
            points = at * ((size - 1) / (outputs - 1))
    elif mode == "DEFAULT":
        points = at * (size / outputs)
    elif mode == "OFFSET_CORNERS":
        delta = max(1, size - 1) / outputs
        points = 0.5 * delta + at * delta
    else:
        points = (at + 0.5) * (size / outputs) - 0.5
    return points.clamp(0, size - 1)
