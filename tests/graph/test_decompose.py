"""Op by op, the same calls as torch gives when it traces the whole graph again."""

import operator
from collections import Counter

import pytest
import torch
from torch import nn
from torch.export import default_decompositions

from edgegen.graph.capture import capture
from edgegen.graph.decompose import decomposed

aten = torch.ops.aten
KEPT = (aten.linear.default, aten.upsample_bilinear2d.vec)


def told(nodes):
    return Counter(
        (str(node.target), tuple(node.meta["val"].shape))
        for node in nodes
        if node.op == "call_function" and node.target is not operator.getitem and "_assert" not in str(node.target)
        if isinstance(node.meta["val"], torch.Tensor) and node.target is not aten._to_copy.default
    )


def whole(program):
    table = default_decompositions()
    for op in KEPT:
        table.pop(op, None)
    return program.run_decompositions(table).graph.nodes


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.batch = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, input):
        x = self.conv(self.batch(input)).reshape(4, 4, 8).contiguous()
        x = nn.functional.instance_norm(x.to(torch.float32).transpose(1, 2))
        return x.flatten(1).unsqueeze(0).matmul(x.flatten(1).t()).split(2, 1)


@pytest.mark.parametrize("name", ["text_encoder", "denoiser", "decoder"])
def test_networks_come_out_alike(tiny, name):
    program = capture(tiny.components[name])
    text = str(program.graph)
    graph, origin = decomposed(program, KEPT)
    assert told(graph.nodes) == told(whole(program)) and str(program.graph) == text
    graph.lint()
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert {origin[node].graph for node in calls} == {program.graph}
    outputs = {node: origin[node].meta["val"].shape for node in calls if node.target is aten.convolution.default}
    assert all(node.meta["val"].shape == shape for node, shape in outputs.items())


def test_norms_reshapes_and_parts_come_out_alike():
    program = torch.export.export(Norms().eval(), (torch.randn(2, 4, 4, 4),))
    graph, origin = decomposed(program, KEPT)
    assert told(graph.nodes) == told(whole(program))
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    assert [node.name for node in graph.nodes if node.op == "placeholder"] == names
    kinds = {str(origin[node].target) for node in graph.nodes if node.target is aten.convolution.default}
    assert kinds == {"aten.conv2d.default"}
