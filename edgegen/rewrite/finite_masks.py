"""Masks of -inf or of float32's lowest number become -6e4, which float16 has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.count import op_name
from edgegen.graph.edit import Editor
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline

aten = torch.ops.aten
HALF_MAX = 65504.0
# Where a fill value stands among the arguments.
_FILLS: dict[Any, tuple[int, ...]] = {
    aten.masked_fill.Scalar: (2,),
    aten.where.ScalarOther: (2,),
    aten.where.ScalarSelf: (1,),
    aten.where.Scalar: (1, 2),
    aten.full.default: (1,),
    aten.full_like.default: (1,),
    aten.new_full.default: (2,),
    aten.scalar_tensor.default: (0,),
    aten.mul.Tensor: (1,),
    aten.mul.Scalar: (1,),
}
_CARRYING = """
    add sub where masked_fill maximum view reshape flatten unflatten transpose permute squeeze unsqueeze expand
    expand_as slice select repeat tril triu to _to_copy clone contiguous alias detach lift_fresh_copy mul
"""
_CARRIES = frozenset(f"aten.{name}" for name in _CARRYING.split())
_SOFTMAXES = frozenset({"aten.softmax", "aten._softmax", "aten._safe_softmax", "aten.log_softmax"})


@dataclass(frozen=True)
class FiniteMasks(Pass):
    """What hides scores from a softmax is a number that float16 can hold, and whose exponential is still 0.

        %m = aten.masked_fill(%scores, %hidden, -inf)            %m = aten.masked_fill(%scores, %hidden, -6e4)
        %n = aten.mul(%padding, -3.4e38)                   ->    %n = aten.mul(%padding, -6e4)
        %p = aten.softmax(aten.add(%m, %n), -1)                  %p = aten.softmax(aten.add(%m, %n), -1)

    In float16 -3.4e38 is -inf, 0 * -inf is NaN, and a row that is masked from end to end is NaN. Constants, the fill of
    `masked_fill`, `where` and `full`, and factors of a 0/1 mask are replaced. A row with one visible score keeps its
    bits. Of a row without one, float32 gives the mean of all values when it was filled with the lowest number, and
    keeps doing so; when the lowest number was added to it, it now gives what its scores say; -inf gave NaN.

    Declines
    1. a value that something other than a softmax or the mask of an attention reads;
    2. a constant mask with a row that hides everything: its meaning rests on the mask being infinite;
    3. a constant or fill that is too large upwards.
    """

    value: float = -6.0e4
    """Nearer to 0 where several masks are added: their sum must stay above -65504."""

    name: ClassVar[str] = "finite-masks"
    tolerance: ClassVar[float] = 0.0
    after: ClassVar[tuple[str, ...]] = ("remove-identities", "fold-constants")

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        declined: list[Decline] = []
        for node in [one for one in editor.graph.nodes if one.op == "placeholder"]:
            held = editor.value(node)
            if held is None or not held.is_floating_point() or not held.numel() or not _too_large(held):
                continue
            reason = _constant_refusal(held) or _leads_elsewhere(node)
            if reason is not None:
                declined.append(decline(node, reason))
            else:
                editor.set_weight(node, held.clamp(min=self.value))
        for node in editor.nodes(*_FILLS):
            for place in _FILLS[node.target]:
                fill = node.args[place]
                if not isinstance(fill, float) or math.isnan(fill) or abs(fill) <= HALF_MAX:
                    continue
                reason = "its fill is too large upwards: this is no mask" if fill > 0 else _leads_elsewhere(node)
                if reason is not None:
                    declined.append(decline(node, reason))
                else:
                    node.update_arg(place, self.value)
                    editor.changes += 1
        if not editor.changes:
            return Rewritten(program, False, tuple(declined))
        return Rewritten(editor.finish(), True, tuple(declined))


def _too_large(value: Tensor) -> bool:
    return bool((value.abs() > HALF_MAX).any())


def _constant_refusal(value: Tensor) -> str | None:
    if bool((value > HALF_MAX).any()):
        return "it is too large upwards: this is no mask"
    if value.ndim and bool((value < -HALF_MAX).all(-1).any()):
        return "a row of it hides everything: what that row means rests on the mask being infinite"
    return None


def _leads_elsewhere(start: Node) -> str | None:
    """What reads the mask that is no softmax and does not lead to one, in words."""
    seen, todo = {start}, [start]
    while todo:
        node = todo.pop()
        for user in node.users:
            if user.op == "output":
                return "it is an output of the graph"
            name = op_name(user)
            masks = name == "aten.scaled_dot_product_attention" and node in (
                *user.args[3:4],
                user.kwargs.get("attn_mask"),
            )
            if name in _SOFTMAXES or masks or user in seen:
                continue
            if name not in _CARRIES:
                return f"`{user.name}` ({name}) reads it, not only a softmax"
            seen.add(user)
            todo.append(user)
    return None
