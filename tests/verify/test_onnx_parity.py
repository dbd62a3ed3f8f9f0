"""Real artifacts: lowered by the real exporter, executed by onnxruntime, held against torch."""

import copy

import pytest
import torch
from torch import nn

from edgegen.errors import GateError
from edgegen.lower.backend import get_backend
from edgegen.profile.host import profile
from edgegen.verify.gates import require
from edgegen.verify.outcome import Outcome, Unavailable
from edgegen.verify.parity import compiled_run, load_executables, verify

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def executables(onnx_files, shapes_reference):
    loaded = load_executables(get_backend("onnx"), onnx_files, shapes_reference.signatures)
    yield loaded
    for one in loaded.values():
        one.close()


def test_onnx_passes_every_gate_in_fp32(executables, shapes_reference):
    report = verify(shapes_reference, executables, "fp32", backend="onnx")
    assert report.status == "passed", report.failed
    assert report.worst_sqnr_db >= 90 and report.worst_psnr_db >= 80
    worst = report.worst_sensitivity
    assert abs(worst.ratio - 1) < 1e-3 and worst.cosine > 0.9999


def test_a_real_artifact_made_deaf_is_caught(executables, shapes, shapes_reference, tmp_path, lower_to_onnx):
    """Keys and values of every cross-attention are zero: the real converter and runtime draw one picture for all."""
    denoiser = shapes.components["denoiser"]
    module = copy.deepcopy(denoiser.module)
    width = shapes.components["text_encoder"].outputs[0].shape[-1]
    silenced = [
        part
        for part in module.modules()
        if isinstance(part, nn.Linear) and part.in_features == width and part.bias is None
    ]
    assert silenced
    with torch.no_grad():
        for part in silenced:
            part.weight.zero_()
    path = lower_to_onnx(denoiser, module, tmp_path)
    deaf = load_executables(get_backend("onnx"), {"denoiser": path}, shapes_reference.signatures)
    report = verify(shapes_reference, {**executables, **deaf}, "fp32", backend="onnx")
    assert all(step.ratio == 0.0 for step in report.sensitivity)
    assert "sensitivity" in {gate.gate for gate in report.failed}
    with pytest.raises(GateError, match="sensitivity"):
        require([report])


def test_a_truncated_file_is_a_load_fail(onnx_files, executables, shapes_reference, tmp_path):
    broken = tmp_path / "decoder.onnx"
    broken.write_bytes(onnx_files["decoder"].read_bytes()[:5000])
    found = load_executables(get_backend("onnx"), {"decoder": broken}, shapes_reference.signatures)
    assert isinstance(found["decoder"], Unavailable) and found["decoder"].outcome is Outcome.LOAD_FAIL
    report = verify(shapes_reference, {**executables, **found}, "fp32", backend="onnx")
    assert report.status == "failed" and report.components[-1].outcome is Outcome.LOAD_FAIL


def test_the_wrong_component_is_caught(onnx_files, executables, shapes_reference):
    found = load_executables(get_backend("onnx"), {"decoder": onnx_files["denoiser"]}, shapes_reference.signatures)
    report = verify(shapes_reference, {**executables, **found}, "fp32", backend="onnx")
    assert report.status == "failed"
    assert report.components[-1].outcome in (Outcome.LOAD_FAIL, Outcome.RUN_FAIL, Outcome.MISMATCH)


def test_onnx_is_profiled(onnx_files, shapes_reference):
    first = shapes_reference.trajectories[0]
    report = profile(
        get_backend("onnx"),
        onnx_files,
        shapes_reference.signatures,
        shapes_reference.one_picture(),
        picture=lambda loaded: compiled_run(shapes_reference, first, loaded),
        picture_steps=len(first.steps),
        runs=3,
        loads=1,
    )
    assert "onnxruntime" in report.runtimes
    times = {part.component: part.run.median_ms for part in report.components}
    assert set(times) == set(onnx_files) and all(value > 0 for value in times.values())
    assert report.picture.median_ms > times["decoder"]
    denoiser = next(part for part in report.components if part.component == "denoiser")
    assert len(denoiser.runs) == len(first.steps)
