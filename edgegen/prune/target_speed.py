"""Milliseconds of a target from milliseconds of this machine: the ratio of what both do of one kernel.

A target file says how many multiply-accumulates a second its runtime did of a large UNet in fp32. What this machine
does of that UNet's commonest work, 3x3 convolutions and projections of 320 and 640 channels, is timed here; both sides
being throughputs of the same work, their ratio carries times over. It is an estimate, and called so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgegen.cache import Cache
from edgegen.precision.options import Progress
from edgegen.prune.assemble import timed_with
from edgegen.prune.bench import Point, times
from edgegen.prune.kernels import Kernel
from edgegen.targets.model import BackendOnTarget

WORK: Sequence[tuple[Point, float]] = (
    (Point(kernel=Kernel(kind="conv", sizes=(3, 3, 1, 32, 32)), read=320, written=320), 9.0 * 32 * 32),
    (Point(kernel=Kernel(kind="conv", sizes=(3, 3, 1, 16, 16)), read=640, written=640), 9.0 * 16 * 16),
    (Point(kernel=Kernel(kind="linear", sizes=(1024,)), read=320, written=1280), 1024.0),
)
"""Kernels, and their MACs for each channel read and written."""


@dataclass(frozen=True)
class TargetSpeed:
    """MACs a second of the target (by its file) and of this machine (timed with `runtime`)."""

    target: float
    here: float
    runtime: str

    @property
    def factor(self) -> float:
        """Milliseconds there for each one here."""
        return self.here / self.target

    def said(self) -> str:
        return (
            f"kernels timed on this machine with {self.runtime}, scaled by {self.factor:.2f}: {self.here:.3g} MACs a "
            f"second here, {self.target:.3g} by the target file"
        )


def target_speed(on: BackendOnTarget, cache: Cache, progress: Progress) -> TargetSpeed | None:
    """None where the target file does not say how fast it is."""
    if on.speed is None:
        return None
    runtime = timed_with(on.name)
    known = times(runtime, [point for point, _ in WORK], cache, progress)
    macs = sum(each * point.read * point.written for point, each in WORK)
    return TargetSpeed(on.speed.macs_per_second, macs / (sum(known.values()) / 1e3), runtime)
