"""Ranges of a graph's values: what interval arithmetic proves, and what was seen on samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.count import op_name
from edgegen.graph.edit import module_path, user_inputs, weights
from edgegen.graph.evaluate import evaluate
from edgegen.graph.ranges.bound import Bound
from edgegen.graph.ranges.transfer import Propagation

MARGIN = 2.0
"""Other inputs may go this many times further than those that were observed."""
Basis = Literal["proven", "observed", "unknown"]
Interval = tuple[float, float]


class Observed(BaseModel):
    """What one value was over all samples; `smallest` is the smallest magnitude that is not 0, inf if all are 0."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    low: float
    high: float
    smallest: float
    finite: bool

    def joined(self, other: Observed) -> Observed:
        """Over both sets of samples."""
        return Observed(
            low=min(self.low, other.low),
            high=max(self.high, other.high),
            smallest=min(self.smallest, other.smallest),
            finite=self.finite and other.finite,
        )


class ValueRange(BaseModel):
    """One value: the interval that no input can leave, and what samples gave. Inputs are as `Ranges.inputs` says."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    node: str
    op: str
    module: str
    sound: Interval
    observed: Observed | None
    known: bool
    """False: no transfer rule covers the op, so `sound` is everything."""

    def magnitude(self, margin: float = MARGIN) -> tuple[float, Basis]:
        """The largest magnitude to reckon with, and what that rests on: proof where it is the tighter of the two."""
        proven = max(abs(self.sound[0]), abs(self.sound[1]))
        if self.observed is None:
            return proven, "proven" if math.isfinite(proven) else "unknown"
        seen = max(abs(self.observed.low), abs(self.observed.high)) * margin
        return (proven, "proven") if proven <= seen else (seen, "observed")

    def seen(self) -> float:
        """The largest observed magnitude, 0 without samples."""
        return 0.0 if self.observed is None else max(abs(self.observed.low), abs(self.observed.high))


class Inside(BaseModel):
    """What an op computes on the way to its result, over all samples; 0 and inf where that does not apply."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    step: float = 0.0
    """Largest magnitude of a value inside: the square of a norm, the scores of an attention before its scale."""
    total: float = 0.0
    """Largest magnitude of a sum inside: squares of a norm, |a| |b| of a product, elements of a mean."""
    least: float = math.inf
    """Smallest variance of a norm, 0 when a group had none."""
    least_positive: float = math.inf
    """Smallest variance of a norm that is not 0."""

    def joined(self, other: Inside) -> Inside:
        """Over both sets of samples."""
        return Inside(
            step=max(self.step, other.step),
            total=max(self.total, other.total),
            least=min(self.least, other.least),
            least_positive=min(self.least_positive, other.least_positive),
        )


@dataclass(frozen=True)
class Ranges:
    """Ranges by the names of nodes, inputs and weights included."""

    values: Mapping[str, ValueRange]
    inside: Mapping[str, Inside]
    inputs: Mapping[str, Interval]
    """What the intervals take for granted about each input."""
    unknown: tuple[str, ...]
    samples: int
    margin: float


def analyse(
    program: ExportedProgram,
    samples: Sequence[Mapping[str, Tensor]] = (),
    margin: float = MARGIN,
    inputs: Mapping[str, Interval] | None = None,
) -> Ranges:
    """Ranges of every value of a float32 graph.

    `samples` are inputs by name, as `evaluate` takes them. An input's interval is the one given in `inputs`, else
    `margin` times what the samples hold, else everything: what is called proven holds for inputs inside it. Interval
    arithmetic after Moore, Kearfott and Cloud, "Introduction to Interval Analysis", 2009.
    """
    watcher = _Watcher(program)
    for sample in samples:
        watcher.start(sample)
        evaluate(program, sample, watcher)
    assumed = {}
    for node in user_inputs(program):
        seen = watcher.values.get(node.name)
        widest = (-math.inf, math.inf) if seen is None else _widened(seen, margin)
        assumed[node.name] = (inputs or {}).get(node.name, widest)
    propagation = Propagation(program, {name: Bound.of(*interval) for name, interval in assumed.items()})
    unknown = {node.name for node in propagation.unknown}
    found = {}
    for node in program.graph.nodes:
        if node.op in ("placeholder", "call_function") and _floats(node):
            found[node.name] = ValueRange(
                node=node.name,
                op=op_name(node) if node.op == "call_function" else "placeholder",
                module=module_path(node),
                sound=propagation[node].interval(),
                observed=watcher.values.get(node.name),
                known=node.name not in unknown,
            )
    return Ranges(found, watcher.inside, assumed, tuple(sorted(unknown)), len(samples), margin)


def _widened(seen: Observed, margin: float) -> Interval:
    furthest = max(abs(seen.low), abs(seen.high)) * margin
    return (min(0.0, -furthest if seen.low < 0 else 0.0), max(0.0, furthest if seen.high > 0 else 0.0))


def _floats(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def observe(value: Tensor) -> Observed:
    """Extremes of one tensor; NaN and infinities are left out of them and make it not finite."""
    usable = value.detach().flatten()
    finite = True
    low, high = _extremes(usable)
    if not (math.isfinite(low) and math.isfinite(high)):
        finite, usable = False, usable[torch.isfinite(usable)]
        low, high = _extremes(usable)
    magnitudes = usable.abs()
    smallest = _extremes(magnitudes)[0]
    if smallest == 0.0:
        nonzero = magnitudes[magnitudes > 0]
        smallest = nonzero.min().item() if nonzero.numel() else math.inf
    return Observed(low=low, high=high, smallest=smallest, finite=finite)


def _extremes(flat: Tensor) -> tuple[float, float]:
    if not flat.numel():
        return 0.0, 0.0
    low, high = torch.aminmax(flat)
    return low.item(), high.item()


@dataclass
class _Watcher:
    """Sees every value of a run, and keeps those that an op with an inside will read until it has run."""

    program: ExportedProgram
    values: dict[str, Observed] = field(default_factory=dict)
    inside: dict[str, Inside] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._weights = weights(self.program)
        self._held: dict[str, Tensor] = {}
        self._readers: dict[str, int] = {}
        self._waiting = {
            node.name: sum(user.op == "call_function" and op_name(user) in _INSIDE for user in node.users)
            for node in self.program.graph.nodes
        }
        for name, value in self._weights.items():
            if value.is_floating_point() and value.numel():
                self.values[name] = observe(value)

    def start(self, sample: Mapping[str, Tensor]) -> None:
        """A new run begins with these inputs."""
        self._held = dict(self._weights)
        self._readers = dict(self._waiting)
        for node in user_inputs(self.program):
            self._keep(node.name, sample[node.name])

    def __call__(self, node: Node, value: Any) -> None:
        if op_name(node) in _INSIDE:
            self._look_inside(node)
        if isinstance(value, Tensor):
            self._keep(node.name, value)

    def _keep(self, name: str, value: Tensor) -> None:
        if value.is_floating_point():
            seen = observe(value)
            self.values[name] = seen.joined(self.values[name]) if name in self.values else seen
        if self._readers[name]:
            self._held[name] = value

    def _look_inside(self, node: Node) -> None:
        args = [self._held.get(one.name) if isinstance(one, Node) else one for one in node.args]
        if all(one.numel() for one in args if isinstance(one, Tensor)) and isinstance(args[0], Tensor):
            found = _INSIDE[op_name(node)](args, node.kwargs)
            self.inside[node.name] = found.joined(self.inside.get(node.name, found))
        for source in node.all_input_nodes:
            self._readers[source.name] -= 1
            if not self._readers[source.name] and source.name not in self._weights:
                self._held.pop(source.name, None)


def _of_norm(x: Tensor, centre: bool) -> Inside:
    """[..., n]: groups along the last axis."""
    deviation = (x - x.mean(-1, keepdim=True) if centre else x).float()
    squares = deviation.square()
    variance = squares.mean(-1)
    positive = variance[variance > 0]
    return Inside(
        step=squares.max().item(),
        total=max(squares.sum(-1).max().item(), x.float().sum(-1).abs().max().item() if centre else 0.0),
        least=variance.min().item(),
        least_positive=positive.min().item() if positive.numel() else math.inf,
    )


def _group_norm(args: list[Any], _kwargs: Any) -> Inside:
    return _of_norm(args[0].reshape(args[0].shape[0], args[1], -1), True)


def _layer_norm(args: list[Any], _kwargs: Any) -> Inside:
    return _of_norm(args[0].flatten(-len(args[1])), True)


def _rms_norm(args: list[Any], _kwargs: Any) -> Inside:
    return _of_norm(args[0].flatten(-len(args[1])), False)


def _vector_norm(args: list[Any], kwargs: Any) -> Inside:
    x = args[0]
    dims = args[2] if len(args) > 2 else kwargs.get("dim")
    over = list(range(x.ndim)) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
    squares = x.square()
    return Inside(step=squares.max().item(), total=squares.sum(over).max().item())


def _mean(args: list[Any], kwargs: Any) -> Inside:
    x = args[0]
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    over = list(range(x.ndim)) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
    return Inside(total=x.sum(over).abs().max().item())


def _product(args: list[Any], _kwargs: Any) -> Inside:
    a, b = args[0], args[1]
    return Inside(total=_terms(a, b))


def _linear(args: list[Any], _kwargs: Any) -> Inside:
    return Inside(total=_terms(args[0], args[1].transpose(-1, -2)))


def _terms(a: Tensor, b: Tensor) -> float:
    """max of |a| |b|: no partial sum of the product, in whatever order, goes further.

    Lengths of rows and columns bound it (Cauchy and Schwarz); the product is made only where they say too little.
    """
    bound = (a.norm(dim=-1).max() * b.norm(dim=-2 if b.ndim > 1 else -1).max()).item()
    return bound if bound < 32768.0 else (a.abs() @ b.abs()).max().item()


def _attention(args: list[Any], _kwargs: Any) -> Inside:
    query, key = args[0], args[1]
    bound = (query.norm(dim=-1).max() * key.norm(dim=-1).max()).item()
    if bound < 32768.0 or query.shape[-3] != key.shape[-3]:
        return Inside(step=bound, total=bound)
    products = query @ key.transpose(-1, -2)
    return Inside(step=products.abs().max().item(), total=bound)


def _conv(args: list[Any], _kwargs: Any) -> Inside:
    terms = args[1].abs().flatten(1).sum(1).max() * args[0].abs().max()
    return Inside(total=terms.item())


_INSIDE = {
    "aten.group_norm": _group_norm,
    "aten.layer_norm": _layer_norm,
    "aten.rms_norm": _rms_norm,
    "aten.linalg_vector_norm": _vector_norm,
    "aten.mean": _mean,
    "aten.matmul": _product,
    "aten.bmm": _product,
    "aten.linear": _linear,
    "aten.scaled_dot_product_attention": _attention,
    "aten.conv1d": _conv,
    "aten.conv2d": _conv,
    "aten.conv3d": _conv,
}
