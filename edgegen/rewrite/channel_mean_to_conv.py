"""Means over channels as convolutions, for delegates that reduce over height and width only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.graph.pattern import Match, Op, Var
from edgegen.rewrite.base import RulePass

aten = torch.ops.aten


@dataclass(frozen=True)
class ChannelMeanToConv(RulePass):
    """The mean over the channels of a picture [N, C, H, W], as norms over channels of video autoencoders take it.

        %m: f32[N, 1, H, W] = aten.mean(%x, [1], True)       ->   %m = aten.conv2d(%x, %a)

    with %a a weight [1, C, 1, 1] of 1/C. XNNPACK takes the convolution and not the mean, and its tensors have channels
    last, so the sum is over neighbours in memory.

    Declines a mean over the second axis that it keeps when
    1. the value is not [N, C, H, W];
    2. it is computed in another dtype than its input's.
    """

    name: ClassVar[str] = "channel-mean-to-conv"
    tolerance: ClassVar[float] = 1e-5

    def pattern(self) -> tuple[Op, ...]:
        return tuple(Op(aten.mean.dim, Var("x"), [axis], True, shared=True) for axis in (1, -3))

    def check(self, found: Match, editor: Editor) -> str | None:
        rank = found["x"].meta["val"].dim()
        if rank != 4:
            return f"its input has {rank} axes, not [N, C, H, W]"
        if found.root.meta["val"].dtype != found["x"].meta["val"].dtype:
            return "it is computed in another precision than its input"
        return None

    def rewrite(self, found: Match, editor: Editor) -> Node:
        x = found["x"]
        channels = int(x.meta["val"].shape[1])
        average = torch.full((1, channels, 1, 1), 1.0 / channels, dtype=x.meta["val"].dtype)
        return editor.call(aten.conv2d.default, x, editor.constant(average, editor.named(found.root, "average")))
