"""Low-rank adapters (LoRA) become part of the weights that they adapt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.graph.pattern import Match, Op, Var
from edgegen.rewrite.base import RulePass
from edgegen.rewrite.conv1x1_to_linear import conv_arguments

aten = torch.ops.aten
_LINEAR, _CONV = aten.linear.default, aten.conv2d.default


@dataclass(frozen=True)
class MergeLowRankAdapters(RulePass):
    """A linear or convolution beside a narrow pair of them, scaled and added, is one with their product in its weight.

        %h = aten.linear(%x, %w, %b)                                 %y = aten.linear(%x, %w2, %b)
        %d = aten.linear(%x, %a)          # [r, in]            ->    w2 = w + s * (up @ a)
        %u = aten.linear(%d, %up)         # [out, r]
        %y = aten.add(%h, aten.mul(%u, s))

    (Hu et al. 2021, arXiv 2106.09685.) Convolutions likewise: the first of the pair has the kernel, stride and padding
    of the base, the second is 1x1. The scale is a number or a weight of one element, before, between or after the pair,
    or absent. The product is computed in fp64 and rounded once.

    Declines
    1. a pair that is not narrower than the base: it would be no adapter, and merging it may cost precision for nothing;
    2. a bias inside the pair, weights that are computed or that another call reads too;
    3. convolutions of different stride, padding, dilation or with groups;
    4. a value inside that something else reads (no match, and no decline).
    """

    name: ClassVar[str] = "merge-low-rank-adapters"
    after: ClassVar[tuple[str, ...]] = ("remove-identities", "fold-constants")

    def pattern(self) -> tuple[Op, ...]:
        found = []
        for kind in (_LINEAR, _CONV):
            base = Op(kind, Var("x"), Var("weight"), name="base")
            for before, between, after in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)):
                source: Any = _scaled(Var("x"), "s") if before else Var("x")
                down: Any = Op(kind, source, Var("down_weight"), name="down")
                up: Any = Op(kind, _scaled(down, "s") if between else down, Var("up_weight"), name="up")
                found.append(Op(aten.add.Tensor, base, _scaled(up, "s") if after else up, commutative=True))
        return tuple(found)

    def check(self, found: Match, editor: Editor) -> str | None:
        if found.root.kwargs:
            return "the sum has a factor of its own"
        for name in ("weight", "down_weight", "up_weight"):
            if editor.value(found[name]) is None:
                return f"`{found[name].name}` is computed"
            if len(found[name].users) > 1:
                return f"`{found[name].name}` is read by another call"
        if any(len(found[name].args) > 2 and found[name].args[2] is not None for name in ("down", "up")):
            return "the pair has a bias"
        if _scale(found, editor) is None:
            return "its scale is no constant number"
        down, up = found["down_weight"].meta["val"], found["up_weight"].meta["val"]
        if down.shape[0] >= min(up.shape[0], math.prod(down.shape[1:])):
            return f"the pair has rank {down.shape[0]}, which is not lower than the base's"
        if found["base"].target is _CONV:
            base, first, second = (conv_arguments(found[name])[1:] for name in ("base", "down", "up"))
            if any(one[3] != 1 for one in (base, first, second)):
                return "a convolution has groups"
            if _pairs(base) != _pairs(first) or down.shape[2:] != found["weight"].meta["val"].shape[2:]:
                return "the pair's first convolution has another kernel, stride, padding or dilation than the base"
            if tuple(up.shape[2:]) != (1, 1) or _pairs(second)[:2] != ((1, 1), (0, 0)):
                return "the pair's second convolution is not 1x1"
        return None

    def rewrite(self, found: Match, editor: Editor) -> Node:
        weight, down, up = (editor.value(found[name]) for name in ("weight", "down_weight", "up_weight"))
        scale = _scale(found, editor)
        assert weight is not None and down is not None and up is not None and scale is not None
        product = up.double().flatten(1) @ down.double().flatten(1)
        merged = (weight.double() + scale * product.reshape(weight.shape)).to(weight.dtype)
        base = found["base"]
        kept = editor.constant(merged, editor.named(base, "weight_merged"))
        return editor.call(base.target, found["x"], kept, *base.args[2:], **base.kwargs)


def _scaled(value: Any, name: str) -> Op:
    either = (aten.mul.Tensor, aten.div.Tensor)
    return Op(either, value, Var(name, literal=True), name="scaling", commutative=True)


def _scale(found: Match, editor: Editor) -> float | None:
    """The factor between base and adapter, 1 when there is none; None when it is no constant number."""
    if "s" not in found.values:
        return 1.0
    given = found["s"]
    held = editor.value(given)
    if isinstance(held, Tensor) and held.numel() == 1:
        given = held.item()
    scaling = found["scaling"]
    if isinstance(given, bool) or not isinstance(given, int | float) or scaling.kwargs:
        return None
    if scaling.target is aten.div.Tensor and scaling.args[0] is found["s"]:
        return None
    number = 1 / given if scaling.target is aten.div.Tensor and given else float(given)
    return number if math.isfinite(number) else None


def _pairs(arguments: Any) -> tuple[tuple[int, ...], ...]:
    stride, padding, dilation = (tuple(one) * (2 // len(one)) for one in arguments[:3])
    return stride, padding, dilation
