"""1x1 convolutions as linears over tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.graph.pattern import Match, Op, Var
from edgegen.graph.rearrange import Rearrangement, static_shape
from edgegen.rewrite.base import RulePass
from edgegen.rewrite.linear_to_conv1x1 import tokens_of
from edgegen.rewrite.merge_rearrangements import chain, emit, rearranged

aten = torch.ops.aten


@dataclass(frozen=True)
class Conv1x1ToLinear(RulePass):
    """A convolution of 1x1 becomes a linear over the pixels' channels.

        %x: f32[1, 64, 8, 8] = aten.reshape(aten.transpose(%t, 1, 2), [1, 64, 8, 8])
        %y: f32[1, 128, 8, 8] = aten.conv2d(%x, %w, %b)
      ->
        %l: f32[1, 64, 128] = aten.linear(%t, %w[:, :, 0, 0], %b)
        %y: f32[1, 128, 8, 8] = aten.reshape(aten.transpose(%l, 1, 2), [1, 128, 8, 8])

    `where="tokens"`: only where the image is made of tokens [B, HW, C] (or [B, H, W, C]) for the convolution, or is
    taken apart into them. `where="everywhere"`: every one. Run `sink-transposes` afterwards.

    Declines
    1. a stride, padding or groups;
    2. a weight that is computed;
    3. with `where="tokens"`, an image on both sides.
    """

    where: Literal["tokens", "everywhere"] = "tokens"

    name: ClassVar[str] = "conv1x1-to-linear"

    def pattern(self) -> Op:
        return Op(aten.conv2d.default, Var("x"), Var("weight"), shared=True)

    def check(self, found: Match, editor: Editor) -> str | None:
        weight, shape = editor.value(found["weight"]), static_shape(found["x"])
        if weight is None:
            return "its weight is computed"
        if tuple(weight.shape[2:]) != (1, 1):
            return f"its kernel is {weight.shape[2]}x{weight.shape[3]}"
        if shape is None or len(shape) != 4:
            return f"its input has shape {tuple(found['x'].meta['val'].shape)}"
        _, stride, padding, _, groups = conv_arguments(found.root)
        if groups != 1 or any(one != 1 for one in stride) or padding not in ([0, 0], [0]):
            return f"stride {stride}, padding {padding}, groups {groups}"
        if self.where == "tokens" and not _beside_tokens(found):
            return "an image comes in and goes out"
        return None

    def rewrite(self, found: Match, editor: Editor) -> Node:
        weight = editor.value(found["weight"])
        assert weight is not None
        layout = _tokens(found["x"])
        source, whole, _ = chain(found["x"])
        direct = whole.then(layout)
        start, steps = (found["x"], layout.steps()) if direct is None else (source, direct.steps())
        tokens = emit(editor, start, steps)
        flat = editor.constant(weight[:, :, 0, 0], editor.named(found.root, "weight_linear"))
        bias = conv_arguments(found.root)[0]
        linear = editor.call(aten.linear.default, tokens, flat, *([] if bias is None else [bias]))
        return emit(editor, linear, _tokens(found.root).inverse().steps())


def conv_arguments(node: Node) -> tuple[Any, list[int], list[int], list[int], int]:
    """Bias, stride, padding, dilation and groups of an aten.conv*d.default call, defaults filled in."""
    values: dict[str, Any] = {"bias": None, "stride": [1], "padding": [0], "dilation": [1], "groups": 1}
    values.update(zip(values, node.args[2:], strict=False))
    values.update(node.kwargs)
    lists = [list(values[name]) for name in ("stride", "padding", "dilation")]
    return values["bias"], lists[0], lists[1], lists[2], values["groups"]


def _tokens(image: Node) -> Rearrangement:
    shape = static_shape(image)
    assert shape is not None
    batch, channels, height, width = shape
    return tokens_of(batch, channels, height, width, 3)


def _beside_tokens(found: Match) -> bool:
    """Whether the image's elements lie as tokens before the convolution, or after it."""
    _, before, calls = chain(found["x"])
    whole = before.then(_tokens(found["x"]))
    if calls and not before.is_reshape and whole is not None and whole.is_reshape:
        return True
    after = _tokens(found.root).inverse()
    for end in rearranged(found.root):
        source, whole, _ = chain(end)
        rest = after.then(whole) if source is found.root and not whole.is_reshape else None
        if rest is not None and rest.is_reshape:
            return True
    return False
