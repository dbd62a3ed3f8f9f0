"""3-D convolutions over frames as 2-D ones, for runtimes that have no others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.graph.pattern import Match, Op, Var
from edgegen.graph.rearrange import static_shape
from edgegen.rewrite.base import RulePass
from edgegen.rewrite.conv1x1_to_linear import conv_arguments

aten = torch.ops.aten


@dataclass(frozen=True)
class Conv3dToConv2d(RulePass):
    """A convolution of [B, C, T, H, W] becomes 2-D convolutions of its frames.

        %y = aten.conv3d(%x, %w: [O, C, k, h, w], %b, [1, 1, 1], [1, p, p])

    `form="frames"`: each output frame is one convolution of the k frames that it reads, stacked in channels; frames of
    the padding are left out of the stack, and of the weight:

        %f0 = aten.squeeze(aten.slice(%x, 2, 0, 1), 2), ...
        %y0 = aten.conv2d(aten.cat([%f0, %f1], 1), %w[:, :, 1:] as [O, 2 C, h, w], %b, [1, 1], [p, p])
        %y = aten.cat([aten.unsqueeze(%y0, 2), ...], 2)

    `form="taps"`: one 2-D convolution a tap over all frames at once, in the batch, and their sum: k calls however many
    frames there are, but a transpose on either side:

        %r = aten.reshape(aten.transpose(%x, 1, 2), [B T, C, H, W])    # zero frames put in before it
        %y = sum over j of aten.conv2d(%r[frames j, j + s, ...], %w[:, :, j])

    k = 1 needs neither: it is one convolution of frames in the batch in both. Causal padding (zeros in front alone)
    that comes as aten.constant_pad_nd or aten.pad before the convolution is read as its padding by "frames".

    Declines
    1. groups with form "frames" (form "taps" takes them);
    2. a weight that is computed, a padding that is a word, dynamic shapes.
    """

    form: Literal["frames", "taps"] = "frames"

    name: ClassVar[str] = "conv3d-to-conv2d"
    removes: ClassVar[tuple[Any, ...]] = (aten.conv3d.default, aten.conv3d.padding)

    def pattern(self) -> Op:
        return Op((aten.conv3d.default, aten.conv3d.padding), Var("x"), Var("weight"), shared=True)

    def check(self, found: Match, editor: Editor) -> str | None:
        if found.root.target is aten.conv3d.padding:
            return "its padding is a word"
        if editor.value(found["weight"]) is None:
            return "its weight is computed"
        shape = static_shape(found["x"])
        if shape is None or len(shape) != 5 or static_shape(found.root) is None:
            return f"its input has shape {tuple(found['x'].meta['val'].shape)}"
        groups = conv_arguments(found.root)[4]
        if self.form == "frames" and groups != 1 and found["weight"].meta["val"].shape[2] > 1:
            return "it has groups, which stacked frames would mix"
        return None

    def rewrite(self, found: Match, editor: Editor) -> Node:
        weight = editor.value(found["weight"])
        assert weight is not None
        bias, *lists, groups = conv_arguments(found.root)
        stride, padding, dilation = (list(one) * (3 // len(one)) for one in lists)
        conv = _Conv(found.root, bias, stride, padding, dilation, groups)
        if self.form == "frames" and weight.shape[2] > 1:
            x, front = _without_padding(found["x"])
            return _frames(x, weight, conv, front, editor)
        return _taps(found["x"], weight, conv, editor)


@dataclass(frozen=True)
class _Conv:
    node: Node
    bias: Any
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def frames(self, x: Node, weight: Tensor, bias: Any, suffix: str, editor: Editor) -> Node:
        """The 2-D part of it, of [N, C, H, W]."""
        kernel = editor.constant(weight, editor.named(self.node, suffix))
        spatial = (self.stride[1:], self.padding[1:], self.dilation[1:])
        return editor.call(aten.conv2d.default, x, kernel, bias, *spatial, self.groups)


def _without_padding(x: Node) -> tuple[Node, int]:
    """What zero frames were put in front of, and how many; `x` and 0 when there are none."""
    if x.target not in (aten.constant_pad_nd.default, aten.pad.default):
        return x, 0
    source, pads, *rest = x.args
    zero = not [one for one in rest if one not in ("constant", None, 0, 0.0)] and not x.kwargs
    padded: list[int] = list(pads)  # type: ignore[arg-type]
    if not zero or len(padded) != 6 or any(padded[:4]) or padded[4] < 0 or padded[5] != 0:
        return x, 0
    assert isinstance(source, Node)
    return source, padded[4]


def _frames(x: Node, weight: Tensor, conv: _Conv, front: int, editor: Editor) -> Node:
    count, taps = int(x.meta["val"].shape[2]), int(weight.shape[2])
    batch, channels, _, height, width = x.meta["val"].shape
    frames: dict[int, Node] = {}

    def frame(index: int) -> Node:
        if index not in frames:
            part = x if count == 1 else editor.call(aten.slice.Tensor, x, 2, index, index + 1)
            frames[index] = editor.call(aten.reshape.default, part, [batch, channels, height, width])
        return frames[index]

    made = []
    kernels: dict[tuple[int, ...], Node] = {}
    shape = [int(size) for size in conv.node.meta["val"].shape]
    for index in range(shape[2]):
        start = index * conv.stride[0] - conv.padding[0] - front
        read = [(tap, start + tap * conv.dilation[0]) for tap in range(taps)]
        inside = [(tap, place) for tap, place in read if 0 <= place < count]
        key = tuple(tap for tap, _ in inside)
        if inside:
            chosen = weight[:, :, list(key)]
        else:  # nothing but padding: a product with one tap of zeros gives the bias
            inside, chosen = [(0, 0)], torch.zeros_like(weight[:, :, :1])
        stack = [frame(place) for _, place in inside]
        joined = stack[0] if len(stack) == 1 else editor.call(aten.cat.default, stack, 1)
        if key not in kernels:
            flat = chosen.transpose(1, 2).flatten(1, 2)  # channels within taps, as the frames are stacked
            kernels[key] = editor.constant(flat, editor.named(conv.node, f"weight_frames_{len(kernels)}"))
        spatial = (conv.stride[1:], conv.padding[1:], conv.dilation[1:])
        out = editor.call(aten.conv2d.default, joined, kernels[key], conv.bias, *spatial)
        made.append(editor.call(aten.reshape.default, out, [*shape[:2], 1, *shape[3:]]))
    return made[0] if len(made) == 1 else editor.call(aten.cat.default, made, 2)


def _taps(x: Node, weight: Tensor, conv: _Conv, editor: Editor) -> Node:
    if conv.padding[0]:
        x = editor.call(aten.constant_pad_nd.default, x, [0, 0, 0, 0, conv.padding[0], conv.padding[0]])
    batch, channels, count, height, width = (int(size) for size in x.meta["val"].shape)
    shape = [int(size) for size in conv.node.meta["val"].shape]
    first = x if count == 1 or channels == 1 else editor.call(aten.transpose.int, x, 1, 2)
    frames = editor.call(aten.reshape.default, first, [batch, count, channels, height, width])
    total: Node | None = None
    for tap in range(int(weight.shape[2])):
        start = tap * conv.dilation[0]
        end = start + (shape[2] - 1) * conv.stride[0] + 1
        part = frames
        if (start, end, conv.stride[0]) != (0, count, 1):
            part = editor.call(aten.slice.Tensor, frames, 1, start, end, conv.stride[0])
        flat = editor.call(aten.reshape.default, part, [batch * shape[2], channels, height, width])
        bias = conv.bias if tap == 0 else None
        one = conv.frames(flat, weight[:, :, tap], bias, f"weight_tap_{tap}", editor)
        total = one if total is None else editor.call(aten.add.Tensor, total, one)
    assert total is not None
    apart = editor.call(aten.reshape.default, total, [batch, shape[2], shape[1], *shape[3:]])
    return editor.call(aten.transpose.int, apart, 1, 2)
