"""Constants added to, or multiplied with, what a linear or convolution gives, folded into its bias and weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline

aten = torch.ops.aten
# Where the features are in the output, counted from its end for a linear, and in the weight.
CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
PRODUCTS = (aten.linear.default, *CONVS, *TRANSPOSED)
SUMS = (aten.add.Tensor, aten.sub.Tensor)
SCALES = (aten.mul.Tensor, aten.div.Tensor)
_TRANSPOSED_GROUPS = 6  # the place of `groups` among a transposed convolution's arguments


@dataclass(frozen=True)
class FoldBiasAdd(Pass):
    """A constant added to every feature is a bias, a constant factor of every feature belongs to the weight.

        %h = aten.conv2d(%x, %w, %b, ...)                       %y = aten.conv2d(%x, %w, %b2, ...)
        %y = aten.add(%h, %d: f32[1, C, 1, 1] = weight)   ->    b2 = b + d

        %h = aten.linear(%x, %w, %b)                      ->    %y = aten.linear(%x, %w2, %b2)
        %y = aten.mul(%h, 2.0)                                  w2 = 2 w, b2 = 2 b

    `sub` and `div` likewise; numbers as well as weights. It is what `specialise-timestep` with one timestep leaves of
    each resnet block's time projection. Computed in fp64 and rounded once to the dtype of the weights.

    Declines
    1. something else reads the product: it would have to be computed twice;
    2. the constant is not one value a feature, or one for all;
    3. the bias is computed; or, for a factor, the weight is computed or another call reads it;
    4. the product divides the constant;
    5. a grouped transposed convolution and a factor: no axis of its weight has all features;
    6. the result has another dtype than the product, or a folded value is not finite in it.
    """

    name: ClassVar[str] = "fold-bias-add"
    after: ClassVar[tuple[str, ...]] = ("specialise-timestep", "fold-constants", "upsample-to-conv-transpose")
    tolerance: ClassVar[float] = 1e-5

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        declined: list[Decline] = []
        modified = False
        for node in editor.nodes(*SUMS, *SCALES):  # in order, so a second constant finds the product of the first
            product, constant = _operands(node, editor)
            if product is None:
                continue
            folded = _folded(node, product, constant, editor)
            if isinstance(folded, str):
                declined.append(decline(node, folded))
                continue
            _replace(node, product, *folded, editor)
            modified = True
        if not modified:
            return Rewritten(program, False, tuple(declined))
        return Rewritten(editor.finish(), True, tuple(declined))


def _operands(node: Node, editor: Editor) -> tuple[Node | None, Any]:
    """The product and the constant (a number or the node of a weight) of a sum or a scaling."""
    for product, constant in (node.args[:2], node.args[1::-1]):
        known = isinstance(constant, int | float) or editor.value(constant) is not None
        if isinstance(product, Node) and product.target in PRODUCTS and known:
            return product, constant
    return None, None


def _folded(node: Node, product: Node, constant: Any, editor: Editor) -> tuple[Tensor | None, Tensor | None] | str:
    """New weight and bias, None for one that stays; or why there are none."""
    factor, summand = _affine(node, constant, editor)
    if factor is None:
        return "the product divides the constant"
    made, result = product.meta["val"], node.meta["val"]
    if len(product.users) > 1:
        return "something else reads the product"
    if made.shape != result.shape or made.dtype != result.dtype:
        return f"the result is {result.dtype}{list(result.shape)}, the product {made.dtype}{list(made.shape)}"
    held = editor.value(product.args[1])
    axis = made.dim() - 1 if product.target not in (*CONVS, *TRANSPOSED) else made.dim() - _weight(product).dim() + 1
    width = int(made.shape[axis])
    scale, shift = (_by_feature(value, axis, made.dim(), width) for value in (factor, summand))
    if scale is None or shift is None:
        return "the constant is not one value a feature"
    bias_node = product.args[2] if len(product.args) > 2 else None
    bias = editor.value(bias_node)
    if bias_node is not None and bias is None:
        return "the bias is computed"
    weight = None
    if not bool((scale == 1).all()):
        if held is None:
            return "the weight is computed"
        if len(product.args[1].users) > 1:  # type: ignore[union-attr]
            return f"`{product.args[1].name}` is read by another call"  # type: ignore[union-attr]
        place = int(product.target in TRANSPOSED)
        if place and len(product.args) > _TRANSPOSED_GROUPS and product.args[_TRANSPOSED_GROUPS] != 1:
            return "a grouped transposed convolution has no axis of all features"
        weight = (held.double() * scale.view([-1 if i == place else 1 for i in range(held.dim())])).to(held.dtype)
    offset: Tensor | None = shift if bias is None else bias.double() * scale + shift
    if bias is None and not bool(shift.any()):
        offset = None
    elif offset is not None:
        offset = offset.to(made.dtype)
    if any(value is not None and not bool(torch.isfinite(value).all()) for value in (weight, offset)):
        return f"a folded value is not finite in {made.dtype}"
    return weight, offset


def _affine(node: Node, constant: Any, editor: Editor) -> tuple[Tensor | None, Tensor]:
    """`node` as scale * product + shift, in fp64; no scale for a division by the product."""
    held = editor.value(constant)
    value = torch.tensor(float(constant), dtype=torch.float64) if held is None else held.detach().double()
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    first = node.args[0] is constant
    if node.target is aten.mul.Tensor:
        return value, zero
    if node.target is aten.div.Tensor:
        return (None if first else 1 / value), zero
    alpha = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
    sign = alpha if node.target is aten.add.Tensor else -alpha
    return (one * sign, value) if first else (one, value * sign)


def _by_feature(value: Tensor, axis: int, rank: int, width: int) -> Tensor | None:
    """`value` as [width], when broadcasting it to `rank` axes varies along `axis` alone."""
    if value.dim() > rank:
        return None
    shape = [1] * (rank - value.dim()) + list(value.shape)
    if any(size != 1 for place, size in enumerate(shape) if place != axis):
        return None
    return value.reshape(-1).expand(width)


def _weight(product: Node) -> Tensor:
    value: Tensor = product.args[1].meta["val"]  # type: ignore[union-attr]
    return value


def _replace(node: Node, product: Node, weight: Tensor | None, bias: Tensor | None, editor: Editor) -> None:
    x, old_weight, old_bias = (*product.args, None)[:3]
    with editor.at(node):
        new_weight = old_weight if weight is None else editor.constant(weight, editor.named(product, "weight_folded"))
        new_bias = old_bias if bias is None else editor.constant(bias, editor.named(product, "bias_folded"))
    with editor.at(product):
        new = editor.call(product.target, x, new_weight, new_bias, *product.args[3:], **product.kwargs)
    editor.replace(node, new)
    # At once, so that the next constant finds the weight read by the new product alone.
    editor.graph.erase_node(node)
    editor.graph.erase_node(product)
