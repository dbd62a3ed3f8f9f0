"""Patterns over ATen calls: what a rule looks for, written as the expression that it matches.

    x = Var("x")
    swish = Op(aten.mul.Tensor, x, Op(aten.sigmoid.default, x), commutative=True)
    match(swish, node)  # Match(root, {"x": ...}, inner nodes) or None

A `Var` seen twice must be the same node (or an equal literal). An inner call that something outside the match reads is
no match unless its pattern says `shared`: rewriting would keep it alive and compute it twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node


@dataclass(frozen=True)
class Var:
    """Any node, or with `literal` any value at all, bound to `name`."""

    name: str
    literal: bool = False


@dataclass(frozen=True, init=False)
class Op:
    """A call of `target` (or of one of several) with arguments that match; trailing arguments may be left out.

    `name` binds the call itself. Arguments that the pattern does not mention are free: a rule's check looks at them.
    `keywords` are keyword arguments that the call must have, with these values.
    """

    targets: tuple[Any, ...]
    args: tuple[Any, ...]
    name: str | None
    commutative: bool
    shared: bool
    keywords: tuple[tuple[str, Any], ...]

    def __init__(
        self,
        target: Any,
        *args: Any,
        name: str | None = None,
        commutative: bool = False,
        shared: bool = False,
        **keywords: Any,
    ) -> None:
        object.__setattr__(self, "targets", target if isinstance(target, tuple) else (target,))
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "commutative", commutative)
        object.__setattr__(self, "shared", shared)
        object.__setattr__(self, "keywords", tuple(keywords.items()))


@dataclass(frozen=True)
class Match:
    """One place where a pattern holds: its last node, what the variables stand for, and the calls it covers."""

    root: Node
    values: Mapping[str, Any]
    nodes: tuple[Node, ...]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


def match(pattern: Op, node: Node) -> Match | None:
    """`pattern` at `node`, or None. The first order of commutative calls' arguments that fits as a whole is taken."""
    for found in _matches(pattern, node, _Found({}, {})):
        inner = (call for call, shared in found.calls.items() if call is not node and not shared)
        if not any(user not in found.calls for call in inner for user in call.users):
            return Match(node, found.values, tuple(found.calls))
    return None


@dataclass(frozen=True)
class _Found:
    """What is bound so far, and the calls covered so far with whether others may read them."""

    values: Mapping[str, Any]
    calls: Mapping[Node, bool]


def _matches(pattern: Any, value: Any, so_far: _Found) -> Iterator[_Found]:
    """Every way in which `value` fits."""
    if isinstance(pattern, Var):
        if not pattern.literal and not isinstance(value, Node):
            return
        if pattern.name in so_far.values and not _same(so_far.values[pattern.name], value):
            return
        yield _Found({**so_far.values, pattern.name: value}, so_far.calls)
        return
    if not isinstance(pattern, Op):
        if _equal(pattern, value):
            yield so_far
        return
    if not isinstance(value, Node) or value.op != "call_function" or value.target not in pattern.targets:
        return
    if len(value.args) < len(pattern.args) or any(value.kwargs.get(key) != one for key, one in pattern.keywords):
        return
    named = {pattern.name: value} if pattern.name else {}
    start = _Found({**so_far.values, **named}, {**so_far.calls, value: pattern.shared})
    orders = [value.args[: len(pattern.args)]]
    if pattern.commutative and len(value.args) > 1:
        first, second, *rest = value.args
        orders.append((second, first, *rest)[: len(pattern.args)])
    for order in orders:
        yield from _all(pattern.args, order, start)


def _all(patterns: Sequence[Any], values: Sequence[Any], so_far: _Found) -> Iterator[_Found]:
    if not patterns:
        yield so_far
        return
    for found in _matches(patterns[0], values[0], so_far):
        yield from _all(patterns[1:], values[1:], found)


def _same(first: Any, second: Any) -> bool:
    """One node, or equal literals."""
    if isinstance(first, Node) or isinstance(second, Node):
        return first is second
    return _equal(first, second)


def _equal(pattern: Any, value: Any) -> bool:
    if isinstance(value, Node) or isinstance(pattern, bool) != isinstance(value, bool):
        return False
    if isinstance(value, list | tuple):
        return isinstance(pattern, list | tuple) and list(pattern) == list(value)
    return bool(pattern == value)
