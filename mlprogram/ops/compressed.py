"""Weights that are stored compressed: `constexpr_*` operations, evaluated when a weight is needed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlprogram.blob import unpack
from mlprogram.errors import ProgramError
from mlprogram.kernel import arithmetic, exact
from mlprogram.ops.layout import bounded
from mlprogram.ops.quantization import along, positive
from mlprogram.tensor_type import BY_NAME

Ints = tuple[int, ...]
_PALETTES = {2: "uint1", 4: "uint2", 16: "uint4", 64: "uint6", 256: "uint8"}


@arithmetic("constexpr_affine_dequantize")
def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int) -> Tensor:
    positive(scale, or_zero=True)
    steps = quantized_data.float() - along(zero_point, quantized_data, axis).float()
    return steps * along(scale, quantized_data, axis)


@exact("constexpr_blockwise_shift_scale")
def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Computed in the scale's type, as coremltools does: for integers the same as rounding once.

    Scales of other data than integers may have any sign: coremltools makes a product of tables and scales of it.
    """
    if not data.is_floating_point():
        positive(scale, or_zero=True)
    steps = data.to(scale.dtype)
    if offset is not None:
        if offset.shape != scale.shape:
            raise ProgramError(f"offsets of {list(offset.shape)} and scales of {list(scale.shape)}")
        steps = steps - _blocks(offset.to(scale.dtype), tuple(data.shape))
    return steps * _blocks(scale, tuple(data.shape))


@exact("constexpr_cast")
def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    if output_dtype != "fp32":
        raise ProgramError(f"constexpr_cast to {output_dtype}")
    return source_val.to(torch.float32)


@exact("constexpr_lut_to_dense")
def constexpr_lut_to_dense(
    indices: Tensor, lut: Tensor, shape: Ints | None = None, vector_axis: int | None = None
) -> Tensor:
    """With `shape` the form of iOS 16: packed indices into one table; else that of iOS 18: tables for blocks."""
    if shape is None:
        return _looked_up(indices, lut, vector_axis)
    element = BY_NAME.get(_PALETTES.get(lut.numel(), ""))
    if element is None or lut.dim() != 1 or indices.dim() != 1:
        raise ProgramError(f"a table of {lut.numel()} entries")
    count = _count(shape, lut.element_size())
    if indices.numel() != (count * element.bits + 7) // 8:
        raise ProgramError(f"{indices.numel()} bytes of indices for {count} elements of {element.bits} bits")
    places = unpack(indices.numpy(), element, count) if element.bits < 8 else indices
    return lut[places.int()].view(shape)


@exact("constexpr_sparse_to_dense")
def constexpr_sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: Ints | None = None) -> Tensor:
    """With `shape` the form of iOS 16, whose mask is packed bits; else that of iOS 18."""
    if shape is not None:
        count = _count(shape, nonzero_data.element_size())
        if mask.dim() != 1 or mask.numel() != (count + 7) // 8:
            raise ProgramError(f"{mask.numel()} bytes of mask for {count} elements")
        mask = unpack(mask.numpy(), BY_NAME["uint1"], count).view(shape)
    return _spread(nonzero_data, mask)


@exact("constexpr_lut_to_sparse")
def constexpr_lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, vector_axis: int | None = None
) -> tuple[Tensor, Tensor]:
    dense = _looked_up(_spread(indices_nonzero_data, indices_mask), lut, vector_axis)
    mask = indices_mask
    if vector_axis is not None:
        mask = mask.repeat_interleave(lut.shape[-1], vector_axis)
    return mask, dense[mask != 0]


@exact("constexpr_sparse_blockwise_shift_scale")
def constexpr_sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    dense = constexpr_blockwise_shift_scale(_spread(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


def _count(shape: Ints, item_bytes: int) -> int:
    if any(one < 0 for one in shape):
        raise ProgramError(f"a tensor of shape {list(shape)}")
    bounded(list(shape), item_bytes)
    return math.prod(shape)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    places = mask != 0
    if values.dim() != 1 or int(places.sum()) != values.numel():
        raise ProgramError(f"{values.numel()} values for {int(places.sum())} places of a mask")
    dense = torch.zeros(mask.shape, dtype=values.dtype)
    dense[places] = values
    return dense


def _blocks(parameter: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`parameter`, one element for each block, repeated to `shape`."""
    if parameter.dim() != len(shape):
        raise ProgramError(f"blocks of {list(parameter.shape)} in {list(shape)}")
    for axis, (blocks, size) in enumerate(zip(parameter.shape, shape, strict=True)):
        if not blocks or size % blocks:
            raise ProgramError(f"{blocks} blocks along an axis of {size}")
        if blocks not in (1, size):
            parameter = parameter.repeat_interleave(size // blocks, axis)
    return parameter


def _looked_up(indices: Tensor, lut: Tensor, vector_axis: int | None) -> Tensor:
    """`lut` is [blocks along each axis of `indices`..., entries, length of a vector]."""
    rank, shape = indices.dim(), tuple(indices.shape)
    if lut.dim() != rank + 2 or not rank:
        raise ProgramError(f"tables of {list(lut.shape)} for indices of {list(shape)}")
    entries, length = lut.shape[-2:]
    if indices.numel() and int(indices.max()) >= entries:
        raise ProgramError(f"an index outside of a table of {entries} entries")
    if length > 1 and (vector_axis is None or not -rank <= vector_axis < rank):
        raise ProgramError(f"vectors of {length} elements along axis {vector_axis}")
    tables = torch.arange(math.prod(lut.shape[:-2])).view(lut.shape[:-2])
    rows = _blocks(tables, shape) * entries + indices.long()
    vectors = lut.reshape(-1, length)[rows]
    if length == 1:
        return vectors.squeeze(-1)
    assert vector_axis is not None
    at = vector_axis % rank
    return vectors.movedim(-1, at + 1).flatten(at, at + 1)
