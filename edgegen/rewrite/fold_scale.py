"""Constant factors of what a linear or convolution reads, folded into its weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.graph.pattern import Match, Op, Var
from edgegen.rewrite.base import RulePass

aten = torch.ops.aten
CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
SCALES = (aten.mul.Tensor, aten.div.Tensor)


@dataclass(frozen=True)
class FoldScale(RulePass):
    """A constant factor of each input channel belongs to the weight. `fold-bias-add` folds factors of outputs.

        %s = aten.mul(%x, %g: f32[1, C, 1, 1] = weight)        ->    %y = aten.conv2d(%x, %w2, %b, ...)
        %y = aten.conv2d(%s, %w, %b, ...)                            w2[:, i] = g[i] w[:, i]

    Numbers and weights, mul and div; zero padding stays zero. Computed in fp64 and rounded once.

    Declines
    1. something else reads the scaled value: its scaling would stay;
    2. the constant is not one value a channel, or the factor divides it;
    3. the weight is computed, or read by another call;
    4. the scaled value has another shape or dtype than what is scaled, or a folded value is not finite.
    """

    name: ClassVar[str] = "fold-scale"
    after: ClassVar[tuple[str, ...]] = ("fold-constants",)

    def pattern(self) -> tuple[Op, ...]:
        scaled = Op(SCALES, name="scale", shared=True)
        return (Op((aten.linear.default, *CONVS), scaled, Var("weight")),)

    def check(self, found: Match, editor: Editor) -> str | None:
        scale = found["scale"]
        value, constant = _operands(scale, editor)
        if value is None:
            return "neither factor is constant"
        if len(scale.users) > 1:
            return "something else reads the scaled value"
        if scale.target is aten.div.Tensor and scale.args[0] is constant:
            return "the value divides the constant"
        before, after = value.meta["val"], scale.meta["val"]
        if before.shape != after.shape or before.dtype != after.dtype:
            return f"it scales {before.dtype}{list(before.shape)} to {after.dtype}{list(after.shape)}"
        weight = editor.value(found["weight"])
        if weight is None:
            return "the weight is computed"
        if len(found["weight"].users) > 1:
            return f"`{found['weight'].name}` is read by another call"
        factor = _factor(found, editor)
        if factor is None:
            return "the constant is not one value a channel"
        folded = (weight.double() * factor).to(weight.dtype)
        return None if bool(torch.isfinite(folded).all()) else "a folded value is not finite"

    def rewrite(self, found: Match, editor: Editor) -> Node:
        value, _ = _operands(found["scale"], editor)
        weight, factor = editor.value(found["weight"]), _factor(found, editor)
        assert weight is not None and factor is not None
        product = found.root
        folded = editor.constant((weight.double() * factor).to(weight.dtype), editor.named(product, "weight_scaled"))
        return editor.call(product.target, value, folded, *product.args[2:], **product.kwargs)


def _operands(scale: Node, editor: Editor) -> tuple[Node | None, Any]:
    """What is scaled, and the constant (a number or a weight's node)."""
    for value, constant in (scale.args[:2], scale.args[1::-1]):
        known = isinstance(constant, int | float) or editor.value(constant) is not None
        if isinstance(value, Node) and editor.value(value) is None and known:
            return value, constant
    return None, None


def _factor(found: Match, editor: Editor) -> Tensor | None:
    """The factor in fp64, shaped to multiply the weight; None when it is not one value a channel."""
    scale, product = found["scale"], found.root
    _, constant = _operands(scale, editor)
    held = editor.value(constant)
    value = torch.tensor(float(constant), dtype=torch.float64) if held is None else held.detach().double()
    if scale.target is aten.div.Tensor:
        value = 1 / value
    weight, rank = product.args[1].meta["val"], scale.meta["val"].dim()  # type: ignore[union-attr]
    axis = rank - 1 if product.target is aten.linear.default else rank - weight.dim() + 1
    shape = [1] * (rank - value.dim()) + list(value.shape)
    if any(size != 1 for place, size in enumerate(shape) if place != axis):
        return None
    channels = int(scale.meta["val"].shape[axis])
    value = value.reshape(-1).expand(channels)
    groups = channels // int(weight.shape[1])
    parts = value.reshape(groups, 1, -1).expand(groups, int(weight.shape[0]) // groups, -1)
    return parts.reshape(int(weight.shape[0]), -1, *[1] * (weight.dim() - 2))
