"""The weight and bias of a norm, moved into the linears or 1x1 convolutions that read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.rewrite.base import Pass, Rewritten, decline

aten = torch.ops.aten
LAYER_NORM, GROUP_NORM, RMS_NORM = aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default
LINEAR, CONV = aten.linear.default, aten.conv2d.default
_CONV_DEFAULTS = (None, [1, 1], [0, 0], [1, 1], 1)


@dataclass(frozen=True)
class FoldNormAffine(Pass):
    """A norm that only products read keeps no weight and no bias of its own.

        %n = aten.layer_norm(%x, [C], %weight, %bias, eps)     %n = aten.layer_norm(%x, [C], None, None, eps)
        %q = aten.linear(%n, %wq)                          ->  %q = aten.linear(%n, %wq2, %bq2)
        %k = aten.linear(%n, %wk, %bk)                         %k = aten.linear(%n, %wk2, %bk2)

    with w2 = w * weight (a factor for each input feature) and b2 = b + w @ bias. Likewise aten.rms_norm, which has no
    bias, and aten.group_norm read by 1x1 convolutions. It saves two passes over the activations where a runtime runs
    the norm in pieces. Computed in fp64 and rounded once.

    Declines
    1. something else than linears, or ungrouped 1x1 convolutions without padding, reads the norm;
    2. the norm runs over more than the last axis;
    3. the norm's or a reader's weight or bias is computed, or the reader's weight is read by another call.
    """

    name: ClassVar[str] = "fold-norm-affine"
    tolerance: ClassVar[float] = 1e-5

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        declined = []
        for norm in editor.nodes(LAYER_NORM, GROUP_NORM, RMS_NORM):
            if _affine(norm) == (None, None) or not norm.users:
                continue
            reason = _refusal(norm, editor)
            if reason is not None:
                declined.append(decline(norm, reason))
                continue
            self._fold(norm, editor)
        if not editor.changes:
            return Rewritten(program, False, tuple(declined))
        return Rewritten(editor.finish(), True, tuple(declined))

    def _fold(self, norm: Node, editor: Editor) -> None:
        scale, shift = (None if one is None else editor.value(one) for one in _affine(norm))
        for reader in list(norm.users):
            weight, bias = _product(reader)
            held, offset = editor.value(weight), None if bias is None else editor.value(bias)
            assert held is not None
            with editor.at(reader):
                new: list[Any] = [norm, weight, bias, *reader.args[3:]]
                if scale is not None:
                    new[1] = editor.constant(_scaled(held, scale), editor.named(reader, "weight_with_norm"))
                if shift is not None and bool(shift.any()):
                    new[2] = editor.constant(_shifted(held, offset, shift), editor.named(reader, "bias_with_norm"))
                editor.replace(reader, editor.call(reader.target, *new))
            editor.graph.erase_node(reader)
        with editor.at(norm):
            args = list(norm.args)
            if norm.target is RMS_NORM:
                args[2] = None
            else:
                args[2:4] = [None, None][: len(args) - 2]
            editor.replace(norm, editor.call(norm.target, *args))


def _affine(norm: Node) -> tuple[Any, Any]:
    weight, bias = ([*norm.args[2:4], None, None])[:2]
    return weight, None if norm.target is RMS_NORM else bias


def _product(reader: Node) -> tuple[Any, Any]:
    return reader.args[1], reader.args[2] if len(reader.args) > 2 else None


def _refusal(norm: Node, editor: Editor) -> str | None:
    axes: Any = norm.args[1]
    if norm.target is not GROUP_NORM and len(axes) != 1:
        return f"it normalises over the last {len(axes)} axes, not one"
    if any(one is not None and editor.value(one) is None for one in _affine(norm)):
        return "its weight or bias is computed"
    wanted = CONV if norm.target is GROUP_NORM else LINEAR
    for reader in norm.users:
        if reader.target is not wanted or reader.args[0] is not norm or norm in reader.args[1:]:
            return f"`{reader.name}` reads it"
        weight, bias = _product(reader)
        if editor.value(weight) is None or (bias is not None and editor.value(bias) is None):
            return f"the weight or bias of `{reader.name}` is computed"
        if len(weight.users) > 1:
            return f"`{weight.name}` is read by another call"
        if wanted is CONV and not _pointwise(reader, weight):
            return f"`{reader.name}` is no 1x1 convolution without padding and groups"
    return None


def _pointwise(conv: Node, weight: Node) -> bool:
    options: tuple[Any, ...] = (*conv.args[2:], *_CONV_DEFAULTS[len(conv.args) - 2 :])
    _, _, padding, _, groups = options
    return [*weight.meta["val"].shape[2:]] == [1, 1] and not any(padding) and bool(groups == 1)


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """[N, C] or [N, C, 1, 1] with a factor for each of C."""
    factor = scale.double().reshape(1, -1, *[1] * (weight.dim() - 2))
    return (weight.double() * factor).to(weight.dtype)


def _shifted(weight: Tensor, bias: Tensor | None, shift: Tensor) -> Tensor:
    added = weight.double().flatten(1) @ shift.double()
    return (added if bias is None else added + bias.double()).to(weight.dtype)
