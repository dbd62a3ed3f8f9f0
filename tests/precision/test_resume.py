"""A network computed from its first change on gives what the whole of it gives, and computes no more than it must."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgegen.precision.plan import OpPlan, Range
from edgegen.precision.resume import FloatRun
from edgegen.precision.simulate import Network
from edgegen.precision.sites import sites


class Branches(nn.Module):
    """Ops in a row, a skip over all of them, and one that reads an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(5))
        self.other = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        skip = x * 2.0
        for conv in self.convs:
            x = conv(x).relu()
        return torch.tanh(x + skip) + self.other(y)[:, :, None, None]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    program = torch.export.export(Branches().eval(), (torch.randn(1, 4, 6, 6), torch.randn(1, 6)))
    return Network("branches", program, sites(program))


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(1, 4, 6, 6, generator=generator), "y": torch.randn(1, 6, generator=generator)}


def _int8(network, *keys):
    ends = Range(low=-2.0, high=2.0)
    return network.changes(
        {key: OpPlan(op=network.sites[key].kind, precision="w8a8", input=ends, output=ends) for key in keys}
    )


@pytest.mark.parametrize("points", [1, 2, 16])
def test_every_op_changed_alone_gives_what_the_whole_network_gives(network, inputs, points):
    run = FloatRun.of(network, inputs, points)
    (plain,) = network(inputs)
    assert torch.equal(run.outputs[0], plain)
    for key in network.sites:
        changes = _int8(network, key)
        (whole,) = network(inputs, changes)
        (resumed,) = run.changed(changes)
        assert torch.equal(resumed, whole) and not torch.equal(resumed, plain), key


def test_several_changes_begin_at_the_first_and_leave_the_float_run_as_it_was(network, inputs):
    run = FloatRun.of(network, inputs, 16)
    changes = _int8(network, *list(network.sites)[1::2])
    (whole,) = network(inputs, changes)
    for _ in range(2):
        assert torch.equal(run.changed(changes)[0], whole)
    assert run.changed({}) is run.outputs


def test_what_lies_before_the_change_is_not_computed_again(network, inputs):
    run = FloatRun.of(network, inputs, 16)
    last = list(network.sites)[4]
    seen = []
    changes = _int8(network, last)
    (name,) = changes
    convs = [node for node in network.program.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    real = torch.ops.aten.conv2d.default

    def counted(*args, **kwargs):
        seen.append(1)
        return real(*args, **kwargs)

    for node in convs:
        node.target = counted
    try:
        run.changed(changes)
    finally:
        for node in convs:
            node.target = real
    assert name == convs[-1].name
    assert len(seen) == 1
