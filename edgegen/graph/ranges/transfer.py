"""What each ATen op does to bounds. An op without a rule may give anything, and is listed as unknown."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from edgegen.graph.count import op_name
from edgegen.graph.edit import weights
from edgegen.graph.ranges.bound import (
    UNKNOWN,
    Bound,
    add,
    multiply,
    negative,
    reciprocal,
    union,
    valley,
    weighted,
)

Value = Bound | tuple[Bound, ...]


class Propagation:
    """Bounds of every value of `program`, given bounds of its inputs; `unknown` names calls that no rule covers."""

    def __init__(self, program: ExportedProgram, inputs: Mapping[str, Bound]) -> None:
        self._weights = weights(program)
        self._bounds: dict[Node, Value] = {}
        self.unknown: list[Node] = []
        for node in program.graph.nodes:
            if node.op == "placeholder":
                held = self._weights.get(node.name)
                known = Bound.exactly(held) if held is not None and held.numel() else None
                self._bounds[node] = known if known is not None else inputs.get(node.name, UNKNOWN)
            elif node.op == "call_function":
                self._bounds[node] = self._call(node)

    def __getitem__(self, node: Node) -> Bound:
        """The bound of a value; of several values, that of all of them together."""
        found = self._bounds[node]
        if isinstance(found, Bound):
            return found
        parts = [part.whole() for part in found]
        return Bound(torch.stack([p.low for p in parts]).min(), torch.stack([p.high for p in parts]).max())

    def arg(self, value: Any) -> Bound:
        """The bound of an argument: a node or a number."""
        if isinstance(value, Node):
            return self[value]
        if isinstance(value, bool | int | float):
            return Bound.of(float(value))
        return UNKNOWN

    def weight(self, value: Any) -> Tensor | None:
        """The weight behind an argument, as float64."""
        held = self._weights.get(value.name) if isinstance(value, Node) else None
        return None if held is None else held.detach().double()

    def _call(self, node: Node) -> Value:
        if node.target is operator.getitem:
            source: Any = self._bounds[node.args[0]]  # type: ignore[index]
            index: Any = node.args[1]
            part: Bound = source[index] if isinstance(source, tuple) else source.whole()
            return part if part.low.numel() else Bound.of(0.0)
        name = op_name(node)
        made = node.meta.get("val")
        if isinstance(made, Tensor) and not made.numel():
            return Bound.of(0.0)  # any bound is one of no element
        if name in _MOVES:
            return self._moved(node)
        if isinstance(made, Tensor) and made.dtype is torch.bool:
            return Bound.of(0.0, 1.0)
        rule = _RULES.get(name)
        if rule is not None:
            return rule(self, node).tidy()
        if not isinstance(made, Tensor | tuple | list):
            return UNKNOWN
        self.unknown.append(node)
        return UNKNOWN if isinstance(made, Tensor) else tuple(UNKNOWN for _ in made)

    def _moved(self, node: Node) -> Value:
        """An op that only moves elements does to bounds what it does to values."""
        made = node.meta["val"]
        by_index = op_name(node) in _MOVES_BY_INDEX
        sources = node.all_input_nodes[:1] if by_index else node.all_input_nodes
        fulls = {one: self[one].full(one.meta["val"].shape) for one in sources}
        fill = [float(value) for value in node.args[1:] if isinstance(value, float)]
        if by_index or any(value is None for value in fulls.values()):
            parts = [self[one].whole() for one in sources] + [Bound.of(value) for value in fill]
            whole = parts[0]
            for part in parts[1:]:
                whole = union(whole, part)
            if op_name(node) in _ZEROES:
                whole = union(whole, Bound.of(0.0))
            return whole if isinstance(made, Tensor) else tuple(whole for _ in made)
        low = _applied(node, lambda one: fulls[one].low.contiguous())  # type: ignore[union-attr]
        high = _applied(node, lambda one: fulls[one].high.contiguous())  # type: ignore[union-attr]
        if isinstance(made, Tensor):
            return Bound(low, high).tidy()
        return tuple(Bound(x, y).tidy() for x, y in zip(low, high, strict=True))


def _applied(node: Node, value: Callable[[Node], Tensor]) -> Any:
    args: Any = map_arg(node.args, value)
    kwargs: Any = map_arg(node.kwargs, value)
    assert isinstance(node.target, torch._ops.OpOverload)
    target = torch.ops.aten.reshape.default if op_name(node) in ("aten.view", "aten._unsafe_view") else node.target
    return target(*args, **kwargs)


Rule = Callable[[Propagation, Node], Bound]


def _shape(node: Any) -> torch.Size:
    shape: torch.Size = node.meta["val"].shape
    return shape


def _first(rule: Callable[[Bound], Bound]) -> Rule:
    return lambda state, node: rule(state.arg(node.args[0]))


def _rising(function: Callable[[Tensor], Tensor]) -> Rule:
    return _first(lambda a: a.map(function))


def _between(low: float, high: float) -> Rule:
    return lambda state, node: Bound.of(low, high)


def _add(state: Propagation, node: Node) -> Bound:
    return add(state.arg(node.args[0]), _scaled(state, node, node.args[1]))


def _sub(state: Propagation, node: Node) -> Bound:
    return add(state.arg(node.args[0]), negative(_scaled(state, node, node.args[1])))


def _rsub(state: Propagation, node: Node) -> Bound:
    return add(state.arg(node.args[1]), negative(state.arg(node.args[0])))


def _scaled(state: Propagation, node: Node, value: Any) -> Bound:
    factor = node.kwargs.get("alpha", 1)
    bound = state.arg(value)
    return bound if factor == 1 else multiply(bound, Bound.of(float(factor)))  # type: ignore[arg-type]


def _mul(state: Propagation, node: Node) -> Bound:
    a, b = node.args
    if a is b:
        return valley(state.arg(a).finite(), torch.square, 0.0, 0.0)
    return multiply(state.arg(a), state.arg(b))


def _div(state: Propagation, node: Node) -> Bound:
    return multiply(state.arg(node.args[0]), reciprocal(state.arg(node.args[1])))


def _pow(state: Propagation, node: Node) -> Bound:
    base, exponent = state.arg(node.args[0]), node.args[1]
    if not isinstance(exponent, int | float):
        return UNKNOWN
    power = float(exponent)
    if power > 0 and power % 2 == 0:
        return valley(base.finite(), lambda x: x**power, 0.0, 0.0)
    if power > 0 and (power % 2 == 1 or bool((base.low >= 0).all())):
        return base.map(lambda x: x**power)
    if power < 0 and bool((base.low >= 0).all()):
        return Bound(base.high**power, base.low**power)
    return Bound.of(0.0, math.inf) if power % 1 else UNKNOWN


def _sqrt(a: Bound) -> Bound:
    return a.map(lambda x: x.clamp(min=0).sqrt())


def _rsqrt(a: Bound) -> Bound:
    return Bound(a.high.clamp(min=0).rsqrt(), a.low.clamp(min=0).rsqrt())


def _gated(least: float) -> Rule:
    """x times a gate in 0..1: nothing below `least`, and never above the positive part."""
    return _first(lambda a: Bound(torch.zeros_like(a.low).masked_fill(a.low < 0, least), a.high.clamp(min=0)))


def _abs(a: Bound) -> Bound:
    return valley(a, torch.abs, 0.0, 0.0)


def _clamp(state: Propagation, node: Node) -> Bound:
    a = state.arg(node.args[0])
    low, high = (*node.args[1:], None, None)[:2]
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    if op_name(node) == "aten.clamp_max":
        low, high = None, low
    if op_name(node) == "aten.hardtanh":
        low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
    if low is not None:
        floor = state.arg(low)
        a = Bound(torch.maximum(a.low, floor.low), torch.maximum(a.high, floor.high))
    if high is not None:
        ceiling = state.arg(high)
        a = Bound(torch.minimum(a.low, ceiling.low), torch.minimum(a.high, ceiling.high))
    return a


def _extreme(pick: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    def rule(state: Propagation, node: Node) -> Bound:
        a, b = state.arg(node.args[0]), state.arg(node.args[1])
        return Bound(pick(a.low, b.low), pick(a.high, b.high))

    return rule


def _dims(node: Node) -> tuple[list[int], bool]:
    """The axes that a reduction goes over, and whether it keeps them."""
    rank = len(_shape(node.args[0]))
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = list(range(rank)) if given in (None, []) else [given] if isinstance(given, int) else list(given)
    keep = any(one is True for one in node.args[2:]) or node.kwargs.get("keepdim") is True
    return [dim % max(rank, 1) for dim in dims], keep


def _count(node: Node) -> int:
    shape = _shape(node.args[0])
    return max(1, math.prod(shape[dim] for dim in _dims(node)[0]))


def _reduced(state: Propagation, node: Node, dims: list[int], keep: bool) -> Bound:
    """Bounds of anything between the least and the greatest along `dims`."""
    a = state.arg(node.args[0])
    rank = len(_shape(node.args[0]))
    low, high = (x.reshape([1] * (rank - x.ndim) + list(x.shape)) for x in (a.low, a.high))
    if not dims or rank == 0:
        return Bound(low, high)
    low, high = low.amin(dims, keepdim=True), high.amax(dims, keepdim=True)
    return Bound(low, high) if keep else Bound(low.squeeze(dims), high.squeeze(dims))


def _mean(state: Propagation, node: Node) -> Bound:
    return _reduced(state, node, *_dims(node))


def _sum(state: Propagation, node: Node) -> Bound:
    return multiply(_mean(state, node), Bound.of(float(_count(node))))


def _var(state: Propagation, node: Node) -> Bound:
    low, high = state.arg(node.args[0]).interval()
    count = _count(node)
    most = (high - low) ** 2 / 4 * count / max(1, count - 1)
    return Bound.of(0.0, most)


def _std(state: Propagation, node: Node) -> Bound:
    return _sqrt(_var(state, node))


def _vector_norm(state: Propagation, node: Node) -> Bound:
    low, high = state.arg(node.args[0]).interval()
    return Bound.of(0.0, max(abs(low), abs(high)) * math.sqrt(_shape(node.args[0]).numel()))


def _cumsum(state: Propagation, node: Node) -> Bound:
    low, high = state.arg(node.args[0]).interval()
    shape = _shape(node.args[0])
    length = shape[node.args[1]] if len(shape) else 1  # type: ignore[index]
    return Bound.of(min(low, low * length), max(high, high * length))


def _linear(state: Propagation, node: Node) -> Bound:
    x, weight = state.arg(node.args[0]), state.weight(node.args[1])
    shape = _shape(node.args[0])
    if weight is None:
        made = _product(state, node, node.args[0], node.args[1], shape[-1])
    else:
        # One bound a column: what the other axes say is joined.
        columns = _columns(x, len(shape), len(shape) - 1, shape[-1])
        made = weighted(columns, weight, lambda v, w: v @ w.t())
    bias = node.args[2] if len(node.args) > 2 else None
    return made if bias is None else add(made, state.arg(bias))


def _columns(x: Bound, rank: int, axis: int, size: int) -> Bound:
    """Bounds along one axis alone, as vectors of `size`."""
    low, high = (v.reshape([1] * (rank - v.ndim) + list(v.shape)) for v in (x.low, x.high))
    others = [dim for dim in range(rank) if dim != axis]
    if others:
        low, high = low.amin(others), high.amax(others)
    return Bound(low.reshape(-1).expand(size), high.reshape(-1).expand(size))


def _product(state: Propagation, node: Node, a: Any, b: Any, length: int) -> Bound:
    one = multiply(state.arg(a).whole(), state.arg(b).whole())
    return multiply(one, Bound.of(float(length)))


def _matmul(state: Propagation, node: Node) -> Bound:
    a, b = node.args[-2:] if op_name(node) in ("aten.baddbmm", "aten.addmm") else node.args[:2]
    shape = _shape(a)
    known = state.weight(b)
    if known is not None and known.ndim == 2:
        made = weighted(_columns(state.arg(a), len(shape), len(shape) - 1, shape[-1]), known, lambda v, w: v @ w)
    else:
        made = _product(state, node, a, b, shape[-1])
    return add(made, state.arg(node.args[0])) if op_name(node) in ("aten.baddbmm", "aten.addmm") else made


def _conv(state: Propagation, node: Node) -> Bound:
    source, weight = node.args[0], state.weight(node.args[1])
    shape = _shape(source)
    bias = node.args[2] if len(node.args) > 2 else None
    padded = any(one not in (0, "valid") for one in _flat(node.args[4] if len(node.args) > 4 else 0))
    transposed = "transpose" in op_name(node)
    grouped: Any = node.args[6] if len(node.args) > 6 and not transposed else 1
    groups = int(grouped)
    a = state.arg(source)
    if padded or transposed:
        a = union(a, Bound.of(0.0))
    if weight is None or transposed:
        held = state.arg(node.args[1]).whole()
        terms = math.prod(_shape(node.args[1])[0 if transposed else 1 :])
        made = multiply(multiply(a.whole(), held), Bound.of(float(terms)))
    else:
        channels = _columns(a, len(shape), len(shape) - weight.ndim + 1, shape[len(shape) - weight.ndim + 1])
        # The whole kernel sees one interval an input channel, so only the sums of its signs count.
        outputs = weight.shape[0] // groups
        parts = weight.reshape(groups, outputs, weight.shape[1], -1)

        def product(v: Tensor, w: Tensor) -> Tensor:
            return (w.sum(-1) * v.reshape(groups, 1, -1)).sum(-1).reshape(-1)

        made = weighted(channels, parts, product)
        made = Bound(*(v.reshape([-1] + [1] * (weight.ndim - 2)) for v in (made.low, made.high)))
    if bias is None:
        return made
    added = state.arg(bias)
    spread = [-1] + [1] * (len(_shape(node)) - 2)
    if added.low.ndim == 1:
        added = Bound(added.low.reshape(spread), added.high.reshape(spread))
    return add(made, added)


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _attention(state: Propagation, node: Node) -> Bound:
    return union(state.arg(node.args[2]).whole(), Bound.of(0.0))


def _normalised(count: int, state: Propagation, weight: Any, bias: Any, spread: list[int]) -> Bound:
    """No element of a standardised group of n lies further out than sqrt(n)."""
    made = Bound.of(-math.sqrt(count), math.sqrt(count))
    for given, join in ((weight, multiply), (bias, add)):
        if given is not None:
            held = state.arg(given)
            if held.low.ndim == 1:
                held = Bound(held.low.reshape(spread), held.high.reshape(spread))
            made = join(made, held)
    return made


def _group_norm(state: Propagation, node: Node) -> Bound:
    shape = _shape(node.args[0])
    groups: Any = node.args[1]
    count = shape[1:].numel() // int(groups)
    weight, bias = (*node.args[2:4], None, None)[:2]
    return _normalised(count, state, weight, bias, [-1] + [1] * (len(shape) - 2))


def _layer_norm(state: Propagation, node: Node) -> Bound:
    weight, bias = (*node.args[2:4], None, None)[:2]
    if op_name(node) == "aten.rms_norm":
        bias = None
    return _normalised(math.prod(node.args[1]), state, weight, bias, [-1])  # type: ignore[arg-type]


def _embedding(state: Propagation, node: Node) -> Bound:
    table = state.weight(node.args[0])
    return Bound(table.amin(0), table.amax(0)) if table is not None else state.arg(node.args[0]).whole()


def _where(state: Propagation, node: Node) -> Bound:
    return union(state.arg(node.args[1]), state.arg(node.args[2]))


def _masked_fill(state: Propagation, node: Node) -> Bound:
    return union(state.arg(node.args[0]), state.arg(node.args[2]))


def _made(state: Propagation, node: Node) -> Bound:
    """A constant that the graph makes: it is made."""
    value = node.target(*node.args, **node.kwargs)  # type: ignore[operator]
    return Bound.exactly(value)


def _filled(state: Propagation, node: Node) -> Bound:
    name = op_name(node)
    if name == "aten.full_like":
        return state.arg(node.args[1])
    return Bound.of({"aten.zeros_like": 0.0, "aten.ones_like": 1.0}[name])


def _same(state: Propagation, node: Node) -> Bound:
    return state.arg(node.args[0])


def _convex(state: Propagation, node: Node) -> Bound:
    return union(state.arg(node.args[0]).whole(), Bound.of(0.0)) if "pool" in op_name(node) else _whole(state, node)


def _whole(state: Propagation, node: Node) -> Bound:
    return state.arg(node.args[0]).whole()


_MOVING = """
    view _unsafe_view reshape flatten unflatten transpose permute t squeeze unsqueeze expand expand_as slice select cat
    stack chunk split split_with_sizes unbind pad constant_pad_nd repeat repeat_interleave tile flip roll
    upsample_nearest1d upsample_nearest2d upsample_nearest3d pixel_shuffle pixel_unshuffle channel_shuffle tril triu
    gather index index_select movedim unfold narrow diagonal
"""
_MOVES = frozenset(f"aten.{name}" for name in _MOVING.split())
_MOVES_BY_INDEX = frozenset({"aten.gather", "aten.index", "aten.index_select"})
_ZEROES = frozenset({"aten.tril", "aten.triu", "aten.pad", "aten.constant_pad_nd"})
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("aten.add", "aten.add_"), _add),
    "aten.sub": _sub,
    "aten.rsub": _rsub,
    **dict.fromkeys(("aten.mul", "aten.mul_"), _mul),
    "aten.div": _div,
    "aten.pow": _pow,
    "aten.square": _first(lambda a: valley(a.finite(), torch.square, 0.0, 0.0)),
    "aten.neg": _first(negative),
    "aten.reciprocal": _first(reciprocal),
    "aten.abs": _first(_abs),
    "aten.sqrt": _first(_sqrt),
    "aten.rsqrt": _first(_rsqrt),
    "aten.exp": _rising(torch.exp),
    "aten.log": _rising(lambda x: x.clamp(min=0).log()),
    "aten.tanh": _rising(torch.tanh),
    "aten.sigmoid": _rising(torch.sigmoid),
    "aten.erf": _rising(torch.erf),
    "aten.relu": _rising(torch.relu),
    "aten.leaky_relu": _first(lambda a: Bound(a.low, a.high.clamp(min=0))),
    "aten.softplus": _first(lambda a: Bound(a.low.clamp(min=0), a.high.clamp(min=0) + 0.6932)),
    "aten.floor": _rising(torch.floor),
    "aten.ceil": _rising(torch.ceil),
    "aten.round": _rising(torch.round),
    "aten.hardsigmoid": _between(0.0, 1.0),
    "aten.silu": _gated(-0.2785),
    "aten.gelu": _gated(-0.1701),
    **dict.fromkeys(("aten.hardswish", "aten.mish"), _gated(-0.376)),
    "aten.sin": _between(-1.0, 1.0),
    "aten.cos": _between(-1.0, 1.0),
    **dict.fromkeys(("aten.softmax", "aten._softmax", "aten._safe_softmax"), _between(0.0, 1.0)),
    "aten.log_softmax": _between(-math.inf, 0.0),
    **dict.fromkeys(("aten.clamp", "aten.clamp_min", "aten.clamp_max", "aten.hardtanh"), _clamp),
    "aten.maximum": _extreme(torch.maximum),
    "aten.minimum": _extreme(torch.minimum),
    **dict.fromkeys(("aten.mean", "aten.amax", "aten.amin"), _mean),
    "aten.sum": _sum,
    "aten.var": _var,
    "aten.std": _std,
    "aten.linalg_vector_norm": _vector_norm,
    "aten.cumsum": _cumsum,
    "aten.linear": _linear,
    **dict.fromkeys(("aten.matmul", "aten.bmm", "aten.mm", "aten.baddbmm", "aten.addmm"), _matmul),
    **dict.fromkeys(
        ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.conv_transpose1d", "aten.conv_transpose2d"), _conv
    ),
    "aten.scaled_dot_product_attention": _attention,
    "aten.group_norm": _group_norm,
    **dict.fromkeys(("aten.layer_norm", "aten.rms_norm"), _layer_norm),
    "aten.embedding": _embedding,
    "aten.where": _where,
    "aten.masked_fill": _masked_fill,
    **dict.fromkeys(("aten.full", "aten.zeros", "aten.ones", "aten.arange", "aten.scalar_tensor", "aten.eye"), _made),
    **dict.fromkeys(("aten.full_like", "aten.zeros_like", "aten.ones_like"), _filled),
    **dict.fromkeys(
        (
            "aten.to",
            "aten._to_copy",
            "aten.type_as",
            "aten.clone",
            "aten.alias",
            "aten.contiguous",
            "aten.detach",
            "aten.dropout",
            "aten.lift_fresh_copy",
        ),
        _same,
    ),
    **dict.fromkeys(
        (
            "aten.upsample_bilinear2d",
            "aten.upsample_linear1d",
            "aten.upsample_trilinear3d",
            "aten.avg_pool2d",
            "aten.max_pool2d",
            "aten.adaptive_avg_pool2d",
            "aten.adaptive_max_pool2d",
        ),
        _convex,
    ),
}
