"""Element by element, with broadcasting: arithmetic, comparisons, logic, functions, casts, selection."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mlprogram.errors import ProgramError
from mlprogram.kernel import arithmetic, exact

_XY = ("x", "y")


@arithmetic("add", alike=_XY)
def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@arithmetic("sub", alike=_XY)
def sub(x: Tensor, y: Tensor) -> Tensor:
    return x - y


@arithmetic("mul", alike=_XY)
def mul(x: Tensor, y: Tensor) -> Tensor:
    return x * y


@arithmetic("real_div", alike=_XY)
def real_div(x: Tensor, y: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise ProgramError("division of integers without a rounding rule")
    return x / y


@arithmetic("floor_div", alike=_XY)
def floor_div(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode="floor")


@arithmetic("mod", alike=_XY)
def mod(x: Tensor, y: Tensor) -> Tensor:
    return torch.remainder(x, y)


@arithmetic("pow", alike=_XY)
def power(x: Tensor, y: Tensor) -> Tensor:
    return torch.pow(x, y)


@arithmetic("maximum", alike=_XY)
def maximum(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x, y)


@arithmetic("minimum", alike=_XY)
def minimum(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(x, y)


@exact("equal", alike=_XY)
def equal(x: Tensor, y: Tensor) -> Tensor:
    return x == y


@exact("not_equal", alike=_XY)
def not_equal(x: Tensor, y: Tensor) -> Tensor:
    return x != y


@exact("greater", alike=_XY)
def greater(x: Tensor, y: Tensor) -> Tensor:
    return x > y


@exact("greater_equal", alike=_XY)
def greater_equal(x: Tensor, y: Tensor) -> Tensor:
    return x >= y


@exact("less", alike=_XY)
def less(x: Tensor, y: Tensor) -> Tensor:
    return x < y


@exact("less_equal", alike=_XY)
def less_equal(x: Tensor, y: Tensor) -> Tensor:
    return x <= y


@exact("logical_and")
def logical_and(x: Tensor, y: Tensor) -> Tensor:
    return torch.logical_and(x, y)


@exact("logical_or")
def logical_or(x: Tensor, y: Tensor) -> Tensor:
    return torch.logical_or(x, y)


@exact("logical_xor")
def logical_xor(x: Tensor, y: Tensor) -> Tensor:
    return torch.logical_xor(x, y)


@exact("logical_not")
def logical_not(x: Tensor) -> Tensor:
    return torch.logical_not(x)


@exact("select", alike=("a", "b"))
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


@arithmetic("abs")
def absolute(x: Tensor) -> Tensor:
    return x.abs()


@arithmetic("acos")
def acos(x: Tensor) -> Tensor:
    return x.acos()


@arithmetic("asin")
def asin(x: Tensor) -> Tensor:
    return x.asin()


@arithmetic("atan")
def atan(x: Tensor) -> Tensor:
    return x.atan()


@arithmetic("atanh")
def atanh(x: Tensor) -> Tensor:
    return x.atanh()


@arithmetic("ceil")
def ceil(x: Tensor) -> Tensor:
    return x.ceil()


@arithmetic("cos")
def cos(x: Tensor) -> Tensor:
    return x.cos()


@arithmetic("cosh")
def cosh(x: Tensor) -> Tensor:
    return x.cosh()


@arithmetic("erf")
def erf(x: Tensor) -> Tensor:
    return x.erf()


@arithmetic("exp")
def exp(x: Tensor) -> Tensor:
    return x.exp()


@arithmetic("exp2")
def exp2(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise ProgramError("exp2 of integers, whose rounding is not documented")
    return x.exp2()


@arithmetic("floor")
def floor(x: Tensor) -> Tensor:
    return x.floor()


@arithmetic("inverse")
def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return 1.0 / (x + epsilon)


@arithmetic("log")
def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


@arithmetic("round")
def rounded(x: Tensor) -> Tensor:
    """Halves go to the even neighbour (`value_inference` is `numpy.round`)."""
    return x.round()


@arithmetic("rsqrt")
def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return 1.0 / torch.sqrt(x + epsilon)


@arithmetic("sign")
def sign(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, x.sign()) if x.is_floating_point() else x.sign()


@arithmetic("sin")
def sin(x: Tensor) -> Tensor:
    return x.sin()


@arithmetic("sinh")
def sinh(x: Tensor) -> Tensor:
    return x.sinh()


@arithmetic("sqrt")
def sqrt(x: Tensor) -> Tensor:
    return x.sqrt()


@arithmetic("square")
def square(x: Tensor) -> Tensor:
    return x * x


@arithmetic("tan")
def tan(x: Tensor) -> Tensor:
    return x.tan()


@arithmetic("tanh")
def tanh(x: Tensor) -> Tensor:
    return x.tanh()


@arithmetic("threshold")
def threshold(x: Tensor, alpha: float) -> Tensor:
    return torch.maximum(x, torch.tensor(alpha, dtype=x.dtype))


@arithmetic("clip")
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


_TARGETS = {
    "int8": (torch.int8, -128, 127),
    "uint8": (torch.uint8, 0, 255),
    "int16": (torch.int16, -(1 << 15), (1 << 15) - 1),
    "uint16": (torch.int32, 0, (1 << 16) - 1),
    "int32": (torch.int32, -(1 << 31), (1 << 31) - 1),
}


@exact("cast")
def cast(x: Tensor, dtype: Literal["int8", "uint8", "int16", "uint16", "int32", "fp16", "fp32", "bool"]) -> Tensor:
    """Fractions are cut towards zero. A number that the integer type does not have is refused: nothing defines it."""
    if dtype == "bool":
        return x != 0
    if dtype == "fp16":
        return x.to(torch.float16)
    if dtype == "fp32":
        return x.to(torch.float32)
    target, low, high = _TARGETS[dtype]
    # In types that hold the limits, so that they can be compared with.
    x = x.double().trunc() if x.is_floating_point() else x.long()
    if x.numel() and not bool(((x >= low) & (x <= high)).all()):
        raise ProgramError(f"cast to {dtype} of a value outside of its range, which is not defined")
    return x.to(target)
