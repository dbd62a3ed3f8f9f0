"""What coremltools asks of each constant before it becomes float16, asked without copies of it.

Its own check lists the positions of all values below 1e38, eight bytes for each of up to five axes: a gigabyte for the
table of words of a CLIP text encoder, seven times the table itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

_LARGEST, _INFINITE = 65504.0, 1e38
"""Of float16, and where coremltools takes a float32 for an infinity that may stay one."""
_PIECE = 1 << 20


@contextmanager
def frugal_overflow_check() -> Iterator[None]:
    """Within it, `FP16ComputePrecision.fp16_overflow` of coremltools gives the same answers and copies nothing."""
    from coremltools.converters.mil.mil.passes.defs.quantization import FP16ComputePrecision

    theirs = FP16ComputePrecision.__dict__["fp16_overflow"]
    FP16ComputePrecision.fp16_overflow = staticmethod(_reads_what_overflows)
    try:
        yield
    finally:
        FP16ComputePrecision.fp16_overflow = theirs


def _reads_what_overflows(op: Any) -> bool:
    for given in op.inputs.values():
        for var in given if isinstance(given, list | tuple) else (given,):
            constant = var.op is not None and var.op.op_type == "const"
            if constant and var.is_tensor_or_scalar_of(dtype="fp32") and overflows(var.op.val.val):
                return True
    return False


def overflows(value: Any) -> bool:
    """Whether float16 cannot hold a number of `value` (float32, any shape) that is below 1e38."""
    flat = np.asarray(value).reshape(-1)
    for start in range(0, flat.size, _PIECE):
        sizes = np.abs(flat[start : start + _PIECE])
        if np.any((sizes > _LARGEST) & (sizes < _INFINITE)):
            return True
    return False
