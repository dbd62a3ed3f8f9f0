"""A value concatenated with itself, as the first skip of a UNet without a mid block is, computed on once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline

aten = torch.ops.aten
_GROUPS = 6  # the place of `groups` among a convolution's arguments


@dataclass(frozen=True)
class MergeRepeatedCat(Pass):
    """Convolutions and GroupNorms over [x, x] become such over x.

        %c: f32[1, 2C, H, W] = aten.cat([%x, %x], 1)        %y = aten.conv2d(%x, %w[:, :C] + %w[:, C:], %b)
        %y = aten.conv2d(%c, %w, %b)                   ->
        %n = aten.group_norm(%c, 2G, %s, %t, eps)           %a = aten.group_norm(%x, G, %s[:C], %t[:C], eps)
                                                            %d = aten.group_norm(%x, G, %s[C:], %t[C:], eps)
                                                            %n = aten.cat([%a, %d], 1)

    The first halves a convolution's work. The second costs nothing, and no delegate stumbles over a concatenation with
    one input twice (XNNPACK's partitioner counts inputs, finds one, and cuts the graph there).

    Declines
    1. more than two parts, or another axis than the channels;
    2. a reader that is neither a convolution of one group nor a GroupNorm; the others are rewritten;
    3. a group that reaches over both halves;
    4. a weight that is computed.
    """

    name: ClassVar[str] = "merge-repeated-cat"
    after: ClassVar[tuple[str, ...]] = ("remove-identities", "fold-constants")
    tolerance: ClassVar[float] = 1e-5

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        declined: list[Decline] = []
        modified = False
        for node in editor.nodes(aten.cat.default):
            args: Any = node.args
            parts, axis = args[0], (args[1] if len(args) > 1 else node.kwargs.get("dim", 0))
            if len(parts) == len(set(parts)):
                continue
            if len(parts) != 2 or axis % node.meta["val"].dim() != 1:
                declined.append(decline(node, "not two of one value along the channels"))
                continue
            for user in list(node.users):
                reason = _refusal(user, editor)
                if reason is not None:
                    declined.append(decline(user, reason))
                    continue
                with editor.at(user):
                    new = _norms(editor, user, parts[0]) if _is_norm(user) else _conv(editor, user, parts[0])
                    editor.replace(user, new)
                editor.graph.erase_node(user)
                modified = True
        if not modified:
            return Rewritten(program, False, tuple(declined))
        return Rewritten(editor.finish(), True, tuple(declined))


def _is_norm(node: Node) -> bool:
    return node.target is aten.group_norm.default


def _refusal(user: Node, editor: Editor) -> str | None:
    if user.target is not aten.conv2d.default and not _is_norm(user):
        return "it reads a value concatenated with itself, and is no convolution or GroupNorm"
    args: Any = user.args
    weights = args[2:4] if _is_norm(user) else args[1:2]
    if any(one is not None and editor.value(one) is None for one in weights):
        return "its weight is computed"
    if _is_norm(user):
        return "a group reaches over both halves" if args[1] % 2 else None
    return "a grouped convolution" if len(args) > _GROUPS and args[_GROUPS] != 1 else None


def _conv(editor: Editor, node: Node, x: Node) -> Node:
    args: Any = node.args
    first, second = _halves(editor, args[1], 1)
    merged = editor.constant(first + second, editor.named(node, "weight_merged"))
    return editor.call(aten.conv2d.default, x, merged, *args[2:])


def _norms(editor: Editor, node: Node, x: Node) -> Node:
    args: Any = node.args
    made = []
    for half in (0, 1):
        affine: list[Node | None] = []
        for held, name in zip((*args[2:4], None, None)[:2], ("weight", "bias"), strict=True):
            value = None if held is None else _halves(editor, held, 0)[half]
            affine.append(None if value is None else editor.constant(value, editor.named(node, f"{name}_{half}")))
        made.append(editor.call(aten.group_norm.default, x, args[1] // 2, *affine, *args[4:]))
    return editor.call(aten.cat.default, made, 1)


def _halves(editor: Editor, held: Node, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    value = editor.value(held)
    assert value is not None
    first, second = value.chunk(2, axis)
    return first, second
