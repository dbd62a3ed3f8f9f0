"""Cutting a graph into consecutive parts, each a program of its own: what is too large for one file becomes several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.errors import EdgegenError
from edgegen.graph.edit import Editor, user_inputs, weights

_WINDOW = 0.15
"""How far from an equal share of the weights a cut may lie, as a share of one part, to carry less across."""
_CARRIED = (torch.float32, torch.float16, torch.int32)
"""What may cross: float16 is carried as float32, which loses nothing."""


@dataclass(frozen=True)
class Part:
    """One part: `program` takes what `inputs` name and gives what `outputs` name, inputs of the whole, values carried
    between parts, or outputs of the whole."""

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def cut(program: ExportedProgram, parts: int, outputs: Sequence[str]) -> tuple[Part, ...]:
    """`program`, whose outputs are called `outputs`, as `parts` consecutive programs of about equal weight.

    Each part takes what it reads, inputs of the whole or values that any part before it gave, and gives what later ones
    read. Among the places near an equal share, that with the fewest bytes across is taken. EdgegenError when it has
    fewer places to cut than asked for.
    """
    if parts < 1:
        raise ValueError(f"{parts} parts")
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    places = _places(program, calls, parts)
    bounds = [-1, *places, len(calls) - 1]
    return tuple(_part(program, calls, first, last, outputs) for first, last in pairwise(bounds))


def _places(program: ExportedProgram, calls: Sequence[Node], parts: int) -> list[int]:
    """Indices of the last call of each part but the last one."""
    held = weights(program)
    loaded, seen = [], set()
    total = 0
    for node in calls:
        for source in node.all_input_nodes:
            if source.name in held and source.name not in seen:
                seen.add(source.name)
                total += held[source.name].numel() * held[source.name].element_size()
        loaded.append(total)
    returned = set(program.graph.output_node().all_input_nodes)
    crossing = _crossing(calls, returned)
    chosen: list[int] = []
    for part in range(1, parts):
        share = total * part / parts
        free = [i for i, size in crossing.items() if size is not None and (not chosen or i > chosen[-1])]
        near = [i for i in free if abs(loaded[i] - share) <= _WINDOW * total / parts]
        if not free:
            raise EdgegenError(f"the graph cannot be cut into {parts} parts: it has {len(chosen)} places for a cut")
        chosen.append(
            min(near, key=lambda i: crossing[i] or 0) if near else min(free, key=lambda i: abs(loaded[i] - share))
        )
    return chosen


def _crossing(calls: Sequence[Node], returned: set[Node]) -> dict[int, int | None]:
    """Index of a call -> bytes that cross behind it, None where no cut can be: a result that is no tensor, or one that
    the graph returns, would have to be handed on."""
    place = {node: index for index, node in enumerate(calls)}
    last = {node: max((place[user] for user in node.users if user in place), default=-1) for node in calls}
    alive: set[Node] = set()
    found: dict[int, int | None] = {}
    for index, node in enumerate(calls[:-1]):
        alive = {one for one in alive if last[one] > index}
        if last[node] > index or node in returned:
            alive.add(node)
        values = [one.meta.get("val") for one in alive]
        done = bool(alive & returned) or any(one in returned for one in calls[: index + 1])
        whole = all(isinstance(value, Tensor) and value.dtype in _CARRIED for value in values)
        found[index] = (
            sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
            if whole and alive and not done
            else None
        )
    return found


def _part(program: ExportedProgram, calls: Sequence[Node], first: int, last: int, outputs: Sequence[str]) -> Part:
    """Calls `first + 1` to `last` of `program`."""
    editor = Editor(program, "cut")
    copies = {node.name: node for node in editor.graph.nodes}
    before, own = calls[: first + 1], set(calls[first + 1 : last + 1])
    leaving = [node for node in calls[first + 1 : last + 1] if any(user not in own for user in node.users)]
    ends = last == len(calls) - 1
    for source in (node for node in before if any(user in own for user in node.users)):
        value: Tensor = source.meta["val"]
        wide = torch.float32 if value.dtype == torch.float16 else value.dtype
        arrived = editor.add_input(_carried(source), torch.zeros(tuple(value.shape), dtype=wide))
        if wide != value.dtype:
            with editor.at(_first_call(editor)):
                arrived = editor.call(torch.ops.aten.to.dtype, arrived, value.dtype)
        editor.replace(copies[source.name], arrived)
    if not ends:
        with editor.at(editor.graph.output_node()):
            editor.set_outputs([_widened(editor, copies[node.name]) for node in leaving])
    editor.sweep()
    for node in [node for node in editor.graph.nodes if node.op == "placeholder" and not node.users]:
        if node.name in {one.name for one in user_inputs(program)}:
            editor.drop_input(node)
    made = editor.finish()
    given = tuple(outputs) if ends else tuple(_carried(node) for node in leaving)
    return Part(made, tuple(node.name for node in user_inputs(made)), given)


def _carried(node: Node) -> str:
    """What a value is called between parts."""
    return f"carried_{node.name}"


def _widened(editor: Editor, node: Node) -> Node:
    if node.meta["val"].dtype != torch.float16:
        return node
    return editor.call(torch.ops.aten.to.dtype, node, torch.float32)


def _first_call(editor: Editor) -> Node:
    first: Node = next(node for node in editor.graph.nodes if node.op != "placeholder")
    return first
