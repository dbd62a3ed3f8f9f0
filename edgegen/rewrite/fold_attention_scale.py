"""The scale of an attention, folded into the weight of what makes its queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.attention import ATTENTION, AttentionCall, read_attention
from edgegen.graph.edit import Editor
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline

aten = torch.ops.aten
RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten._unsafe_view.default,
)
PERMUTES = (aten.transpose.int, aten.permute.default)
SCALABLE = (aten.linear.default, aten.conv1d.default, aten.conv2d.default)


@dataclass(frozen=True)
class FoldAttentionScale(Pass):
    """Queries come out of their projection already scaled, and the attention itself scales nothing.

        %q0: f32[1, L, D] = aten.linear(%x, %wq, %bq)
        %q: f32[1, H, L, E] = aten.transpose(aten.view(%q0, [1, L, H, E]), 1, 2)
        %o = aten.scaled_dot_product_attention(%q, %k, %v, %m)
    ->
        %q0: f32[1, L, D] = aten.linear(%x, %wq * scale, %bq * scale)
        %q as before
        %o = aten.scaled_dot_product_attention(%q, %k, %v, %m, scale=1.0)

    The passes that write attention out fold the scale in the same way. Where weights are put on a grid of codes it has
    to happen before: 1 / sqrt(E) is seldom a power of two, and codes of a weight are not those of a multiple of it.

    Declines where it is not the queries, or else the keys, that one linear or convolution with constant weights of its
    own makes, with nothing but reshaping between.
    """

    name: ClassVar[str] = "fold-attention-scale"
    after: ClassVar[tuple[str, ...]] = ("remove-identities", "fold-constants", "split-chunked-linear", "fold-bias-add")
    tolerance: ClassVar[float] = 1e-5

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        declined: list[Decline] = []
        modified = False
        for node in editor.nodes(ATTENTION):
            call = read_attention(node)
            if call.scale == 1.0:
                continue
            scaled = fold_scale(editor, call)
            if scaled is None:
                declined.append(decline(node, "neither queries nor keys come from a projection of their own"))
                continue
            given: dict[str, Any] = {**node.kwargs, "scale": 1.0}
            with editor.at(node):
                new = editor.call(ATTENTION, *_with(node, *scaled), **given)
                editor.replace(node, new)
            editor.graph.erase_node(node)  # it counts as random, for its dropout, so no sweep takes it
            modified = True
        if not modified:
            return Rewritten(program, False, tuple(declined))
        return Rewritten(editor.finish(), True, tuple(declined))


def _with(node: Node, query: Node, key: Node) -> tuple[Any, ...]:
    """The arguments of an attention, with another query and key."""
    return (query, key, *node.args[2:])


def fold_scale(editor: Editor, call: AttentionCall) -> tuple[Node, Node] | None:
    """Query and key, the scale of `call` in the weights behind one of them; None where there are none to take it."""
    if call.query not in (call.key, call.value) and (made := _scalable(editor, call.query)) is not None:
        return _scale_weights(editor, call.query, made, call.scale), call.key
    if call.key not in (call.query, call.value) and (made := _scalable(editor, call.key)) is not None:
        return call.query, _scale_weights(editor, call.key, made, call.scale)
    return None


def _scalable(editor: Editor, node: Node) -> Node | None:
    """The linear or convolution with constant weights of its own that `node` is, but for reshaping, or None."""
    while len(node.users) == 1 and node.target in (*RESHAPES, *PERMUTES):
        node = node.args[0]  # type: ignore[assignment]
    if len(node.users) > 1 or node.target not in SCALABLE:
        return None
    weight, bias = (*node.args, None)[1:3]
    if editor.value(weight) is None or (bias is not None and editor.value(bias) is None):
        return None
    return node if len(weight.users) == 1 else None  # type: ignore[union-attr]


def _scale_weights(editor: Editor, node: Node, made: Node, scale: float) -> Node:
    """`node` over `made` with scaled weights."""
    weight, bias = (editor.value(one) for one in (*made.args, None)[1:3])
    assert weight is not None
    with editor.at(made):
        scaled = editor.constant(weight * scale, editor.named(made, "weight_scaled"))
        offset = None if bias is None else editor.constant(bias * scale, editor.named(made, "bias_scaled"))
        new = editor.call(made.target, made.args[0], scaled, offset, *made.args[3:], **made.kwargs)
    editor.replace(made, new)
    return new if node is made else node  # what reshapes reads the new product by now
