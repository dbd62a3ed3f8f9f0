import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from edgegen.graph.capture import capture
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import get_backend
from edgegen.students.student import Component
from edgegen.verify.blame import CLOSED, _where_finite, blame, first_divergence, node_values
from edgegen.verify.trajectory import Sample


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 8)
        self.register_buffer("offset", torch.full((8,), 0.5))

    def forward(self, x):
        return self.third(torch.sigmoid(self.second(torch.sigmoid(self.first(x)) + self.offset)))


X = np.linspace(-1, 1, 8, dtype=np.float32)[None]


@pytest.fixture
def program():
    spec = TensorSpec(name="x", shape=(1, 8))
    return capture(Component("chain", Chain(), (spec,), (spec,)))


def tampered(program, name):
    """Values of the same graph where the op `name`, and with it all that follows, is wrong."""
    module = Chain()
    with torch.no_grad():
        getattr(module, name).weight.neg_()
    spec = TensorSpec(name="x", shape=(1, 8))
    return node_values(capture(Component("chain", module, (spec,), (spec,))), [X])


def test_node_values_are_those_of_the_module(program):
    values = node_values(program, [X])
    with torch.no_grad():
        expected = Chain()(torch.from_numpy(X)).numpy()
    output = next(iter(program.graph_signature.user_outputs))
    np.testing.assert_allclose(values[output], expected, atol=1e-6)


def test_equal_values_blame_nothing(program):
    assert first_divergence(program, [X], node_values(program, [X]), 60) is None


@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_the_tampered_layer_is_the_one_that_is_named(program, name):
    verdict = first_divergence(program, [X], tampered(program, name), 60)
    assert verdict is not None
    assert verdict.module == name and "linear" in verdict.op
    assert verdict.sqnr_db < 60


def test_renumbered_names_are_not_blamed(program):
    """A converter that shifts names by one: linear_1 is what the graph calls linear, and so on."""
    values = node_values(program, [X])
    shifted = {"linear": values["linear_1"], "linear_1": values["linear"], "linear_2": values["linear_2"]}
    assert first_divergence(program, [X], shifted, 60) is None


def test_a_value_fused_away_behind_an_unlucky_name_is_not_blamed(program):
    values = dict(node_values(program, [X]))
    values["sigmoid"] = np.full_like(values["sigmoid"], 9.0)
    assert first_divergence(program, [X], values, 60) is None


def test_nan_in_the_middle_is_found(program):
    values = {name: value.copy() for name, value in node_values(program, [X]).items()}
    names = list(values)
    for name in names[names.index("linear_1") :]:
        values[name][:] = np.nan
    verdict = first_divergence(program, [X], values, 60)
    assert verdict is not None and verdict.node == "linear_1" and "not finite" in str(verdict)


def test_shapes_that_differ_are_left_out(program):
    values = {name: value[0] for name, value in node_values(program, [X]).items()}
    assert first_divergence(program, [X], values, 60) is None


def test_a_backend_that_is_closed_is_said_to_be_closed(program, tmp_path):
    text = blame(SimpleNamespace(name="sealed"), "chain", tmp_path, program, ["x"], [Sample("s", {"x": X}, {})], 60)
    assert text.startswith("`chain`: sealed does not let us look inside")


@pytest.mark.parametrize("name", ["executorch", "coreai"])
def test_real_backends_that_are_closed_say_why(program, tmp_path, name):
    backend = get_backend(name)
    text = blame(backend, "chain", tmp_path, program, ["x"], [Sample("s", {"x": X}, {})], 60)
    assert text.startswith(f"`chain`: {name} does not let us look inside its artifacts ({CLOSED[name]})")


def test_values_that_are_no_nodes_of_the_graph_are_not_taken_for_agreement(program, tmp_path):
    """TFLite shows its tensors, under names and in a layout of its own."""
    backend = SimpleNamespace(name="tflite", intermediate_values=lambda path, inputs: {"Chain/first;1": X, "a": X})
    text = blame(backend, "chain", tmp_path, program, ["x"], [Sample("s", {"x": X}, {})], 60)
    assert "none of the 2 values inside can be told to be a node of the graph" in text and "channels last" in text


def test_without_a_model_values_are_written_and_nothing_is_claimed(tmp_path):
    backend = SimpleNamespace(name="glass", intermediate_values=lambda path, inputs: {"../../evil": X})
    text = blame(backend, "chain", tmp_path, None, ["x"], [Sample("s", {"x": X}, {})], 60, dump=tmp_path / "dump")
    assert text == "`chain`: glass artifacts are held against the student, which takes `--model MODEL`"
    index = json.loads((tmp_path / "dump" / "index.json").read_text())
    assert index["compared_with"] is None
    assert [(one["name"], one["file"]) for one in index["values"]] == [("../../evil", "00000.npy")]
    assert sorted(path.name for path in (tmp_path / "dump").iterdir()) == ["00000.npy", "index.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["dump"]


def test_a_mask_of_minus_infinity_is_no_error(program):
    """float16 may hold it as a very negative number; a number where the reference has none is one."""
    masked = np.array([0.5, -np.inf], np.float32)
    assert _where_finite(masked, masked) == np.inf
    assert _where_finite(masked, np.array([0.5, -6e4], np.float32)) == np.inf
    assert _where_finite(masked, np.array([0.5, 1.0], np.float32)) == -np.inf
    assert _where_finite(np.array([0.5, np.nan], np.float32), masked) == -np.inf


def test_blame_that_fails_says_so_and_does_not_raise(program, tmp_path):
    def explode(path, inputs):
        raise RuntimeError("no such node")

    backend = SimpleNamespace(name="glass", intermediate_values=explode)
    text = blame(backend, "chain", tmp_path, program, ["x"], [Sample("s", {"x": X}, {})], 60)
    assert "looking inside failed (RuntimeError: no such node)" in text


def test_error_that_builds_up_is_not_pinned_on_one_op(program, tmp_path):
    backend = SimpleNamespace(name="glass", intermediate_values=lambda path, inputs: node_values(program, [X]))
    text = blame(backend, "chain", tmp_path, program, ["x"], [Sample("s", {"x": X}, {})], 60)
    assert "no single op falls below 60 dB on s" in text


@pytest.mark.slow
def test_a_real_onnx_artifact_with_one_wrong_convolution_is_blamed_on_it(
    shapes, shapes_reference, tmp_path, lower_to_onnx
):
    pytest.importorskip("onnxruntime")
    decoder = shapes.components["decoder"]
    module = copy.deepcopy(decoder.module)
    convolutions = [name for name, part in module.named_modules() if isinstance(part, nn.Conv2d)]
    guilty = convolutions[len(convolutions) // 2]
    with torch.no_grad():
        module.get_submodule(guilty).weight.mul_(1.2)
    path = lower_to_onnx(decoder, module, tmp_path)
    arguments = (capture(decoder), ["latent"], shapes_reference.samples["decoder"], 60.0)
    text = blame(get_backend("onnx"), "decoder", path, *arguments)
    assert f"in `{guilty}`" in text and "conv2d" in text, text
