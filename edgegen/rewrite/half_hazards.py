"""What float16 would do to a graph: values that leave its range, epsilons that vanish, steps that are too coarse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.graph.count import op_name
from edgegen.graph.edit import module_path, weights
from edgegen.graph.epsilon import epsilon
from edgegen.graph.half_arithmetic import HALF_MAX, SMALLEST, SMALLEST_NORMAL, Arithmetic
from edgegen.graph.ranges.analyse import Inside, Interval, Ranges, ValueRange

aten = torch.ops.aten
Kind = Literal[
    "constant",
    "overflow",
    "inside",
    "accumulation",
    "epsilon",
    "denominator",
    "underflow",
    "resolution",
    "cancellation",
    "measured",
]
COARSE_ANGLE = 16.0
"""From here on an angle in float16 is known to 1/128 rad at best."""
EXACT_INTEGERS = 2048.0
"""Up to here float16 has every integer; a running sum beyond it loses what is added."""
VANISHES = SMALLEST / 2
"""Numbers up to this round to 0."""
CANCELLED = 64.0
"""A difference that is this many times smaller than its operands has lost six of float16's eleven bits."""


class Hazard(BaseModel):
    """One place where float16 would go wrong. `interval` is what the verdict rests on, in units of the value.

    `severity` "breaks": on what was observed, or for any input; "risk": for inputs that go further within the margin,
    or on runtimes that compute sums in float16. `evidence` "proven" follows from the graph alone (constants, intervals
    for inputs in their stated range), "observed" from samples. `fix` and `proof` are filled by `half_safety`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    node: str
    op: str
    module: str
    kind: Kind
    severity: Literal["breaks", "risk"]
    interval: Interval
    evidence: Literal["proven", "observed"]
    detail: str
    fix: str = ""
    proof: str = ""


def find_hazards(program: ExportedProgram, ranges: Ranges, arithmetic: Arithmetic = "decomposed") -> tuple[Hazard, ...]:
    """Hazards of a float32 graph if it were computed in float16, in the order of the graph.

    `ranges` are those of this very graph. `arithmetic` says what the runtime rounds; where it keeps sums in float32,
    sums that leave float16 are told as risks.
    """
    search = _Search(program, ranges, arithmetic, weights(program))
    found: list[Hazard] = []
    for node in program.graph.nodes:
        if node.op in ("placeholder", "call_function"):
            for check in _CHECKS:
                found += check(search, node)
    return tuple(found)


def overflowing(program: ExportedProgram, ranges: Ranges) -> set[str]:
    """Names of all values that may leave float16, those that only pass such values on included."""
    return {name for name, value in ranges.values.items() if _leaves_half(value, ranges)}


def _leaves_half(value: ValueRange, ranges: Ranges) -> bool:
    if value.observed is not None and not value.observed.finite:
        return True
    largest, basis = value.magnitude(ranges.margin)
    return basis != "unknown" and largest > HALF_MAX


@dataclass(frozen=True)
class _Search:
    program: ExportedProgram
    ranges: Ranges
    arithmetic: Arithmetic
    weights: Mapping[str, Tensor]

    def constant(self, node: Any) -> Tensor | None:
        return self.weights.get(node.name) if isinstance(node, Node) else None

    def value(self, node: Any) -> ValueRange | None:
        return self.ranges.values.get(node.name) if isinstance(node, Node) else None

    def hazard(
        self,
        node: Node,
        kind: Kind,
        detail: str,
        interval: Interval,
        *,
        breaks: bool,
        proven: bool = False,
    ) -> Hazard:
        return Hazard(
            node=node.name,
            op="placeholder" if node.op == "placeholder" else op_name(node),
            module=module_path(node),
            kind=kind,
            severity="breaks" if breaks else "risk",
            interval=interval,
            evidence="proven" if proven else "observed",
            detail=detail,
        )


def _constants(search: _Search, node: Node) -> Iterator[Hazard]:
    if node.op == "placeholder":
        held, value = search.constant(node), search.value(node)
        if held is not None and value is not None and (value.magnitude()[0] > HALF_MAX or not _finite(value)):
            yield search.hazard(
                node, "constant", "a constant of it is beyond float16", value.sound, breaks=True, proven=True
            )
        return
    if op_name(node) in ("aten.clamp", "aten.clamp_min", "aten.clamp_max"):
        return
    for number in (one for one in node.args if isinstance(one, float)):
        if abs(number) > HALF_MAX and _single(node):
            detail = f"the number {number:g} in it is beyond float16"
            yield search.hazard(node, "constant", detail, (number, number), breaks=True, proven=True)
        if op_name(node) == "aten.div" and 0 < abs(number) < SMALLEST_NORMAL:
            detail = f"it divides by {number:g}, which float16 has only in part or not at all"
            breaks = abs(number) <= VANISHES
            yield search.hazard(node, "denominator", detail, (number, number), breaks=breaks, proven=True)


def _overflows(search: _Search, node: Node) -> Iterator[Hazard]:
    value = search.value(node)
    if value is None or (node.op == "placeholder" and node.name in search.weights):
        return
    if not _single(node) or not _leaves_half(value, search.ranges):
        return
    sources = (search.value(one) for one in node.all_input_nodes)
    if any(source is not None and _leaves_half(source, search.ranges) for source in sources):
        return  # it passes on what overflowed before, or is made of it: there is one cause
    if any(isinstance(one, float) and abs(one) > HALF_MAX for one in node.args):
        return  # told as a constant
    low, high = value.sound
    proven = low > HALF_MAX or high < -HALF_MAX
    seen = value.observed
    interval = value.sound if seen is None else (seen.low, seen.high)
    breaks = proven or seen is None or not seen.finite or value.seen() > HALF_MAX
    detail = f"its magnitude reaches {value.seen():g}" if seen is not None else "its interval leaves float16"
    yield search.hazard(node, "overflow", detail, interval, breaks=breaks, proven=proven)


def _insides(search: _Search, node: Node) -> Iterator[Hazard]:
    inside = search.ranges.inside.get(node.name)
    if inside is None or node.op != "call_function" or not _single(node):
        return
    name = op_name(node)
    square = search.ranges.margin**2
    what = "the products of queries and keys" if "attention" in name else "a square inside"
    composite = name in _COMPOSITE
    if composite and search.arithmetic != "fused" and inside.step * square > HALF_MAX:
        detail = f"{what} reaches {inside.step:g}"
        yield search.hazard(node, "inside", detail, (0.0, inside.step), breaks=inside.step > HALF_MAX)
    elif inside.total > HALF_MAX:
        detail = f"a sum inside reaches {inside.total:g}: it overflows where sums are computed in float16"
        breaks = search.arithmetic == "accumulating" and name in _REDUCES
        yield search.hazard(node, "accumulation", detail, (0.0, inside.total), breaks=breaks)
    if name in _NORMS and search.arithmetic != "fused":
        yield from _small_variance(search, node, inside)


def _small_variance(search: _Search, node: Node, inside: Inside) -> Iterator[Hazard]:
    held = epsilon(node, search.constant) or 0.0
    if held <= VANISHES:
        detail = f"its epsilon {held:g} is 0 in float16, and a variance is {inside.least:g}"
        breaks = inside.least / search.ranges.margin**2 < SMALLEST_NORMAL
        yield search.hazard(node, "epsilon", detail, (inside.least, inside.least), breaks=breaks)
    elif inside.least_positive + held < SMALLEST * 32:
        detail = f"a variance of {inside.least_positive:g} has few digits in float16, or none"
        interval = (inside.least_positive, inside.least_positive)
        yield search.hazard(node, "underflow", detail, interval, breaks=True)


def _epsilons(search: _Search, node: Node) -> Iterator[Hazard]:
    name = op_name(node) if node.op == "call_function" else ""
    if name not in _GUARDS or not _single(node):
        return
    held = epsilon(node, search.constant)
    value = search.value(node if name in _AVERAGES else node.args[0])
    if held is None or value is None or not 0 < held <= VANISHES or not _divides(node):
        return
    if value.sound[0] >= SMALLEST_NORMAL:
        return
    seen = value.observed
    low = 0.0 if seen is None or seen.low <= 0 <= seen.high else min(abs(seen.low), abs(seen.high))
    # Whoever wrote the epsilon expected a 0, even if no sample had one.
    detail = f"its epsilon {held:g} is 0 in float16, and what it is added to comes down to {low:g}"
    breaks = low < SMALLEST_NORMAL * search.ranges.margin
    yield search.hazard(node, "epsilon", detail, (low, low + held), breaks=breaks, proven=seen is None)


def _divides(node: Node) -> bool:
    """Whether a value ends as a denominator, or under a root or logarithm."""
    for user in node.users:
        name = op_name(user) if user.op == "call_function" else ""
        if name in ("aten.rsqrt", "aten.sqrt", "aten.reciprocal", "aten.log"):
            return True
        if name == "aten.div" and user.args[1] is node:
            return True
        if name == "aten.pow" and isinstance(user.args[1], int | float) and user.args[1] < 1:
            return True
        if name in _PASSES_ON and _divides(user):
            return True
    return False


def _denominators(search: _Search, node: Node) -> Iterator[Hazard]:
    if node.op != "call_function":
        return
    name = op_name(node)
    place = {"aten.div": 1, "aten.reciprocal": 0, "aten.rsqrt": 0}.get(name)
    denominator = None if place is None else node.args[place]
    value = search.value(denominator)
    if value is None or value.observed is None or not _single(node):
        return
    smallest = value.observed.smallest
    if smallest < SMALLEST_NORMAL and not _epsilon_before(search, denominator):
        detail = f"its denominator comes down to {smallest:g}, where float16 has few digits or none"
        yield search.hazard(node, "denominator", detail, (smallest, value.seen()), breaks=smallest < SMALLEST * 32)


def _epsilon_before(search: _Search, node: Any) -> bool:
    """Whether the denominator's own epsilon is told of already."""
    while isinstance(node, Node) and node.op == "call_function":
        if any(True for _ in _epsilons(search, node)):
            return True
        if op_name(node) not in _PASSES_ON:
            return False
        node = node.args[0]
    return False


def _underflows(search: _Search, node: Node) -> Iterator[Hazard]:
    value = search.value(node)
    if value is None or value.observed is None or node.op != "call_function" or not _single(node):
        return
    largest = value.seen()
    if not 0 < largest < SMALLEST_NORMAL or not any(_needs_digits(user) for user in node.users):
        return
    if any(
        (source := search.value(one)) is not None and 0 < source.seen() < SMALLEST_NORMAL
        for one in node.all_input_nodes
        if one.op == "call_function"
    ):
        return
    detail = f"no magnitude is above {largest:g}, where float16 has few digits or none"
    interval = (value.observed.low, value.observed.high)
    yield search.hazard(node, "underflow", detail, interval, breaks=largest < SMALLEST * 32)


def _needs_digits(user: Node) -> bool:
    """Whether a reader makes something large of a small value: adding it to something larger needs none of it."""
    return user.op == "call_function" and op_name(user) in _MAGNIFIES


def _resolutions(search: _Search, node: Node) -> Iterator[Hazard]:
    if node.op != "call_function" or not _single(node):
        return
    name = op_name(node)
    if name in ("aten.sin", "aten.cos"):
        value = search.value(node.args[0])
        largest, basis = (0.0, "unknown") if value is None else value.magnitude(1.0)
        if basis != "unknown" and largest >= COARSE_ANGLE:
            step = 2.0 ** (math.floor(math.log2(largest)) - 10)
            detail = f"its angle reaches {largest:g} rad, where one step of float16 is {step:g} rad"
            yield search.hazard(node, "resolution", detail, (-largest, largest), breaks=True, proven=basis == "proven")
    elif name == "aten.cumsum":
        value = search.value(node)
        length = node.args[0].meta["val"].shape[node.args[1]]  # type: ignore[union-attr]
        if value is not None and length >= EXACT_INTEGERS:
            detail = f"it adds {length} terms one by one: late terms are below a step of float16"
            yield search.hazard(node, "resolution", detail, value.sound, breaks=True)
    elif name == "aten.arange" or (name == "aten.to" and _from_integers(node)):
        value = search.value(node)
        largest = 0.0 if value is None else value.magnitude(1.0)[0]
        if value is not None and EXACT_INTEGERS < largest < math.inf and not _leads_to_angle(node):
            detail = f"integers up to {largest:g}: float16 has all of them up to {EXACT_INTEGERS:g}"
            yield search.hazard(node, "resolution", detail, value.sound, breaks=True, proven=value.observed is None)


def _leads_to_angle(node: Node) -> bool:
    """Whether a sine or cosine follows within a few calls: what is lost is told there."""
    front = {node}
    for _ in range(8):
        front = {user for one in front for user in one.users if user.op == "call_function"}
        if any(op_name(user) in ("aten.sin", "aten.cos") for user in front):
            return True
    return False


def _cancellations(search: _Search, node: Node) -> Iterator[Hazard]:
    if node.op != "call_function" or op_name(node) != "aten.sub" or not _difference_of_means(node):
        return
    operand, value = search.value(node.args[0]), search.value(node)
    if operand is None or value is None or value.observed is None:
        return
    if value.observed.smallest * CANCELLED < operand.seen():
        detail = f"a variance down to {value.observed.smallest:g} is left of numbers up to {operand.seen():g}"
        interval = (value.observed.low, value.observed.high)
        yield search.hazard(node, "cancellation", detail, interval, breaks=True)


def _difference_of_means(node: Node) -> bool:
    def squares(value: Any) -> Node | None:
        if not isinstance(value, Node) or value.op != "call_function":
            return None
        name, args = op_name(value), value.args
        is_square = (
            name == "aten.square"
            or (name == "aten.pow" and args[1] == 2)
            or (name == "aten.mul" and args[0] is args[1])
        )
        return args[0] if is_square and isinstance(args[0], Node) else None

    mean, other = node.args[:2]
    if not isinstance(mean, Node) or mean.op != "call_function" or op_name(mean) != "aten.mean":
        return False
    inner = squares(other)
    return (
        squares(mean.args[0]) is not None
        and inner is not None
        and inner.op == "call_function"
        and op_name(inner) == "aten.mean"
    )


def _finite(value: ValueRange) -> bool:
    return value.observed is None or value.observed.finite


def _single(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype is torch.float32


def _from_integers(node: Node) -> bool:
    source = node.args[0]
    return isinstance(source, Node) and not source.meta["val"].is_floating_point()


_NORMS = frozenset({"aten.group_norm", "aten.layer_norm", "aten.rms_norm"})
_COMPOSITE = _NORMS | {"aten.scaled_dot_product_attention", "aten.linalg_vector_norm"}
_REDUCES = _NORMS | {"aten.linalg_vector_norm", "aten.mean", "aten.sum"}
_MAGNIFIES = _NORMS | {"aten.div", "aten.rsqrt", "aten.sqrt", "aten.reciprocal", "aten.log", "aten.mul"}
_AVERAGES = frozenset({"aten.linear", "aten.conv1d", "aten.conv2d"})
_GUARDS = _AVERAGES | {"aten.add", "aten.clamp_min", "aten.clamp"}
_PASSING_ON = """
    view reshape flatten unflatten transpose permute squeeze unsqueeze expand expand_as slice select to _to_copy clone
    contiguous alias sqrt add clamp_min
"""
_PASSES_ON = frozenset(f"aten.{name}" for name in _PASSING_ON.split())
_CHECKS: tuple[Callable[[_Search, Node], Iterator[Hazard]], ...] = (
    _constants,
    _overflows,
    _insides,
    _epsilons,
    _denominators,
    _underflows,
    _resolutions,
    _cancellations,
)
