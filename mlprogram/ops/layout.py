"""Shapes and places: no value changes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mlprogram.errors import ProgramError
from mlprogram.kernel import exact
from mlprogram.tensor_type import MAX_BYTES

Ints = tuple[int, ...]
Bools = tuple[bool, ...]


@exact("identity")
def identity(x: Tensor) -> Tensor:
    return x


@exact("expand_dims")
def expand_dims(x: Tensor, axes: Ints) -> Tensor:
    rank = x.dim() + len(axes)
    places = sorted(_axis(one, rank) for one in axes)
    for place in places:
        x = x.unsqueeze(place)
    return x


@exact("squeeze")
def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    """An axis that is not of length one stays, as in torch."""
    if axes is None:
        return x.squeeze()
    return x.squeeze(tuple({_axis(one, x.dim()) for one in axes}))


@exact("reshape")
def reshape(x: Tensor, shape: Ints) -> Tensor:
    """-1 for the one dimension that follows from the others, 0 for the dimension of `x` at the same place."""
    if 0 in shape and x.numel():
        if len(shape) != x.dim():
            raise ProgramError(f"shape {list(shape)} with a 0 for a value of rank {x.dim()}")
        shape = tuple(x.shape[at] if one == 0 else one for at, one in enumerate(shape))
    return x.reshape(shape)


@exact("reshape_like")
def reshape_like(x: Tensor, ref_tensors: tuple[Tensor, ...], begins: Ints, ends: Ints, end_masks: Bools) -> Tensor:
    shape: list[int] = []
    for one, begin, end, masked in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += one.shape[begin:] if masked else one.shape[begin:end]
    return x.reshape(shape)


@exact("transpose")
def transpose(x: Tensor, perm: Ints) -> Tensor:
    return x.permute(perm)


@exact("flatten2d")
def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@exact("reverse")
def reverse(x: Tensor, axes: Ints | None = None) -> Tensor:
    return x.flip(tuple(range(x.dim())) if axes is None else axes)


@exact("slice_by_index")
def slice_by_index(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    ranges, gone = _ranges(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    for axis, positions in enumerate(ranges):
        x = _pick(x, axis, positions)
    return x.squeeze(gone) if gone else x


@exact("slice_by_size")
def slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    """A size of -1 takes all that is left."""
    if len(begin) != x.dim() or len(size) != x.dim():
        raise ProgramError(f"begin {list(begin)} and size {list(size)} for a value of rank {x.dim()}")
    for axis, (start, count) in enumerate(zip(begin, size, strict=True)):
        start = start + x.shape[axis] if start < 0 else start
        x = x.narrow(axis, start, x.shape[axis] - start if count == -1 else count)
    return x


@exact("slice_update", alike=("x", "update"))
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    ranges, _ = _ranges(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    shape = [len(one) for one in ranges]
    result = x.clone()
    places = torch.meshgrid(*(torch.tensor(list(one), dtype=torch.int64) for one in ranges), indexing="ij")
    result[places] = update.reshape(shape)
    return result


@exact("sliding_windows")
def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    axis = _axis(axis, x.dim())
    return x.unfold(axis, size, stride).movedim(-1, axis + 1)


@exact("concat", alike=("values",))
def concat(values: tuple[Tensor, ...], axis: int, interleave: bool = False) -> Tensor:
    if all(one.dim() == 0 for one in values):
        return torch.stack(values)
    if not interleave:
        return torch.cat(values, axis)
    axis = _axis(axis, values[0].dim())
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


@exact("stack", alike=("values",))
def stack(values: tuple[Tensor, ...], axis: int) -> Tensor:
    return torch.stack(values, axis)


@exact("split")
def split(x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Ints | None = None) -> tuple[Tensor, ...]:
    if split_sizes is None:
        if num_splits is None or num_splits < 1 or x.shape[axis] % num_splits:
            raise ProgramError(f"split of {x.shape[axis]} into {num_splits} equal parts")
        split_sizes = (x.shape[axis] // num_splits,) * num_splits
    elif num_splits not in (None, len(split_sizes)):
        raise ProgramError(f"split into {num_splits} parts of sizes {list(split_sizes)}")
    return torch.split(x, list(split_sizes), axis)


@exact("tile")
def tile(x: Tensor, reps: Ints) -> Tensor:
    if len(reps) != x.dim() or any(one < 1 for one in reps):
        raise ProgramError(f"repetitions {list(reps)} of a value of rank {x.dim()}")
    bounded([one * times for one, times in zip(x.shape, reps, strict=True)], x.element_size())
    return x.tile(reps)


@exact("pad", alike=("x", "constant_val"))
def pad(x: Tensor, pad: Ints, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """`pad` is (before, after) for each of the last dimensions, in their order."""
    if len(pad) % 2 or len(pad) > 2 * x.dim() or any(one < 0 for one in pad):
        raise ProgramError(f"padding {list(pad)} of a value of rank {x.dim()}")
    pairs = [(pad[one], pad[one + 1]) for one in range(0, len(pad), 2)]
    first = x.dim() - len(pairs)
    bounded(
        [*x.shape[:first], *(x.shape[first + at] + low + high for at, (low, high) in enumerate(pairs))],
        x.element_size(),
    )
    if mode == "constant":
        return F.pad(x, [one for pair in reversed(pairs) for one in pair], value=constant_val)
    if mode not in ("reflect", "replicate"):
        raise ProgramError(f"padding mode `{mode}`")
    for at, (low, high) in enumerate(pairs):
        size = x.shape[first + at]
        if low or high:
            if not size or (mode == "reflect" and max(low, high) > size - 1):
                raise ProgramError(f"{mode} padding by {low} and {high} of {size} elements")
            places = torch.arange(-low, size + high)
            if mode == "reflect":
                places = torch.where(places < 0, -places, torch.where(places >= size, 2 * (size - 1) - places, places))
            x = x.index_select(first + at, places.clamp(0, size - 1))
    return x


@exact("crop")
def crop(x: Tensor, crop_height: Ints, crop_width: Ints) -> Tensor:
    for axis, amounts in ((-2, crop_height), (-1, crop_width)):
        if len(amounts) != 2 or min(amounts) < 0:
            raise ProgramError(f"crop by {list(amounts)}")
        x = x.narrow(axis, amounts[0], x.shape[axis] - sum(amounts))
    return x


@exact("pixel_shuffle")
def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    _block(x, upscale_factor)
    return F.pixel_shuffle(x, upscale_factor)


@exact("pixel_unshuffle")
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    _block(x, downscale_factor)
    return F.pixel_unshuffle(x, downscale_factor)


@exact("depth_to_space")
def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """Channels are (row in block, column in block, channel), TensorFlow's order."""
    _block(x, block_size)
    return parts(x, 1, block_size, block_size, -1).permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)


@exact("space_to_depth")
def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    _block(x, block_size)
    return parts(parts(x, 3, -1, block_size), 2, -1, block_size).permute(0, 3, 5, 1, 2, 4).flatten(1, 3)


@exact("space_to_batch")
def space_to_batch(x: Tensor, block_shape: Ints, paddings: Ints) -> Tensor:
    (rows, columns), amounts = _blocks(x, block_shape, paddings)
    return parts(parts(F.pad(x, amounts), 3, -1, columns), 2, -1, rows).permute(3, 5, 0, 1, 2, 4).flatten(0, 2)


@exact("batch_to_space")
def batch_to_space(x: Tensor, block_shape: Ints, crops: Ints) -> Tensor:
    (rows, columns), (left, right, top, bottom) = _blocks(x, block_shape, crops)
    whole = parts(x, 0, rows, columns, -1).permute(2, 3, 4, 0, 5, 1).flatten(4, 5).flatten(2, 3)
    return whole[:, :, top : whole.shape[2] - bottom, left : whole.shape[3] - right]


@exact("band_part")
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    rows, columns = x.shape[-2:]
    distance = torch.arange(rows).view(-1, 1) - torch.arange(columns)
    kept = torch.ones(rows, columns, dtype=torch.bool)
    if lower >= 0:
        kept &= distance <= lower
    if upper >= 0:
        kept &= -distance <= upper
    return torch.where(kept, x, torch.zeros((), dtype=x.dtype))


def parts(x: Tensor, axis: int, *sizes: int) -> Tensor:
    """`x` with one axis as several, the last of which varies fastest; one of `sizes` may be -1."""
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def bounded(shape: list[int], item_bytes: int) -> None:
    """ProgramError for a size that only a broken program asks for, before memory is."""
    if math.prod(shape) * item_bytes > MAX_BYTES:
        raise ProgramError(f"a value of {shape} elements")


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise ProgramError(f"axis {axis} of {rank}")
    return axis % rank


def _block(x: Tensor, size: int) -> None:
    if x.dim() != 4 or size < 1:
        raise ProgramError(f"blocks of {size} in a value of rank {x.dim()}")


def _blocks(x: Tensor, shape: Ints, amounts: Ints) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    if x.dim() != 4 or len(shape) != 2 or min(shape) < 1 or len(amounts) != 4 or min(amounts) < 0:
        raise ProgramError(f"blocks of {list(shape)} with {list(amounts)} in a value of rank {x.dim()}")
    top, bottom, left, right = amounts
    return (shape[0], shape[1]), (left, right, top, bottom)


def _ranges(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None,
    begin_mask: Bools | None,
    end_mask: Bools | None,
    squeeze_mask: Bools | None,
) -> tuple[list[range], tuple[int, ...]]:
    """The positions taken along each axis, as Python slices take them, and the axes that go away."""
    rank = x.dim()
    given = (begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if any(one is not None and len(one) != rank for one in given):
        raise ProgramError(f"a slice with parameters that are not {rank} long each")
    ranges = []
    for axis, size in enumerate(x.shape):
        start = None if begin_mask and begin_mask[axis] else begin[axis]
        if squeeze_mask and squeeze_mask[axis]:
            at = 0 if start is None else start
            if not -size <= at < size:
                raise ProgramError(f"index {at} of {size} elements")
            ranges.append(range(at % size, at % size + 1))
            continue
        stop = None if end_mask and end_mask[axis] else end[axis]
        step = stride[axis] if stride else 1
        if not step:
            raise ProgramError("a slice with stride 0")
        ranges.append(range(size)[start:stop:step])
    return ranges, tuple(at for at in range(rank) if squeeze_mask and squeeze_mask[at])


def _pick(x: Tensor, axis: int, positions: range) -> Tensor:
    if positions == range(x.shape[axis]):
        return x
    if positions.step == 1:
        return x.narrow(axis, positions.start if positions else 0, len(positions))
    return x.index_select(axis, torch.tensor(list(positions), dtype=torch.int64))
