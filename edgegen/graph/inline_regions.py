"""Regions that `torch.export` keeps as graphs of their own, written out where they are called."""

from __future__ import annotations

import operator
from typing import Any

from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from edgegen.graph.edit import Editor

BY = "inline-regions"


def inline_regions(program: ExportedProgram) -> ExportedProgram:
    """`program` without the regions that a network's `torch.autocast(..., enabled=False)` and `torch.no_grad` leave:
    they change nothing of an inference in float32, and no pass looks inside a graph in a graph.

        %y = wrap_with_autocast("cuda", float16, False, False, %region, %x)   ->   %y = aten.cos(%x)
        region(%a): return aten.cos(%a)

    An autocast that is on for the CPU is left as it is, and so is a region with regions of its own inside.
    """
    regions = [node for node in program.graph.nodes if _body(program, node) is not None]
    if not regions:
        return program
    editor = Editor(program, BY)
    by_name = {node.name: node for node in editor.graph.nodes}
    for region in regions:
        node, body = by_name[region.name], _body(program, region)
        assert body is not None
        _inline(editor, node, *body)
    return editor.finish()


def _body(program: ExportedProgram, node: Node) -> tuple[GraphModule, int] | None:
    """The graph of a region that can be written out, and where its arguments begin; None for anything else."""
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or name not in ("wrap_with_autocast", "wrap_with_set_grad_enabled"):
        return None
    first = 1 if name == "wrap_with_set_grad_enabled" else 4
    device, enabled = node.args[0], node.args[2] if first == 4 else False
    if enabled and device == "cpu":
        return None
    held = node.args[first]
    assert isinstance(held, Node)
    body: Any = program.graph_module.get_submodule(str(held.target))
    inside = [one.op for one in body.graph.nodes]
    return None if "get_attr" in inside or "call_module" in inside else (body, first + 1)


def _inline(editor: Editor, node: Node, body: GraphModule, first: int) -> None:
    made: dict[Node, Any] = {}
    given = iter(node.args[first:])
    for one in body.graph.nodes:
        if one.op == "placeholder":
            made[one] = next(given)
        elif one.op == "output":
            results = [made[value] if isinstance(value, Node) else value for value in one.args[0]]
        else:
            with editor.graph.inserting_before(node):
                made[one] = editor.graph.node_copy(one, made.__getitem__)
            editor.propagate(made[one])
    for user in list(node.users):
        assert user.target is operator.getitem, "a region gives a tuple"
        place = user.args[1]
        assert isinstance(place, int)
        editor.replace(user, results[place])
        editor.graph.erase_node(user)
    editor.graph.erase_node(node)
