"""The ONNX backend on the shipped student: parity, names, bytes, damage, a look inside."""

import json

import pytest
import torch

from edgegen.errors import EdgegenError
from edgegen.graph.capture import capture
from edgegen.lower import onnx as module

BACKEND = module.BACKEND
COMPONENTS = ("text_encoder", "denoiser", "decoder")


@pytest.fixture(scope="session")
def onnx_artifacts(lowering, tmp_path_factory):
    folders = {precision: tmp_path_factory.mktemp(f"onnx_{precision}") for precision in BACKEND.precisions}
    return {
        (name, precision): lowering.lower(BACKEND, folder, name, precision)
        for precision, folder in folders.items()
        for name in COMPONENTS
    }


@pytest.mark.parametrize(("precision", "floor"), [("fp32", 100.0), ("fp16", 40.0)])
@pytest.mark.parametrize("name", COMPONENTS)
def test_artifact_matches_torch(lowering, onnx_artifacts, name, precision, floor):
    lowering.check_parity(BACKEND, onnx_artifacts[name, precision].path, name, floor)


@pytest.mark.parametrize("name", COMPONENTS)
def test_names_shapes_and_types_in_the_file_are_the_specs(lowering, onnx_artifacts, name):
    import onnx

    part, graph = lowering.parts[name], onnx.load(str(onnx_artifacts[name, "fp16"].path)).graph
    types = {"float32": onnx.TensorProto.FLOAT, "int32": onnx.TensorProto.INT32}
    for found, specs in ((graph.input, part.inputs), (graph.output, part.outputs)):
        described = [
            (v.name, tuple(d.dim_value for d in v.type.tensor_type.shape.dim), v.type.tensor_type.elem_type)
            for v in found
        ]
        assert described == [(s.name, s.shape, types[s.dtype]) for s in specs]


def test_fp16_halves_the_file_and_says_what_this_host_rounds(onnx_artifacts):
    for name in COMPONENTS:
        full, half = onnx_artifacts[name, "fp32"], onnx_artifacts[name, "fp16"]
        assert half.path.stat().st_size < 0.56 * full.path.stat().st_size
        assert any("not of float16 arithmetic" in note for note in half.result.notes)
        assert "rounded_to_float16_here" not in full.result.details
    # A network of convolutions runs in float32 here: parity of it must never be read as that of float16 arithmetic.
    kept, _, declared = onnx_artifacts["decoder", "fp16"].result.details["rounded_to_float16_here"].partition(" of ")
    assert int(kept) < 0.1 * int(declared.split()[0])


def test_same_program_same_bytes_and_program_untouched(lowering, onnx_artifacts, tmp_path):
    lowering.check_same_bytes(BACKEND, onnx_artifacts["text_encoder", "fp32"], "text_encoder", "fp32", tmp_path)


def test_no_path_of_the_building_machine_is_in_the_file(lowering, onnx_artifacts):
    for artifact in onnx_artifacts.values():
        lowering.check_no_paths(artifact.path)


def test_module_paths_stay(onnx_artifacts):
    import onnx

    nodes = onnx.load(str(onnx_artifacts["denoiser", "fp32"].path)).graph.node
    spaces = [entry.value for node in nodes for entry in node.metadata_props if entry.key == "namespace"]
    assert any("down_blocks.1.attentions.0" in space for space in spaces)


def test_delegation_counts_every_operator(onnx_artifacts):
    import onnx

    artifact = onnx_artifacts["denoiser", "fp32"]
    total = len(onnx.load(str(artifact.path)).graph.node)
    delegation = artifact.result.delegation
    assert delegation.full and delegation.delegated_ops == delegation.total_ops == total


@pytest.mark.parametrize("name", COMPONENTS)
def test_intermediate_values_are_those_of_the_captured_nodes(lowering, onnx_artifacts, name):
    artifact = onnx_artifacts[name, "fp32"]
    seen = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n):
            seen[n.name] = result = super().run_node(n)
            return result

    inputs = [torch.from_numpy(lowering.inputs[name][spec.name]) for spec in lowering.parts[name].inputs]
    Recorder(artifact.program.module(check_guards=False)).run(*inputs)
    values = BACKEND.intermediate_values(artifact.path, lowering.inputs[name])
    calls = [node.name for node in artifact.program.graph.nodes if node.op == "call_function"]
    assert set(values) <= set(calls) and len(values) >= 0.85 * len(calls)
    for node, value in values.items():
        assert value.shape == tuple(seen[node].shape)
        assert lowering.sqnr(seen[node].numpy(), value) > 90, node


def test_weights_beside_the_model_above_the_limit(lowering, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EXTERNAL_DATA_ABOVE", 1000)
    artifact = lowering.lower(BACKEND, tmp_path, "decoder", "fp32")
    assert artifact.result.details["external_data"] == "decoder.onnx.data"
    assert (tmp_path / "decoder.onnx.data").stat().st_size > 10 * artifact.path.stat().st_size
    lowering.check_parity(BACKEND, artifact.path, "decoder", 100.0)


def test_a_wrong_call_names_the_input(lowering, onnx_artifacts):
    lowering.check_wrong_calls(BACKEND, onnx_artifacts["denoiser", "fp32"].path)


def test_a_damaged_or_missing_file_is_an_error(lowering, onnx_artifacts, tmp_path):
    lowering.check_damage(BACKEND, onnx_artifacts["decoder", "fp32"].path, "decoder", tmp_path)


def test_a_signature_that_is_not_the_specs_is_refused(lowering, onnx_artifacts):
    path = onnx_artifacts["decoder", "fp32"].path
    lowering.check_foreign_specs(BACKEND, path)
    renamed = (lowering.parts["decoder"].inputs[0].model_copy(update={"name": "z"}),)
    with pytest.raises(EdgegenError, match="no `z` among its inputs"):
        lowering.load(BACKEND, path, "decoder", inputs=renamed)


def test_lowering_against_wrong_specs_names_the_component(lowering, tmp_path):
    lowering.check_names_component(BACKEND, tmp_path)


@pytest.mark.parametrize("opset", ["9999", "latest"])
def test_an_operator_set_that_cannot_be_had_is_not_claimed(lowering, tmp_path, opset):
    part = lowering.parts["decoder"]
    with pytest.raises(EdgegenError, match=rf"`decoder`.*opset `?{opset}"):
        BACKEND.lower(capture(part), lowering.request(part, "fp32", tmp_path, options={"opset": opset}))


def test_stated_operator_set_is_the_one_in_the_file(onnx_artifacts):
    import onnx

    for artifact in onnx_artifacts.values():
        (entry,) = onnx.load(str(artifact.path)).opset_import
        assert artifact.result.details["opset"] == str(entry.version) == str(module.OPSET)


def test_metadata_is_json_of_names(onnx_artifacts):
    import onnx

    entries = onnx.load(str(onnx_artifacts["decoder", "fp32"].path)).metadata_props
    assert [entry.key for entry in entries] == [module.FX_VALUES]
    assert json.loads(entries[0].value)["conv2d"]
