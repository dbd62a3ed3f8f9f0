import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from edgegen.verify.reference import reference

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path, so their neighbours have to be findable


@pytest.fixture(scope="session")
def shapes_reference(shapes):
    """Two prompts at two steps, the first at one step too: small, because many tests run all of it."""
    torch.set_num_threads(1)
    return reference(shapes, prompts=shapes.config.example_prompts[:2], step_counts=(2, 1))


def lower_onnx(component, module, out_dir, precision="fp32"):
    from edgegen.graph.capture import capture
    from edgegen.lower.backend import LowerRequest, get_backend
    from edgegen.rewrite.to_half import ToHalf

    backend = get_backend("onnx")
    out_dir.mkdir(parents=True, exist_ok=True)
    program = capture(dataclasses.replace(component, module=module))
    if precision == "fp16" and backend.half == "graph":
        program = ToHalf()(program).program
    request = LowerRequest(component.name, component.inputs, component.outputs, precision, out_dir)
    return out_dir / backend.lower(program, request).file


@pytest.fixture(scope="session")
def onnx_files(shapes, tmp_path_factory):
    """Every component of the shipped student as a real .onnx file, in fp32."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    root = tmp_path_factory.mktemp("onnx")
    return {name: lower_onnx(part, part.module, root / name) for name, part in shapes.components.items()}


@pytest.fixture(scope="session")
def lower_to_onnx():
    return lower_onnx
