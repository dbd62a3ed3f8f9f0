"""Sums with 0, products with 1, double negations and constants in a row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline

aten = torch.ops.aten
_SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
_PRODUCTS = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
_ONCE = (aten.relu.default, aten.abs.default)


@dataclass(frozen=True)
class SimplifyArithmetic(Pass):
    """Arithmetic that does nothing goes, and numbers that follow each other become one.

        aten.mul(%x, 1), aten.div(%x, 1), aten.add(%x, 0), aten.sub(%x, 0), aten.pow(%x, 1)       ->  %x
        aten.neg(aten.neg(%x)), aten.relu(aten.relu(%x)) (the inner one)                          ->  %x
        aten.mul(aten.mul(%x, 2.0), 3.0)                                            ->  aten.mul(%x, 6.0)
        aten.add(aten.add(%x, 2.0), 3.0)                                            ->  aten.add(%x, 5.0)

    Weights that are 1 or 0 everywhere count as numbers. The first two lines are exact but for the sign of a zero
    (-0.0 + 0 is 0.0); numbers that become one round once where they rounded twice.

    Declines
    1. what would change shape or dtype (1.0 times an integer, a weight that broadcasts);
    2. numbers that cancel (2 and -1.9: the sum was less exact than its parts) or overflow, or become subnormal;
    3. an inner call that something else reads.
    """

    name: ClassVar[str] = "simplify-arithmetic"
    tolerance: ClassVar[float] = 1e-6

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        declined: list[Decline] = []
        modified = False
        for node in editor.nodes():
            source = _identity(node, editor)
            if source is not None:
                if _like(source, node):
                    editor.replace(node, source)
                    editor.graph.erase_node(node)
                    modified = True
                else:
                    declined.append(decline(node, "it changes the shape or the dtype"))
                continue
            merged = _merged(node)
            if isinstance(merged, str):
                declined.append(decline(node, merged))
            elif merged is not None:
                value, number = merged
                with editor.at(node):
                    editor.replace(node, editor.call(node.target, value, number))
                inner = node.args[0]
                editor.graph.erase_node(node)
                editor.graph.erase_node(inner)  # type: ignore[arg-type]
                modified = True
        if not modified:
            return Rewritten(program, False, tuple(declined))
        return Rewritten(editor.finish(), True, tuple(declined))


def _like(source: Node, node: Node) -> bool:
    a, b = source.meta["val"], node.meta["val"]
    return bool(a.shape == b.shape and a.dtype == b.dtype)


def _number(value: Any, editor: Editor) -> float | None:
    """A number, or the one that a weight holds everywhere when it is 0 or 1."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    held = editor.value(value)
    if held is None or not held.numel():
        return None
    for number in (0.0, 1.0):
        if bool((held == number).all()):
            return number
    return None


def _identity(node: Node, editor: Editor) -> Node | None:
    """The argument that `node` gives back, or None."""
    args: Any = node.args
    if node.target in _SUMS or node.target in _PRODUCTS:
        neutral = 0.0 if node.target in _SUMS else 1.0
        if isinstance(args[0], Node) and _number(args[1], editor) == neutral and "rounding_mode" not in node.kwargs:
            return args[0]
        either = node.target in (aten.add.Tensor, aten.mul.Tensor) and not node.kwargs
        if either and isinstance(args[1], Node) and _number(args[0], editor) == neutral:
            return args[1]
    elif node.target is aten.pow.Tensor_Scalar and args[1] == 1:
        return args[0]  # type: ignore[no-any-return]
    elif node.target is aten.neg.default and args[0].target is aten.neg.default:
        return args[0].args[0]  # type: ignore[no-any-return]
    elif node.target in _ONCE and args[0].target is node.target:
        return args[0]  # type: ignore[no-any-return]
    return None


def _merged(node: Node) -> tuple[Node, float] | str | None:
    """What `node` and the call before it do with two numbers, as one; why not; or None when there are no two."""
    if node.target not in (aten.add.Tensor, aten.mul.Tensor) or node.kwargs:
        return None
    inner, second = node.args
    if not isinstance(inner, Node) or inner.target is not node.target or inner.kwargs or isinstance(second, Node):
        return None
    value, first = inner.args
    floats = node.meta["val"].is_floating_point() and inner.meta["val"].dtype == node.meta["val"].dtype
    if isinstance(first, Node) or not isinstance(value, Node) or not floats or not _like(value, node):
        return None
    if len(inner.users) > 1:
        return "something else reads the value between the two numbers"
    a, b = float(first), float(second)  # type: ignore[arg-type]
    if node.target is aten.add.Tensor:
        return "the two numbers cancel" if a * b < 0 else (value, a + b)
    limits = torch.finfo(node.meta["val"].dtype)
    product = abs(a * b)
    if not math.isfinite(product) or (product and not limits.smallest_normal <= product <= limits.max):
        return f"the product of the two numbers leaves the range of {node.meta['val'].dtype}"
    return value, a * b
