"""Chains of reshapes and transposes become the fewest that move the same elements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.graph.rearrange import (
    REARRANGING,
    Rearrangement,
    Step,
    identity,
    permutation,
    rearrangement,
    static_shape,
)
from edgegen.rewrite.base import Pass, Rewritten

aten = torch.ops.aten
Cost = tuple[int, int]
"""Elements that a permute moves, then the number of calls."""


@dataclass(frozen=True)
class MergeRearrangements(Pass):
    """Views, flattens, squeezes, transposes and permutes in a row become at most reshape, permute, reshape.

        %a = aten.transpose(%x, 1, 2)                                %y = aten.relu(%x)
        %b = aten.permute(%a, [0, 2, 1])
        %y = aten.relu(%b)                                     ->
        %c = aten.unsqueeze(aten.unsqueeze(%y, 2), 3)                %c = aten.reshape(%y, [1, 8, 1, 1])

    With `images`, where a permute of an image and one of its tokens would do, it is that of the image, which cancels
    against those of a runtime with channels last:

        %t = aten.transpose(aten.flatten(%x, 2), 1, 2)         ->    %p = aten.permute(%x, [0, 2, 3, 1])
                                                                     %t = aten.reshape(%p, [1, 4096, 64])

    Declines (silently: there is nothing to gain)
    1. a chain that is as short as it can be, or whose inner values are read by others so that nothing would go;
    2. a reshape without common factors ([2, 3] to [3, 2]), which is the start of a new chain;
    3. dynamic shapes.
    """

    images: bool = False

    name: ClassVar[str] = "merge-rearrangements"
    after: ClassVar[tuple[str, ...]] = ("functionalise",)
    tolerance: ClassVar[float] = 1e-6  # kernels sum in another order what lies otherwise in memory

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        if not merge(editor, self.images):
            return Rewritten(program, False)
        return Rewritten(editor.finish(), True)


def chain(node: Node) -> tuple[Node, Rearrangement, tuple[Node, ...]]:
    """Where the elements of a rearranging call come from, what was done to them, and the calls that did it, in order.

    The source is the first value that is no rearrangement of another; it may be `node` itself (no calls).
    """
    shape = static_shape(node)
    assert shape is not None
    whole, calls, now = identity(shape), [], node
    while (one := rearrangement(now)) is not None:
        longer = one.then(whole)
        if longer is None:
            break
        whole = longer
        calls.append(now)
        source = now.args[0]
        assert isinstance(source, Node)
        now = source
    return now, whole, tuple(reversed(calls))


def rearranged(node: Node) -> Iterator[Node]:
    """Every rearrangement of `node`, nearest first."""
    for user in node.users:
        if rearrangement(user) is not None:
            yield user
            yield from rearranged(user)


def cost(steps: Sequence[Step], elements: int) -> Cost:
    """What `steps` on a tensor of so many elements cost."""
    return sum(kind == "permute" for kind, _ in steps) * elements, len(steps)


def emit(editor: Editor, source: Node, steps: Sequence[Step]) -> Node:
    """Calls that do `steps` to `source`; made inside `editor.at`. A swap of two axes is a transpose."""
    node = source
    for kind, value in steps:
        moved = [axis for axis, dim in enumerate(value) if axis != dim]
        if kind == "reshape":
            node = editor.call(aten.reshape.default, node, list(value))
        elif len(moved) == 2:
            node = editor.call(aten.transpose.int, node, *moved)
        else:
            node = editor.call(aten.permute.default, node, list(value))
    return node


def terminals(editor: Editor) -> list[Node]:
    """Rearranging calls whose value something reads that is none, and whose source is no weight."""
    found = []
    for node in editor.nodes(*REARRANGING):
        if all(user.target in REARRANGING and rearrangement(user) is not None for user in node.users):
            continue
        if rearrangement(node) is not None and editor.value(chain(node)[0]) is None:
            found.append(node)
    return found


def merge(editor: Editor, images: bool) -> bool:
    """Shorten every chain that can be; True when one was. What is dead afterwards is gone."""
    changed = False
    for node in terminals(editor):
        source, whole, calls = chain(node)
        steps = whole.steps(images)
        if steps == _steps_of(calls):
            continue
        elements = node.meta["val"].numel()
        now, then = cost(_steps_of(_exclusive(calls)), elements), cost(steps, elements)
        if then < now or (images and then == now):
            with editor.at(node):
                editor.replace(node, emit(editor, source, steps))
            for dead in reversed(calls):
                if not dead.users:
                    editor.graph.erase_node(dead)
            changed = True
    return changed


def _exclusive(calls: Sequence[Node]) -> tuple[Node, ...]:
    """The calls at the end of a chain that nothing needs any more once its last value has another source."""
    kept = [calls[-1]]
    for call in reversed(calls[:-1]):
        if len(call.users) > 1:
            break
        kept.append(call)
    return tuple(reversed(kept))


def _steps_of(calls: Sequence[Node]) -> tuple[Step, ...]:
    """The calls of a chain as they are, as steps."""
    found: list[Step] = []
    for call in calls:
        one = rearrangement(call)
        assert one is not None
        dims = permutation(call)
        found.append(("reshape", one.target_shape) if dims is None else ("permute", dims))
    return tuple(found)
