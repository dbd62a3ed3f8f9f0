"""Pixel shuffles in the form that a target runs well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.graph.rearrange import Rearrangement, permuted, reshaped, static_shape
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline
from edgegen.rewrite.merge_rearrangements import chain, emit, terminals

aten = torch.ops.aten
_SHUFFLES = (aten.pixel_shuffle.default, aten.pixel_unshuffle.default)


@dataclass(frozen=True)
class PixelShuffleForm(Pass):
    """aten.pixel_shuffle and pixel_unshuffle, or what they are made of (Shi et al. 2016, arXiv 1609.05158).

    form="call": the views and permute that move channels into pixels, however they are grouped, become one call:

        %a = aten.view(%x, [1, 4, 2, 2, 8, 8])
        %b = aten.permute(%a, [0, 1, 4, 2, 5, 3])              ->    %y = aten.pixel_shuffle(%x, 2)
        %y = aten.reshape(%b, [1, 4, 16, 16])

    form="reshape": the call becomes reshape, permute, reshape, of at most rank 5 (batch and channels as one axis),
    which mobile delegates take; torch's own decomposition has rank 6.

    form="conv": pixel_shuffle becomes a transposed convolution, pixel_unshuffle a convolution, of stride r with
    constant weights of 0 and 1. It costs C * C * r ** 2 multiplications a pixel, so it is for few channels (the last
    layer of a decoder) on hardware where a transpose of rank 5 leaves the accelerator.

    Declines
    1. dynamic shapes, or an input that is not of rank 4;
    2. with form="conv", more than `max_channels` channels on the side of the larger image.

    form="conv" is exact for finite values: an infinite pixel makes others NaN (0 times infinity).
    """

    form: Literal["call", "reshape", "conv"] = "reshape"
    max_channels: int = 16

    name: ClassVar[str] = "pixel-shuffle-form"
    after: ClassVar[tuple[str, ...]] = ("functionalise",)
    tolerance: ClassVar[float] = 1e-6

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        declined: list[Decline] = []
        modified = False
        if self.form == "call":
            for node in terminals(editor):
                source, whole, _ = chain(node)
                known = _recognised(whole)
                if known is not None:
                    target, factor = known
                    with editor.at(node):
                        editor.replace(node, editor.call(target, source, factor))
                    modified = True
        for node in [] if self.form == "call" else editor.nodes(*_SHUFFLES):
            reason = self._refusal(node)
            if reason is not None:
                declined.append(decline(node, reason))
                continue
            with editor.at(node):
                editor.replace(node, _as_conv(node, editor) if self.form == "conv" else _as_steps(node, editor))
            editor.graph.erase_node(node)
            modified = True
        if not modified:
            return Rewritten(program, False, tuple(declined))
        return Rewritten(editor.finish(), True, tuple(declined))

    def _refusal(self, node: Node) -> str | None:
        small, large = _small_and_large(node)
        if small is None or large is None or len(small) != 4:
            return "its input is not of rank 4, or dynamic"
        if self.form == "conv" and large[1] > self.max_channels:
            return f"{large[1]} channels make a convolution of mostly zeros too costly"
        return None


def _small_and_large(node: Node) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Shapes of the image with many channels and of the one with many pixels."""
    ends = (static_shape(node.args[0]), static_shape(node))  # type: ignore[arg-type]
    return ends if node.target is aten.pixel_shuffle.default else (ends[1], ends[0])


def _shuffle(small: tuple[int, ...], factor: int) -> Rearrangement:
    """[B, C r r, H, W] -> [B, C, H r, W r]."""
    batch, deep, height, width = small
    channels = deep // factor**2
    split = (batch * channels, factor, factor, height, width)
    moved = permuted(split, (0, 3, 1, 4, 2))
    apart, joined = reshaped(small, split), reshaped(moved.target_shape, _large(small, factor))
    assert apart is not None and joined is not None
    middle = apart.then(moved)
    whole = None if middle is None else middle.then(joined)
    assert whole is not None
    return whole


def _large(small: tuple[int, ...], factor: int) -> tuple[int, ...]:
    return small[0], small[1] // factor**2, small[2] * factor, small[3] * factor


def _recognised(whole: Rearrangement) -> tuple[Any, int] | None:
    """The call that a rearrangement is, and its factor, or None."""
    for target, one in ((aten.pixel_shuffle.default, whole), (aten.pixel_unshuffle.default, whole.inverse())):
        small, large = one.source_shape, one.target_shape
        if len(small) != 4 or len(large) != 4 or large[2] % small[2]:
            continue
        factor = large[2] // small[2]
        if (
            factor > 1
            and small[1] % factor**2 == 0
            and _large(small, factor) == large
            and one == _shuffle(small, factor)
        ):
            return target, factor
    return None


def _as_steps(node: Node, editor: Editor) -> Node:
    source, factor = node.args
    assert isinstance(source, Node) and isinstance(factor, int)
    small, _ = _small_and_large(node)
    assert small is not None
    whole = _shuffle(small, factor)
    return emit(editor, source, (whole if node.target is aten.pixel_shuffle.default else whole.inverse()).steps())


def _as_conv(node: Node, editor: Editor) -> Node:
    source, factor = node.args
    assert isinstance(factor, int)
    _, large = _small_and_large(node)
    assert large is not None
    weight = _selection(large[1], factor).to(node.meta["val"].dtype)
    kernel = editor.constant(weight, editor.named(node, "selection"))
    if node.target is aten.pixel_shuffle.default:
        return editor.call(aten.conv_transpose2d.input, source, kernel, None, [factor, factor])
    return editor.call(aten.conv2d.default, source, kernel, None, [factor, factor])


def _selection(channels: int, factor: int) -> Tensor:
    """[C r r, C, r, r] with a 1 where input channel c r r + i r + j is pixel (i, j) of channel c."""
    return torch.eye(channels * factor**2).view(channels * factor**2, channels, factor, factor)
