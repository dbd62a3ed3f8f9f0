"""What watches a pipeline: dumps that read well, and numbers that are held."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from edgegen.errors import EdgegenError, GateError
from edgegen.graph.edit import Editor
from edgegen.rewrite.base import Pass, PassError, Rewritten
from edgegen.rewrite.drop_unused_inputs import DropUnusedInputs
from edgegen.rewrite.observe import Dump, PassMismatch, Verify, relative_error
from edgegen.rewrite.pipeline import Pipeline
from edgegen.rewrite.remove_identities import RemoveIdentities
from edgegen.rewrite.specialise_timestep import SpecialiseTimestep
from tests.rewrite.conftest import export

aten = torch.ops.aten


class Timed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, timestep, caption):
        return self.linear(x.clone()) + timestep.cos(), x.view(8)


@dataclass(frozen=True)
class ScalesLinear(Pass):
    """A pass that is off by `by` in its first output."""

    by: float

    name: ClassVar[str] = "scales-linear"

    def call(self, program):
        editor = Editor(program, self.name)
        for node in editor.nodes(aten.linear.default):
            with editor.at(next(iter(node.users))):
                made = editor.call(aten.mul.Tensor, node, 1.0 + self.by)
            node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
        return Rewritten(editor.finish(), True)


@dataclass(frozen=True)
class RenamesInput(Pass):
    """A pass that changes what goes in and says nothing of it."""

    name: ClassVar[str] = "renames-input"
    changes_signature: ClassVar[bool] = True

    def call(self, program):
        editor = Editor(program, self.name)
        old = next(node for node in editor.graph.nodes if node.name == "x")
        editor.replace(old, editor.replace_input(old, "z", torch.zeros(2, 4)))
        editor.drop_input(old)
        return Rewritten(editor.finish(), True)


@pytest.fixture(scope="module")
def timed():
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 4), "timestep": torch.randn(1), "caption": torch.randn(3)}
    return export(Timed(), *inputs.values()), inputs


def test_a_dump_has_the_graph_before_and_after_each_pass_that_changed_it(timed, tmp_path):
    program, _ = timed
    one = SpecialiseTimestep((999.0,))
    Pipeline((RemoveIdentities(), one, DropUnusedInputs())).run(program, [Dump(tmp_path / "ir")])
    names = ["00-input.txt", "01-remove-identities.txt", "02-specialise-timestep.txt", "03-drop-unused-inputs.txt"]
    assert sorted(path.name for path in (tmp_path / "ir").iterdir()) == names
    first, _, third, last = ((tmp_path / "ir" / name).read_text() for name in names)
    assert "%p_linear_weight: f32[4, 4] = weight[linear.weight]" in first
    assert "%x: f32[2, 4] = input" in first
    (linear,) = [line for line in first.splitlines() if line.startswith("%linear")]
    assert linear.startswith("%linear: f32[2, 4] = aten.linear.default(%clone, %p_linear_weight, %p_linear_bias)")
    assert linear.endswith("# linear")
    assert "cos" in first and "aten.cos" not in third and "specialise-timestep" in third
    assert "%caption" in third and "%caption" not in last
    assert last.splitlines()[-1] == "return [%add, %view]"


def test_a_pass_that_changes_nothing_is_not_dumped(timed, tmp_path):
    program, _ = timed
    Pipeline((SpecialiseTimestep((1.0,), input="other"),)).run(program, [Dump(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["00-input.txt"]


def test_a_folder_that_cannot_be_written_is_said(timed, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgegenError, match="cannot be written"):
        Pipeline((RemoveIdentities(),)).run(timed[0], [Dump(tmp_path / "file")])


@pytest.mark.parametrize("values", [(999.0,), (999.0, 1.0)])
def test_numbers_hold_through_passes_that_change_the_inputs(timed, values):
    program, inputs = timed
    verify = Verify(inputs)
    made, _ = Pipeline((RemoveIdentities(), SpecialiseTimestep(values), DropUnusedInputs())).run(program, [verify])
    assert verify.seen == 3 and verify.program is made
    assert verify.errors == {"remove-identities": 0.0, "specialise-timestep": 0.0, "drop-unused-inputs": 0.0}
    assert ("step" in verify.inputs) == (len(values) > 1) and "timestep" not in verify.inputs
    assert inputs.keys() == {"x", "timestep", "caption"}, "what was given is not changed"


def test_numbers_beyond_the_tolerance_name_pass_output_and_error(timed):
    program, inputs = timed
    verify = Verify(inputs)
    with pytest.raises(PassMismatch, match=r"pass `scales-linear\{by=0.01\}` changed output 0 \(`add`\) by 0.0\d+ rel"):
        Pipeline((RemoveIdentities(), ScalesLinear(0.01))).run(program, [verify])
    assert verify.seen == 1 and "scales-linear" not in verify.errors
    assert (
        issubclass(PassMismatch, GateError) and issubclass(PassMismatch, PassError) and PassMismatch("x").exit_code == 3
    )


def test_numbers_within_the_tolerance_are_kept(timed):
    program, inputs = timed
    verify = Verify(inputs)
    Pipeline((ScalesLinear(1e-6),)).run(program, [verify])
    assert 0 < verify.errors["scales-linear"] <= 1e-5


def test_a_pass_must_say_what_its_new_inputs_are(timed):
    program, inputs = timed
    with pytest.raises(PassError, match="made the input `z`"):
        Pipeline((RenamesInput(),)).run(program, [Verify(inputs)])


def test_nothing_that_is_not_a_number_is_ever_close():
    one = torch.ones(2)
    bad = torch.tensor([1.0, float("nan")])
    assert relative_error(one, bad) == relative_error(bad, bad) == relative_error(bad, one) == float("inf")
    assert relative_error(one, one.double()) == relative_error(one, torch.ones(3)) == float("inf")
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(one * 2, one) == 0.5
