"""Sites: the ops of a graph that a plan gives precisions to, and where they are after a target's passes.

A site is named by the module path that its call came from. Where one module makes several, as a projection that was
cut into parts does, they are `path#1`, `path#2`, ... in the order of the canonical graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgegen.errors import EdgegenError, UsageError
from edgegen.graph.count import macs_of
from edgegen.graph.edit import made_by, module_path, weights
from edgegen.precision.plan import ComponentPlan, OpPlan, Range

aten = torch.ops.aten
Kind = Literal["conv", "linear", "matmul"]
LINEAR = aten.linear.default
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, *TRANSPOSED)
MATMULS = (aten.bmm.default, aten.matmul.default, aten.mm.default)
_OF_NORMS = frozenset({"explicit-group-norm", "explicit-layer-norm", "explicit-rms-norm", "two-pass-variance"})
_ALIKE = 1e-6
"""1 - the squared cosine of two weights that are the same but for a factor, in float32 or float16."""
_KIN = 0.8
"""The squared cosine of a weight and of what four bits leave of it."""


@dataclass(frozen=True)
class Site:
    """One call that may be quantized. `weight` is the placeholder of its weight, None for a matmul."""

    key: str
    kind: Kind
    node: str
    weight: str | None
    shape: tuple[int, ...]
    """Of the weight, or of a matmul's second operand."""
    macs: int
    axis: int = 0
    """Of the weight's output channels."""

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return 0 if self.weight is None else math.prod(self.shape)


def channel_axis(node: Node) -> int:
    """Along which axis of its weight a convolution's or linear's output channels lie."""
    return 1 if node.target in TRANSPOSED else 0


def kind_of(node: Node) -> Kind:
    """Of a site's call, as it is in this graph."""
    if node.target in MATMULS:
        return "matmul"
    return "linear" if node.target is LINEAR else "conv"


def sites(program: ExportedProgram) -> dict[str, Site]:
    """The sites of a canonical graph in its order. What passes made of norms is none."""
    found: dict[str, list[Site]] = {}
    for path, site in _candidates(program):
        found.setdefault(path, []).append(site)
    keys = {}
    for path, group in found.items():
        for number, site in enumerate(group, start=1):
            keys[site.node] = path if len(group) == 1 else f"{path}#{number}"
    order = [node.name for node in program.graph.nodes if node.name in keys]
    flat = {site.node: site for group in found.values() for site in group}
    return {keys[name]: _named(flat[name], keys[name]) for name in order}


def resolve(program: ExportedProgram, plan: ComponentPlan, canonical: ExportedProgram) -> dict[str, OpPlan]:
    """The plan on `program`, which a target's passes made of `canonical`: name of each call -> how it is computed.

    An op that passes turned into several calls gives each the same. Where a pass scaled a weight, the output range is
    scaled too; `op` says what the call is in `program`, where a linear may be a convolution. UsageError when the plan
    names an op that `canonical` has not, or of another kind; EdgegenError when one is not found again in `program`.
    """
    known = sites(canonical)
    check(plan, known)
    at = _placed(program, canonical, known)
    resolved: dict[str, OpPlan] = {}
    for key, op in plan.ops.items():
        if key not in at:
            raise EdgegenError(f"op `{key}` of the plan is nowhere in the graph after the target's passes")
        for name, factor in at[key]:
            resolved[name] = _scaled(op, factor)
    calls = {node.name: node for node in program.graph.nodes if node.name in resolved}
    return {name: resolved[name].model_copy(update={"op": kind_of(node)}) for name, node in calls.items()}


def check(plan: ComponentPlan, known: Mapping[str, Site]) -> None:
    """UsageError for an op of `plan` that is not among the sites `known`, or is of another kind there."""
    from difflib import get_close_matches

    for key, op in plan.ops.items():
        if key not in known:
            near = get_close_matches(key, known, n=2, cutoff=0.6)
            hint = f"did you mean {' or '.join(f'`{one}`' for one in near)}?" if near else "make the plan again"
            raise UsageError(f"the plan names op `{key}`, which this graph does not have", hint=hint)
        if op.op != known[key].kind:
            raise UsageError(f"the plan says that `{key}` is a {op.op}, and it is a {known[key].kind}")


def _candidates(program: ExportedProgram) -> Iterator[tuple[str, Site]]:
    held = weights(program)
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target not in (LINEAR, *CONVS, *MATMULS):
            continue
        if _OF_NORMS.intersection(made_by(node)[:1]):
            continue
        a, b = node.args[:2]
        shape = tuple(int(size) for size in b.meta["val"].shape)
        kind = kind_of(node)
        if kind == "matmul":
            if a.name not in held and b.name not in held:
                yield _path(node, kind), Site("", kind, node.name, None, shape, macs_of(node))
        elif b.name in held:
            yield _path(node, kind), Site("", kind, node.name, b.name, shape, macs_of(node), channel_axis(node))


def _path(node: Node, kind: Kind) -> str:
    """A module that is called again, which torch.export numbers, is the same; the root itself has no path."""
    return ".".join(part.split("@")[0] for part in module_path(node).split(".")) or kind


def _named(site: Site, key: str) -> Site:
    return Site(key, site.kind, site.node, site.weight, site.shape, site.macs, site.axis)


def _placed(
    program: ExportedProgram, canonical: ExportedProgram, known: Mapping[str, Site]
) -> dict[str, list[tuple[str, float]]]:
    """Key -> calls of `program` that the site became, with the factor that its weight was multiplied by."""
    before, after = weights(canonical), weights(program)
    own: dict[str, list[Site]] = {}
    for site in known.values():
        own.setdefault(site.key.split("#")[0], []).append(site)
    there: dict[str, list[Site]] = {}
    for path, site in _candidates(program):
        there.setdefault(path, []).append(site)
    found: dict[str, list[tuple[str, float]]] = {}
    for path, group in own.items():
        with_weights = [site for site in group if site.weight is not None]
        calls = [site for site in there.get(path, []) if site.weight is not None]
        for site, call, factor in _paired(with_weights, calls, before, after):
            found.setdefault(site.key, []).append((call.node, factor))
        products = [site for site in group if site.weight is None]
        made = [site for site in there.get(path, []) if site.weight is None]
        if products and len(products) == len(made):
            for site, call in zip(products, made, strict=True):
                found.setdefault(site.key, []).append((call.node, 1.0))
    return found


def _paired(
    group: list[Site], calls: list[Site], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> Iterator[tuple[Site, Site, float]]:
    """Which site each call of one module came from: by its weight, and in order where weights are shared."""
    if len(group) == 1:
        for call in calls:
            alike, factor = _likeness(before[group[0].weight or ""], after[call.weight or ""])
            yield group[0], call, factor if alike > _KIN else 1.0
        return
    free = list(group)
    for call in calls:
        likeness = [_likeness(before[site.weight or ""], after[call.weight or ""]) for site in free]
        best = max(range(len(free)), key=lambda index: likeness[index][0], default=None)
        if best is not None and likeness[best][0] > _KIN:
            yield free.pop(best), call, likeness[best][1]
        elif free and len(calls) == len(group):  # its weight was changed beyond recognition, its place was not
            yield free.pop(0), call, 1.0


def _likeness(weight: Tensor, made: Tensor) -> tuple[float, float]:
    """How much of `made`, whatever its axes, is `weight` times a number (0..1, the cosine squared), and the number.

    Weights may have been put on a grid meanwhile: a number that is nearly 1 is then 1.
    """
    if weight.numel() != made.numel():
        return 0.0, 1.0
    if weight.data_ptr() == made.data_ptr():
        return 1.0, 1.0
    a, b = weight.detach().flatten().double(), made.detach().flatten().double()
    product, size, other = float(a @ b), float(a @ a), float(b @ b)
    if size == 0 or other == 0:
        return float(size == other), 1.0
    alike, factor = product**2 / (size * other), product / size
    return alike, 1.0 if alike < 1 - _ALIKE and abs(factor - 1) < 0.05 else factor


def _scaled(op: OpPlan, factor: float) -> OpPlan:
    if op.output is None or abs(factor - 1.0) < 1e-4:
        return op
    ends = sorted((op.output.low * factor, op.output.high * factor))
    return op.model_copy(update={"output": Range(low=ends[0], high=ends[1])})
