"""Nearest upsampling by two and the 3x3 convolution that follows, as one transposed convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.graph.pattern import Match, Op, Var
from edgegen.rewrite.base import RulePass

aten = torch.ops.aten
UPSAMPLES = (aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default)
# Row r, column c: whether tap c of the 3-tap kernel lands on tap r of the 4-tap one, along one axis.
_TAPS = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))


@dataclass(frozen=True)
class UpsampleToConvTranspose(RulePass):
    """Each pixel was to be written four times and then multiplied by overlapping taps: add the taps up beforehand.

        %u: f32[1, C, 2H, 2W] = aten.upsample_nearest2d(%x, None, [2.0, 2.0])
        %y = aten.conv2d(%u, %w: f32[N, C, 3, 3], %b, [1, 1], [1, 1])
    ->
        %y = aten.conv_transpose2d(%x, %w2: f32[C, N, 4, 4], %b, [2, 2], [1, 1])

    Along one axis an even output reads w0 x[i-1] + (w1 + w2) x[i] and an odd one (w0 + w1) x[i] + w2 x[i+1], so
    w2 = [w2, w1 + w2, w0 + w1, w0]. Upsampled padding is padding of what is upsampled, so borders agree as well.
    4/9 of the MACs and no op for the upsampling, which XNNPACK does not delegate; the weights grow by 16/9, and on
    CPUs the time stays about the same.

    Declines
    1. the factor is not two, on both axes;
    2. the convolution is not 3x3 with padding 1, stride 1, dilation 1 and one group;
    3. something else reads the upsampled value;
    4. its weight is computed, or another call reads it: the file would hold both forms.
    """

    name: ClassVar[str] = "upsample-to-conv-transpose"
    after: ClassVar[tuple[str, ...]] = ("remove-identities", "fold-constants")
    tolerance: ClassVar[float] = 1e-5

    def pattern(self) -> Op | tuple[Op, ...]:
        upsample = Op(UPSAMPLES, Var("x"), name="upsample", shared=True)
        return Op(aten.conv2d.default, upsample, Var("weight"), name="conv")

    def check(self, found: Match, editor: Editor) -> str | None:
        conv, before, after = found["conv"], found["x"].meta["val"].shape, found["upsample"].meta["val"].shape
        if [*after[2:]] != [2 * size for size in before[2:]]:
            return f"it upsamples from {list(before[2:])} to {list(after[2:])}, not by two"
        if _scales(found["upsample"]) not in ((None, None), (2.0, 2.0)):
            return "its scales are not two"
        stride, padding, dilation, groups = (*conv.args, *(None, [1, 1], [0, 0], [1, 1], 1)[len(conv.args) - 2 :])[3:7]
        kernel = found["weight"].meta["val"].shape[2:]
        if [*kernel] != [3, 3] or any(len({*v, 1}) > 1 for v in (stride, padding, dilation)) or groups != 1:
            return "the convolution is not 3x3 with padding, stride, dilation and groups of one"
        if len(found["upsample"].users) > 1:
            return "something else reads the upsampled value"
        if editor.value(found["weight"]) is None:
            return "its weight is computed"
        if len(found["weight"].users) > 1:
            return f"`{found['weight'].name}` is read by another call"
        return None

    def rewrite(self, found: Match, editor: Editor) -> Node:
        conv, weight = found["conv"], editor.value(found["weight"])
        assert weight is not None
        bias = conv.args[2] if len(conv.args) > 2 else None
        kernel = editor.constant(transposed_kernel(weight), editor.named(conv, "weight_transposed"))
        return editor.call(aten.conv_transpose2d.input, found["x"], kernel, bias, [2, 2], [1, 1])


def transposed_kernel(weight: Tensor) -> Tensor:
    """[N, C, 3, 3] of the convolution -> [C, N, 4, 4] of the transposed one; added up in fp64, in `weight`'s dtype."""
    taps = torch.tensor(_TAPS, dtype=torch.float64)
    return torch.einsum("ri,sj,ncij->cnrs", taps, taps, weight.double()).to(weight.dtype)


def _scales(upsample: Node) -> tuple[float | None, float | None]:
    """What the call says of its factors; with them torch computes source pixels, whatever the sizes are."""
    args: Any = upsample.args
    given: Any = upsample.kwargs
    if upsample.target is aten.upsample_nearest2d.vec:
        factors = args[2] if len(args) > 2 else given.get("scale_factors")
        return (None, None) if factors is None else (factors[0], factors[1])
    named = [given.get(name) for name in ("scales_h", "scales_w")[len(args) - 2 :]]
    return (*args[2:4], *named)
