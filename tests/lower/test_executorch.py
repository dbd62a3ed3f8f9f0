"""The ExecuTorch backend on the shipped student: parity, order, bytes, damage, how XNNPACK cuts it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from edgegen.graph.capture import capture
from edgegen.lower.executorch import BACKEND
from edgegen.rewrite.to_half import ToHalf

COMPONENTS = ("text_encoder", "denoiser", "decoder")
QUICK = [(name, precision) for name in ("text_encoder", "decoder") for precision in BACKEND.precisions]


@pytest.fixture(scope="session")
def executorch_artifacts(lowering, tmp_path_factory):
    folders = {precision: tmp_path_factory.mktemp(f"executorch_{precision}") for precision in BACKEND.precisions}
    return {(name, p): lowering.lower(BACKEND, folders[p], name, p) for name, p in QUICK}


@pytest.fixture(scope="session")
def executorch_denoiser(lowering, tmp_path_factory):
    return lowering.lower(BACKEND, tmp_path_factory.mktemp("executorch_denoiser"), "denoiser", "fp32")


FLOORS = {"fp32": 90.0, "fp16": 40.0}


@pytest.mark.parametrize(("name", "precision"), QUICK)
def test_artifact_matches_torch(lowering, executorch_artifacts, name, precision):
    lowering.check_parity(BACKEND, executorch_artifacts[name, precision].path, name, FLOORS[precision])


@pytest.mark.slow
def test_denoiser_matches_torch(lowering, executorch_denoiser):
    lowering.check_parity(BACKEND, executorch_denoiser.path, "denoiser", FLOORS["fp32"])


def test_a_small_denoiser_in_fp16_matches_torch(lowering, tiny, tmp_path):
    """Every kind of block that the shipped one has, in a tenth of its time."""
    part = tiny.components["denoiser"]
    request = lowering.request(part, "fp16", tmp_path)
    result = BACKEND.lower(ToHalf()(capture(part)).program, request)
    given = part.example_inputs()
    with torch.no_grad():
        expected = part.module(*given).numpy()
    executable = BACKEND.load(tmp_path / result.file, part.inputs, part.outputs)
    named = {spec.name: value.numpy() for spec, value in zip(part.inputs, given, strict=True)}
    found = executable(named)["prediction"]
    executable.close()
    assert FLOORS["fp16"] <= lowering.sqnr(expected, found) < 90


ON_ONE_CORE = """
import json, os, sys
from pathlib import Path
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.executorch import BACKEND
inputs, outputs = ([TensorSpec.model_validate(one) for one in side] for side in json.loads(sys.argv[2]))
BACKEND.load(Path(sys.argv[1]), tuple(inputs), tuple(outputs)).close()
from executorch.extension.pybindings import portable_lib
print(portable_lib._threadpool_get_thread_count())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system keeps no process to some of its cores")
def test_no_more_threads_than_cores(lowering, executorch_artifacts):
    artifact = executorch_artifacts["text_encoder", "fp32"]
    part = lowering.parts["text_encoder"]
    specs = json.dumps([[one.model_dump() for one in side] for side in (part.inputs, part.outputs)])
    call = [sys.executable, "-c", ON_ONE_CORE, str(artifact.path), specs]
    assert subprocess.run(call, check=True, capture_output=True, text=True).stdout.split()[-1] == "1"


@pytest.mark.slow
def test_inputs_go_in_by_the_order_of_the_specs(lowering, executorch_denoiser):
    artifact = executorch_denoiser
    assert artifact.result.details["inputs"] == "latent, timestep, context"
    shuffled = dict(reversed(lowering.inputs["denoiser"].items()))
    executable = lowering.load(BACKEND, artifact.path, "denoiser")
    assert lowering.sqnr(lowering.expected["denoiser"], executable(shuffled)["prediction"]) > 90


def test_fp16_says_that_convolutions_stay_float32(executorch_artifacts):
    """The serializer stores convolution weights as float32: the decoder, all convolutions, claims no half a file."""
    size = {key: artifact.path.stat().st_size for key, artifact in executorch_artifacts.items()}
    assert size["text_encoder", "fp16"] < 0.6 * size["text_encoder", "fp32"]
    assert size["decoder", "fp16"] > 0.95 * size["decoder", "fp32"]
    half = executorch_artifacts["decoder", "fp16"].result
    assert "convolution weights and biases are float32" in half.details["float16"]
    assert any("float32" in note for note in half.notes)


def test_fp16_is_rounded_here(lowering, executorch_artifacts):
    """Values between operators are float16: the result differs from float32's by far more than float32's own error."""
    for name in ("text_encoder", "decoder"):
        values = lowering.run(BACKEND, executorch_artifacts[name, "fp16"].path, name)
        (value,) = values.values()
        assert lowering.sqnr(lowering.expected[name], value) < 90


def test_same_program_same_bytes_and_program_untouched(lowering, executorch_artifacts, tmp_path):
    first = executorch_artifacts["decoder", "fp32"]
    lowering.check_same_bytes(BACKEND, first, "decoder", "fp32", tmp_path)


@pytest.mark.slow
def test_text_encoder_same_bytes(lowering, executorch_artifacts, tmp_path):
    first = executorch_artifacts["text_encoder", "fp32"]
    lowering.check_same_bytes(BACKEND, first, "text_encoder", "fp32", tmp_path)


def test_no_path_of_the_building_machine_is_in_the_file(lowering, executorch_artifacts):
    for artifact in executorch_artifacts.values():
        lowering.check_no_paths(artifact.path)


def test_delegation_is_what_xnnpack_took(executorch_artifacts):
    decoder = executorch_artifacts["decoder", "fp32"].result.delegation
    assert decoder.pieces == 3 and not decoder.full
    assert decoder.undelegated["aten.upsample_nearest2d.vec"] == 2
    assert not any("convolution" in op for op in decoder.undelegated)
    encoder = executorch_artifacts["text_encoder", "fp32"].result.delegation
    assert encoder.undelegated["aten.native_layer_norm.default"] == 5
    for delegation in (decoder, encoder):
        assert delegation.delegated_ops + sum(delegation.undelegated.values()) == delegation.total_ops


def test_pieces_are_the_delegates_in_the_file(executorch_artifacts):
    from executorch.exir._serialize._program import deserialize_pte_binary

    for artifact in executorch_artifacts.values():
        (plan,) = deserialize_pte_binary(artifact.path.read_bytes()).program.execution_plan
        assert len(plan.delegates) == artifact.result.delegation.pieces


@pytest.mark.slow
def test_a_wrong_call_names_the_input(lowering, executorch_denoiser):
    lowering.check_wrong_calls(BACKEND, executorch_denoiser.path)


def test_a_damaged_or_missing_file_is_an_error(lowering, executorch_artifacts, tmp_path):
    lowering.check_damage(BACKEND, executorch_artifacts["decoder", "fp32"].path, "decoder", tmp_path)


def test_a_signature_that_is_not_the_specs_is_refused(lowering, executorch_artifacts):
    lowering.check_foreign_specs(BACKEND, executorch_artifacts["decoder", "fp32"].path)


def test_lowering_against_wrong_specs_names_the_component(lowering, tmp_path):
    lowering.check_names_component(BACKEND, tmp_path)
