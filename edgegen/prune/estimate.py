"""How long students that are alike take for a picture on a target: an estimate, from kernels timed on this machine.

The kernels of all of them are timed together at the widths of the widest, so that sizes of one student lie on the same
surfaces and a narrower one is never said to be slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.export import ExportedProgram

from edgegen.cache import Cache
from edgegen.graph.capture import capture
from edgegen.precision.options import Progress
from edgegen.prune.assemble import timed, timed_with
from edgegen.prune.cost import Op, ops, width
from edgegen.prune.kernels import Kernel
from edgegen.prune.space import Spaces
from edgegen.prune.target_speed import target_speed
from edgegen.students.student import Student
from edgegen.targets import Target
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


def before_and_after(
    student: Student,
    other: Student,
    steps: int,
    target: Target,
    backends: Sequence[str],
    cache: Cache,
    progress: Progress,
) -> tuple[dict[str, tuple[float, float]], str]:
    """Backend -> milliseconds of a picture of `steps` steps of both in fp32, and what they are estimated from."""
    networks = {
        which: {
            part: Network(capture(component), steps if part == "denoiser" else 1, "fp32")
            for part, component in one.components.items()
        }
        for which, one in (("before", student), ("after", other))
    }
    found = {name: picture_latency(networks, target.backend(name), cache, progress) for name in backends}
    latency = {name: (one.milliseconds["before"], one.milliseconds["after"]) for name, one in found.items()}
    return latency, "; ".join(dict.fromkeys(one.source for one in found.values()))


def _priced(on: BackendOnTarget, kernel: Kernel, precision: BuildPrecision) -> float:
    """Of the time in fp32."""
    op = PRICED.get(kernel.kind)
    cost = None if op is None else on.cost(op, precision)
    return 1.0 if cost is None or precision == "fp32" else cost.time
