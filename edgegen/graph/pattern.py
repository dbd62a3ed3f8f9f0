"""Patterns over ATen calls: what a rule looks for, written as the expression that it matches.

    x = Var("x")
    swish = Op(aten.mul.Tensor, x, Op(aten.sigmoid.default, x), commutative=True)
    match(swish, node)  # Match(root, {"x": ...}, inner nodes) or None

A `Var` seen twice must be the same node. An inner call that something outside the match reads is no match unless its
pattern says `shared`: rewriting would keep it alive and compute it twice.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """

    targets: tuple[Any, ...]
    args: tuple[Any, ...]
    name: str | None
    commutative: bool
    shared: bool

    def __init__(
        self, target: Any, *args: Any, name: str | None = None, commutative: bool = False, shared: bool = False
    ) -> None:
        object.__setattr__(self, "targets", target if isinstance(target, tuple) else (target,))
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "commutative", commutative)
        object.__setattr__(self, "shared", shared)


@dataclass(frozen=True)
class Match:
    """One place where a pattern holds: its last node, what the variables stand for, and the calls it covers."""

    root: Node
    values: Mapping[str, Any]
    nodes: tuple[Node, ...]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


def match(pattern: Op, node: Node) -> Match | None:
    """`pattern` at `node`, or None. The first order of a commutative call's arguments that fits is taken."""
    found = _match(pattern, node, _Found({}, {}))
    if found is None:
        return None
    for inner, shared in found.calls.items():
        if inner is not node and not shared and any(user not in found.calls for user in inner.users):
            return None
    return Match(node, found.values, tuple(found.calls))


@dataclass(frozen=True)
class _Found:
    """What is bound so far, and the calls covered so far with whether others may read them."""

    values: Mapping[str, Any]
    calls: Mapping[Node, bool]


def _match(pattern: Any, value: Any, so_far: _Found) -> _Found | None:
    if isinstance(pattern, Var):
        if not pattern.literal and not isinstance(value, Node):
            return None
        if pattern.name in so_far.values and so_far.values[pattern.name] is not value:
            return None
        return _Found({**so_far.values, pattern.name: value}, so_far.calls)
    if not isinstance(pattern, Op):
        return so_far if _equal(pattern, value) else None
    if not isinstance(value, Node) or value.op != "call_function" or value.target not in pattern.targets:
        return None
    if len(value.args) < len(pattern.args):
        return None
    named = {pattern.name: value} if pattern.name else {}
    start = _Found({**so_far.values, **named}, {**so_far.calls, value: pattern.shared})
    orders = [value.args[: len(pattern.args)]]
    if pattern.commutative:
        first, second, *rest = value.args
        orders.append((second, first, *rest)[: len(pattern.args)])
    for order in orders:
        found: _Found | None = start
        for part, argument in zip(pattern.args, order, strict=True):
            found = None if found is None else _match(part, argument, found)
        if found is not None:
            return found
    return None


def _equal(pattern: Any, value: Any) -> bool:
    if isinstance(value, Node) or isinstance(pattern, bool) != isinstance(value, bool):
        return False
    if isinstance(value, list | tuple):
        return isinstance(pattern, list | tuple) and list(pattern) == list(value)
    return bool(pattern == value)
