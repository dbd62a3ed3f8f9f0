"""GroupNorm as instance normalisation of its groups, on tensors of four axes."""

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
class GroupNormAsInstanceNorm(RulePass):
    """GroupNorm (Wu and He 2018, arXiv 1803.08494): a group is one channel of an image C/G times as high.

        %y = aten.group_norm(%x: [N, C, H, W], G, %weight, %bias, eps)

    becomes

        %g = aten.reshape(%x, [N, G, C / G * H, W])
        %n = aten.instance_norm(%g, None, None, None, None, True, 0.0, eps, False)
        %r = aten.reshape(%n, [N, C, H, W])
        %y = aten.add(aten.mul(%r, %weight), %bias)

    For a runtime with one operation for instance normalisation and none for GroupNorm: Core ML tools writes GroupNorm
    as seven operations on five axes, of which the variance is a value in fp16; Core ML's own keeps it to itself.

    Declines
    1. an input that is not [N, C, H, W];
    2. an affine weight or bias that is computed by the graph, not held by it.
    """

    name: ClassVar[str] = "group-norm-as-instance-norm"
    tolerance: ClassVar[float] = 1e-5
    removes: ClassVar[tuple[Any, ...]] = (aten.group_norm.default,)

    def pattern(self) -> Op:
        return Op(aten.group_norm.default, Var("x"))

    def check(self, found: Match, editor: Editor) -> str | None:
        rank = found["x"].meta["val"].dim()
        if rank != 4:
            return f"its input has {rank} axes, not [N, C, H, W]"
        affine = [one for one in found.root.args[2:4] if isinstance(one, Node)]
        return None if all(editor.value(one) is not None for one in affine) else "its weight or bias is computed"

    def rewrite(self, found: Match, editor: Editor) -> Node:
        node, x = found.root, found["x"]
        batch, channels, height, width = (int(size) for size in x.meta["val"].shape)
        groups = node.args[1]
        assert isinstance(groups, int)
        weight, bias, eps = ([*node.args[2:5], None, None, None])[:3]
        eps = 1e-5 if eps is None else eps
        seen = editor.call(aten.reshape.default, x, [batch, groups, channels // groups * height, width])
        none = (None, None, None, None)
        result = editor.call(aten.instance_norm.default, seen, *none, True, 0.0, eps, False)
        result = editor.call(aten.reshape.default, result, [batch, channels, height, width])
        for target, held, suffix in ((aten.mul.Tensor, weight, "scale"), (aten.add.Tensor, bias, "shift")):
            if held is not None:
                value = editor.value(held)
                assert value is not None
                per_channel = editor.constant(value.reshape(1, -1, 1, 1), editor.named(node, suffix))
                result = editor.call(target, result, per_channel)
        return result
