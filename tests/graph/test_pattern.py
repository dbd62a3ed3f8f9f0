"""Patterns match the expression that they are written as, and nothing that others would miss."""

import torch
from torch import nn

from edgegen.graph.pattern import Op, Var, match

aten = torch.ops.aten
x, y = Var("x"), Var("y")


class Wrap(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def matches(pattern, function, count=2):
    """Names bound at each place in a function of `count` tensors where `pattern` holds."""
    program = torch.export.export(Wrap(function), tuple(torch.randn(2, 3) for _ in range(count)))
    found = [match(pattern, node) for node in program.graph.nodes]
    return [{name: str(value) for name, value in one.values.items()} for one in found if one is not None]


def test_a_variable_seen_twice_is_one_node():
    swish = Op(aten.mul.Tensor, x, Op(aten.sigmoid.default, x))
    assert len(matches(swish, lambda a, b: a * a.sigmoid())) == 1
    assert matches(swish, lambda a, b: a * b.sigmoid()) == []
    assert matches(swish, lambda a, b: a.sigmoid() * a) == []


def test_commutative_calls_match_both_ways_and_go_back():
    swish = Op(aten.mul.Tensor, x, Op(aten.sigmoid.default, x), commutative=True)
    assert len(matches(swish, lambda a, b: a.sigmoid() * a)) == 1
    # The product binds x and y first, in the order that the sum then rules out.
    nested = Op(aten.add.Tensor, Op(aten.mul.Tensor, x, y, commutative=True), y, commutative=True)
    assert matches(nested, lambda a, b: a * b + b) == [{"x": "inputs_0", "y": "inputs_1"}]
    assert matches(nested, lambda a, b: a * b + a) == [{"x": "inputs_1", "y": "inputs_0"}]
    assert matches(nested, lambda a, b: a + b * a) == [{"x": "inputs_1", "y": "inputs_0"}]


def test_an_inner_value_that_others_read_is_no_match_unless_shared():
    inner = Op(aten.relu.default, x)
    assert matches(Op(aten.exp.default, inner), lambda a, b: a.relu().exp()) == [{"x": "inputs_0"}]

    def read_twice(a, b):
        z = a.relu()
        return z.exp() + z

    assert matches(Op(aten.exp.default, inner), read_twice) == []
    assert len(matches(Op(aten.exp.default, Op(aten.relu.default, x, shared=True)), read_twice)) == 1
    assert matches(Op(aten.exp.default, inner), lambda a, b: (z := a.relu(), z.exp())) == []  # an output is a reader


def test_literals_match_by_value_and_kind():
    def forward(a, b):
        return (a * 2).sum(1).unsqueeze(0)

    assert len(matches(Op(aten.mul.Tensor, x, 2), forward)) == 1
    assert len(matches(Op(aten.mul.Tensor, x, 2.0), forward)) == 1
    assert matches(Op(aten.mul.Tensor, x, 3), forward) == []
    assert len(matches(Op(aten.sum.dim_IntList, x, [1]), forward)) == 1
    assert matches(Op(aten.sum.dim_IntList, x, [0]), forward) == []
    assert matches(Op(aten.unsqueeze.default, x, False), forward) == []  # False is no 0
    assert matches(Op(aten.mul.Tensor, x, Var("factor", literal=True)), forward) == [{"x": "inputs_0", "factor": "2"}]
    assert matches(Op(aten.mul.Tensor, x, y), forward) == []  # a plain variable is a node


def test_a_literal_seen_twice_is_equal():
    s = Var("s", literal=True)
    both = Op(aten.add.Tensor, Op(aten.mul.Tensor, x, s), Op(aten.mul.Tensor, y, s))
    assert len(matches(both, lambda a, b: a * 0.75 + b * 0.75)) == 1
    assert matches(both, lambda a, b: a * 0.75 + b * 0.5) == []


def test_several_targets_names_and_arguments_left_out():
    pattern = Op((aten.add.Tensor, aten.sub.Tensor), name="sum")
    found = matches(pattern, lambda a, b: (a + b) * (a - b))
    assert [one["sum"] for one in found] == ["add", "sub"]
    assert len(matches(Op(aten.softmax.int, x), lambda a, b: a.softmax(-1))) == 1
    assert matches(Op(aten.relu.default, x, y), lambda a, b: a.relu()) == []  # more arguments than it has
