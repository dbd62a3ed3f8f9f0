"""How long students that are alike take for a picture on a target: an estimate, from kernels timed on this machine.

The kernels of all of them are timed together at the widths of the widest, so that sizes of one student lie on the same
surfaces and a narrower one is never said to be slower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.export import ExportedProgram

from edgegen.cache import Cache
from edgegen.precision.options import Progress
from edgegen.prune.assemble import timed, timed_with
from edgegen.prune.cost import Op, ops, width
from edgegen.prune.kernels import Kernel
from edgegen.prune.space import Spaces
from edgegen.prune.target_speed import target_speed
from edgegen.targets.model import BackendOnTarget, BuildPrecision, QuantizableOp

PRICED: dict[str, QuantizableOp] = {
    "conv": "conv",
    "depthwise": "conv",
    "transposed": "conv",
    "linear": "linear",
    "attention": "matmul",
}
"""Kind of a kernel -> the op whose cost says what a precision does to it; others take as long as in fp32."""


@dataclass(frozen=True)
class Network:
    """A captured component, how often a picture calls it, and the float that it is computed in."""

    program: ExportedProgram
    calls: int
    precision: BuildPrecision


@dataclass(frozen=True)
class Estimated:
    """Student -> milliseconds of a picture. `on_target`: they are the target's, not this machine's, of which only the
    ratios mean anything. `source`: what they are from, in words."""

    milliseconds: Mapping[str, float]
    on_target: bool
    source: str


def picture_latency(
    students: Mapping[str, Mapping[str, Network]], on: BackendOnTarget, cache: Cache, progress: Progress
) -> Estimated:
    """`students`: name -> component -> its network. Timings are kept in `cache`."""
    found = {
        name: {part: ops(one.program, Spaces(())) for part, one in networks.items()}
        for name, networks in students.items()
    }
    every = [op for parts in found.values() for each in parts.values() for op in each]
    surfaces = timed(on.name, every, on.width_multiple, cache, progress)
    speed = target_speed(on, cache, progress)
    factor = 1.0 if speed is None else speed.factor

    def time(op: Op, precision: BuildPrecision) -> float:
        if op.kernel is None or op.folded:
            return 0.0
        read = width(op.read) if op.kernel.two_sided else 1.0
        return surfaces[op.kernel](read, width(op.written)) * _priced(on, op.kernel, precision)

    made = {
        name: factor
        * sum(time(op, one.precision) * one.calls for part, one in networks.items() for op in found[name][part])
        for name, networks in students.items()
    }
    errors = sorted(one.error for one in surfaces.values())
    fit = f", fitted within {errors[len(errors) // 2]:.0%} (median over kernels)" if errors else ""
    said = f"kernels timed on this machine with {timed_with(on.name)}, not scaled" if speed is None else speed.said()
    return Estimated(made, speed is not None, said + fit)


def _priced(on: BackendOnTarget, kernel: Kernel, precision: BuildPrecision) -> float:
    """Of the time in fp32."""
    op = PRICED.get(kernel.kind)
    cost = None if op is None else on.cost(op, precision)
    return 1.0 if cost is None or precision == "fp32" else cost.time
