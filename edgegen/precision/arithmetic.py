"""Int8 arithmetic in quantized_decomposed ops: written into a graph by one caller, computed at once by another.

`Call` is the difference: `Editor.call` makes nodes, `at_once` gives values. What the planner tries and what the
reference computes is so the same to the bit.
"""

from __future__ import annotations

import operator
from typing import Any, Protocol

import numpy as np
import torch

# Registers the ops; nothing of it is called.
import torch.ao.quantization.fx._decomposed
from torch import Tensor

from edgegen.precision.encode import ACTIVATION_MAX, ACTIVATION_MIN, activation_qparams
from edgegen.precision.plan import Range

qd = torch.ops.quantized_decomposed
_CODES = (ACTIVATION_MIN, ACTIVATION_MAX, torch.int8)
_EPSILON = 2.0**-23
"""The least scale of a tensor whose range is taken when it is computed, as ExecuTorch has it."""


class Call(Protocol):
    """Does, or writes down, one call."""

    def __call__(self, target: Any, /, *args: Any, **kwargs: Any) -> Any: ...


def at_once(target: Any, /, *args: Any, **kwargs: Any) -> Any:
    """The value of a call."""
    return target(*args, **kwargs)


def static(call: Call, value: Any, scale: float, zero_point: int, dtype: torch.dtype) -> Any:
    """`value` through int8 codes of one scale, and back to `dtype`."""
    codes = call(qd.quantize_per_tensor.default, value, scale, zero_point, *_CODES)
    return call(qd.dequantize_per_tensor.default, codes, scale, zero_point, *_CODES, **out(dtype))


def by_row(call: Call, value: Any, dtype: torch.dtype) -> Any:
    """`value` through int8 codes of the range that each row along its last axis has, and back to `dtype`."""
    chosen = call(qd.choose_qparams_per_token_asymmetric.default, value, torch.int8)
    scale, zero_point = (call(operator.getitem, chosen, place) for place in (0, 1))
    codes = call(qd.quantize_per_token.default, value, scale, zero_point, *_CODES)
    return call(qd.dequantize_per_token.default, codes, scale, zero_point, *_CODES, dtype)


def by_tensor(call: Call, value: Any, dtype: torch.dtype) -> Any:
    """`value` through int8 codes of the range that it has, and back to `dtype`."""
    chosen = call(qd.choose_qparams.tensor, value, *_CODES[:2], _EPSILON, torch.int8)
    scale, zero_point = (call(operator.getitem, chosen, place) for place in (0, 1))
    codes = call(qd.quantize_per_tensor.tensor, value, scale, zero_point, *_CODES)
    return call(qd.dequantize_per_tensor.tensor, codes, scale, zero_point, *_CODES, **out(dtype))


def fake_quantized(value: Tensor, range: Range) -> Tensor:
    """What `static` gives for the codes of `range`, without making them.

    Codes are counted from the zero point: added before rounding it would turn halves the other way where it is odd.
    Torch's own kernel for this takes ten times as long, but knows the gradient.
    """
    scale, zero = activation_qparams(range)
    low, high = ACTIVATION_MIN - zero, ACTIVATION_MAX - zero
    if value.requires_grad or value.dtype is not torch.float32:
        return torch.fake_quantize_per_tensor_affine(value, scale, 0, low, high)
    return (value * (1.0 / np.float32(scale)).item()).round_().clamp_(low, high).mul_(scale)


def int32_bias(bias: Tensor, scales: Tensor, range: Range) -> Tensor:
    """`bias` [N] as int8 arithmetic adds it: a whole number of the steps of its int32 sums, for each output channel.

    `scales` [N] are the weight's, `range` is the input's. Less than a thousandth of an output's step, and still it is
    what makes runtimes round single codes otherwise than a float bias would, which a deep graph then carries on.
    """
    step = scales.double() * activation_qparams(range).scale
    return ((bias.double() / step).round() * step).to(bias.dtype)


def out(dtype: torch.dtype) -> dict[str, Any]:
    """float32 is what the ops give unasked, and not every converter reads the argument."""
    return {} if dtype is torch.float32 else {"out_dtype": dtype}
