"""The ONNX exporter's optimiser takes `x + 1e-8` for `x`: a guard against division by zero is gone, and 0 / 0 is NaN.

Its rules for terms that change nothing match constants within 1e-8; here they match the constants they name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exact_constants() -> Iterator[None]:
    """Within this, onnxscript's rules about adding 0 and multiplying by 1 are about 0 and 1."""
    from onnxscript.rewriter.rules.common import _no_op

    found = []
    for rule in _no_op.rules:
        for node in rule._target_pattern:
            found += [value for value in node.inputs if hasattr(value, "_abs_tol")]
    before = [(value._rel_tol, value._abs_tol) for value in found]
    try:
        for value in found:
            value._rel_tol = value._abs_tol = 0.0
        yield
    finally:
        for value, (relative, absolute) in zip(found, before, strict=True):
            value._rel_tol, value._abs_tol = relative, absolute
