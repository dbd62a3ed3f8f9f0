"""In-place calls become calls that give a new value; lasting changes stay."""

import pytest
import torch
from torch import nn

from edgegen.rewrite import functionalise
from edgegen.rewrite.base import census
from edgegen.rewrite.functionalise import Functionalise, mutates


class Wrap(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def written_to(x):
    y = x.exp()
    y[:, 0] = 3.0
    y[:, 1].mul_(2)
    return y + 1


def seen_through_a_view(x):
    y = x.exp()
    flat = y.view(6)
    y.add_(1)
    return flat * 2, y


def chained(x):
    y = x.exp()
    z = y * 2
    y.add_(1).mul_(3)
    y -= z
    return y, y.view(6)


def of_a_view_that_nothing_else_reads(x):
    return torch.relu_(x.exp().view(6).sin())


def read_before(x):
    y = x.exp()
    total = y.view(6).sum()
    return y.add_(total)


ALONE = [chained, of_a_view_that_nothing_else_reads, read_before, lambda x: nn.functional.silu(x * 2, inplace=True)]


@pytest.mark.parametrize("forward", ALONE)
def test_what_only_the_value_shows_is_replaced_alone(check_pass, forward, monkeypatch):
    monkeypatch.setattr(functionalise, "_as_torch_does", None)
    result = check_pass(Functionalise(), Wrap(forward), torch.randn(2, 3))
    assert not any(mutates(node) for node in result.program.graph.nodes)


@pytest.mark.parametrize("forward", [written_to, seen_through_a_view])
def test_what_a_view_shows_is_left_to_torch(check_pass, forward):
    result = check_pass(Functionalise(), Wrap(forward), torch.randn(2, 3))
    assert not any(mutates(node) for node in result.program.graph.nodes)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        y = self.norm(self.linear(x))
        y[:, 0] = 1.0
        return nn.functional.gelu(y)


def test_torch_s_way_leaves_composite_ops_whole(check_pass):
    result = check_pass(Functionalise(), Layers(), torch.randn(2, 4))
    assert {"aten.linear", "aten.layer_norm", "aten.gelu"} <= set(census(result.program))


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x):
        self.count.add_(1)
        return (x + self.count).relu_()


def test_a_change_of_a_buffer_or_an_input_stays():
    program = torch.export.export(Counts().eval(), (torch.randn(3),))
    result = Functionalise()(program)
    assert result.modified and census(result.program) == {"aten.add_": 1, "aten.add": 1, "aten.relu": 1}
    assert "b_count" in result.declined[0].reason and "outlives" in result.declined[0].reason
    again = Functionalise()(result.program)
    assert not again.modified and again.declined
    result = Functionalise()(torch.export.export(Wrap(lambda x: x.view(3).mul_(2) + 1), (torch.randn(3),)))
    assert not result.modified and "inputs_0" in result.declined[0].reason


def test_a_graph_without_changes_is_left_alone(check_pass):
    check_pass(Functionalise(), Wrap(lambda x: x.relu() + 1), torch.randn(3), modified=False)
