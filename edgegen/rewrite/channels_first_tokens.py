"""Transformer blocks with channels before tokens: [B, L, C] becomes [B, C, 1, L], linears become 1x1 convolutions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.edit import Editor
from edgegen.graph.rearrange import Rearrangement, identity, permuted, rearrangement, reshaped, static_shape
from edgegen.rewrite.base import Decline, Pass, Rewritten, decline
from edgegen.rewrite.channels_first_attention import ends
from edgegen.rewrite.merge_rearrangements import chain, emit

aten = torch.ops.aten
UNARY = (
    aten.gelu.default,
    aten.silu.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.exp.default,
    aten.neg.default,
    aten.square.default,
    aten.rsqrt.default,
    aten.clamp.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.leaky_relu.default,
    aten.mul.Scalar,
    aten.add.Scalar,
    aten.sub.Scalar,
    aten.div.Scalar,
    aten.pow.Tensor_Scalar,
    aten.to.dtype,
    aten._to_copy.default,
)
BINARY = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes)
NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_AXES = (0, 3, 1)
"""Where batch, tokens and channels of [B, L, C] are in [B, C, 1, L]."""
_MOST_SHIFT = 1e3


@dataclass(frozen=True)
class ChannelsFirstTokens(Pass):
    """Regions of token-wise ops, which read and give [B, L, C], computed on [B, C, 1, L].

        %t = aten.transpose(aten.flatten(%x, 2), 1, 2)       %t = aten.reshape(%x, [B, C, 1, L])
        %n = aten.layer_norm(%t, [C], %g, %b)           ->   %n = (mean, sub, mul, mean, add, rsqrt, mul over axis 1)
        %y = aten.linear(%n, %w)                             %y = aten.conv2d(%n, %w as [D, C, 1, 1])
        %z = aten.add(%t, aten.gelu(%y))                     %z = aten.add(%t, aten.gelu(%y))
        %o = aten.view(aten.transpose(%z, 1, 2), [B, C, H, W])    %o = aten.reshape(%z, [B, C, H, W])

    A region is what linears, LayerNorms, RMSNorms, elementwise ops, splits, slices and concatenations make of each
    other. It moves when that leaves fewer permutes at its borders than there were; one linear alone at its border
    stays where it is when that saves one. LayerNorm keeps the order in which ane_transformers writes it, shift before
    scale, which Core ML tools recognise as one `layer_norm` over axis 1; where a scale is too near 0 for that, scale
    comes first.

    Declines
    1. a region whose borders are in token layout: it would get more permutes, not fewer;
    2. (as members; the region ends there) a linear whose weight the graph computes, a norm over more than the last
       axis or whose weight it computes, operands that broadcast to more axes, dynamic shapes.
    """

    name: ClassVar[str] = "channels-first-tokens"
    after: ClassVar[tuple[str, ...]] = (
        "remove-identities",
        "fold-constants",
        "channels-first-attention",
        "split-chunked-linear",
    )
    tolerance: ClassVar[float] = 1e-5

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        declined: list[Decline] = []
        moving: set[Node] = set()
        left: list[set[Node]] = []
        for region in _regions(editor):
            kept = _trimmed(editor, region)
            now, then = _permutes(editor, kept)
            if then < now:
                moving |= kept
            else:
                left.append(region)
        for regions in _neighbours(editor, left):  # what none saves alone, they may when they share what they read
            kept = _trimmed(editor, set().union(*regions))
            now, then = _permutes(editor, kept)
            if then < now:
                moving |= kept
            elif any(node.target is aten.linear.default or node.target in NORMS for node in kept):
                first = next(node for node in editor.nodes() if node in kept)
                said = f"{now} permutes at the borders of {len(kept)} ops would become {then}"
                declined.append(decline(first, said))
        if not moving:
            return Rewritten(program, False, tuple(declined))
        _Twins(editor, moving).write()
        return Rewritten(editor.finish(), True, tuple(declined))


def _tokens(node: Any) -> bool:
    """A floating value [B, L, C]."""
    shape = static_shape(node) if isinstance(node, Node) else None
    return shape is not None and len(shape) == 3 and node.meta["val"].is_floating_point()


def _member(editor: Editor, node: Node) -> bool:
    """Whether a call works on tokens and has a form with channels first."""
    target, args = node.target, node.args
    if target is operator.getitem:
        return _tokens(node) and isinstance(args[0], Node) and _member(editor, args[0])
    if target in SPLITS:
        return _tokens(args[0])
    if not _tokens(node):
        return False
    if target is aten.linear.default:
        return _tokens(args[0]) and all(editor.value(one) is not None for one in args[1:] if one is not None)
    if target in NORMS:
        affine = [one for one in args[2:4] if isinstance(one, Node)]
        return len(args[1]) == 1 and all(editor.value(one) is not None for one in affine)  # type: ignore[arg-type]
    if target in UNARY:
        return _tokens(args[0])
    if target in BINARY:
        operands = [one for one in args[:2] if isinstance(one, Node)]
        shape = node.meta["val"].shape
        return any(one.meta["val"].shape == shape for one in operands) and all(_operand(one) for one in operands)
    if target is aten.slice.Tensor:
        return _tokens(args[0])
    if target is aten.cat.default:
        return all(_tokens(one) for one in args[0])  # type: ignore[union-attr]
    return False


def _operand(node: Node) -> bool:
    """What a binary op on tokens can take beside them: tokens, [C], or one number."""
    shape = static_shape(node)
    return shape is not None and (_tokens(node) or len(shape) == 1 or math.prod(shape) == 1)


def _inputs(node: Node) -> list[Node]:
    """The arguments of a member that are tokens, or lists of them."""
    return [one for one in node.all_input_nodes if _tokens(one) or one.target in SPLITS]


def _regions(editor: Editor) -> list[set[Node]]:
    """Members that feed one another, in the order in which they begin."""
    owner: dict[Node, set[Node]] = {}
    for node in editor.nodes():
        if not _member(editor, node):
            continue
        region = {node}
        for one in _inputs(node):
            if one in owner and owner[one] is not region:
                region |= owner[one]
        for one in region:
            owner[one] = region
    unique = {id(region): region for region in owner.values()}
    return list(unique.values())


def _neighbours(editor: Editor, regions: list[set[Node]]) -> list[list[set[Node]]]:
    """Regions that read the same value from outside, together."""
    groups: list[tuple[set[Node], list[set[Node]]]] = []
    for region in regions:
        read = {chain(entry)[0] for entry in _borders(editor, region)[0]}
        joined = [group for group in groups if group[0] & read]
        groups = [group for group in groups if group not in joined]
        groups.append((read.union(*(one for one, _ in joined)), [*(one for _, many in joined for one in many), region]))
    return [many for _, many in groups]


def _borders(editor: Editor, region: set[Node]) -> tuple[list[Node], list[tuple[Node, Node, Rearrangement]]]:
    """What the region reads from outside, weights left out, and (member, value, how) of what outsiders read of it."""
    inside: dict[Node, None] = {}
    outside: list[tuple[Node, Node, Rearrangement]] = []
    for node in [one for one in editor.nodes() if one in region]:
        for one in _inputs(node):
            if one not in region and editor.value(one) is None:
                inside[one] = None
        if node.target in SPLITS:
            continue
        shape = static_shape(node)
        assert shape is not None
        for end, how in ends(node, identity(shape)):
            if end is not node or any(user not in region and rearrangement(user) is None for user in node.users):
                outside.append((node, end, how))
    return list(inside), outside


def _permutes(editor: Editor, region: set[Node]) -> tuple[int, int]:
    """Permutes at the borders as they are, and as they would be."""
    entries, exits = _borders(editor, region)
    now = 0
    wanted = set()
    for entry in entries:
        source, how, calls = chain(entry)
        now += int(not how.is_reshape and bool(calls))
        whole = how.then(_layout(how.target_shape))
        if whole is None or not whole.is_reshape:
            wanted.add((entry if whole is None else source, whole))
    then = len(wanted)
    for node, _, how in exits:
        now += int(not how.is_reshape)
        whole = _layout(tuple(node.meta["val"].shape)).inverse().then(how)
        then += int(whole is None or not whole.is_reshape)
    return now, then


def _trimmed(editor: Editor, region: set[Node]) -> set[Node]:
    """The region without linears at its border that read from outside and are read there in token layout."""
    kept = set(region)
    for node in [one for one in editor.nodes(aten.linear.default) if one in region]:
        alone = all(one not in kept for one in (*_inputs(node), *node.users))
        if alone and len(kept) > 1:
            with_it, without = _permutes(editor, kept), _permutes(editor, kept - {node})
            if with_it[1] - with_it[0] > without[1] - without[0]:
                kept.remove(node)
    return kept


def _layout(shape: tuple[int, ...]) -> Rearrangement:
    """[B, L, C] to [B, C, 1, L]."""
    batch, length, channels = shape
    view = reshaped((batch, channels, length), (batch, channels, 1, length))
    assert view is not None
    layout = permuted(shape, (0, 2, 1)).then(view)
    assert layout is not None
    return layout


@dataclass
class _Twins:
    """Members of regions written anew with channels first."""

    editor: Editor
    region: set[Node]
    made: dict[Node, Any] = field(default_factory=dict)
    moved: dict[tuple[Node, Rearrangement], Node] = field(default_factory=dict)
    weights: dict[Any, Node] = field(default_factory=dict)

    def write(self) -> None:
        members = [node for node in self.editor.nodes() if node in self.region]
        _, exits = _borders(self.editor, self.region)
        for node in members:
            with self.editor.at(node):
                self.made[node] = self._twin(node)
        for node, end, how in exits:
            whole = _layout(tuple(node.meta["val"].shape)).inverse().then(how)
            with self.editor.at(end):
                if whole is None:
                    back = _layout(tuple(node.meta["val"].shape)).inverse()
                    new = emit(self.editor, emit(self.editor, self.made[node], back.steps()), how.steps())
                else:
                    new = emit(self.editor, self.made[node], whole.steps())
            self.editor.replace(end, new)

    def _twin(self, node: Node) -> Any:
        call, target, args = self.editor.call, node.target, node.args
        if target is aten.linear.default:
            return self._convolution(node)
        if target in NORMS:
            return self._norm(node)
        if target is operator.getitem:
            return call(operator.getitem, self.made[args[0]], args[1])  # type: ignore[index]
        if target in BINARY:
            first, second = (self._second(node, one) for one in args[:2])
            return call(target, first, second, *args[2:], **node.kwargs)
        if target is aten.cat.default:
            axis = args[1] if len(args) > 1 else 0
            return call(target, [self._value(one) for one in args[0]], _axis(axis))  # type: ignore[union-attr]
        if target in SPLITS:
            sizes, axis = args[1], args[2] if len(args) > 2 else 0
            return call(target, self._value(args[0]), sizes, _axis(axis))
        if target is aten.slice.Tensor:
            axis = args[1] if len(args) > 1 else 0
            return call(target, self._value(args[0]), _axis(axis), *args[2:])
        return call(target, self._value(args[0]), *args[1:], **node.kwargs)

    def _value(self, node: Any) -> Node:
        """Tokens [B, L, C] as [B, C, 1, L]."""
        if node not in self.made:
            held = self.editor.value(node)
            if held is not None:
                self.made[node] = self._held(node, lambda value: value.transpose(1, 2).unsqueeze(2))
            else:
                source, how, _ = chain(node)
                whole = how.then(_layout(how.target_shape))
                if whole is None:
                    source, whole = node, _layout(how.target_shape)
                # Made for the first reader, so all later ones find it before them.
                if (source, whole) not in self.moved:
                    self.moved[source, whole] = emit(self.editor, source, whole.steps())
                self.made[node] = self.moved[source, whole]
        found: Node = self.made[node]
        return found

    def _second(self, node: Node, one: Any) -> Any:
        """An operand of a binary op."""
        if _tokens(one):
            return self._value(one)
        if not isinstance(one, Node) or one.meta["val"].numel() == 1:
            return one
        if self.editor.value(one) is not None:
            return self._held(one, lambda value: value.reshape(1, -1, 1, 1))
        return self.editor.call(aten.reshape.default, one, [1, -1, 1, 1])

    def _held(self, node: Node, form: Callable[[Tensor], Tensor], suffix: str = "channels_first") -> Node:
        """A weight in another form, made once."""
        key = (node, suffix)
        if key not in self.weights:
            value = self.editor.value(node)
            assert value is not None
            self.weights[key] = self.editor.constant(form(value), f"{node.name.removeprefix('p_')}_{suffix}")
        return self.weights[key]

    def _convolution(self, node: Node) -> Node:
        x, weight, *bias = node.args
        assert isinstance(weight, Node)
        kernel = self._held(weight, lambda value: value[:, :, None, None], "conv")
        return self.editor.call(aten.conv2d.default, self._value(x), kernel, *bias)

    def _norm(self, node: Node) -> Node:
        call, x = self.editor.call, self._value(node.args[0])
        given: list[Any] = [*node.args[2:], None, None, None]
        layer = node.target is aten.layer_norm.default
        weight, bias, eps = (given[0], given[1], given[2]) if layer else (given[0], None, given[1])
        if eps is None:
            eps = 1e-5 if layer else torch.finfo(node.meta["val"].dtype).eps
        if layer:
            x = call(aten.sub.Tensor, x, call(aten.mean.dim, x, [1], True))
        variance = call(aten.mean.dim, call(aten.mul.Tensor, x, x), [1], True)
        y = call(aten.mul.Tensor, x, call(aten.rsqrt.default, call(aten.add.Tensor, variance, eps)))
        if weight is None:
            return y if bias is None else call(aten.add.Tensor, y, self._held(bias, _per_channel))
        scale = self._held(weight, _per_channel)
        if bias is None:
            return call(aten.mul.Tensor, y, scale)
        held, shift = self.editor.value(weight), self.editor.value(bias)
        assert held is not None and shift is not None
        ratio = shift.double() / held.double()
        if bool((ratio.abs() < _MOST_SHIFT).all()):
            before = self._held(bias, lambda value: _per_channel(ratio.to(value.dtype)), f"over_{weight.name}")
            return call(aten.mul.Tensor, call(aten.add.Tensor, y, before), scale)
        return call(aten.add.Tensor, call(aten.mul.Tensor, y, scale), self._held(bias, _per_channel))


def _per_channel(value: Tensor) -> Tensor:
    return value.reshape(1, -1, 1, 1)


def _axis(axis: Any) -> int:
    return _AXES[axis % 3]
