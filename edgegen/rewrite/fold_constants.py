"""Compute once, while compiling, what follows from weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.edit import Editor, apply
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline

# Calls that make a tensor larger out of a smaller one: folding them trades a cheap call for bytes in the file.
_GROW_BYTES = 1 << 16


@dataclass(frozen=True)
class FoldConstants(Pass):
    """A call that reads nothing but weights (or nothing at all, as `arange`) becomes a weight; so does one that reads a
    value without elements, which is known whatever it was made of.

        %w = weight                                       ->   %t = weight, transposed
        %t = aten.transpose(%w, 0, 1)
        %y = aten.matmul(%x, %t)                               %y = aten.matmul(%x, %t)

    Declines
    1. a call that draws random numbers or mutates its argument;
    2. a call that makes more than 64 KiB more than it reads (an expanded bias): the file would grow by it.
    """

    name: ClassVar[str] = "fold-constants"
    tolerance: ClassVar[float] = 0.0

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        known: dict[Node, Any] = {
            node: value
            for node in editor.graph.nodes
            if node.op == "placeholder" and (value := editor.value(node)) is not None
        }
        declined: list[Decline] = []
        for node in editor.nodes():
            made = node.meta["val"]
            if isinstance(made, Tensor) and not made.numel():
                known[node] = torch.empty(made.shape, dtype=made.dtype)
                continue
            if not all(one in known for one in node.all_input_nodes):
                continue
            reason = _refusal(node, known)
            if reason is not None:
                declined.append(decline(node, reason))
                continue
            with torch.no_grad():
                known[node] = apply(node, known.__getitem__)
        modified = False
        for node in [one for one in editor.nodes() if one in known]:
            value = known[node]
            if isinstance(value, Tensor) and value.numel() and any(user not in known for user in node.users):
                with editor.at(node):
                    editor.replace(node, editor.constant(value.clone(), editor.named(node, node.name)))
                modified = True
        if not modified:
            return Rewritten(program, False, tuple(declined))
        return Rewritten(editor.finish(), True, tuple(declined))


def _refusal(node: Node, known: dict[Node, Any]) -> str | None:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if torch.Tag.nondeterministic_seeded in target.tags:
            return "it draws random numbers"
        if target._schema.is_mutable:
            return "it mutates its argument"
    made = node.meta["val"]
    if isinstance(made, Tensor):
        reads = sum(known[one].nbytes for one in node.all_input_nodes if isinstance(known[one], Tensor))
        size = made.numel() * made.element_size()
        if node.all_input_nodes and size > reads + _GROW_BYTES:
            return f"it would grow the file from {reads} to {size} bytes"
    return None
