"""Matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from mlprogram.errors import ProgramError
from mlprogram.kernel import Accumulate, arithmetic
from mlprogram.sums import product


@arithmetic("linear", alike=("x", "weight", "bias"))
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, accumulate: Accumulate = "fp32") -> Tensor:
    if accumulate == "fp32" and x.is_floating_point():
        return torch.nn.functional.linear(x, weight, bias)
    result = product(x, weight.mT, accumulate)
    return result if bias is None else result + bias


@arithmetic("matmul", alike=("x", "y"))
def matmul(
    x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False, accumulate: Accumulate = "fp32"
) -> Tensor:
    if transpose_x and x.dim() > 1:
        x = x.mT
    if transpose_y and y.dim() > 1:
        y = y.mT
    return product(x, y, accumulate)


@arithmetic("einsum", alike=("values",))
def einsum(values: tuple[Tensor, ...], equation: str, accumulate: Accumulate = "fp32") -> Tensor:
    """`nchw,nwhu->nchu` and `chw,whr->chr`, under any letters: batched over all but the axes -3 and -1."""
    letters: dict[str, int] = {}
    spelled = [letters.setdefault(one, len(letters)) for one in equation if one.isalpha()]
    form = [one for one in equation if not one.isalpha() and one != " "]
    known = ([0, 1, 2, 3, 0, 3, 2, 4, 0, 1, 2, 4], [0, 1, 2, 2, 1, 3, 0, 1, 3])
    if len(values) != 2 or form != [",", "-", ">"] or spelled not in known:
        raise ProgramError(f"einsum `{equation}` is not one of the two forms that are defined")
    x, y = values
    if x.dim() != y.dim() or x.dim() != (4 if spelled == known[0] else 3):
        raise ProgramError(f"einsum `{equation}` of ranks {x.dim()} and {y.dim()}")
    # [.., c, h, w] x [.., w, h, u] -> [.., h, c, w] x [.., h, w, u]
    return product(x.transpose(-3, -2), y.transpose(-3, -2), accumulate).transpose(-3, -2)
