"""Activations in the form that a target runs whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.graph.pattern import Match, Op, Var
from edgegen.rewrite.base import RulePass

aten = torch.ops.aten
_ERF, _TANH = math.sqrt(0.5), math.sqrt(2 / math.pi)


@dataclass(frozen=True)
class ActivationForm(RulePass):
    """SiLU and GELU as one call, or as the calls that they are made of.

        silu="whole":  aten.mul(%x, aten.sigmoid(%x))                                ->  aten.silu(%x)
        silu="split":  aten.silu(%x)                                                 ->  aten.mul(%x, aten.sigmoid(%x))
        gelu="whole":  aten.mul(aten.mul(%x, 0.5), aten.add(aten.erf(aten.mul(%x, 0.7071...)), 1))
                                                                                     ->  aten.gelu(%x)
                       and its tanh form, with 0.044715, likewise                    ->  aten.gelu(%x, "tanh")
        gelu="split":  aten.gelu(%x)  ->  0.5 x (1 + erf(x / sqrt(2))); of the tanh form likewise
        gelu="split-tanh":  the tanh form alone, for a runtime that has one GELU and takes either for it

    These are the same function, rounded elsewhere. x * sigmoid(1.702 x), CLIP's own, and hard-swish are functions of
    their own and stay.

    Declines
    1. a GELU with numbers that are not GELU's, or that are computed;
    2. (silently) what has the form already, or whose inner values something else reads.
    """

    silu: Literal["keep", "whole", "split"] = "whole"
    gelu: Literal["keep", "whole", "split", "split-tanh"] = "whole"

    name: ClassVar[str] = "activation-form"
    tolerance: ClassVar[float] = 1e-5

    def pattern(self) -> tuple[Op, ...]:
        found: list[Op] = []
        x = Var("x")
        if self.silu == "split":
            found.append(Op(aten.silu.default, x, shared=True))
        elif self.silu == "whole":
            found.append(Op(aten.mul.Tensor, x, Op(aten.sigmoid.default, x), commutative=True, shared=True))
        if self.gelu == "split":
            found.append(Op(aten.gelu.default, x, shared=True))
        if self.gelu == "split-tanh":
            found.append(Op(aten.gelu.default, x, shared=True, approximate="tanh"))
        if self.gelu == "whole":
            found += _written_out(x)
        return tuple(found)

    def check(self, found: Match, editor: Editor) -> str | None:
        return _constants(found) if "inner" in found.values else None

    def rewrite(self, found: Match, editor: Editor) -> Node:
        x, root = found["x"], found.root
        if root.target is aten.silu.default:
            return editor.call(aten.mul.Tensor, x, editor.call(aten.sigmoid.default, x))
        if root.target is aten.gelu.default:
            return _split(x, root.kwargs.get("approximate", "none") == "tanh", editor)
        if "inner" not in found.values:
            return editor.call(aten.silu.default, x)
        if found["inner"].target is aten.erf.default:
            return editor.call(aten.gelu.default, x)
        return editor.call(aten.gelu.default, x, approximate="tanh")


def _split(x: Node, tanh: bool, editor: Editor) -> Node:
    if not tanh:
        inner = editor.call(aten.erf.default, editor.call(aten.mul.Tensor, x, _ERF))
    else:
        cube = editor.call(aten.mul.Tensor, editor.call(aten.mul.Tensor, x, x), x)
        argument = editor.call(aten.add.Tensor, x, editor.call(aten.mul.Tensor, cube, 0.044715))
        inner = editor.call(aten.tanh.default, editor.call(aten.mul.Tensor, argument, _TANH))
    half = editor.call(aten.mul.Tensor, x, 0.5)
    return editor.call(aten.mul.Tensor, half, editor.call(aten.add.Tensor, inner, 1.0))


def _written_out(x: Var) -> list[Op]:
    """The two GELUs as torch code writes them: 0.5 * x first, or x * 0.5 * (...), or x * (...) * 0.5."""

    def times(value: Any, name: str) -> Op:
        return Op(aten.mul.Tensor, value, Var(name, literal=True), commutative=True)

    scaled = (Op(aten.div.Tensor, x, Var("scale", literal=True), name="scaling"), times(x, "scale"))
    cubes = (Op(aten.pow.Tensor_Scalar, x, 3), Op(aten.pow.Tensor_Scalar, x, 3.0))
    products = Op(aten.mul.Tensor, Op(aten.mul.Tensor, x, x, shared=True), x, commutative=True)
    found = []
    inners = [Op(aten.erf.default, one, name="inner") for one in scaled]
    for cube in (*cubes, products):
        argument = Op(aten.add.Tensor, x, times(cube, "cubic"), commutative=True)
        inners.append(Op(aten.tanh.default, times(argument, "scale"), name="inner"))
    for inner in inners:
        one = Op(aten.add.Tensor, inner, Var("one", literal=True), commutative=True)
        found.append(Op(aten.mul.Tensor, times(x, "half"), one, commutative=True))
        found.append(times(Op(aten.mul.Tensor, x, one, commutative=True), "half"))
    return found


def _constants(found: Match) -> str | None:
    """Why the numbers of a written-out GELU are not GELU's, or None."""
    scale = found["scale"]
    if not all(isinstance(found[name], int | float) for name in ("half", "one", "scale")):
        return "its numbers are computed"
    if "scaling" in found.values:
        scale = 1 / scale if scale else math.inf
    expected = {"half": 0.5, "one": 1.0, "scale": _ERF if found["inner"].target is aten.erf.default else _TANH}
    values = {"half": found["half"], "one": found["one"], "scale": scale}
    if "cubic" in found.values:
        expected["cubic"], values["cubic"] = 0.044715, found["cubic"]
    for name, value in expected.items():
        if not isinstance(values[name], int | float) or not math.isclose(values[name], value, rel_tol=1e-5):
            return f"its number {values[name]} is not GELU's {value:.6g}"
    return None
