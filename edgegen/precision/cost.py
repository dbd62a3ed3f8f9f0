"""What a target's runtimes execute and what it costs there: which precisions an op may have, and its time in each.

Times are relative, from the delegates' tables (`targets/delegates/*.toml`), and weighted by multiply-accumulates: a
plan's latency by them is an estimate, and called so. Bytes are exact: codes packed, scales and tables of two bytes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.precision.plan import BITS, COMPRESSED, OpPlan, OpPrecision, Precision
from edgegen.precision.sites import Site
from edgegen.targets import Target
from edgegen.targets.model import BackendOnTarget, DeniedOp, Place, PrecisionCost, QuantizableOp

aten = torch.ops.aten
ATEN: dict[QuantizableOp, tuple[str, ...]] = {
    "conv": ("aten.convolution", "aten.conv1d", "aten.conv2d", "aten.conv3d"),
    "linear": ("aten.linear", "aten.addmm", "aten.mm"),
    "matmul": ("aten.matmul", "aten.bmm"),
}
"""What target files call the ops of plans."""
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
_STRIDE = 3
"""The place of `stride` among a convolution's arguments."""
FLOATS: tuple[OpPrecision, ...] = ("fp32", "fp16")


class Work(NamedTuple):
    """Of one call of an op: multiply-accumulates, and values that it reads and writes, weights left out."""

    macs: int
    values: int


LARGE = Work(2**50, 0)
"""An op beside whose multiply-accumulates nothing else counts."""


def work_of(site: Site) -> Work:
    """By the shape of its weight: each is multiplied once at every position. Strides are not looked at."""
    if site.weight is None:
        return Work(site.macs, 0)
    positions = site.macs // max(1, math.prod(site.shape))
    return Work(site.macs, positions * (site.shape[0] + site.shape[1]))


@dataclass(frozen=True)
class Candidate:
    """One way to compute an op, and with each backend its time, in that of as many fp32 multiply-accumulates of a large
    op."""

    precision: OpPrecision
    form: str
    group: int
    time: Mapping[str, float]


def places(program: ExportedProgram, sites: Mapping[str, Site]) -> dict[str, tuple[Place, ...]]:
    """Of each site: whether no other site comes before it, none after it, it has a stride, or is transposed."""
    by_node = {site.node: key for key, site in sites.items()}
    behind: dict[Node, bool] = {}  # whether a site lies before a value
    first, followed = set(), set()
    for node in program.graph.nodes:
        before = any(behind[one] or one.name in by_node for one in node.all_input_nodes)
        behind[node] = before
        if node.name in by_node and not before:
            first.add(node.name)
    ahead: set[Node] = set()
    for node in reversed(program.graph.nodes):
        if any(user in ahead or user.name in by_node for user in node.users):
            ahead.add(node)
            followed.add(node.name)
    found: dict[str, tuple[Place, ...]] = {}
    nodes = {node.name: node for node in program.graph.nodes}
    for key, site in sites.items():
        node = nodes[site.node]
        marks: list[tuple[Place, bool]] = [
            ("first", site.node in first),
            ("last", site.node not in followed),
            ("strided", site.kind == "conv" and _stride(node) > 1 and node.target not in TRANSPOSED),
            ("transposed", node.target in TRANSPOSED),
        ]
        found[key] = tuple(name for name, holds in marks if holds)
    return found


def _stride(node: Node) -> int:
    args: Any = node.args
    stride: Any = args[_STRIDE] if len(args) > _STRIDE else 1
    each = stride if isinstance(stride, list | tuple) else (stride,)
    greatest: int = max((int(one) for one in each), default=1)
    return greatest


def refusal(op: QuantizableOp, precision: OpPrecision, at: Sequence[Place], on: BackendOnTarget) -> str | None:
    """Why the runtime does not execute an op in this precision, in the target file's words; None when it does."""
    if precision not in on.precisions:
        offered = ", ".join(one for one in on.precisions)
        return f"`{on.name}` executes {offered} here"
    denied = _denial(op, precision, at, on)
    return None if denied is None else f"`{on.name}`: {denied.reason} ({denied.reference})"


def _denial(op: QuantizableOp, precision: OpPrecision, at: Sequence[Place], on: BackendOnTarget) -> DeniedOp | None:
    for denied in on.denied_ops:
        if precision not in denied.precisions or not denied.op.startswith(ATEN[op]):
            continue
        if not denied.where or set(denied.where) & set(at):
            return denied
    return None


def float_precision(target: Target, backends: Sequence[str]) -> Precision:
    """What is not quantized is computed in: fp16 where every backend prefers it, else fp32."""
    defaults = {target.backend(name).default_precision for name in backends}
    return "fp16" if defaults == {"fp16"} else "fp32"


def candidates(
    op: QuantizableOp,
    at: Sequence[Place],
    target: Target,
    backends: Sequence[str],
    base: Precision,
    allowed: Collection[str] | None = None,
    work: Work | None = None,
) -> tuple[Candidate, ...]:
    """What every one of `backends` executes natively and has a cost for, the float `base` first; `allowed` None: all.

    Weight-only precisions are none of a matmul's, and where two backends keep a precision's weights in different forms
    it is none of either's: they could not compute the same.
    """
    done = work or LARGE

    def times(precision: OpPrecision) -> dict[str, float]:
        return {name: target.backend(name).time(op, precision, *done) for name in backends}

    found = [Candidate(base, "affine", 0, times(base))]
    for precision in COMPRESSED:
        if allowed is not None and precision not in allowed:
            continue
        if op == "matmul" and not precision.startswith("w8a8"):
            continue
        if any(refusal(op, precision, at, target.backend(name)) for name in backends):
            continue
        costs = {name: target.backend(name).cost(op, precision) for name in backends}
        priced: dict[str, PrecisionCost] = {name: cost for name, cost in costs.items() if cost is not None}
        if len(priced) == len(backends) and len({(cost.form, cost.group) for cost in priced.values()}) == 1:
            one = next(iter(priced.values()))
            found.append(Candidate(precision, one.form, one.group, times(precision)))
    return tuple(found)


def stored_bytes(shape: Sequence[int], channels: int, op: OpPlan | Candidate) -> int:
    """Of a weight of `shape` with `channels` output channels in a precision: codes, and scales or tables beside them,
    as `edgegen.precision.encode.Encoded.stored_bytes` counts them."""
    elements, bits = math.prod(shape), BITS[op.precision]
    if op.precision in FLOATS:
        return elements * bits // 8
    packed = -(-elements * bits // 8)
    if op.form == "palette":
        return packed + 2 * (1 << bits) * (channels // op.group if op.group else 1)
    groups = (shape[0] * shape[1] // channels) // op.group if op.group else 1
    return packed + 2 * channels * groups
