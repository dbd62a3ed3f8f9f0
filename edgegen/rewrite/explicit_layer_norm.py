"""LayerNorm written out in operations that a delegate takes whole, with the variance in two passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.graph.pattern import Match, Op, Var
from edgegen.rewrite.base import RulePass

aten = torch.ops.aten


@dataclass(frozen=True)
class ExplicitLayerNorm(RulePass):
    """LayerNorm (Ba et al. 2016, arXiv 1607.06450) over the last axis, C long.

        %y = aten.layer_norm(%x, [C], %weight, %bias, eps)

    becomes, with %a a weight [1, C] of 1/C,

        %m = aten.linear(%x, %a)                     # [..., 1]
        %d = aten.sub(%x, %m)
        %v = aten.linear(aten.mul(%d, %d), %a, eps)  # variance + eps: eps is the bias
        %n = aten.mul(%d, aten.rsqrt(%v))
        %y = aten.add(aten.mul(%n, %weight), %bias)

    `form` is `linear-mean` as above, for delegates that reduce over height and width only, or `mean`, which reduces
    with aten.mean and adds eps with a call of its own.

    Declines
    1. a norm over more than the last axis.
    """

    form: Literal["linear-mean", "mean"] = "linear-mean"

    name: ClassVar[str] = "explicit-layer-norm"
    tolerance: ClassVar[float] = 1e-5
    removes: ClassVar[tuple[Any, ...]] = (aten.layer_norm.default,)

    def pattern(self) -> Op:
        return Op(aten.layer_norm.default, Var("x"))

    def check(self, found: Match, editor: Editor) -> str | None:
        axes = found.root.args[1]
        assert isinstance(axes, list | tuple)
        return None if len(axes) == 1 else f"it normalises over the last {len(axes)} axes, not one"

    def rewrite(self, found: Match, editor: Editor) -> Node:
        node, x = found.root, found["x"]
        weight, bias = ([*node.args[2:4], None, None])[:2]
        eps = node.args[4] if len(node.args) > 4 else 1e-5
        mean = averager(editor, node, self.form == "linear-mean")
        centred = editor.call(aten.sub.Tensor, x, mean(x, None))
        variance = mean(editor.call(aten.mul.Tensor, centred, centred), eps)
        result = editor.call(aten.mul.Tensor, centred, editor.call(aten.rsqrt.default, variance))
        if weight is not None:
            result = editor.call(aten.mul.Tensor, result, weight)
        return result if bias is None else editor.call(aten.add.Tensor, result, bias)


def averager(editor: Editor, node: Node, as_linear: bool) -> Any:
    """mean(v, offset): the mean over the last axis, which stays with length 1, plus a constant where one is given."""
    value = node.meta["val"]
    size, dtype = value.shape[-1], value.dtype
    if as_linear:
        row = editor.constant(torch.full((1, size), 1.0 / size, dtype=dtype), editor.named(node, "average"))

    def mean(of: Node, offset: float | None) -> Node:
        if not as_linear:
            plain = editor.call(aten.mean.dim, of, [-1], True)
            return plain if offset is None else editor.call(aten.add.Scalar, plain, offset)
        if offset is None:
            return editor.call(aten.linear.default, of, row)
        eps = editor.constant(torch.full((1,), offset, dtype=dtype), editor.named(node, "eps"))
        return editor.call(aten.linear.default, of, row, eps)

    return mean
