"""Regions are written out: the same numbers, nothing nested, and what may not be is left."""

import torch
from torch import nn

from edgegen.graph.capture import capture
from edgegen.graph.edit import module_path
from edgegen.graph.inline_regions import inline_regions
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.students.student import Component


class Regions(nn.Module):
    """Two regions, one after the other, the first with two results."""

    def __init__(self, device: str = "cuda", enabled: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.options = {"device_type": device, "enabled": enabled}

    def forward(self, x):
        with torch.autocast(**self.options, dtype=torch.bfloat16):
            y = self.linear(x).exp()
            z = torch.cat([y.cos(), y.sin()], -1)
        with torch.autocast(**self.options, dtype=torch.bfloat16):
            y = (y * 2).tanh()
        return z, y + x


def regions_in(program):
    return [node.name for node in program.graph.nodes if "wrap_with" in getattr(node.target, "__name__", "")]


def test_a_region_is_written_out():
    torch.manual_seed(0)
    net, x = Regions().eval(), torch.randn(3, 4)
    exported = torch.export.export(net, (x,))
    assert len(regions_in(exported)) == 2
    program = inline_regions(exported)
    assert not regions_in(program)
    assert not [node for node in program.graph.nodes if node.op == "get_attr"]
    program.graph.lint()
    for made, wanted in zip(program.module()(x), net(x), strict=True):
        assert torch.equal(made, wanted)
    assert all("val" in node.meta for node in program.graph.nodes if node.op == "call_function")


def test_provenance_stays():
    class Above(nn.Module):
        def __init__(self):
            super().__init__()
            self.within = Regions()

        def forward(self, x):
            return self.within(x)

    program = inline_regions(torch.export.export(Above().eval(), (torch.randn(3, 4),)))
    linear = next(node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default)
    assert module_path(linear) == "within.linear"


def test_an_autocast_that_is_on_stays():
    exported = torch.export.export(Regions("cpu", True).eval(), (torch.randn(3, 4),))
    assert len(regions_in(inline_regions(exported))) == len(regions_in(exported)) > 0


def test_without_regions_nothing_happens():
    exported = torch.export.export(nn.Linear(4, 4), (torch.randn(3, 4),))
    assert inline_regions(exported) is exported


def test_capture_writes_them_out():
    specs = tuple(TensorSpec(name=name, shape=shape) for name, shape in (("z", (3, 8)), ("y", (3, 4))))
    part = Component("model", Regions(), (TensorSpec(name="x", shape=(3, 4)),), specs)
    assert not regions_in(capture(part))
