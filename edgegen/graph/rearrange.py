"""What a chain of reshapes and permutes does to a tensor, as one value: split axes, reorder the parts, group them.

    [B, C, H, W] -> flatten(2) -> transpose(1, 2) -> [B, HW, C]

is: the axes B, C, H, W are factors; their new order is B, H, W, C; H and W become one axis. Values compose and invert,
so a chain is the identity, a pure reshape or neither, whichever ops it was written with. Axes of size 1 have no factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten
Shape = tuple[int, ...]
Step = tuple[str, Shape]
"""("reshape", shape) or ("permute", dims)."""

_REMEMBERED = 4096
_VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.contiguous.default,
    aten.clone.default,
)
_PERMUTES = (aten.permute.default, aten.transpose.int, aten.t.default)
REARRANGING = (*_VIEWS, *_PERMUTES)
"""Ops that only move elements."""


@dataclass(frozen=True)
class Rearrangement:
    """A bijection of a tensor's elements. `sizes` are the factors in the order of the source (row-major).

    `source[i]` factors make axis i of what goes in; `order` lists the factors as they come out; `target[j]` of those
    make axis j of what comes out.
    """

    sizes: Shape
    source: Shape
    order: Shape
    target: Shape

    @property
    def source_shape(self) -> Shape:
        return _shape(self.sizes, self.source)

    @property
    def target_shape(self) -> Shape:
        return _shape([self.sizes[i] for i in self.order], self.target)

    @property
    def is_reshape(self) -> bool:
        """Whether the elements keep their order in memory."""
        return self.order == tuple(range(len(self.order)))

    @property
    def is_identity(self) -> bool:
        return self.is_reshape and self.source_shape == self.target_shape

    def inverse(self) -> Rearrangement:
        """What takes the target back to the source."""
        places = {factor: place for place, factor in enumerate(self.order)}
        sizes = tuple(self.sizes[i] for i in self.order)
        return Rearrangement(sizes, self.target, tuple(places[i] for i in range(len(self.sizes))), self.source)

    @lru_cache(maxsize=_REMEMBERED)  # noqa: B019 (values, not objects: bounded, and asked for again and again)
    def then(self, other: Rearrangement) -> Rearrangement | None:
        """`self`, then `other`; None when no common factors exist (as for [2, 3] seen as [3, 2])."""
        assert self.target_shape == other.source_shape, f"{self.target_shape} is no {other.source_shape}"
        ours, theirs = _split(self.order, self.target), _split(range(len(other.sizes)), other.source)
        pieces_of: list[list[int]] = [[] for _ in self.sizes]  # the factor's parts, as sizes
        parts_of: list[list[tuple[int, int]]] = [[] for _ in other.sizes]  # (factor of self, its part)
        for mine, others in zip(ours, theirs, strict=True):
            common = _refine([self.sizes[i] for i in mine], [other.sizes[i] for i in others])
            if common is None:
                return None
            sizes, in_mine, in_others = common
            for factor, group in zip(mine, _split(sizes, in_mine), strict=True):
                pieces_of[factor] = list(group)
            names = [(factor, part) for factor in mine for part in range(len(pieces_of[factor]))]
            for factor, group in zip(others, _split(names, in_others), strict=True):
                parts_of[factor] = list(group)
        starts = [0]
        for pieces in pieces_of:
            starts.append(starts[-1] + len(pieces))
        sizes = tuple(size for pieces in pieces_of for size in pieces)
        source = tuple(sum(len(pieces_of[i]) for i in group) for group in _split(range(len(self.sizes)), self.source))
        order = tuple(starts[factor] + part for i in other.order for factor, part in parts_of[i])
        target = tuple(sum(len(parts_of[i]) for i in group) for group in _split(other.order, other.target))
        return _merged(sizes, source, order, target)

    @lru_cache(maxsize=_REMEMBERED)  # noqa: B019
    def resized(self, shape: Shape) -> Rearrangement | None:
        """The same moves for a target of another `shape`, None when there are none.

        An axis of one factor, there and in the source, takes any size; one of several its own or 1. So what broadcasts
        against the target broadcasts against the source.
        """
        if len(shape) != len(self.target):
            return None
        sizes = list(self.sizes)
        for size, group in zip(shape, _split(self.order, self.target), strict=True):
            if size == math.prod(self.sizes[i] for i in group):
                continue
            if len(group) == 1:
                sizes[group[0]] = size
            elif group and size == 1:
                for i in group:
                    sizes[i] = 1
            else:
                return None
        for group in _split(range(len(sizes)), self.source):
            changed = [sizes[i] for i in group if sizes[i] != self.sizes[i]]
            if len(group) > 1 and changed not in ([], [1] * len(group)):
                return None
        return _merged(tuple(sizes), self.source, self.order, self.target)

    def source_axis(self, target_axis: int) -> int | None:
        """The axis that went in and came out whole as `target_axis`, or None."""
        axes = self.source_axes([target_axis])
        return axes[0] if axes is not None and len(axes) == 1 else None

    def source_axes(self, target_axes: Sequence[int]) -> list[int] | None:
        """The axes that went in and make up exactly `target_axes`, or None; axes of size 1 count on neither side."""
        groups = _split(self.order, self.target)
        wanted = {factor for axis in target_axes for factor in groups[axis]}
        axes = [axis for axis, group in enumerate(_split(range(len(self.sizes)), self.source)) if wanted & set(group)]
        held = {factor for axis in axes for factor in _split(range(len(self.sizes)), self.source)[axis]}
        return axes if held == wanted else None

    @lru_cache(maxsize=_REMEMBERED)  # noqa: B019
    def steps(self, images: bool = False) -> tuple[Step, ...]:
        """The fewest reshapes and permutes that do it; with `images`, permutes of rank 4 before those of rank 3.

        A converter whose images are channels-last cancels permute(0, 2, 3, 1), and does not see through flatten.
        """
        if self.is_identity:
            return ()
        if self.is_reshape:
            return (("reshape", self.target_shape),)
        early, late = self._permute_first(), self.inverse()._permute_first()
        found: list[tuple[Step, ...]] = []
        if early is not None:
            shape = tuple(self.source_shape[i] for i in early)
            found.append(_without_noop(("permute", early), ("reshape", self.target_shape), shape))
        if late is not None:
            back = tuple(late.index(i) for i in range(len(late)))
            shape = tuple(self.target_shape[i] for i in late)
            found.append(_without_noop(("reshape", shape), ("permute", back), self.source_shape))
        if found:
            return min(found, key=lambda steps: (len(steps), _permute_rank(steps) * (-1 if images else 1)))
        blocks, order = self._blocks()
        return (("reshape", blocks), ("permute", order), ("reshape", self.target_shape))

    def _permute_first(self) -> Shape | None:
        """Dims of a permute of the source after which a reshape does the rest, or None."""
        groups = _split(range(len(self.sizes)), self.source)
        axis_of = {factor: axis for axis, group in enumerate(groups) for factor in group}
        dims: list[int] = []
        for factor in self.order:
            if not dims or dims[-1] != axis_of[factor]:
                dims.append(axis_of[factor])
        kept = [i for i, group in enumerate(groups) if group]
        if sorted(dims) != kept or [i for axis in dims for i in groups[axis]] != list(self.order):
            return None
        ones = [i for i, group in enumerate(groups) if not group]
        if len(self.target) == len(self.source) and sum(n == 0 for n in self.target) == len(ones):
            rest, units = iter(dims), iter(ones)  # the ones go where the target has its own, so that a permute does
            return tuple(next(rest) if n else next(units) for n in self.target)
        for axis in ones:
            dims.insert(min(axis, len(dims)), axis)
        return tuple(dims)

    def _blocks(self) -> tuple[Shape, Shape]:
        """Sizes of the runs of factors that stay together, in source order, and the order in which they come out."""
        runs: list[list[int]] = []
        for factor in self.order:
            if runs and runs[-1][-1] + 1 == factor:
                runs[-1].append(factor)
            else:
                runs.append([factor])
        placed = sorted(range(len(runs)), key=lambda i: runs[i][0])
        sizes = tuple(math.prod(self.sizes[factor] for factor in runs[i]) for i in placed)
        return sizes, tuple(placed.index(i) for i in range(len(runs)))


def identity(shape: Shape) -> Rearrangement:
    """The rearrangement of `shape` that moves nothing."""
    return permuted(shape, tuple(range(len(shape))))


@lru_cache(maxsize=_REMEMBERED)
def permuted(shape: Shape, dims: Shape) -> Rearrangement:
    """aten.permute(x, dims) for an x of `shape`."""
    factor_of = {axis: i for i, axis in enumerate(axis for axis, size in enumerate(shape) if size != 1)}
    order = tuple(factor_of[axis] for axis in dims if axis in factor_of)
    present = tuple(int(size != 1) for size in shape)
    return _merged(tuple(s for s in shape if s != 1), present, order, tuple(present[axis] for axis in dims))


@lru_cache(maxsize=_REMEMBERED)
def reshaped(source: Shape, target: Shape) -> Rearrangement | None:
    """aten.reshape(x, target) for an x of shape `source`; None when the two have no common factors."""
    common = _refine(source, target)
    if common is None:
        return None
    sizes, in_source, in_target = common
    return _merged(sizes, in_source, tuple(range(len(sizes))), in_target)


def static_shape(node: Node) -> Shape | None:
    """The shape of a node's value; None for no tensor, no elements or a dynamic shape."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not all(type(size) is int and size > 0 for size in value.shape):
        return None
    return tuple(value.shape)


def rearrangement(node: Node) -> Rearrangement | None:
    """What one call does to its first argument, or None when it does more than to move elements."""
    if node.op != "call_function" or node.target not in REARRANGING or not isinstance(node.args[0], Node):
        return None
    source, target = static_shape(node.args[0]), static_shape(node)
    if source is None or target is None:
        return None
    if node.target in _VIEWS:
        return reshaped(source, target)
    return permuted(source, permutation(node) or ())


def permutation(node: Node) -> Shape | None:
    """The dims of a permute, transpose or t, as aten.permute takes them; None for another call."""
    if node.target not in _PERMUTES:
        return None
    rank = node.meta["val"].dim()
    if node.target is aten.permute.default:
        asked: Any = node.args[1]
        return tuple(axis % rank for axis in asked)
    dims = list(range(rank))
    if rank > 1:
        axes: Any = (0, 1) if node.target is aten.t.default else node.args[1:3]
        dims[axes[0]], dims[axes[1]] = dims[axes[1]], dims[axes[0]]
    return tuple(dims)


def _merged(sizes: Shape, source: Shape, order: Shape, target: Shape) -> Rearrangement:
    """Without factors of size 1, and with neighbours that stay neighbours within their axes as one."""
    source_axis = _owners(source)
    target_axis = dict(zip(order, _owners(target), strict=True))
    place = {factor: i for i, factor in enumerate(order)}
    kept = [i for i, size in enumerate(sizes) if size != 1]
    ranks = {factor: i for i, factor in enumerate(sorted(kept, key=place.__getitem__))}
    groups: list[list[int]] = []
    for factor in kept:
        last = groups[-1][-1] if groups else None
        if (
            last is not None
            and ranks[factor] == ranks[last] + 1
            and source_axis[factor] == source_axis[last]
            and target_axis[factor] == target_axis[last]
        ):
            groups[-1].append(factor)
        else:
            groups.append([factor])
    by_place = sorted(range(len(groups)), key=lambda i: ranks[groups[i][0]])
    return Rearrangement(
        sizes=tuple(math.prod(sizes[i] for i in group) for group in groups),
        source=tuple(sum(source_axis[g[0]] == axis for g in groups) for axis in range(len(source))),
        order=tuple(by_place),
        target=tuple(sum(target_axis[g[0]] == axis for g in groups) for axis in range(len(target))),
    )


def _refine(first: Sequence[int], second: Sequence[int]) -> tuple[Shape, Shape, Shape] | None:
    """Sizes that both lists are products of, in order, and how many make each entry; None without such sizes."""
    cuts = []
    for sizes in (first, second):
        products = [1]
        for size in sizes:
            products.append(products[-1] * size)
        cuts.append(products)
    if cuts[0][-1] != cuts[1][-1]:
        return None
    marks = sorted({*cuts[0], *cuts[1]})
    if any(high % low for low, high in pairwise(marks)):
        return None
    counts = [tuple(sum(low < mark <= high for mark in marks) for low, high in pairwise(products)) for products in cuts]
    return tuple(high // low for low, high in pairwise(marks)), counts[0], counts[1]


def _split(values: Sequence[Any], counts: Sequence[int]) -> list[Sequence[Any]]:
    found, start = [], 0
    for count in counts:
        found.append(values[start : start + count])
        start += count
    return found


def _owners(counts: Sequence[int]) -> list[int]:
    return [axis for axis, count in enumerate(counts) for _ in range(count)]


def _shape(sizes: Sequence[int], counts: Sequence[int]) -> Shape:
    return tuple(math.prod(group) for group in _split(sizes, counts))


def _permute_rank(steps: Sequence[Step]) -> int:
    return max((len(value) for kind, value in steps if kind == "permute"), default=0)


def _without_noop(first: Step, second: Step, between: Shape) -> tuple[Step, ...]:
    """Both steps, or one when the reshape among them leaves the shape `between` (before or after it) as it is."""
    return tuple(step for step in (first, second) if step != ("reshape", between))
