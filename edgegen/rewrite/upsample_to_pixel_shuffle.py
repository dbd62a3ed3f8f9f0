"""Nearest upsampling by two and the 3x3 convolution that follows, as a 2x2 convolution whose channels become pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from edgegen.graph.edit import Editor, made_by
from edgegen.graph.pattern import Match, Op, Var
from edgegen.rewrite.upsample_to_conv_transpose import UpsampleToConvTranspose

aten = torch.ops.aten
# Parity, tap of the 2-tap kernel, tap of the 3-tap kernel that lands on it, along one axis.
_TAPS = (((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)), ((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)))


@dataclass(frozen=True)
class UpsampleToPixelShuffle(UpsampleToConvTranspose):
    """The four pixels that one source pixel becomes are four groups of channels (Shi et al. 2016, arXiv 1609.05158).

        %u: f32[B, C, 2H, 2W] = aten.upsample_nearest2d(%x, None, [2.0, 2.0])
        %y = aten.conv2d(%u, %w: f32[N, C, 3, 3], %b, [1, 1], [1, 1])
    ->
        %z: f32[B, 4N, H+1, W+1] = aten.conv2d(%x, %w2: f32[4N, C, 2, 2], %b2, [1, 1], [1, 1])
        %p: f32[B, N, 2H+2, 2W+2] = aten.pixel_shuffle(%z, 2)
        %y = %p without its outermost pixels

    Along one axis, output 2k-1 is (w0 + w1) x[k-1] + w2 x[k] and output 2k is w0 x[k-1] + (w1 + w2) x[k]: both read the
    same two pixels, so one convolution gives both, for k = 0..H with a pixel of padding. 4/9 of the MACs, on kernels
    that every runtime has tuned, unlike those of a transposed convolution; the weights grow by 16/9.

    `form` is `pixel-shuffle`, or `permute`, which says the same with reshapes and one rank-4 permute: in a layout with
    channels last only that permute moves anything, and no value has more than four axes. What this pass wrote in the
    first form it brings to the second, the same output channels in another order: their codes stay what they are.

    Declines as `upsample-to-conv-transpose` does.
    """

    form: Literal["pixel-shuffle", "permute"] = "pixel-shuffle"

    name: ClassVar[str] = "upsample-to-pixel-shuffle"
    # These would merge the permutes with others, and take them for work in channels-first memory.
    after: ClassVar[tuple[str, ...]] = (
        *UpsampleToConvTranspose.after,
        "merge-rearrangements",
        "sink-transposes",
    )

    def pattern(self) -> Op | tuple[Op, ...]:
        upsampled = super().pattern()
        if self.form == "pixel-shuffle" or not isinstance(upsampled, Op):
            return upsampled
        phases = Op(aten.conv2d.default, Var("x"), Var("weight"), name="phases")
        return upsampled, Op(aten.pixel_shuffle.default, phases, 2, name="shuffle")

    def check(self, found: Match, editor: Editor) -> str | None:
        if "shuffle" not in found.values:
            return super().check(found, editor)
        conv, weight = found["phases"], found["weight"]
        if self.name not in made_by(found["shuffle"]):
            return "it was in the model"
        constant = all(one is None or editor.value(one) is not None for one in conv.args[1:3])
        return None if constant and len(weight.users) == 1 else "its weight is computed, or another call reads it"

    def rewrite(self, found: Match, editor: Editor) -> Node:
        if "shuffle" in found.values:
            return _permuted(editor, found["shuffle"], found["phases"])
        conv, x = found["conv"], found["x"]
        weight = editor.value(found["weight"])
        assert weight is not None
        height, width = x.meta["val"].shape[2:]
        shuffled = self.form == "pixel-shuffle"
        kernel = editor.constant(phase_kernel(weight, shuffled), editor.named(conv, "weight_of_phases"))
        bias: Any = conv.args[2] if len(conv.args) > 2 else None
        if bias is not None:
            bias = _repeated(editor, conv, bias, shuffled)
        phases = editor.call(aten.conv2d.default, x, kernel, bias, [1, 1], [1, 1])
        y = editor.call(aten.pixel_shuffle.default, phases, 2) if shuffled else _pixels(editor, phases)
        y = editor.call(aten.slice.Tensor, y, 2, 1, 2 * height + 1)
        return editor.call(aten.slice.Tensor, y, 3, 1, 2 * width + 1)


def _pixels(editor: Editor, phases: Node) -> Node:
    """[B, 4N, H, W], channels (row, column, feature) -> [B, N, 2H, 2W]."""
    batch, channels, height, width = phases.meta["val"].shape
    last = editor.call(aten.permute.default, phases, [0, 2, 3, 1])
    rows = editor.call(aten.reshape.default, last, [batch * height, width, 2, channels // 2])
    rows = editor.call(aten.permute.default, rows, [0, 2, 1, 3])
    image = editor.call(aten.reshape.default, rows, [batch, 2 * height, 2 * width, channels // 4])
    return editor.call(aten.permute.default, image, [0, 3, 1, 2])


def _permuted(editor: Editor, shuffle: Node, conv: Node) -> Node:
    """What `shuffle` gives of `conv`, written the other way."""

    def reordered(place: int, said: str) -> Node | None:
        value = editor.value(conv.args[place]) if place < len(conv.args) else None
        if value is None:
            return None
        turned = value.reshape(-1, 4, *value.shape[1:]).transpose(0, 1).reshape(value.shape).contiguous()
        return editor.constant(turned, editor.named(conv, said))

    weight, bias = reordered(1, "weight_of_phases"), reordered(2, "bias_of_phases")
    with editor.at(conv):
        phases = editor.call(conv.target, conv.args[0], weight, bias, *conv.args[3:], **conv.kwargs)
    with editor.at(shuffle):
        return _pixels(editor, phases)


def phase_kernel(weight: Tensor, shuffled: bool) -> Tensor:
    """[N, C, 3, 3] -> [4N, C, 2, 2], added up in fp64, in `weight`'s dtype.

    Features run as pixel_shuffle reads them (feature, row, column) or, not `shuffled`, (row, column, feature).
    """
    taps = torch.tensor(_TAPS, dtype=torch.float64)
    order = "nabcuv" if shuffled else "abncuv"
    phases = torch.einsum(f"aui,bvj,ncij->{order}", taps, taps, weight.double())
    return phases.reshape(-1, weight.shape[1], 2, 2).to(weight.dtype)


def _repeated(editor: Editor, conv: Node, bias: Node, shuffled: bool) -> Node:
    """The bias of every phase: a constant's is a constant."""
    value = editor.value(bias)
    if value is not None:
        repeated = value.repeat_interleave(4) if shuffled else value.repeat(4)
        return editor.constant(repeated, editor.named(conv, "bias_of_phases"))
    if shuffled:
        return editor.call(aten.repeat_interleave.self_int, bias, 4)
    return editor.call(aten.repeat.default, bias, [4])
