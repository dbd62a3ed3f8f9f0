"""Where a graph does not care about the scale of a value: f(x / s) = f(x) once its epsilons are divided too.

A value of degree d is divided by s^d when the root is divided by s. RMSNorm squares (2), averages (2), takes the
inverse root (-1) and multiplies by the root (0): nothing after it notices. Linear attention divides two values of
degree 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from edgegen.graph.count import op_name
from edgegen.graph.edit import Editor
from edgegen.graph.epsilon import epsilon, set_epsilon

Degree = Fraction
REACH = 16
"""A region ends at most this many calls behind its root: beyond, it is not one formula any more."""


@dataclass(frozen=True)
class Region:
    """What a division of `root` by s changes and does not change.

    `degrees` are of the values inside, which nothing outside reads; `exits` keep their values; `edges` are the readers
    of the root that must read root / s.
    """

    root: Node
    degrees: dict[Node, Degree]
    exits: tuple[Node, ...]
    edges: tuple[Node, ...]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Calls whose numbers in them may need a change."""
        return (*self.degrees, *self.exits)


def region(editor: Editor, root: Node, target: Node) -> Region | None:
    """The scale-free region behind `root` that holds `target`, inside or as its end; None when there is none."""
    near = _near(root)
    blocked: set[Node] = set()
    while True:
        degrees, exits = _propagate(editor, root, near - blocked)
        loose = {node for node in degrees if any(user not in degrees and user not in exits for user in node.users)}
        if not loose:
            break
        blocked |= loose
    members = {**dict.fromkeys(degrees), **dict.fromkeys(exits)}
    if target not in members:
        return None
    kept = _connected(target, members)
    edges = tuple(node for node in kept if root in node.all_input_nodes)
    return Region(
        root,
        {node: degree for node, degree in degrees.items() if node in kept},
        tuple(node for node in exits if node in kept),
        edges,
    )


def rescale(editor: Editor, found: Region, exponent: int) -> None:
    """Divide the root by 2^exponent for its readers inside, and every constant that is added inside by what fits."""
    root = found.root
    first = next(node for node in editor.nodes() if node in found.edges)
    with editor.at(first):
        scaled = editor.call(torch.ops.aten.mul.Tensor, root, 2.0**-exponent)
    degrees = {**found.degrees, scaled: Degree(1)}
    for node in found.edges:
        node.replace_input_with(root, scaled)
    for node in found.nodes:
        _adjust(editor, node, degrees, lambda degree: 2.0 ** float(-exponent * degree))


def _near(root: Node) -> set[Node]:
    found, front = {root}, [root]
    for _ in range(REACH):
        front = [user for node in front for user in node.users if user not in found and user.op == "call_function"]
        found.update(front)
    return found


def _propagate(editor: Editor, root: Node, allowed: set[Node]) -> tuple[dict[Node, Degree], dict[Node, None]]:
    degrees: dict[Node, Degree] = {root: Degree(1)}
    exits: dict[Node, None] = {}
    for node in editor.nodes():
        if node not in allowed or node is root or not any(one in degrees for one in node.all_input_nodes):
            continue
        rule = _RULES.get(op_name(node))
        degree = None if rule is None else rule(editor, node, degrees)
        if degree == 0:
            exits[node] = None
        elif degree is not None:
            degrees[node] = degree
    del degrees[root]
    return degrees, exits


def _connected(target: Node, members: dict[Node, None]) -> dict[Node, None]:
    """What hangs together with `target` other than through the root, in the order of the graph."""
    found, todo = {target}, [target]
    while todo:
        node = todo.pop()
        for one in (*node.all_input_nodes, *node.users):
            if one in members and one not in found:
                found.add(one)
                todo.append(one)
    return {node: None for node in members if node in found}


Degrees = dict[Node, Degree]
Rule = Callable[[Editor, Node, Degrees], Degree | None]


def _of(value: Any, degrees: Degrees) -> Degree:
    return degrees.get(value, Degree(0)) if isinstance(value, Node) else Degree(0)


def _is_constant(editor: Editor, value: Any) -> bool:
    return isinstance(value, int | float) or editor.value(value) is not None


def _times(factor: Fraction) -> Rule:
    return lambda editor, node, degrees: _of(node.args[0], degrees) * factor


def _same(editor: Editor, node: Node, degrees: Degrees) -> Degree | None:
    return _of(node.args[0], degrees)


def _alike(editor: Editor, node: Node, degrees: Degrees) -> Degree | None:
    """A list of tensors, all of one degree."""
    found = {_of(value, degrees) for value in node.args[0]}  # type: ignore[union-attr]
    return found.pop() if len(found) == 1 else None


def _pad(editor: Editor, node: Node, degrees: Degrees) -> Degree | None:
    fill = [value for value in node.args[2:] if isinstance(value, int | float)]
    mode = [value for value in node.args[2:] if isinstance(value, str)]
    return _of(node.args[0], degrees) if not any(fill) or mode not in ([], ["constant"]) else None


def _product(editor: Editor, node: Node, degrees: Degrees) -> Degree | None:
    return _of(node.args[0], degrees) + _of(node.args[1], degrees)


def _quotient(editor: Editor, node: Node, degrees: Degrees) -> Degree | None:
    return _of(node.args[0], degrees) - _of(node.args[1], degrees)


def _power(editor: Editor, node: Node, degrees: Degrees) -> Degree | None:
    power = node.args[1]
    return _of(node.args[0], degrees) * Fraction(power) if isinstance(power, int | float) else None


def _sum(editor: Editor, node: Node, degrees: Degrees) -> Degree | None:
    """Both of one degree; a constant is divided along."""
    a, b = node.args[:2]
    if any(isinstance(value, Node) and value in degrees for value in (a, b)):
        of_a, of_b = _of(a, degrees), _of(b, degrees)
        if of_a == of_b or _is_constant(editor, b):
            return of_a if of_a != 0 else of_b if of_a == of_b else None
        if _is_constant(editor, a):
            return of_b
    return None


def _clamp(editor: Editor, node: Node, degrees: Degrees) -> Degree | None:
    bounds = [value for value in (*node.args[1:], *node.kwargs.values()) if value is not None]
    return _of(node.args[0], degrees) if all(isinstance(value, int | float) for value in bounds) else None


def _linear(editor: Editor, node: Node, degrees: Degrees) -> Degree | None:
    if any(value in degrees for value in node.args[1:3] if isinstance(value, Node)):
        return None
    bias = node.args[2] if len(node.args) > 2 else None
    return _of(node.args[0], degrees) if bias is None or editor.value(bias) is not None else None


def _norm(editor: Editor, node: Node, degrees: Degrees) -> Degree | None:
    return Degree(0) if node.args[0] in degrees and _of(node.args[0], degrees) > 0 else None


def _attention(editor: Editor, node: Node, degrees: Degrees) -> Degree | None:
    if any(isinstance(value, Node) and value in degrees for value in (*node.args[2:], *node.kwargs.values())):
        return None
    return Degree(0)


def _adjust(editor: Editor, node: Node, degrees: Degrees, factor: Callable[[Degree], float]) -> None:
    """Divide the numbers and constants in `node` that are added to a scaled value."""
    name = op_name(node)
    if name in ("aten.add", "aten.sub", "aten.rsub"):
        a, b = node.args[:2]
        for place, (constant, other) in enumerate(((a, b), (b, a))):
            if isinstance(other, Node) and other in degrees and constant not in degrees:
                _divide(editor, node, place, factor(degrees[other]))
    elif name in ("aten.linear", "aten.conv1d", "aten.conv2d", "aten.conv3d"):
        if len(node.args) > 2 and node.args[2] is not None and node.args[0] in degrees:
            _divide(editor, node, 2, factor(degrees[node.args[0]]))  # type: ignore[index]
    elif name in ("aten.clamp", "aten.clamp_min", "aten.clamp_max"):
        by = factor(degrees[node.args[0]])  # type: ignore[index]
        node.args = (node.args[0], *(value if value is None else value * by for value in node.args[1:]))  # type: ignore[operator]
        node.kwargs = {key: value if value is None else value * by for key, value in node.kwargs.items()}  # type: ignore[operator]
    elif name in ("aten.group_norm", "aten.layer_norm", "aten.rms_norm"):
        held = epsilon(node, editor.value)
        assert held is not None
        set_epsilon(editor, node, held * factor(2 * degrees[node.args[0]]))  # type: ignore[index]
    elif name == "aten.scaled_dot_product_attention":
        query = node.args[0]
        total = _of(query, degrees) + _of(node.args[1], degrees)
        scale: Any = node.kwargs.get("scale")
        usual = query.meta["val"].shape[-1] ** -0.5 if scale is None else scale  # type: ignore[union-attr]
        node.kwargs = {**node.kwargs, "scale": float(usual) / factor(total)}


def _divide(editor: Editor, node: Node, place: int, factor: float) -> None:
    value = node.args[place]
    if isinstance(value, int | float):
        node.update_arg(place, float(value) * factor)
        return
    held: Tensor | None = editor.value(value)
    assert held is not None and isinstance(value, Node)
    with editor.at(node):
        node.update_arg(place, editor.constant(held.detach() * factor, f"{value.target}_scaled"))


_LIKE_THEIR_INPUT = """
    view _unsafe_view reshape flatten unflatten transpose permute t squeeze unsqueeze expand expand_as slice select
    chunk split split_with_sizes unbind repeat repeat_interleave tril triu clone contiguous alias detach dropout to
    _to_copy relu leaky_relu abs neg mean sum amax amin std cumsum linalg_vector_norm
"""
_RULES: dict[str, Rule] = {
    **dict.fromkeys([f"aten.{name}" for name in _LIKE_THEIR_INPUT.split()], _same),
    "getitem": _same,
    "aten.cat": _alike,
    "aten.stack": _alike,
    **dict.fromkeys(("aten.pad", "aten.constant_pad_nd"), _pad),
    **dict.fromkeys(("aten.mul", "aten.matmul", "aten.bmm", "aten.mm"), _product),
    "aten.div": _quotient,
    "aten.pow": _power,
    "aten.square": _times(Fraction(2)),
    "aten.var": _times(Fraction(2)),
    "aten.sqrt": _times(Fraction(1, 2)),
    "aten.rsqrt": _times(Fraction(-1, 2)),
    "aten.reciprocal": _times(Fraction(-1)),
    **dict.fromkeys(("aten.add", "aten.sub", "aten.rsub"), _sum),
    **dict.fromkeys(("aten.clamp", "aten.clamp_min", "aten.clamp_max"), _clamp),
    **dict.fromkeys(("aten.linear", "aten.conv1d", "aten.conv2d", "aten.conv3d"), _linear),
    **dict.fromkeys(("aten.group_norm", "aten.layer_norm", "aten.rms_norm"), _norm),
    "aten.scaled_dot_product_attention": _attention,
}
