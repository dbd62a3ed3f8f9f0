"""RMSNorm written out in operations that a delegate takes whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.graph.pattern import Match, Op, Var
from edgegen.rewrite.base import RulePass
from edgegen.rewrite.explicit_layer_norm import averager

aten = torch.ops.aten


@dataclass(frozen=True)
class ExplicitRmsNorm(RulePass):
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) over the last axis, C long.

        %y = aten.rms_norm(%x, [C], %weight, eps)

    becomes, with %a a weight [1, C] of 1/C,

        %v = aten.linear(aten.mul(%x, %x), %a, eps)  # mean square + eps: eps is the bias
        %n = aten.mul(%x, aten.rsqrt(%v))
        %y = aten.mul(%n, %weight)

    An eps that is not given is the machine epsilon of the dtype, as torch has it. `form` is `linear-mean` as above,
    or `mean`, which reduces with aten.mean.

    Declines
    1. a norm over more than the last axis.
    """

    form: Literal["linear-mean", "mean"] = "linear-mean"

    name: ClassVar[str] = "explicit-rms-norm"
    tolerance: ClassVar[float] = 1e-5
    removes: ClassVar[tuple[Any, ...]] = (aten.rms_norm.default,)

    def pattern(self) -> Op:
        return Op(aten.rms_norm.default, Var("x"))

    def check(self, found: Match, editor: Editor) -> str | None:
        axes = found.root.args[1]
        assert isinstance(axes, list | tuple)
        return None if len(axes) == 1 else f"it normalises over the last {len(axes)} axes, not one"

    def rewrite(self, found: Match, editor: Editor) -> Node:
        node, x = found.root, found["x"]
        weight, eps = ([*node.args[2:4], None, None])[:2]
        if eps is None:
            eps = torch.finfo(x.meta["val"].dtype).eps
        mean = averager(editor, node, self.form == "linear-mean")
        square = mean(editor.call(aten.mul.Tensor, x, x), eps)
        result = editor.call(aten.mul.Tensor, x, editor.call(aten.rsqrt.default, square))
        return result if weight is None else editor.call(aten.mul.Tensor, result, weight)
