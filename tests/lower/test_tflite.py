"""The TFLite backend on the shipped student: parity, names, bytes, damage, how XNNPACK cuts it."""

from collections import Counter

import numpy as np
import pytest

from edgegen.errors import EdgegenError
from edgegen.lower.expand import NotExpandable
from edgegen.lower.tflite import BACKEND, _delegation, _interpreter

COMPONENTS = ("text_encoder", "denoiser", "decoder")


@pytest.fixture(scope="session")
def tflite_artifacts(lowering, tmp_path_factory):
    folders = {precision: tmp_path_factory.mktemp(f"tflite_{precision}") for precision in BACKEND.precisions}
    return {
        (name, precision): lowering.lower(BACKEND, folder, name, precision)
        for precision, folder in folders.items()
        for name in COMPONENTS
    }


def weight_types(path):
    """dtype -> bytes of the constants in the file, read without delegates."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        model_path=str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    )
    ops = interpreter._get_ops_details()
    made = {int(i) for op in ops for i in op["outputs"]} | {d["index"] for d in interpreter.get_input_details()}
    found = Counter()
    for tensor in interpreter.get_tensor_details():
        if tensor["index"] not in made:
            found[np.dtype(tensor["dtype"]).name] += int(np.prod(tensor["shape"])) * np.dtype(tensor["dtype"]).itemsize
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "floor"), [("fp32", 90.0), ("fp16", 60.0)])
@pytest.mark.parametrize("name", COMPONENTS)
def test_artifact_matches_torch(lowering, tflite_artifacts, name, precision, floor):
    lowering.check_parity(BACKEND, tflite_artifacts[name, precision].path, name, floor)


@pytest.mark.parametrize("precision", BACKEND.precisions)
@pytest.mark.parametrize("name", COMPONENTS)
def test_signature_names_and_types_are_the_specs(lowering, tflite_artifacts, name, precision):
    from ai_edge_litert.interpreter import Interpreter

    part = lowering.parts[name]
    runner = Interpreter(model_path=str(tflite_artifacts[name, precision].path)).get_signature_runner("serving_default")
    for found, specs in ((runner.get_input_details(), part.inputs), (runner.get_output_details(), part.outputs)):
        described = {key: (tuple(value["shape"]), np.dtype(value["dtype"]).name) for key, value in found.items()}
        assert described == {spec.name: (spec.shape, spec.dtype) for spec in specs}


def test_fp16_made_of_the_fp32_file_is_the_same_file(tflite_artifacts, lowering, tmp_path):
    full, half = tflite_artifacts["decoder", "fp32"], tflite_artifacts["decoder", "fp16"]
    made = BACKEND.halve(full.path, lowering.request(lowering.parts["decoder"], "fp16", tmp_path))
    assert made == half.result
    assert (tmp_path / made.file).read_bytes() == half.path.read_bytes()


def test_fp16_is_in_the_weights_and_said_to_be_only_there(tflite_artifacts):
    for name in COMPONENTS:
        full, half = tflite_artifacts[name, "fp32"], tflite_artifacts[name, "fp16"]
        assert "float16" not in weight_types(full.path)
        types = weight_types(half.path)
        assert types["float16"] > 4 * types["float32"], name
        assert half.path.stat().st_size < 0.56 * full.path.stat().st_size
        assert half.result.details["float16"].startswith("weights only")
        assert any("not of float16 arithmetic" in note for note in half.result.notes)
    assert tflite_artifacts["decoder", "fp16"].result.details["cast_to_float16"] == "19 CONV_2D"


def test_every_component_is_decomposed_call_by_call(tflite_artifacts):
    for artifact in tflite_artifacts.values():
        assert not any("decomposed as a whole" in note for note in artifact.result.notes)


def test_what_cannot_be_is_decomposed_as_a_whole_and_that_is_said(lowering, tflite_artifacts, tmp_path, monkeypatch):
    def refuse(program, table):
        raise NotExpandable("for a test")

    monkeypatch.setattr("edgegen.lower.expand.expand", refuse)
    slow = lowering.lower(BACKEND, tmp_path, "decoder", "fp32")
    fast = tflite_artifacts["decoder", "fp32"]
    assert slow.result.notes == ("decomposed as a whole, which takes longer: for a test",)
    assert slow.result.delegation == fast.result.delegation


def test_a_converter_without_the_function_that_is_exchanged_is_an_error(lowering, tmp_path, monkeypatch):
    monkeypatch.delattr("litert_torch.fx_infra.safe_run_decompositions")
    with pytest.raises(EdgegenError, match="safe_run_decompositions"):
        lowering.lower(BACKEND, tmp_path, "decoder", "fp32")


def test_same_program_same_bytes_and_program_untouched(lowering, tflite_artifacts, tmp_path):
    for precision in BACKEND.precisions:
        first = tflite_artifacts["text_encoder", precision]
        lowering.check_same_bytes(BACKEND, first, "text_encoder", precision, tmp_path)


def test_no_path_of_the_building_machine_is_in_the_file(lowering, tflite_artifacts):
    for artifact in tflite_artifacts.values():
        lowering.check_no_paths(artifact.path)


def test_tensors_are_named_by_module(tflite_artifacts):
    content = tflite_artifacts["denoiser", "fp32"].path.read_bytes()
    assert b"TimeEmbedding_time_embedding" in content and b"_conv_in" in content


def test_delegation_adds_up(tflite_artifacts):
    for artifact in tflite_artifacts.values():
        delegation = artifact.result.delegation
        assert delegation.known and delegation.pieces >= 1
        assert delegation.delegated_ops + sum(delegation.undelegated.values()) == delegation.total_ops
        assert delegation.delegated_ops > 0.85 * delegation.total_ops


def test_delegation_agrees_with_the_tensors_that_cross_it(tflite_artifacts):
    """The decoder is cut by its two resizes, so three pieces; every convolution is inside one."""
    delegation = tflite_artifacts["decoder", "fp32"].result.delegation
    assert delegation.pieces == 3 and delegation.undelegated == {"RESIZE_NEAREST_NEIGHBOR": 2}
    assert delegation == _delegation(_interpreter(tflite_artifacts["decoder", "fp32"].path))


def test_intermediate_values_end_in_the_output(lowering, tflite_artifacts):
    path = tflite_artifacts["decoder", "fp32"].path
    values = BACKEND.intermediate_values(path, lowering.inputs["decoder"])
    assert len(values) == tflite_artifacts["decoder", "fp32"].result.delegation.total_ops
    expected = lowering.expected["decoder"]
    assert any(v.shape == expected.shape and lowering.sqnr(expected, v) > 90 for v in values.values())


def test_a_wrong_call_names_the_input(lowering, tflite_artifacts):
    lowering.check_wrong_calls(BACKEND, tflite_artifacts["denoiser", "fp32"].path)


def test_a_damaged_or_missing_file_is_an_error(lowering, tflite_artifacts, tmp_path):
    lowering.check_damage(BACKEND, tflite_artifacts["decoder", "fp32"].path, "decoder", tmp_path)


def test_a_signature_that_is_not_the_specs_is_refused(lowering, tflite_artifacts):
    path = tflite_artifacts["decoder", "fp32"].path
    lowering.check_foreign_specs(BACKEND, path)
    renamed = (lowering.parts["decoder"].inputs[0].model_copy(update={"name": "z"}),)
    with pytest.raises(EdgegenError, match="no `z` among its inputs"):
        lowering.load(BACKEND, path, "decoder", inputs=renamed)


def test_lowering_against_wrong_specs_names_the_component(lowering, tmp_path):
    lowering.check_names_component(BACKEND, tmp_path)
