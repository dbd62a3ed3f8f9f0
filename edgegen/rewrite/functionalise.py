"""Calls that change their argument in place become calls that give a new value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Node
from torch.fx.traceback import NodeSource, NodeSourceAction

from edgegen.graph.edit import Editor
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline


@dataclass(frozen=True)
class Functionalise(Pass):
    """add_, relu_, mul_ and their kin, as `inplace=True` and `x += y` leave them in a captured graph.

        %a = aten.conv2d(%x, ...)                              ->    %a = aten.conv2d(%x, ...)
        %b = aten.relu_(%a)                                          %b = aten.relu(%a)
        %y = aten.add(%a, %b)     # %a is changed by now             %y = aten.add(%b, %b)

    One by one where the changed value is a call's own and nothing sees it through a view. Where something does (a
    slice that is written to), the whole graph goes through torch's own functionalisation, `run_decompositions({})`,
    which takes seconds on a large network and is left out otherwise. Run it first: every other pass takes values for
    what they were when they were made.

    Declines
    1. a call that changes a weight, a buffer or an input of the graph: that is an effect, not a way of writing;
    2. a mutating op without functional form.
    """

    name: ClassVar[str] = "functionalise"
    tolerance: ClassVar[float] = 0.0

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        left = _one_by_one(editor)
        changed = editor.finish() if editor.changes else program
        if not left:
            return Rewritten(changed, changed is not program)
        lasting = [node for node in left if _changed_root(node).op == "placeholder"]
        if not lasting:
            whole = _as_torch_does(changed, self.name)
            if not _mutating(whole):
                return Rewritten(whole, True)
        declined = tuple(_reason(node) for node in lasting or left)
        return Rewritten(changed, changed is not program, declined)


def _mutating(program: ExportedProgram) -> list[Node]:
    return [node for node in program.graph.nodes if mutates(node)]


def mutates(node: Node) -> bool:
    """Whether a call changes one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _one_by_one(editor: Editor) -> list[Node]:
    """Replace what can be on its own; the mutating calls that are left."""
    places = {node: place for place, node in enumerate(editor.graph.nodes)}
    left: list[Node] = []
    for node in editor.nodes():
        if not mutates(node):
            continue
        changed = node.args[0]
        functional = _functional(node)
        if functional is None or not isinstance(changed, Node) or not _own(changed, node, places):
            left.append(node)
            continue
        with editor.at(node):
            new = editor.call(functional, *node.args, **node.kwargs)
        if new.meta["val"].dtype != changed.meta["val"].dtype or new.meta["val"].shape != changed.meta["val"].shape:
            editor.graph.erase_node(new)
            left.append(node)
            continue
        places[new] = places[node]
        editor.replace(node, new)
        editor.graph.erase_node(node)
        for user in list(changed.users):
            if user is not new and places[user] > places[new]:
                user.replace_input_with(changed, new)
    return left


def _functional(node: Node) -> Any:
    """`aten.relu.default` for `aten.relu_.default`, or None."""
    target: Any = node.target
    name = target._opname.removesuffix("_")
    packet = getattr(getattr(torch.ops, target.namespace), name, None)
    only_first = [argument.alias_info is not None for argument in target._schema.arguments]
    if name == target._opname or packet is None or only_first != [True] + [False] * (len(only_first) - 1):
        return None
    found = getattr(packet, target._overloadname, None)
    return None if found is None or found._schema.is_mutable else found


def _own(value: Node, changing: Node, places: dict[Node, int]) -> bool:
    """Whether only `value` itself shows that it changes: it is no view, and no earlier view of it is read later."""
    if value.op != "call_function" or _shares(value):
        return False
    return not any(
        places[reader] > places[changing]
        for view in _views(value)
        if view is not changing and places[view] < places[changing]
        for reader in view.users
    )


def _views(value: Node) -> Iterator[Node]:
    for user in value.users:
        if _shares(user):
            yield user
            yield from _views(user)


def _shares(node: Node) -> bool:
    """Whether a call may give (a part of) the memory of an argument; what is not known may."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function"
    if torch.Tag.maybe_aliasing_or_mutating in node.target.tags:
        return True
    return any(value.alias_info is not None for value in node.target._schema.returns)


def _changed_root(node: Node) -> Node:
    """The value whose memory a mutating call writes to."""
    source: Any = node.args[0]
    while isinstance(source, Node) and source.op == "call_function" and _shares(source):
        source = source.args[0]
    return source if isinstance(source, Node) else node


def _as_torch_does(program: ExportedProgram, by: str) -> ExportedProgram:
    """torch's functionalisation of the whole graph, each new call stamped with the pass."""
    known = {(node.name, node.target): node.meta.get("from_node", []) for node in program.graph.nodes}
    made: ExportedProgram = program.run_decompositions({})
    assert all(spec.kind is OutputKind.USER_OUTPUT for spec in made.graph_signature.output_specs)
    for node in made.graph.nodes:
        if node.op == "call_function":
            created = [NodeSource(node, by, NodeSourceAction.CREATE)]
            node.meta["from_node"] = known.get((node.name, node.target), created)
    return made


def _reason(node: Node) -> Decline:
    root = _changed_root(node)
    if root.op == "placeholder":
        return decline(node, f"it changes `{root.name}`, which outlives the call")
    return decline(node, "it has no functional form")
