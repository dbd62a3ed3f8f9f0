"""Run what does not care about layout where fewer transposes are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from edgegen.graph.edit import Editor
from edgegen.graph.rearrange import REARRANGING, Rearrangement, Step, rearrangement, static_shape
from edgegen.rewrite.base import Pass, Rewritten
from edgegen.rewrite.merge_rearrangements import Cost, chain, cost, emit, merge, terminals

aten = torch.ops.aten
_LARGEST_REGION = 200
_POINTWISE = (  # elementwise, and not tagged so
    aten.to.dtype,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
)
_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)


@dataclass(frozen=True)
class SinkTransposes(Pass):
    """Elementwise work between transposes runs before them, or after, where that saves some or all of them.

        %t = aten.transpose(%x, 1, 2)                                %g = aten.gelu(%x)
        %g = aten.gelu(%t)                                     ->    %y = aten.add(%g, %scale_as_[1, 8, 1])
        %s = aten.add(%g, %scale)          # weight [8]
        %y = aten.transpose(%s, 1, 2)

    A region of calls is moved as a whole to the other layout: pointwise calls (their other operands in the region too,
    or weights, which are rearranged here), softmax, mean, sum, amax and amin with kept dims, cat, chunk, split and
    slice along an axis that stays whole, and layer_norm and linear where the last axis stays last. Layouts may differ
    by more than a permute: [B, C, H, W] and its tokens [B, HW, C] are one region. It is moved when fewer elements are
    then permuted, or as many in fewer calls. Chains are merged before and after as `merge-rearrangements` does, with
    the same option `images`.

    Declines (silently) where nothing is saved. Calls that read an axis by position (convolution, attention, group
    norm, upsampling), shapes without common factors and dynamic shapes end a region.
    """

    images: bool = False

    name: ClassVar[str] = "sink-transposes"
    after: ClassVar[tuple[str, ...]] = ("functionalise",)

    def call(self, program: ExportedProgram) -> Rewritten:
        editor = Editor(program, self.name)
        modified = merge(editor, self.images)
        spent, tried, moved = _spent(editor), set[_Region](), False
        while True:
            found = _best_region(editor, tried)
            if found is None and moved:  # what was no gain may be one now
                tried, moved = set(), False
                continue
            if found is None:
                break
            _move(editor, found)
            editor.sweep()
            merge(editor, self.images)
            modified = moved = True
            now = _spent(editor)
            if now >= spent:
                break  # the estimate was wrong; never go round in circles on it
            spent = now
        return Rewritten(editor.finish(), True) if modified else Rewritten(program, False)


@dataclass(frozen=True)
class _Region:
    """Calls that are to run in another layout. `layout` goes from that one to the one in which they are written."""

    layout: Rearrangement
    calls: frozenset[Node]

    def of(self, value: Node) -> Rearrangement:
        """`layout` for the shape of `value`, which a call of the region makes or reads."""
        found = _resized(self.layout, value)
        assert found is not None
        return found


def _resized(layout: Rearrangement, value: Node) -> Rearrangement | None:
    """`layout` for the shape of a value of as many axes, or of fewer when it is broadcast."""
    shape = static_shape(value)
    return None if shape is None else layout.resized((1,) * (len(layout.target) - len(shape)) + shape)


def _spent(editor: Editor) -> Cost:
    """What all rearrangements of the graph cost as they are."""
    calls = [node for node in editor.nodes(*REARRANGING) if _moves_elements(node)]
    permutes = [node for node in calls if (one := rearrangement(node)) is not None and not one.is_reshape]
    return sum(node.meta["val"].numel() for node in permutes), len(calls)


def _best_region(editor: Editor, tried: set[_Region]) -> _Region | None:
    """The first region not in `tried`, in order of the chains that it starts from, whose move saves something."""
    for seed in terminals(editor):
        source, whole, _ = chain(seed)
        for layout, starts in ((whole, list(seed.users)), (whole.inverse(), [source, *source.users])):
            region = _grow(editor, starts, layout)
            if not region.calls or region in tried:
                continue
            tried.add(region)
            smaller, saved = _pruned(editor, region)
            if saved:
                return smaller
    return None


def _grow(editor: Editor, starts: list[Node], layout: Rearrangement) -> _Region:
    """Everything that can move to the source layout of `layout` and touches `starts` through calls that can."""
    found: set[Node] = set()
    waiting = list(starts)
    while waiting and len(found) < _LARGEST_REGION:
        node = waiting.pop()
        if node in found or node.op != "call_function" or _moves_elements(node):
            continue
        if node.target is getitem:
            waiting.append(node.args[0])  # type: ignore[arg-type]
            continue
        group = _group(node)
        values = [one for one in group if one.target not in _SPLITS]
        if any(_resized(layout, one) is None for one in values) or _moved(editor, node, layout) is None:
            continue
        found.update(group)
        waiting += [user for one in group for user in one.users]
        waiting += [one for one in node.all_input_nodes if editor.value(one) is None]
    return _Region(layout, frozenset(found))


def _group(node: Node) -> list[Node]:
    """The call and, when it gives several values, what takes them apart."""
    return [node, *node.users] if node.target in _SPLITS else [node]


def _moves_elements(node: Node) -> bool:
    return node.target in REARRANGING and rearrangement(node) is not None


def _pruned(editor: Editor, region: _Region) -> tuple[_Region, bool]:
    """`region` without the calls that it is better off without, and whether moving what is left saves anything."""
    ordered = [node for node in editor.nodes() if node in region.calls]
    nothing = _total(editor, _Region(region.layout, frozenset()), ordered)
    best = _total(editor, region, ordered)
    shrinking = True
    while shrinking:
        shrinking = False
        for node in ordered:
            if node not in region.calls or node.target is getitem:
                continue
            group = _group(node)
            around = [one for part in group for one in (*part.users, *part.all_input_nodes)]
            if all(one in region.calls or editor.value(one) is not None for one in around):
                continue
            rest = _Region(region.layout, region.calls - set(group))
            now = _total(editor, rest, ordered)
            if now < best:
                region, best, shrinking = rest, now, True
    return region, bool(region.calls) and best < nothing


def _total(editor: Editor, region: _Region, scope: list[Node]) -> Cost:
    """What the rearrangements in and around the calls of `scope` cost when those of `region` have moved."""
    permuted = count = 0

    def pay(whole: Rearrangement | None, value: Node, calls: int) -> None:
        nonlocal permuted, count
        elements = value.meta["val"].numel()
        here = (elements, calls + 2) if whole is None else cost(whole.steps(), elements)
        permuted, count = permuted + here[0], count + here[1]

    values = dict.fromkeys(
        one
        for node in scope
        for one in (*node.all_input_nodes, node)
        if node.target is not getitem and one.target not in _SPLITS and editor.value(one) is None
    )
    values.update(dict.fromkeys(node for node in scope if node.target is getitem))
    ends = dict.fromkeys(end for value in values for end in _reached(value))
    ends.update(dict.fromkeys(value for value in values if _moves_elements(value)))
    for end in ends:
        source, whole, calls = chain(end)
        start = region.of(source).then(whole) if source in region.calls else whole
        if any(user not in region.calls and not _moves_elements(user) for user in end.users):
            pay(start, end, len(calls))
        if any(user in region.calls for user in end.users) and static_shape(end):
            pay(None if start is None else start.then(region.of(end).inverse()), end, len(calls))
    for value in values:
        if value in ends or not static_shape(value):
            continue
        readers = [user for user in value.users if not _moves_elements(user)]
        inside = sum(user in region.calls for user in readers)
        if value in region.calls and inside < len(readers):
            pay(region.of(value), value, 0)
        elif value not in region.calls and inside:
            pay(region.of(value).inverse(), value, 0)
    return permuted, count


def _reached(node: Node) -> Iterator[Node]:
    """Ends of the chains of rearranging calls that start at `node`."""
    for user in node.users:
        if _moves_elements(user):
            if any(not _moves_elements(one) for one in user.users):
                yield user
            yield from _reached(user)


def _move(editor: Editor, region: _Region) -> None:
    """Make each call of `region` anew in its other layout, and rearrange what goes in and what comes out."""
    made: dict[Node, Node] = {}  # call, or value that calls of the region read -> the same in the other layout
    ordered = [node for node in editor.nodes() if node in region.calls]
    for node in ordered:

        def other(value: Node, node: Node = node) -> Node:
            if value in made:
                return made[value]
            if not static_shape(value):
                return value
            layout = region.of(value)
            weight = editor.value(value)
            if weight is None:
                made[value] = emit(editor, value, layout.inverse().steps())
            else:
                turned = _apply(layout.inverse().steps(), weight.reshape(layout.target_shape))
                made[value] = editor.constant(turned, editor.named(node, "rearranged"))
            return made[value]

        with editor.at(node):
            if node.target is getitem:
                made[node] = editor.call(getitem, made[node.args[0]], node.args[1])  # type: ignore[index]
            else:
                moved = _moved(editor, node, region.layout)
                assert moved is not None
                args, kwargs = moved(other)
                made[node] = editor.call(node.target, *args, **kwargs)
    for node in ordered:
        if node.target not in _SPLITS and any(user not in region.calls for user in node.users):
            with editor.at(node):
                editor.replace(node, emit(editor, made[node], region.of(node).steps()))


def _apply(steps: tuple[Step, ...], value: torch.Tensor) -> torch.Tensor:
    for kind, how in steps:
        value = value.reshape(how) if kind == "reshape" else value.permute(how)
    return value


Moved = Callable[[Callable[[Node], Node]], tuple[tuple[Any, ...], dict[str, Any]]]


def _moved(editor: Editor, node: Node, layout: Rearrangement) -> Moved | None:
    """The arguments of `node` in the other layout, given what stands for its operands; None if it cannot move."""
    target: Any = node.target
    if target in REARRANGING:
        return None
    if target is getitem:
        return lambda _: ((), {})
    rank = len(layout.target)
    if target in _SPLITS or target is aten.slice.Tensor:
        return _along(node, layout, 2 if target in _SPLITS else 1, [node.args[0]])
    if target in (aten.softmax.int, aten._softmax.default, aten.log_softmax.int):
        return _along(node, layout, 1, [node.args[0]])
    if target is aten.cat.default:
        return _along(node, layout, 1, list(node.args[0]))  # type: ignore[arg-type]
    if target in _REDUCTIONS:
        dims: Any = node.args[1] if len(node.args) > 1 else None
        if not dims or len(node.args) < 3 or not node.args[2] or not _whole(node.args[0], layout):
            return None
        axes = layout.source_axes([axis % rank for axis in dims])
        if not axes:
            return None
        rest = node.args[2:]
        return lambda other: ((other(node.args[0]), axes, *rest), dict(node.kwargs))  # type: ignore[arg-type]
    if target in (aten.linear.default, aten.layer_norm.default):
        return _on_last_axis(editor, node, layout)
    pointwise = isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable
    if not pointwise or (torch.Tag.pointwise not in target.tags and target not in _POINTWISE):
        return None
    for one in node.all_input_nodes:
        if static_shape(one) == () or _whole(one, layout):
            continue
        if editor.value(one) is None or _resized(layout, one) is None:
            return None
    return lambda other: (map_arg(node.args, other), map_arg(node.kwargs, other))


def _whole(value: Any, layout: Rearrangement) -> bool:
    """Whether a value has all the axes of `layout`, so that what is said of its axes holds there."""
    shape = static_shape(value) if isinstance(value, Node) else None
    return shape is not None and layout.resized(shape) is not None


def _along(node: Node, layout: Rearrangement, place: int, operands: list[Any]) -> Moved | None:
    """A call with its dim at `place` among its arguments, along an axis that is whole in both layouts."""
    dim = node.args[place] if len(node.args) > place else 0
    if not isinstance(dim, int) or "dim" in node.kwargs or not all(_whole(one, layout) for one in operands):
        return None
    axis = layout.source_axis(dim % len(layout.target))
    if axis is None:
        return None

    def args(other: Callable[[Node], Node]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given: list[Any] = [map_arg(one, other) for one in node.args]
        given += [0] * (place + 1 - len(given))
        given[place] = axis
        return tuple(given), dict(node.kwargs)

    return args


def _on_last_axis(editor: Editor, node: Node, layout: Rearrangement) -> Moved | None:
    """linear or layer_norm, whose weights stay as they are."""
    value, *rest = node.args
    weights = [one for one in rest if isinstance(one, Node)]
    if not _whole(value, layout) or any(editor.value(one) is None for one in weights):
        return None
    if layout.source_axis(len(layout.target) - 1) != len(layout.source) - 1:
        return None
    if node.target is aten.layer_norm.default and len(node.args[1]) != 1:  # type: ignore[arg-type]
        return None
    return lambda other: ((other(value), *rest), dict(node.kwargs))  # type: ignore[arg-type]
