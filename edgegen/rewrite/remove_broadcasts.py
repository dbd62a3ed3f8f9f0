"""Take out expands and repeats in front of calls that broadcast by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.graph.rearrange import static_shape
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline

aten = torch.ops.aten
BROADCASTS = (aten.expand.default, aten.expand_as.default, aten.repeat.default)
_PRODUCTS = (aten.matmul.default,)
_OTHERS = (aten.where.ScalarOther, aten.where.ScalarSelf)


@dataclass(frozen=True)
class RemoveBroadcasts(Pass):
    """A call that repeats its operands as needed reads what was expanded, not the expanded value.

        %e: f32[2, 8, 8] = aten.expand(%g: f32[1, 1, 8], [2, 8, 8])
        %y: f32[2, 8, 8] = aten.add(%x: f32[2, 8, 8], %e)              ->    %y = aten.add(%x, %g)

    Elementwise calls, batch axes of matmul and the mask of scaled_dot_product_attention. `repeat` counts where it only
    repeats axes of size 1.

    Declines
    1. a reader that does not broadcast, or whose result would be smaller without the expanded value;
    2. a repeat that tiles.
    """

    name: ClassVar[str] = "remove-broadcasts"
    tolerance: ClassVar[float] = 1e-6  # a matmul of a batch of one may be summed in another order

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        declined: list[Decline] = []
        modified = False
        for node in editor.nodes(*BROADCASTS):
            source = node.args[0]
            if not isinstance(source, Node) or static_shape(source) is None or static_shape(node) is None:
                continue
            if not _repeats_ones(source.meta["val"], node.meta["val"]):
                declined.append(decline(node, "it tiles axes that are larger than 1"))
                continue
            for user in list(node.users):
                reason = _refusal(user, node, source)
                if reason is not None:
                    declined.append(decline(node, reason))
                    continue
                with editor.at(user):
                    args = _swapped(user.args, node, source)
                    new = editor.call(user.target, *args, **_swapped(user.kwargs, node, source))
                editor.replace(user, new)
                editor.graph.erase_node(user)
                modified = True
        if not modified:
            return Rewritten(program, False, tuple(declined))
        return Rewritten(editor.finish(), True, tuple(declined))


def _repeats_ones(source: Tensor, made: Tensor) -> bool:
    shape = (1,) * (made.dim() - source.dim()) + tuple(source.shape)
    return all(old in (1, new) for old, new in zip(shape, made.shape, strict=True))


def _refusal(user: Node, node: Node, source: Node) -> str | None:
    """Why `user` needs the expanded value, or None."""
    target: Any = user.target
    if not isinstance(target, torch._ops.OpOverload):
        return f"`{user.name}` reads it"
    if target is aten.scaled_dot_product_attention.default:
        if node in user.args[:3] or source.meta["val"].dim() < 2:
            return f"`{user.name}` does not broadcast queries, keys or values"
        return None
    if target in _PRODUCTS:
        if any(one.meta["val"].dim() < 2 for one in (*user.all_input_nodes, source)):
            return f"`{user.name}` reads it as a vector"
    elif (torch.Tag.pointwise not in target.tags and target not in _OTHERS) or target._schema.is_mutable:
        return f"`{user.name}` does not broadcast"
    if target in _PRODUCTS and source.meta["val"].shape[-2:] != node.meta["val"].shape[-2:]:
        return f"`{user.name}` multiplies along the expanded axis"
    ends = 2 if target in _PRODUCTS else 0  # axes that are no batch
    read = [(source if one is node else one).meta["val"].shape for one in user.all_input_nodes]
    made = user.meta["val"].shape
    batch: Any = torch.broadcast_shapes(*(one[: len(one) - ends] for one in read))  # type: ignore[no-untyped-call]
    return None if batch == made[: len(made) - ends] else f"`{user.name}` would give less"


def _swapped(value: Any, old: Node, new: Node) -> Any:
    return torch.fx.node.map_arg(value, lambda one: new if one is old else one)
