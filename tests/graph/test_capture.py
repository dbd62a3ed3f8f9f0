"""Captured graphs: the inputs bear the names of the specs, whatever forward calls them."""

import pytest
import torch
from torch import nn

from edgegen.errors import EdgegenError
from edgegen.graph.capture import capture, signature
from edgegen.graph.evaluate import evaluate
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.students.student import Component

SHAPE = (2, 3)


class Two(nn.Module):
    def forward(self, a, b):
        return torch.add(a, b) - torch.mul(a, b)


def component(module, *names):
    specs = tuple(TensorSpec(name=name, shape=SHAPE) for name in names)
    return Component("two", module, specs, (TensorSpec(name="out", shape=SHAPE),))


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a"), ("x", "y"), ("add", "mul"), ("input", "b_a")])
def test_inputs_bear_the_names_of_the_specs(names):
    part = component(Two(), *names)
    program = capture(part)
    assert signature(program) == part.inputs
    first, second = torch.randn(SHAPE), torch.randn(SHAPE)
    (out,) = evaluate(program, {names[0]: first, names[1]: second})
    assert torch.equal(out, Two()(first, second))
    assert torch.equal(program.module()(first, second), out)


class Branches(nn.Module):
    def forward(self, a):
        return a if a.sum() > 0 else -a


def test_a_network_that_does_not_trace_says_so():
    with pytest.raises(EdgegenError, match="component `two` cannot be captured"):
        capture(component(Branches(), "a"))
