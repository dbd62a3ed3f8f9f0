"""The editor: a private copy, true shapes, provenance, weights and inputs that fit the signature."""

import pytest
import torch
from torch import nn

from edgegen.graph.edit import Editor, made_by, module_path, private_program, user_inputs, weights
from edgegen.graph.evaluate import evaluate

aten = torch.ops.aten


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.register_buffer("shift", torch.arange(6.0), persistent=False)

    def forward(self, x, unused):
        return self.layer(x) + self.shift, x * 2


@pytest.fixture
def program():
    with torch.no_grad():
        return torch.export.export(Network().eval(), (torch.randn(2, 4), torch.randn(1)))


def find(editor, target):
    (node,) = editor.nodes(target)
    return node


def test_the_program_that_was_given_is_never_changed(program):
    text, names = str(program.graph), set(program.state_dict)
    editor = Editor(program, "test")
    relu = find(editor, aten.relu.default)
    with editor.at(relu):
        editor.replace(relu, editor.call(aten.tanh.default, relu.args[0]))
        editor.constant(torch.ones(1), "layer.0.weight")
    editor.drop_input(next(node for node in editor.graph.nodes if node.name == "unused"))
    edited = editor.finish()
    assert str(program.graph) == text and set(program.state_dict) == names
    assert [node.name for node in user_inputs(edited)] == ["x"]
    assert [node.name for node in user_inputs(program)] == ["x", "unused"]


def test_new_calls_have_shapes_and_say_where_they_come_from(program):
    editor = Editor(program, "first")
    linear = find(editor, aten.linear.default)
    with editor.at(linear):
        scaled = editor.call(aten.mul.Tensor, linear.args[0], 2.0)
        new = editor.call(aten.linear.default, scaled, *linear.args[1:])
    assert tuple(new.meta["val"].shape) == (2, 6) and module_path(new) == "layer.0"
    editor.replace(linear, new)
    edited = editor.finish()
    assert not [node for node in edited.graph.nodes if node.name == linear.name]  # nothing reads it any more
    second = Editor(edited, "second")
    linear = find(second, aten.linear.default)
    with second.at(linear):
        again = second.call(aten.linear.default, *linear.args)
    assert made_by(again) == ("second", "first")
    assert made_by(find(second, aten.relu.default)) == ()


def test_a_call_outside_of_a_place_or_with_wrong_arguments_is_an_error(program):
    editor = Editor(program, "test")
    linear = find(editor, aten.linear.default)
    with pytest.raises(AssertionError):
        editor.call(aten.relu.default, linear)
    with editor.at(linear), pytest.raises(RuntimeError):
        editor.call(aten.mm.default, linear.args[0], linear.args[0])


def test_weights_of_every_kind_are_found_and_made(program):
    assert {name: tuple(value.shape) for name, value in weights(program).items()} == {
        "p_layer_0_weight": (6, 4),
        "p_layer_0_bias": (6,),
        "b_shift": (6,),
    }
    editor = Editor(program, "test")
    add = find(editor, aten.add.Tensor)
    with editor.at(add):
        names = [editor.constant(torch.full((6,), i), editor.named(add, "made")).name for i in (1, 2)]
        real = editor.constant(torch.randn(6), "made")
        total = editor.call(aten.add.Tensor, add.args[0], real)
        total = editor.call(aten.add.Tensor, total, next(n for n in editor.graph.nodes if n.name == names[1]))
    editor.replace(add, total)
    edited = editor.finish()
    assert len(set(names)) == 2
    assert {"made_2", "made_3"} <= set(edited.state_dict) and "made" not in edited.state_dict  # unread ones go
    assert edited.state_dict["made_2"].dtype == torch.int64
    assert "shift" not in edited.constants  # nothing reads it any more
    edited.module()(torch.randn(2, 4), torch.randn(1))


def test_inputs_are_replaced_in_place_and_dropped_only_unread(program):
    editor = Editor(program, "test")
    x = next(node for node in editor.graph.nodes if node.name == "x")
    with pytest.raises(AssertionError):
        editor.drop_input(x)
    wide = editor.replace_input(x, "wide", torch.zeros(2, 8))
    with editor.at(find(editor, aten.linear.default)):
        editor.replace(x, editor.call(aten.slice.Tensor, wide, 1, 0, 4))
    editor.drop_input(x)
    edited = editor.finish()
    assert [node.name for node in user_inputs(edited)] == ["wide", "unused"]
    given = torch.randn(2, 8)
    expected = evaluate(program, {"x": given[:, :4], "unused": torch.randn(1)})
    found = evaluate(edited, {"wide": given, "unused": torch.randn(1)})
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


class Views(nn.Module):
    def forward(self, x):
        return x.transpose(0, 1).contiguous().relu().view(12).chunk(2)


def test_a_view_of_what_now_lies_otherwise_in_memory_becomes_a_reshape():
    program = torch.export.export(Views(), (torch.randn(3, 4),))
    editor = Editor(program, "test")
    copied = find(editor, aten.contiguous.default)
    editor.replace(copied, copied.args[0])
    edited = editor.finish()
    (reshaped,) = [node for node in edited.graph.nodes if node.target is aten.reshape.default]
    assert made_by(reshaped) == ("test",)
    x = torch.randn(3, 4)
    assert all(torch.equal(a, b) for a, b in zip(evaluate(program, {"x": x}), evaluate(edited, {"x": x}), strict=True))


class Attends(nn.Module):
    def forward(self, x):
        nn.functional.scaled_dot_product_attention(x, x, x)
        y = x * 2
        y.add_(1)
        return y


def test_dead_attention_goes_and_dead_changes_stay():
    edited = Editor(torch.export.export(Attends(), (torch.randn(1, 2, 3),)), "test").finish()
    assert [node.target for node in edited.graph.nodes if node.op == "call_function"] == [
        aten.mul.Tensor,
        aten.add_.Tensor,
    ]


def test_a_private_program_has_a_graph_of_its_own(program):
    private = private_program(program)
    assert str(private.graph) == str(program.graph) and private.graph is not program.graph
    assert all("from_node" not in node.meta for node in private.graph.nodes)
    next(iter(private.graph.nodes)).name = "other"
    assert str(private.graph) != str(program.graph)
