"""Nearest upsampling by two and the 3x3 convolution that follows, as a 2x2 convolution whose channels become pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.graph.pattern import Match
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
    channels last only that permute moves anything, and no value has more than four axes.

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

    def rewrite(self, found: Match, editor: Editor) -> Node:
        conv, x = found["conv"], found["x"]
        weight = editor.value(found["weight"])
        assert weight is not None
        batch, _, height, width = x.meta["val"].shape
        shuffled = self.form == "pixel-shuffle"
        kernel = editor.constant(phase_kernel(weight, shuffled), editor.named(conv, "weight_of_phases"))
        bias: Any = conv.args[2] if len(conv.args) > 2 else None
        if bias is not None:
            bias = _repeated(editor, conv, bias, shuffled)
        phases = editor.call(aten.conv2d.default, x, kernel, bias, [1, 1], [1, 1])
        if shuffled:
            y = editor.call(aten.pixel_shuffle.default, phases, 2)
        else:
            last = editor.call(aten.permute.default, phases, [0, 2, 3, 1])
            features = weight.shape[0]
            rows = editor.call(aten.reshape.default, last, [batch * (height + 1), width + 1, 2, 2 * features])
            rows = editor.call(aten.permute.default, rows, [0, 2, 1, 3])
            image = editor.call(aten.reshape.default, rows, [batch, 2 * height + 2, 2 * width + 2, features])
            y = editor.call(aten.permute.default, image, [0, 3, 1, 2])
        y = editor.call(aten.slice.Tensor, y, 2, 1, 2 * height + 1)
        return editor.call(aten.slice.Tensor, y, 3, 1, 2 * width + 1)


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
