"""What lowering leaves out to be faster leaves no trace in the artifact."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower import executorch as backend
from edgegen.lower.backend import LowerRequest
from edgegen.students.networks.unet import Stage, TransformerShape

pytest.importorskip("executorch.exir")


class Small(nn.Module):
    """A resnet block and a transformer block; relu, pooling and a 1-D convolution, which XNNPACK's passes rewrite."""

    def __init__(self):
        super().__init__()
        self.stage = Stage([(8, 8)], 8, 4, TransformerShape(8, 2))
        self.conv, self.line = nn.Conv2d(8, 8, 3), nn.Conv1d(4, 4, 3)

    def forward(self, x, time, context):
        h = torch.relu(self.conv(self.stage.layer(0, x, time, context)))
        return self.line(nn.functional.max_pool2d(h, 2, 2, 0, 1)[:, :4, 0])


@pytest.mark.slow
def test_the_bytes_are_those_of_the_converter_as_it_comes(tmp_path, monkeypatch):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    torch.manual_seed(0)
    given = torch.randn(1, 8, 10, 10), torch.randn(1, 8), torch.randn(1, 3, 8)
    with torch.no_grad():
        program = torch.export.export(Small().eval(), given)
    inputs = tuple(
        TensorSpec(name=name, shape=tuple(value.shape), dtype="float32")
        for name, value in zip(("x", "time", "context"), given, strict=True)
    )
    outputs = (TensorSpec(name="y", shape=tuple(program.module()(*given).shape), dtype="float32"),)

    def made(name):
        lowered = backend.BACKEND.lower(program, LowerRequest(name, inputs, outputs, "fp32", tmp_path))
        return (tmp_path / lowered.file).read_bytes()

    faster = made("faster")
    monkeypatch.setattr(backend, "_partitioner", XnnpackPartitioner)
    monkeypatch.setattr(backend, "_shared_provenance", nullcontext)
    monkeypatch.setattr(backend, "_needless_traces_left_out", nullcontext)
    assert faster == made("plain")


def test_nothing_of_it_stays_behind():
    from executorch.exir.pass_base import ExportPass
    from torch.fx.traceback import NodeSource

    with backend._shared_provenance(), backend._needless_traces_left_out():
        assert "__deepcopy__" in vars(NodeSource) and "call" in vars(ExportPass)
    assert "__deepcopy__" not in vars(NodeSource) and "call" not in vars(ExportPass)
