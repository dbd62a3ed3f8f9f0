"""The other GELU, where a target runs only one of the two. This changes numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.graph.pattern import Match, Op, Var
from edgegen.rewrite.base import RulePass

aten = torch.ops.aten


@dataclass(frozen=True)
class ApproximateGelu(RulePass):
    """Every GELU becomes the one by tanh, or the one by erf (Hendrycks and Gimpel 2016, arXiv 1606.08415).

        %y = aten.gelu(%x)                                     ->    %y = aten.gelu(%x, approximate="tanh")

    Not exact: the two differ by up to 4.8e-4, near |x| = 2.2. `tolerance` holds for values of order 1 behind one GELU;
    a network is judged by its parity gate. In no preset: a pipeline names it where a runtime leaves it no choice.

    Declines what has the form already.
    """

    form: Literal["tanh", "none"] = "tanh"

    name: ClassVar[str] = "approximate-gelu"
    tolerance: ClassVar[float] = 1e-3

    def pattern(self) -> Op:
        return Op(aten.gelu.default, Var("x"), shared=True)

    def check(self, found: Match, editor: Editor) -> str | None:
        has = found.root.kwargs.get("approximate", "none")
        return f"it is {has} already" if has == self.form else None

    def rewrite(self, found: Match, editor: Editor) -> Node:
        return editor.call(aten.gelu.default, found["x"], approximate=self.form)
