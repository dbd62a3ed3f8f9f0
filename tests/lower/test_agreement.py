"""One network through every backend: the Core ML evaluator gives what runtimes give that execute here."""

import numpy as np
import pytest

from edgegen.lower.backend import get_backend
from mlprogram import Program

RUNTIMES = ("coreai", "tflite", "executorch", "onnx")


@pytest.fixture(scope="module")
def evaluated(lowering, tmp_path_factory):
    """The shipped decoder's package, computed by the evaluator."""
    pytest.importorskip("coremltools")
    made = lowering.lower(get_backend("coreml"), tmp_path_factory.mktemp("agreement"), "decoder", "fp32")
    return Program.open(made.path)(lowering.inputs["decoder"])["image"]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_evaluator_agrees_with_a_runtime(lowering, evaluated, tmp_path, runtime):
    """fp32 against fp32: each adds in an order of its own, and nothing else differs."""
    backend = get_backend(runtime)
    for module in (*backend.lower_modules, *backend.run_modules):
        pytest.importorskip(module)
    made = lowering.lower(backend, tmp_path, "decoder", "fp32")
    found = lowering.run(backend, made.path, "decoder")["image"]
    assert found.dtype == evaluated.dtype == np.float32
    assert lowering.sqnr(found, evaluated) > 100
    # The comparison can fail: it sees one pixel that is off by a thousandth of the range.
    wrong = evaluated.copy()
    wrong[0, 0, 0, 0] += 1e-3 * np.ptp(evaluated)
    assert lowering.sqnr(found, wrong) < 100
