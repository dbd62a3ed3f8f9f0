"""Classifier-free guidance of scale 1 is the conditional prediction: the unconditional half need not be computed."""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from edgegen.graph.edit import Editor
from edgegen.graph.pattern import Match, Op, Var, match
from edgegen.graph.rearrange import permutation, rearrangement, static_shape
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline

aten = torch.ops.aten
# Calls that compute each entry of the first axis of their first argument on its own; further operands are weights.
_BY_ENTRY = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv_transpose2d.input,
    aten.linear.default,
    aten.group_norm.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.avg_pool2d.default,
    aten.max_pool2d.default,
    aten.embedding.default,
)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.scaled_dot_product_attention.default)
_ALONG = {  # the place of the dim among the arguments, and what it is when it is left out
    aten.softmax.int: (1, 0),
    aten.chunk.default: (2, 0),
    aten.split.Tensor: (2, 0),
    aten.split_with_sizes.default: (2, 0),
    aten.slice.Tensor: (1, 0),
    aten.select.int: (1, 0),
}
_ELEMENTWISE = (
    aten.to.dtype,
    aten.hardswish.default,
    aten.dropout.default,
    aten.clone.default,
    aten.contiguous.default,
)


class _MixesBatch(Exception):
    """A call that cannot be computed for one half of the batch."""

    def __init__(self, node: Node, why: str) -> None:
        self.node, self.why = node, why


@dataclass(frozen=True)
class DropDeadGuidance(Pass):
    """uncond + s * (cond - uncond) with s = 1, both from one batch of twice the size.

        %b = aten.cat([%x, %x])                                      %o = network(%x, cond half of %context)
        %o = network(%b, %context)                             ->    %y = %o
        %u, %c = aten.chunk(%o, 2)
        %y = aten.add(%u, aten.mul(aten.sub(%c, %u), 1.0))

    (Ho and Salimans 2022, arXiv 2207.12598.) Also uncond + (cond - uncond), cond + 0 * (cond - uncond),
    (1 - s) * uncond + s * cond, lerp, the conditional half first, two separate calls of the network, and parts taken by
    slice, split or chunk. The network is rebuilt for the conditional half, from the last call back to where the halves
    are put together: a cat, a repeat or expand, or an input or weight of both halves, of which it reads a slice. Bind
    the scale first (`bind-input`, `fold-constants`); what then is unread is left to `drop-unused-inputs`.

    Declines
    1. a scale that is no constant, or another number;
    2. a call on the way that mixes the batch, or is not known not to;
    3. something else that reads a value of both halves, so that it would be computed twice.
    """

    name: ClassVar[str] = "drop-dead-guidance"
    after: ClassVar[tuple[str, ...]] = ("functionalise", "bind-input", "fold-constants")
    tolerance: ClassVar[float] = 1e-5

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        declined: list[Decline] = []
        modified = False
        for node in editor.nodes(aten.add.Tensor, aten.lerp.Scalar, aten.lerp.Tensor):
            found = _guidance(node)
            if found is None:
                continue
            conditional = _live_side(found, editor)
            if conditional is None:
                declined.append(decline(node, "its guidance scale is not the constant 1"))
                continue
            try:
                new = _half_of(conditional, found, editor)
            except _MixesBatch as mixes:
                declined.append(decline(mixes.node, mixes.why))
                continue
            editor.replace(node, new)
            editor.sweep()
            modified = True
        if not modified:
            return Rewritten(program, False, tuple(declined))
        return Rewritten(editor.finish(), True, tuple(declined))


def _guidance(node: Node) -> Match | None:
    """`first` + `factor` * (`to` - `from`), factors left out or on both sides."""
    u, c = Var("u"), Var("c")
    between = Op(aten.sub.Tensor, c, u)
    scaled = Op(aten.mul.Tensor, between, Var("s", literal=True), commutative=True)
    weighed = [
        Op(aten.mul.Tensor, one, Var(name, literal=True), commutative=True) for one, name in ((u, "r"), (c, "s"))
    ]
    for pattern in (
        Op(aten.add.Tensor, u, scaled, commutative=True),
        Op(aten.add.Tensor, u, between, commutative=True),
        Op(aten.add.Tensor, c, scaled, commutative=True, name="beyond"),
        Op(aten.add.Tensor, *weighed, commutative=True),
        Op((aten.lerp.Scalar, aten.lerp.Tensor), u, c, Var("s", literal=True)),
    ):
        found = match(pattern, node)
        if found is None or any(call.kwargs for call in found.nodes):
            continue
        if _are_twins(found["u"], found["c"]):
            return found
    return None


def _are_twins(first: Node, second: Node) -> bool:
    """Whether two values are the halves of one, or what two calls with the same weights give."""
    a, b = _part(first), _part(second)
    if a is not None and b is not None:
        return a[0] is b[0] and a[1] != b[1]
    return first.target is second.target and len(first.args) > 1 and first.args[1:] == second.args[1:]


def _live_side(found: Match, editor: Editor) -> Node | None:
    """The one prediction that the guidance gives, or None."""
    s = _number(found.values.get("s", 1.0), editor)
    if "r" in found.values:
        r = _number(found["r"], editor)
        live = {(0.0, 1.0): "c", (1.0, 0.0): "u"}.get((r, s)) if r is not None and s is not None else None
    elif "beyond" in found.values:
        live = "c" if s == 0.0 else None
    else:
        live = {1.0: "c", 0.0: "u"}.get(s) if s is not None else None
    return None if live is None else found[live]


def _number(value: Any, editor: Editor) -> float | None:
    held = editor.value(value)
    if held is not None:
        return float(held.flatten()[0]) if held.numel() and bool((held == held.flatten()[0]).all()) else None
    return float(value) if isinstance(value, int | float) else None


def _part(node: Any) -> tuple[Node, int] | None:
    """The value of both halves and which half of its first axis `node` is, or None."""
    if not isinstance(node, Node) or (shape := static_shape(node)) is None or not shape:
        return None
    if node.target is getitem and isinstance(node.args[0], Node):
        source, place = node.args[0], node.args[1]
        if source.target not in (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default):
            return None
        dim = source.args[2] if len(source.args) > 2 else 0
        start = int(place) * shape[0]  # type: ignore[arg-type]
    elif node.target is aten.slice.Tensor:
        source = node
        dim, start = (*node.args[1:], 0, 0)[:2]  # type: ignore[assignment]
        if len(node.args) > 4 and node.args[4] != 1:
            return None
    else:
        return None
    whole = source.args[0]
    both = static_shape(whole) if isinstance(whole, Node) else None
    if both is None or not isinstance(dim, int) or dim % len(both) != 0 or both != (2 * shape[0], *shape[1:]):
        return None
    assert isinstance(whole, Node) and isinstance(start, int)
    start = start % both[0] if start < 0 else start
    return (whole, start // shape[0]) if start in (0, shape[0]) else None


def _half_of(conditional: Node, found: Match, editor: Editor) -> Node:
    """`conditional` computed on its own."""
    part = _part(conditional)
    if part is None:
        return conditional  # a call of the network by itself: the other dies unread
    halves = _Halves(editor, part[1])
    new = halves.of(part[0])
    dead = {*halves.made, *found.nodes}
    for node in halves.rebuilt:
        for user in node.users:
            if not _only_for(user, dead, halves.new) and user not in halves.new:
                raise _MixesBatch(user, f"it reads both halves of `{node.name}`, which would be computed twice")
    return new


def _only_for(node: Node, dead: set[Node], new: set[Node]) -> bool:
    """Whether a call is in `dead`, or read by nothing but such calls."""
    if node in dead:
        return True
    return node.op == "call_function" and node not in new and all(_only_for(user, dead, new) for user in node.users)


class _Halves:
    """One half of the batch of each value, made on the way from the last one back to where the halves are joined."""

    def __init__(self, editor: Editor, half: int) -> None:
        self._editor, self._half = editor, half
        self._first = editor.nodes()[0]
        self.made: dict[Node, Node] = {}
        """Value of both halves -> the call that gives one."""
        self.rebuilt: list[Node] = []
        """Calls that were made again for one half."""
        self.new: set[Node] = set()

    def of(self, last: Node) -> Node:
        """The half of `last`; the calls before it are done in order, without recursion, as networks are deep."""
        waiting = [last]
        while waiting:
            node = waiting[-1]
            if node in self.made:
                waiting.pop()
                continue
            needed = [one for one in self._needs(node) if one not in self.made]
            if needed:
                waiting += needed
                continue
            with self._editor.at(node if node.op == "call_function" else self._first):
                self.made[node] = self._make(node)
            self.new.add(self.made[node])
            waiting.pop()
        return self.made[last]

    def _needs(self, node: Node) -> list[Node]:
        """Operands of which a half is wanted to make that of `node`."""
        if node.op != "call_function" or self._joined(node) is not None:
            return []
        source = node.args[0]
        if node.target is getitem:
            return [source]  # type: ignore[list-item]
        return [one for one in node.all_input_nodes if self._batched(one, node)]

    def _joined(self, node: Node) -> Node | None:
        """The operand that is the wanted half of a cat or repeat, or None."""
        shape = static_shape(node)
        if shape is None or not shape or shape[0] % 2:
            return None
        if node.target is aten.cat.default and (len(node.args) < 2 or node.args[1] in (0, -len(shape))):
            parts: Any = node.args[0]
            sizes = [static_shape(one) for one in parts]
            if len(parts) == 2 and sizes[0] == sizes[1]:
                chosen: Node = parts[self._half]
                return chosen
        source = node.args[0] if node.args else None
        if node.target is aten.repeat.default and isinstance(source, Node):
            times: Any = node.args[1]
            if times[0] == 2 and all(one == 1 for one in times[1:]) and len(times) == source.meta["val"].dim():
                return source
        return None

    def _batched(self, operand: Node, reader: Node) -> bool:
        """Whether an operand has both halves along the axis that becomes the first of what `reader` gives."""
        shape = static_shape(operand)
        if shape is None:
            return operand.op == "call_function"  # several values, as chunk gives
        made = static_shape(reader) or static_shape(reader.args[0])  # type: ignore[arg-type]
        assert made is not None
        if reader.target in _BY_ENTRY:
            first = reader.args[1] if reader.target is aten.embedding.default else reader.args[0]
            return operand is first
        if rearrangement(reader) is not None or reader.target in _ALONG:
            return True
        return len(shape) == len(made) and shape[0] == made[0]

    def _make(self, node: Node) -> Node:
        editor, shape = self._editor, static_shape(node)
        if node.op != "call_function":
            assert shape is not None
            if not shape or shape[0] % 2:
                raise _MixesBatch(node, "it has no two halves")
            length = shape[0] // 2
            held = editor.value(node)
            if held is not None:
                return editor.constant(held[self._half * length :][:length], f"{node.name}_half")
            return editor.call(aten.slice.Tensor, node, 0, self._half * length, (self._half + 1) * length)
        joined = self._joined(node)
        if joined is not None:
            return joined
        self._refuse_mixing(node)
        self.rebuilt.append(node)

        def half(one: Node) -> Node:
            return self.made[one] if one in self.made and one in needs else one

        needs = set(self._needs(node))
        if rearrangement(node) is not None and permutation(node) is None:
            assert shape is not None
            return editor.call(aten.reshape.default, half(node.args[0]), [shape[0] // 2, *shape[1:]])  # type: ignore[arg-type]
        if node.target is aten.expand.default:
            assert shape is not None
            return editor.call(aten.expand.default, half(node.args[0]), [shape[0] // 2, *shape[1:]])  # type: ignore[arg-type]
        args: Any = map_arg(node.args, half)
        kwargs: Any = map_arg(node.kwargs, half)
        return editor.call(node.target, *args, **kwargs)

    def _refuse_mixing(self, node: Node) -> None:
        if node.target is not getitem and not _by_entry(node):
            raise _MixesBatch(node, "it mixes the two halves of the batch, or is not known not to")


def _by_entry(node: Node) -> bool:
    """Whether a call computes each half of its first axis from the same half of its operands."""
    target: Any = node.target
    shape = static_shape(node)
    source = static_shape(node.args[0]) if node.args and isinstance(node.args[0], Node) else shape
    if rearrangement(node) is not None:
        dims = permutation(node)
        return dims[0] == 0 if dims is not None else bool(shape and source and shape[0] % 2 == 0 == source[0] % 2)
    if target in _BY_ENTRY:
        return target is aten.embedding.default or (source is not None and len(source) > 1)
    if target in _PRODUCTS:
        return all(isinstance(one, Node) and len(static_shape(one) or ()) >= 3 for one in node.args[:2])
    if target is aten.cat.default:
        dim: Any = node.args[1] if len(node.args) > 1 else 0
        return shape is not None and dim % len(shape) != 0
    if target is aten.expand.default:
        return bool(shape and source and len(shape) == len(source) and shape[0] == source[0])
    if target in _ALONG:
        return source is not None and _dim(node) % len(source) != 0
    if target in (aten.mean.dim, aten.amax.default):
        axes: Any = node.args[1] if len(node.args) > 1 else None
        return bool(axes and source and all(one % len(source) for one in axes))
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return target in _ELEMENTWISE or torch.Tag.pointwise in target.tags


def _dim(node: Node) -> int:
    place, default = _ALONG[node.target]  # type: ignore[index]
    value = node.args[place] if len(node.args) > place else default
    assert isinstance(value, int)
    return value
