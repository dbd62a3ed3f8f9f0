"""The float16 form of a graph: the same as that of the module, behind float32 inputs and outputs."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgegen.errors import EdgegenError
from edgegen.graph.capture import capture
from edgegen.graph.edit import user_inputs
from edgegen.graph.evaluate import evaluate
from edgegen.graph.half_arithmetic import sqnr_db
from edgegen.rewrite.to_half import ToHalf
from edgegen.students.load import load
from edgegen.students.shapes.family import WEIGHTS
from tests.rewrite.conftest import export


class OfModule(nn.Module):
    """What `half()` makes of a module: the timestep stays in float32, as the networks themselves have it."""

    def __init__(self, module, names):
        super().__init__()
        self.module = copy.deepcopy(module).half()
        self.names = names

    def forward(self, *inputs):
        pairs = zip(self.names, inputs, strict=True)
        return self.module(*(x.half() if x.is_floating_point() and n != "timestep" else x for n, x in pairs)).float()


@pytest.fixture(scope="module")
def student():
    return load(WEIGHTS)


@pytest.mark.parametrize("name", ["text_encoder", "denoiser"])
def test_it_is_the_graph_of_the_half_module(student, name):
    component = student.components[name]
    program = capture(component)
    names = [spec.name for spec in component.inputs]
    inputs = component.example_inputs()
    reference = export(OfModule(component.module, names), *inputs)
    calls = [node.name for node in program.graph.nodes if node.op == "call_function"]
    angles = [one for one in calls[: calls.index("sin") + 1] if "assert" not in one] if name == "denoiser" else []
    half = ToHalf(tuple(angles))(program).program
    expected = evaluate(reference, dict(zip([n.name for n in user_inputs(reference)], inputs, strict=True)))
    found = evaluate(half, dict(zip(names, inputs, strict=True)))
    assert torch.equal(expected[0], found[0])
    assert sqnr_db(evaluate(program, dict(zip(names, inputs, strict=True)))[0], found[0]) > 60
    floats = [value for value in half.state_dict.values() if value.is_floating_point()]
    assert floats and all(value.dtype is torch.float16 for value in floats)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.twice = nn.Parameter(torch.randn(8))

    def forward(self, x, ids):
        a, b = (self.linear(x) + self.twice).chunk(2, -1)
        noise = torch.full((1, 4), 0.25) + torch.arange(4, dtype=torch.float32)
        islands = (a.exp() * self.twice[:4]).tanh()
        places = (ids.to(torch.float32) * 1.5).to(torch.int64)
        return islands + b.to(torch.float32) + noise, places, x


def inputs():
    return torch.randn(2, 8), torch.arange(3)


def by_name(program):
    return {node.name: node for node in program.graph.nodes}


def test_everything_float_becomes_half_and_the_boundary_stays(check_pass):
    result = check_pass(ToHalf(), Mixed(), *inputs())
    nodes = by_name(result.program)
    dtypes = {name: nodes[name].meta["val"].dtype for name in ("linear", "full", "arange", "exp", "tanh", "to_2")}
    assert set(dtypes.values()) == {torch.float16}, dtypes
    assert nodes["to"].meta["val"].dtype is torch.float32, "only an index is made of it"
    assert all(value.dtype is torch.float16 for value in result.program.state_dict.values())


def test_islands_are_computed_in_float32_with_casts_around_them(check_pass):
    result = check_pass(ToHalf(("exp", "mul", "tanh")), Mixed(), *inputs())
    nodes = by_name(result.program)
    assert {nodes[name].meta["val"].dtype for name in ("exp", "mul", "tanh")} == {torch.float32}
    assert nodes["mul"].args[0] is nodes["exp"] and nodes["tanh"].args[0] is nodes["mul"], "no cast between islands"
    assert nodes["exp"].args[0].meta["val"].dtype is torch.float32
    assert nodes["exp"].args[0].args[0] is nodes["getitem"]
    assert {str(value.dtype) for value in result.program.state_dict.values()} == {"torch.float16"}


class SharedWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return (x * self.weight).sigmoid() + (x + self.weight).exp()


def test_a_weight_of_both_is_held_twice(check_pass):
    result = check_pass(ToHalf(("add",)), SharedWeight(), torch.randn(3, 4))
    assert sorted(str(value.dtype) for value in result.program.state_dict.values()) == [
        "torch.float16",
        "torch.float32",
    ]


def test_an_island_may_be_the_output_and_the_only_reader_of_an_input(check_pass):
    class Ends(nn.Module):
        def forward(self, x, t):
            return x * 2, t.cos()

    result = check_pass(ToHalf(("cos",)), Ends(), torch.randn(3), torch.tensor([999.0]))
    nodes = by_name(result.program)
    assert nodes["cos"].args[0] is nodes["t"]
    assert torch.equal(
        evaluate(result.program, {"x": torch.zeros(3), "t": torch.tensor([999.0])})[1].cos(),
        torch.tensor([999.0]).cos().cos(),
    )


class TooLarge(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, -1e30]))

    def forward(self, x):
        return (x + self.mask).softmax(-1) + x.masked_fill(x > 0, -3e38).softmax(-1)


def test_what_does_not_fit_is_recorded(check_pass):
    result = check_pass(ToHalf(), TooLarge(), torch.tensor([[-1.0, -2.0]]))
    assert sorted(one.node for one in result.declined) == ["b_mask", "masked_fill"]
    fill = next(node for node in result.program.graph.nodes if node.name == "masked_fill")
    assert fill.args[2] == -math.inf


class OnlyIntegers(nn.Module):
    def forward(self, x):
        return x + 1, (x.to(torch.float32) * 3.7).to(torch.int32)


def test_a_graph_without_floats_to_convert_stays(check_pass):
    check_pass(ToHalf(), OnlyIntegers(), torch.arange(4), modified=False)


def test_float64_and_casts_that_were_there_stay(check_pass):
    class Wide(nn.Module):
        def forward(self, x, y):
            return x * 2, F.silu(y)

    result = check_pass(ToHalf(), Wide(), torch.randn(2, dtype=torch.float64), torch.randn(2))
    assert by_name(result.program)["mul"].meta["val"].dtype is torch.float64


def test_an_island_that_is_not_there():
    with pytest.raises(EdgegenError, match="no call `gone`"):
        ToHalf(("gone",))(export(OnlyIntegers(), torch.arange(4)))
