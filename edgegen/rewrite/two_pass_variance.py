"""A variance as the mean of squared deviations, not as a difference of two large numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.graph.pattern import Match, Op, Var
from edgegen.rewrite.base import RulePass

aten = torch.ops.aten


@dataclass(frozen=True)
class TwoPassVariance(RulePass):
    """E[x^2] - E[x]^2 becomes E[(x - E[x])^2].

        %a = aten.mean(aten.pow(%x, 2), dims, keep)            %m = aten.mean(%x, dims, True)
        %b = aten.mean(%x, dims, keep)                  ->     %d = aten.sub(%x, %m)
        %v = aten.sub(%a, aten.pow(%b, 2))                     %v = aten.mean(aten.mul(%d, %d), dims, keep)

    Where the mean is large beside the deviation, the difference cancels: at a mean of 100 and a deviation of 1 float16
    has no digit of it left, and it may be negative. In exact arithmetic both are the same; Chan, Golub and LeVeque,
    "Algorithms for computing the sample variance", 1983.

    Declines
    1. two means over different axes;
    2. a mean that is computed in another dtype.
    """

    name: ClassVar[str] = "two-pass-variance"
    tolerance: ClassVar[float] = 1e-4
    """The error of the form before, which is the worse one: for means up to ten deviations."""

    def pattern(self) -> tuple[Op, ...]:
        x = Var("x")
        mean = Op(aten.mean.dim, x, name="first", shared=True)
        squares = (Op(aten.pow.Tensor_Scalar, x, 2), Op(aten.mul.Tensor, x, x), Op(aten.square.default, x))
        squared = (Op(aten.pow.Tensor_Scalar, mean, 2), Op(aten.mul.Tensor, mean, mean), Op(aten.square.default, mean))
        return tuple(
            Op(aten.sub.Tensor, Op(aten.mean.dim, square, name="second"), other)
            for square in squares
            for other in squared
        )

    def check(self, found: Match, editor: Editor) -> str | None:
        first, second = found["first"], found["second"]
        if _axes(first) != _axes(second) or _keeps(first) != _keeps(second):
            return "the mean and the mean of squares go over different axes"
        if first.kwargs or second.kwargs or found.root.kwargs:
            return "a mean is computed in another dtype"
        return None

    def rewrite(self, found: Match, editor: Editor) -> Node:
        x, second = found["x"], found["second"]
        centre = editor.call(aten.mean.dim, x, second.args[1], True)
        deviation = editor.call(aten.sub.Tensor, x, centre)
        squares = editor.call(aten.mul.Tensor, deviation, deviation)
        return editor.call(aten.mean.dim, squares, second.args[1], _keeps(second))


def _axes(node: Node) -> list[int]:
    rank, axes = node.args[0].meta["val"].dim(), node.args[1]  # type: ignore[union-attr]
    given: Any = axes if axes else range(rank)
    return sorted(axis % rank for axis in given)


def _keeps(node: Node) -> bool:
    return len(node.args) > 2 and bool(node.args[2])
