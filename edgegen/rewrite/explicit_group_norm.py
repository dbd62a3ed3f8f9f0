"""GroupNorm written out in operations that a delegate takes whole, with the variance in two passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.graph.pattern import Match, Op, Var
from edgegen.rewrite.base import RulePass

aten = torch.ops.aten
# Weights between which a norm's weight can go under the root: the square is then between 2^-8 and 2^8.
_SMALLEST, _LARGEST = 1 / 16, 16.0


@dataclass(frozen=True)
class ExplicitGroupNorm(RulePass):
    """GroupNorm (Wu and He 2018, arXiv 1803.08494) over [N, C, H, W] without a reshape into groups.

        %y = aten.group_norm(%x, G, %weight, %bias, eps)

    becomes, with %A the matrix that averages the C/G channels of a group and gives the mean back to each of them,

        %m = aten.mean(%x, [2, 3], True)             # [N, C, 1, 1]
        %g = aten.conv2d(%m, %A, groups=G)           # mean of the group, at every channel
        %d = aten.sub(%x, %g)
        %v = aten.mean(aten.mul(%d, %d), [2, 3], True)
        %u = aten.conv2d(%v, %A, eps, groups=G)      # variance + eps: eps is the bias
        %s = aten.mul(aten.rsqrt(%u), %weight)       # still [N, C, 1, 1]
        %y = aten.add(aten.mul(%d, %s), %bias)

    No value has more than four axes, nothing is broadcast to more than two, and the variance is that of the centred
    values: mean(x^2) - mean(x)^2 would lose all digits where the mean is large.

    `form` says how channels are averaged: `grouped-conv` with G groups and a weight [C, C/G, 1, 1]; `dense-conv` with
    one group and a weight [C, C, 1, 1], for delegates without grouped convolutions; `linear` with the channels as
    columns, [N, C] and a weight [C, C].

    Where every weight is positive, as in most trained networks, it goes into the second convolution: with row c of %A
    and eps divided by weight[c]^2, the reciprocal root is %s already.

    Declines
    1. an input that is not [N, C, H, W];
    2. an affine weight or bias that is computed by the graph, not held by it.
    """

    form: Literal["grouped-conv", "dense-conv", "linear"] = "grouped-conv"

    name: ClassVar[str] = "explicit-group-norm"
    tolerance: ClassVar[float] = 1e-5
    removes: ClassVar[tuple[Any, ...]] = (aten.group_norm.default,)

    def pattern(self) -> Op:
        return Op(aten.group_norm.default, Var("x"))

    def check(self, found: Match, editor: Editor) -> str | None:
        rank = found["x"].meta["val"].dim()
        if rank != 4:
            return f"its input has {rank} axes, not [N, C, H, W]"
        if any(one is not None and editor.value(one) is None for one in _affine(found.root)):
            return "its weight or bias is no constant of the graph"
        return None

    def rewrite(self, found: Match, editor: Editor) -> Node:
        node, x = found.root, found["x"]
        channels, groups = x.meta["val"].shape[1], node.args[1]
        weight, bias = _affine(node)
        eps = node.args[4] if len(node.args) > 4 else 1e-5
        assert isinstance(groups, int) and isinstance(eps, float)
        mean = self._averager(editor, node, channels, groups)
        centred = editor.call(aten.sub.Tensor, x, mean(_spatial_mean(editor, x), None, None))
        square = editor.call(aten.mul.Tensor, centred, centred)
        factor = None if weight is None else _inverse_square(editor, weight)
        scale = editor.call(aten.rsqrt.default, mean(_spatial_mean(editor, square), eps, factor))
        if weight is not None and factor is None:
            scale = editor.call(aten.mul.Tensor, scale, _per_channel(editor, node, weight, "scale"))
        scaled = editor.call(aten.mul.Tensor, centred, scale)
        if bias is None:
            return scaled
        return editor.call(aten.add.Tensor, scaled, _per_channel(editor, node, bias, "shift"))

    def _averager(self, editor: Editor, node: Node, channels: int, groups: int) -> Any:
        """mean(v, offset, factor): v [N, C, 1, 1] averaged within groups, given back to each channel.

        Plus a constant, then times a factor [C] for each channel, where they are given.
        """
        dtype, size = node.meta["val"].dtype, channels // groups
        shape = [channels, size, 1, 1] if self.form == "grouped-conv" else [channels, channels, 1, 1]
        average = torch.full(shape, 1.0 / size, dtype=torch.float64)
        if self.form != "grouped-conv":
            block = torch.full((size, size), 1.0 / size, dtype=torch.float64)
            average = torch.kron(torch.eye(groups, dtype=torch.float64), block).view(shape)
        average = average.flatten(1) if self.form == "linear" else average
        plain = editor.constant(average.to(dtype), editor.named(node, "group_average"))

        def mean(value: Node, offset: float | None, factor: Tensor | None) -> Node:
            matrix, constant = plain, None
            each = torch.ones(channels, dtype=torch.float64) if factor is None else factor
            if factor is not None:
                scaled = average * each.view(-1, *[1] * (average.dim() - 1))
                matrix = editor.constant(scaled.to(dtype), editor.named(node, "scaled_group_average"))
            if offset is not None:
                constant = editor.constant((each * offset).to(dtype), editor.named(node, "eps"))
            if self.form == "linear":
                batch = value.meta["val"].shape[0]
                flat = editor.call(aten.view.default, value, [batch, channels])
                mixed = editor.call(aten.linear.default, flat, matrix, *([] if constant is None else [constant]))
                return editor.call(aten.view.default, mixed, [batch, channels, 1, 1])
            split = groups if self.form == "grouped-conv" else 1
            return editor.call(aten.conv2d.default, value, matrix, constant, [1, 1], [0, 0], [1, 1], split)

        return mean


def _inverse_square(editor: Editor, held: Node) -> Tensor | None:
    """1 / weight^2 of a held [C], or None where a weight is not positive or its square would leave fp16's range."""
    value = editor.value(held)
    assert value is not None
    if not bool(((value > _SMALLEST) & (value < _LARGEST)).all()):
        return None
    return value.double() ** -2


def _affine(node: Node) -> tuple[Any, Any]:
    given = [*node.args[2:4], None, None]
    return given[0], given[1]


def _spatial_mean(editor: Editor, value: Node) -> Node:
    return editor.call(aten.mean.dim, value, [2, 3], True)


def _per_channel(editor: Editor, node: Node, held: Node, suffix: str) -> Node:
    """A held [C] as [C, 1, 1]."""
    value = editor.value(held)
    assert value is not None
    return editor.constant(value.reshape(1, -1, 1, 1).clone(), editor.named(node, suffix))
