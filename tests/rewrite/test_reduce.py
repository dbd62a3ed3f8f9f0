"""A failing graph becomes the smallest one that still fails, and is saved with a command that shows it."""

import subprocess
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from edgegen.errors import EdgegenError
from edgegen.graph.edit import Editor, user_inputs
from edgegen.graph.evaluate import evaluate
from edgegen.rewrite.base import Pass, PassError, Rewritten, census
from edgegen.rewrite.observe import PassMismatch, Verify
from edgegen.rewrite.pipeline import Pipeline
from edgegen.rewrite.reduce import pass_fails, reduce, save
from edgegen.students.load import load
from tests.rewrite.conftest import export

aten = torch.ops.aten


@dataclass(frozen=True)
class BreaksTanh(Pass):
    """A defect: tanh becomes sigmoid where a multiplication reads it."""

    name: ClassVar[str] = "breaks-tanh"

    def call(self, program):
        editor = Editor(program, self.name)
        found = [n for n in editor.nodes(aten.tanh.default) if any(u.target is aten.mul.Tensor for u in n.users)]
        for node in found:
            with editor.at(node):
                editor.replace(node, editor.call(aten.sigmoid.default, node.args[0]))
        return Rewritten(editor.finish(), True) if found else Rewritten(program, False)


@dataclass(frozen=True)
class RaisesOnExp(Pass):
    """A defect: meets an op that it does not expect."""

    name: ClassVar[str] = "raises-on-exp"

    def call(self, program):
        if census(program)["aten.exp"]:
            raise PassError("there is an exp")
        return Rewritten(program, False)


class Deep(nn.Module):
    """Some thirty calls; one tanh among them is multiplied, one exp lies elsewhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(10))

    def forward(self, x, y):
        for place, layer in enumerate(self.layers):
            x = torch.tanh(layer(x)) if place != 6 else torch.tanh(layer(x)) * y
            x = x + y
        first, second = x.split([3, 5], dim=1)
        return torch.cat([second, first], 1).exp(), y.relu()


@pytest.fixture(scope="module")
def deep():
    torch.manual_seed(1)
    inputs = {"x": torch.randn(2, 8), "y": torch.randn(2, 8)}
    program = export(Deep(), *inputs.values())
    assert census(program).total() > 30
    return program, inputs


def failure(one, program, inputs):
    verify = Verify(inputs)
    with pytest.raises(PassError) as raised:
        Pipeline((one,)).run(program, [verify])
    return raised.value


@pytest.mark.parametrize(("one", "most", "op"), [(BreaksTanh(), 2, "aten.tanh"), (RaisesOnExp(), 1, "aten.exp")])
def test_one_bad_op_deep_in_a_graph_is_found(deep, one, most, op):
    program, inputs = deep
    error = failure(one, program, inputs)
    fails = pass_fails(one, error)
    told = []
    found = reduce(program, inputs, fails, progress=lambda ops, asked: told.append((ops, asked)))
    assert census(found.program).total() == found.ops <= most and census(found.program)[op] == 1
    assert fails(found.program, found.inputs)
    assert found.complete and found.ops_before == len([n for n in program.graph.nodes if n.op == "call_function"])
    assert [ops for ops, _ in told] == sorted((ops for ops, _ in told), reverse=True)
    assert set(found.inputs) == {node.name for node in user_inputs(found.program)}
    again = reduce(program, inputs, fails)
    assert str(again.program.graph) == str(found.program.graph) and again.asked == found.asked
    found.program.graph.lint()
    made = found.program.module()(*found.inputs.values())
    expected = evaluate(found.program, found.inputs)
    torch.testing.assert_close(made if isinstance(made, torch.Tensor) else made[0], expected[0])


class Nan(nn.Module):
    def forward(self, x):
        a = (x.relu() + 1).sin()
        b = (x * 0).log() * 0  # 0 * -inf
        return (a.cos() + b.abs()).tanh(), a


def test_where_not_a_number_begins():
    inputs = {"x": torch.ones(3)}
    program = export(Nan(), *inputs.values())

    def fails(program, inputs):
        return any(value.isnan().any() for value in evaluate(program, inputs)) and all(
            value.isfinite().all() for value in inputs.values()
        )

    found = reduce(program, inputs, fails)
    assert found.ops <= 2 and census(found.program)["aten.log"] == 1


class Mixed(nn.Module):
    """Values of other dtypes, and a call that gives several."""

    def forward(self, x):
        half = x.half().relu()
        big = (x > 0).long().cumsum(1)
        a, b = (half.float() + big).chunk(2, dim=1)
        return (a - b).exp().half()


@pytest.mark.parametrize("op", ["aten.exp", "aten.cumsum", "aten.relu", "aten.chunk", "aten.gt"])
def test_values_of_every_dtype_can_be_cut(op, tmp_path):
    inputs = {"x": torch.randn(2, 4)}
    program = export(Mixed(), *inputs.values())

    def fails(program, inputs):
        evaluate(program, inputs)
        return census(program)[op] > 0

    found = reduce(program, inputs, fails)
    assert found.ops <= 3 and census(found.program)[op] == 1
    save(found, tmp_path, "remove-identities")
    loaded = load(tmp_path / "program.pt2").components["model"]
    assert [spec.name for spec in loaded.inputs] == list(load_file(tmp_path / "inputs.safetensors"))


def test_a_budget_ends_it_with_what_there_is(deep):
    program, inputs = deep
    fails = pass_fails(RaisesOnExp(), PassError("any"))
    few = reduce(program, inputs, fails, most_calls=9)
    assert not few.complete and few.asked == 9 and few.ops < few.ops_before and fails(few.program, few.inputs)
    none = reduce(program, inputs, fails, most_seconds=0.0)
    assert not none.complete and none.asked == 1 and none.ops == none.ops_before


def test_what_does_not_fail_is_not_reduced(deep):
    program, inputs = deep
    with pytest.raises(EdgegenError, match="does not fail"):
        reduce(program, inputs, lambda program, inputs: False)
    with pytest.raises(EdgegenError, match="does not fail"):
        reduce(program, inputs, pass_fails(BreaksTanh(), PassError("a class that it does not raise")))


def test_the_script_is_what_it_says(deep, tmp_path):
    program, inputs = deep
    found = reduce(program, inputs, pass_fails(BreaksTanh(), PassMismatch("any")))
    script = save(found, tmp_path / "small", "breaks-tanh")
    assert script.parent == tmp_path / "small"
    assert {path.name for path in script.parent.iterdir()} == {
        "graph.txt",
        "inputs.safetensors",
        "program.pt2",
        "reproduce.sh",
    }
    assert "aten.tanh.default" in (script.parent / "graph.txt").read_text()
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
    command = "edgegen passes run program.pt2 --inputs inputs.safetensors --passes breaks-tanh --verify"
    assert script.read_text().splitlines()[1].endswith(f"exec {command}")
