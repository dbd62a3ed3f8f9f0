"""A large ONNX file is written piece by piece, and is the file that onnx itself would have written."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edgegen.lower import onnx as module
from edgegen.lower.onnx_write import write_model


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.large = torch.nn.Linear(256, 512)
        self.narrow = torch.nn.Parameter(torch.randn(512, 256).half(), requires_grad=False)
        self.small = torch.nn.Linear(256, 3)

    def forward(self, x):
        return self.small((self.large(x).relu().half() @ self.narrow).float())


@pytest.fixture(scope="module")
def exported():
    torch.manual_seed(0)
    return torch.onnx.export(Net().eval(), (torch.randn(2, 256),), dynamo=True, input_names=["x"], verbose=False)


def test_it_is_the_model_that_onnx_writes(exported, tmp_path):
    written = write_model(exported.model, tmp_path / "pieces.onnx")
    exported.save(str(tmp_path / "whole.onnx"))
    pieces, whole = (onnx.load(str(tmp_path / name)) for name in ("pieces.onnx", "whole.onnx"))
    onnx.checker.check_model(pieces, full_check=True)
    weights = [{one.name: onnx.numpy_helper.to_array(one) for one in m.graph.initializer} for m in (pieces, whole)]
    assert weights[0].keys() == weights[1].keys() and len(written.initializers) == 2
    for name, value in weights[0].items():
        assert value.dtype == weights[1][name].dtype
        np.testing.assert_array_equal(value, weights[1][name])
    assert [node.SerializeToString() for node in pieces.graph.node] == [
        node.SerializeToString() for node in whole.graph.node
    ]
    # Once the order of fields is canonical, nothing is left that parsing would have thrown away.
    assert len(pieces.SerializeToString()) == (tmp_path / "pieces.onnx").stat().st_size


def test_a_small_model_refers_to_the_weights_of_the_large_one(exported, tmp_path):
    given = {"x": np.random.default_rng(0).standard_normal((2, 256), dtype=np.float32)}
    with write_model(exported.model, tmp_path / "model.onnx").referring() as small:
        assert small.stat().st_size < 50_000 < (tmp_path / "model.onnx").stat().st_size
        onnx.checker.check_model(str(small), full_check=True)
        outputs = [
            onnxruntime.InferenceSession(str(one)).run(None, given)[0] for one in (small, tmp_path / "model.onnx")
        ]
    np.testing.assert_array_equal(*outputs)
    assert not small.exists()


def test_a_component_above_the_bound_is_lowered_that_way(lowering, tmp_path, monkeypatch):
    for name in ("plain", "streamed"):
        (tmp_path / name).mkdir()
    plain = lowering.lower(module.BACKEND, tmp_path / "plain", "decoder", "fp32")
    monkeypatch.setattr(module, "STREAMED_ABOVE", 1)
    streamed = lowering.lower(module.BACKEND, tmp_path / "streamed", "decoder", "fp32")
    assert streamed.result == plain.result
    lowering.check_parity(module.BACKEND, streamed.path, "decoder", 100.0)
    assert [one.name for one in (tmp_path / "streamed").iterdir()] == [streamed.path.name]
