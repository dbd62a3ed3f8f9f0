"""Operations on fp16, computed in fp32 a piece at a time: what is held in fp32 at once stays small.

A 64x64 latent's self-attention has 8 heads of 4096 x 4096 scores: 256 MiB in fp16, and as much again twice over while a
softmax reads and writes all of them in fp32. Pieces are independent, so the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mlprogram.kernel import Kernel

PIECE = 1 << 21
"""Elements of a result from which on it is computed in pieces."""

# Operations of one result whose elements depend on the elements at the same place alone.
_ELEMENTWISE = frozenset(
    {
        "abs",
        "add",
        "clip",
        "cos",
        "erf",
        "exp",
        "gelu",
        "leaky_relu",
        "maximum",
        "minimum",
        "mul",
        "real_div",
        "relu",
        "sigmoid",
        "silu",
        "sin",
        "softplus",
        "sqrt",
        "square",
        "sub",
        "tanh",
    }
)


def in_pieces(type: str, kernel: Kernel, arguments: Mapping[str, Any]) -> Tensor | tuple[Tensor, ...]:
    """Call the operation's function. fp16 arrives as it is stored; an `arithmetic` operation gets it as fp32."""
    if not kernel.arithmetic:
        return kernel.function(**arguments)
    tensors = {name: one for name, one in arguments.items() if isinstance(one, Tensor) and one.dim()}
    found_axis = _axis(type, arguments, tensors)
    if found_axis is None:
        return kernel.function(**{name: _wide(one) for name, one in arguments.items()})
    axis, size = found_axis
    count = next(iter(tensors.values())).shape[axis]
    step = max(1, PIECE * count // size)
    result: Tensor | None = None
    for at in range(0, count, step):
        length = min(step, count - at)
        piece = {name: one.narrow(axis, at, length) if name in tensors else one for name, one in arguments.items()}
        found = kernel.function(**{name: _wide(one) for name, one in piece.items()})
        assert isinstance(found, Tensor)
        if result is None:
            result = torch.empty(*found.shape[:axis], count, *found.shape[axis + 1 :], dtype=torch.float16)
        result.narrow(axis, at, length).copy_(found)
    assert result is not None
    return result


def _axis(type: str, arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """The first axis along which every array is as long as every other and pieces are independent, and the size of the
    largest array."""
    if not tensors or any(one.dtype != torch.float16 for one in tensors.values()):
        return None
    arrays = list(tensors.values())
    rank = arrays[0].dim()
    if any(one.dim() != rank for one in arrays):
        return None
    if type in _ELEMENTWISE:
        last, barred, size = rank, None, max(one.numel() for one in arrays)
    elif type == "softmax":
        last, barred, size = rank, arguments.get("axis", -1) % rank, arrays[0].numel()
    elif type == "matmul" and len(arrays) == 2 and rank > 2:
        last, barred = rank - 2, None
        rows = arrays[0].shape[-1 if arguments.get("transpose_x") else -2]
        columns = arrays[1].shape[-2 if arguments.get("transpose_y") else -1]
        size = max(*(one.numel() for one in arrays), arrays[0].shape[:-2].numel() * rows * columns)
    else:
        return None
    if size < PIECE:
        return None
    for axis in range(last):
        lengths = {one.shape[axis] for one in arrays}
        if axis != barred and len(lengths) == 1 and lengths.pop() > 1:
            return axis, size
    return None


def _wide(one: Any) -> Any:
    if isinstance(one, Tensor):
        return one.float() if one.dtype == torch.float16 else one
    if isinstance(one, tuple):
        return tuple(_wide(part) for part in one)
    return one
