"""Batch norm in eval mode is a scale and a shift a channel: they belong to the convolution before it."""

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
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
_TRANSPOSED_GROUPS = 6


@dataclass(frozen=True)
class FoldBatchNorm(RulePass):
    """The statistics of a batch norm that follows a convolution or a linear go into its weight and bias.

        %h = aten.conv2d(%x, %w, %b, ...)                          %y = aten.conv2d(%x, %w2, %b2, ...)
        %y = aten.batch_norm(%h, %g, %beta, %mean, %var,     ->    s = g / sqrt(var + eps)
                             False, 0.1, 1e-5, ...)                w2 = s w, b2 = s (b - mean) + beta

    Convolutions of 1 to 3 dimensions, transposed ones (grouped as well) and linears over [B, C]. Computed in fp64 and
    rounded once. A batch norm with nothing to fold it into becomes mul and add of constants, which later passes know.

    Declines
    1. a batch norm that trains, or has no running statistics;
    2. statistics or weights that are computed, or a folded value that is not finite.
    """

    name: ClassVar[str] = "fold-batch-norm"

    def pattern(self) -> Op:
        return Op(aten.batch_norm.default, Var("x"), name="norm", shared=True)

    def check(self, found: Match, editor: Editor) -> str | None:
        _, gain, shift, mean, variance, trains = found.root.args[:6]
        if trains:
            return "it trains: export the module in eval mode"
        if mean is None or variance is None:
            return "it has no running statistics"
        if any(one is not None and editor.value(one) is None for one in (gain, shift, mean, variance)):
            return "its weights or statistics are computed"
        if not all(bool(torch.isfinite(one).all()) for one in _affine(found.root, editor)):
            return "its scale or shift is not finite"
        return None

    def rewrite(self, found: Match, editor: Editor) -> Node:
        norm, product = found.root, found["x"]
        scale, shift = _affine(norm, editor)
        dtype = norm.meta["val"].dtype
        weights = _folded(product, norm, editor, scale, shift)
        if weights is None:
            shape = [1, -1] + [1] * (norm.meta["val"].dim() - 2)
            gain = editor.constant(scale.to(dtype).view(shape), editor.named(norm, "scale"))
            offset = editor.constant(shift.to(dtype).view(shape), editor.named(norm, "shift"))
            return editor.call(aten.add.Tensor, editor.call(aten.mul.Tensor, product, gain), offset)
        weight = editor.constant(weights[0].to(dtype), editor.named(product, "weight_normed"))
        bias = editor.constant(weights[1].to(dtype), editor.named(product, "bias_normed"))
        return editor.call(product.target, product.args[0], weight, bias, *product.args[3:], **product.kwargs)


def _affine(norm: Node, editor: Editor) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel in fp64."""
    gain, shift, mean, variance = (None if one is None else editor.value(one) for one in norm.args[1:5])
    assert mean is not None and variance is not None
    eps: Any = norm.args[7]
    scale = torch.rsqrt(variance.double() + eps)
    scale = scale if gain is None else scale * gain.double()
    return scale.detach(), ((0 if shift is None else shift.double()) - mean.double() * scale).detach()


def _folded(product: Node, norm: Node, editor: Editor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor] | None:
    """Weight and bias in fp64 with the norm in them, or None when what is before it cannot take it."""
    if product.target not in (*CONVS, *TRANSPOSED, aten.linear.default) or len(product.users) > 1:
        return None
    if product.meta["val"].dtype != norm.meta["val"].dtype or "bias" in product.kwargs:
        return None
    if product.target is aten.linear.default and product.meta["val"].dim() != 2:
        return None  # channels of [B, L, C] are L to a batch norm
    weight = editor.value(product.args[1])
    bias_node = product.args[2] if len(product.args) > 2 else None
    bias = torch.zeros((), dtype=torch.float64) if bias_node is None else editor.value(bias_node)
    if weight is None or bias is None or product.meta["val"].dim() not in (2, weight.dim()):
        return None
    if product.target in TRANSPOSED:
        groups: Any = product.args[_TRANSPOSED_GROUPS] if len(product.args) > _TRANSPOSED_GROUPS else 1
        parts = weight.double().view(groups, -1, *weight.shape[1:])
        scaled = parts * scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
        return scaled.view(weight.shape).detach(), (bias.double() * scale + shift).detach()
    scaled = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    return scaled.detach(), (bias.double() * scale + shift).detach()
