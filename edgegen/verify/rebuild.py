"""The graph that an artifact was lowered from, made again from the student and the passes that were recorded."""

from __future__ import annotations

from collections.abc import Sequence

from torch.export import ExportedProgram

from edgegen.errors import EdgegenError
from edgegen.precision.plan import ComponentPlan
from edgegen.precision.quantize import quantized, settled
from edgegen.precision.repair.tensors import Tensors, apply
from edgegen.precision.sites import resolve
from edgegen.rewrite.registry import parse
from edgegen.rewrite.to_half import ToHalf


def rebuilt(captured: ExportedProgram, specs: Sequence[str]) -> ExportedProgram:
    """`captured` after the passes of `specs` (an artifact's `passes`), in float32: what the casts to float16 lose is
    what an artifact is held against, so they are left out. UsageError for a pass that this edgegen does not know."""
    program = captured
    for spec in specs:
        for one in parse(spec):
            if not isinstance(one, ToHalf):
                program = one(program).program
    return program


def rebuilt_as_planned(
    captured: ExportedProgram, specs: Sequence[str], canonical: Sequence[str], plan: ComponentPlan, repaired: Tensors
) -> ExportedProgram:
    """As `rebuilt`, computed as `plan` says: quantize and dequantize ops are in the graph, whoever lowers it.

    `canonical` are the first of `specs`, those that made the graph which `plan` and `repaired` are of. EdgegenError
    when they are not, or when the plan is of another graph.
    """
    count = len(canonical)
    if tuple(specs[:count]) != tuple(canonical):
        raise EdgegenError(
            "the passes of an artifact do not begin with those that its plan was made on",
            hint="build the bundle again",
        )
    base = apply(rebuilt(captured, canonical), repaired)
    program = rebuilt(settled(base, plan), specs[count:])
    return quantized(program, resolve(program, plan, base))
