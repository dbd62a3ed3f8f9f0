"""Calls that compute the same value, and weights that hold the same bytes, become one."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline

aten = torch.ops.aten
_COMMUTATIVE = (aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default)


@dataclass(frozen=True)
class MergeCommon(Pass):
    """Of calls of one op with the same arguments the first is kept (common subexpressions), weights likewise.

        %a = aten.silu(%time)                                  ->    %a = aten.silu(%time)
        %b = aten.silu(%time)                                        %y = aten.add(%a, %a)
        %y = aten.add(%a, %b)

    The arguments of add (without `alpha`), mul, maximum and minimum are also compared the other way round. Weights are
    the same when dtype, shape and every byte are (0.0 is not -0.0).

    Declines
    1. calls that draw random numbers;
    2. every call, when one of the graph mutates its argument: run `functionalise` before;
    3. higher-order calls, whose branches are graphs.
    """

    name: ClassVar[str] = "merge-common"
    after: ClassVar[tuple[str, ...]] = ("functionalise",)
    tolerance: ClassVar[float] = 0.0

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        modified = _merge_weights(editor)
        calls = editor.nodes()
        declined: list[Decline] = []
        mutating = next((node for node in calls if _mutates(node)), None)
        seen: dict[Hashable, Node] = {}
        for node in [] if mutating is not None else calls:
            if node.target is not getitem and not isinstance(node.target, torch._ops.OpOverload):
                continue
            key = _key(node)
            first = seen.setdefault(key, node)
            if first is node:
                continue
            if node.target is not getitem and torch.Tag.nondeterministic_seeded in node.target.tags:  # type: ignore[union-attr]
                declined.append(decline(node, f"it draws random numbers, as `{first.name}` does"))
                continue
            editor.replace(node, first)
            editor.graph.erase_node(node)
            modified = True
        if mutating is not None:
            declined.append(decline(mutating, "it mutates its argument, so equal calls may give different values"))
        if not modified:
            return Rewritten(program, False, tuple(declined))
        return Rewritten(editor.finish(), True, tuple(declined))


def _mutates(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _key(node: Node) -> Hashable:
    args = [_frozen(one) for one in node.args]
    if node.target in _COMMUTATIVE and not node.kwargs:
        args.sort(key=repr)
    return node.target, tuple(args), tuple((name, _frozen(node.kwargs[name])) for name in sorted(node.kwargs))


def _frozen(value: Any) -> Hashable:
    """Hashable, and 1, 1.0 and True apart."""
    if isinstance(value, Node):
        return value
    if isinstance(value, list | tuple):
        return tuple(_frozen(one) for one in value)
    return type(value).__name__, repr(value) if isinstance(value, float) else value


def _merge_weights(editor: Editor) -> bool:
    """Read the first of equal weights instead of the others; True when there were others with readers."""
    modified = False
    kept: dict[Hashable, list[Node]] = {}
    for node in _read_weights(editor):
        value = editor.value(node)
        assert value is not None
        # A few elements tell nearly all weights apart before their bytes are compared.
        some = value.detach().flatten()[:: max(value.numel() // 8, 1)][:8].tolist()
        alike = kept.setdefault((value.dtype, tuple(value.shape), repr(some)), [])
        first = next((one for one in alike if _same_bytes(editor.value(one), value)), None)
        if first is None:
            alike.append(node)
        else:
            editor.replace(node, first)
            modified = True
    return modified


def _read_weights(editor: Editor) -> Iterator[Node]:
    for node in editor.graph.nodes:
        if node.op == "placeholder" and node.users and isinstance(editor.value(node), Tensor):
            yield node


def _same_bytes(first: Tensor | None, second: Tensor) -> bool:
    assert first is not None
    pair = [one.detach().contiguous().flatten().view(torch.uint8) for one in (first, second)]
    return torch.equal(*pair)
