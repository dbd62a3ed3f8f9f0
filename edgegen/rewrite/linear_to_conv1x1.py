"""Linears over the channels of an image as 1x1 convolutions of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.graph.pattern import Match, Op, Var
from edgegen.graph.rearrange import Rearrangement, permuted, reshaped, static_shape
from edgegen.rewrite.base import RulePass
from edgegen.rewrite.merge_rearrangements import chain, emit, rearranged

aten = torch.ops.aten


@dataclass(frozen=True)
class LinearToConv1x1(RulePass):
    """A linear over channels-last tokens becomes a convolution of the channels-first image that they stand for.

        %t: f32[1, 4096, 64] = aten.transpose(aten.flatten(%x, 2), 1, 2)
        %y: f32[1, 4096, 128] = aten.linear(%t, %w, %b)
      ->
        %c: f32[1, 128, 64, 64] = aten.conv2d(%x, %w[:, :, None, None], %b)
        %y: f32[1, 4096, 128] = aten.reshape(aten.permute(%c, [0, 2, 3, 1]), [1, 4096, 128])   (or flatten, transpose)

    `where="images"`: only tokens that are made of an image [B, C, H, W], or become one. `where="everywhere"`: others
    as well, as images of height 1 ([B, L, C] is [B, C, 1, L], [B, C] is [B, C, 1, 1]), which is what Apple's rules for
    the Neural Engine ask for. Run `sink-transposes` afterwards: it cancels what this adds on either side.

    Declines
    1. a weight that is computed;
    2. with `where="images"`, tokens of no image;
    3. more than four axes, or a dynamic shape.
    """

    where: Literal["images", "everywhere"] = "images"

    name: ClassVar[str] = "linear-to-conv1x1"

    def pattern(self) -> Op:
        return Op(aten.linear.default, Var("x"), Var("weight"), shared=True)

    def check(self, found: Match, editor: Editor) -> str | None:
        weight = editor.value(found["weight"])
        if weight is None or weight.dim() != 2:
            return "its weight is computed"
        shape = static_shape(found["x"])
        if shape is None or not 2 <= len(shape) <= 4:
            return f"its input has shape {tuple(found['x'].meta['val'].shape)}"
        if self.where == "images" and _of_image(found) is None:
            return "its tokens are no image's"
        return None

    def rewrite(self, found: Match, editor: Editor) -> Node:
        weight, bias = editor.value(found["weight"]), _bias(found.root)
        assert weight is not None
        layout = _of_image(found)
        if layout is None:
            shape = static_shape(found["x"])
            assert shape is not None
            layout = tokens_of(shape[0], shape[-1], shape[1] if len(shape) == 4 else 1, _length(shape), len(shape))
        source, whole, _ = chain(found["x"])
        direct = whole.then(layout.inverse())
        start, steps = (found["x"], layout.inverse().steps()) if direct is None else (source, direct.steps())
        image = emit(editor, start, steps)
        kernel = editor.constant(weight[:, :, None, None], editor.named(found.root, "weight_1x1"))
        conv = editor.call(aten.conv2d.default, image, kernel, *([] if bias is None else [bias]))
        after = layout.resized(tuple(found.root.meta["val"].shape))
        assert after is not None
        return emit(editor, conv, after.steps())


def tokens_of(batch: int, channels: int, height: int, width: int, rank: int) -> Rearrangement:
    """From [B, C, H, W] to [B, H, W, C] (rank 4), [B, HW, C] (rank 3) or [B, C] (rank 2, of one pixel)."""
    last = permuted((batch, channels, height, width), (0, 2, 3, 1))
    shape = {4: (batch, height, width, channels), 3: (batch, height * width, channels), 2: (batch, channels)}[rank]
    grouped = reshaped(last.target_shape, shape)
    assert grouped is not None
    found = last.then(grouped)
    assert found is not None
    return found


def _length(shape: tuple[int, ...]) -> int:
    return 1 if len(shape) == 2 else shape[-2]


def _bias(node: Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _of_image(found: Match) -> Rearrangement | None:
    """From the image that the tokens are made of, or become, to the tokens; None when there is none."""
    shape = static_shape(found["x"])
    assert shape is not None
    sizes = [(chain(found["x"])[0], False), *((end, True) for end in rearranged(found.root))]
    for image, made in sizes:
        size = static_shape(image)
        if size is None or len(size) != 4:
            continue
        channels = found.root.meta["val"].shape[-1] if made else shape[-1]
        if size[0] != shape[0] or size[1] != channels or size[2] * size[3] * shape[0] * shape[-1] != math.prod(shape):
            continue
        layout = tokens_of(shape[0], shape[-1], size[2], size[3], len(shape))
        after = layout.resized(tuple(found.root.meta["val"].shape))
        source, whole, _ = chain(image if made else found["x"])
        if source is (found.root if made else image) and whole == (after.inverse() if made and after else layout):
            return layout
    return None
