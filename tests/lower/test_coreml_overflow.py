"""The check of constants before float16: the answers of coremltools' own, and what they cost."""

import numpy as np
import pytest

pytest.importorskip("coremltools")

from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil.passes.defs.quantization import FP16ComputePrecision

from edgegen.lower.coreml_overflow import frugal_overflow_check, overflows


def program(value):
    @mb.program(input_specs=[mb.TensorSpec(shape=(4,))])
    def made(x):
        return mb.add(x=x, y=np.full(4, value, dtype=np.float32))

    return next(op for op in made.functions["main"].operations if op.op_type == "add")


@pytest.mark.parametrize(
    "value", [0.0, 1.0, 65504.0, 65505.0, -7e4, 9e37, 1e38, 3e38, np.inf, -np.inf, np.nan], ids=str
)
def test_the_answers_are_theirs(value):
    op = program(value)
    theirs = FP16ComputePrecision.fp16_overflow(op)
    with frugal_overflow_check():
        assert FP16ComputePrecision.fp16_overflow(op) == theirs
        assert overflows(np.float32(value)) == theirs
    assert FP16ComputePrecision.fp16_overflow.__module__.startswith("coremltools")


def test_the_last_of_many_is_seen():
    value = np.zeros(5_000_001, dtype=np.float32)
    assert not overflows(value)
    value[-1] = 1e5
    assert overflows(value.reshape(-1, 3))
