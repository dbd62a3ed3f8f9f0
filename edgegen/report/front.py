"""The Pareto front of a precision plan as coordinates of a drawing. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgegen.precision.plan import FrontPoint

LEFT, RIGHT, TOP, BOTTOM = 70.0, 530.0, 24.0, 196.0
TICKS = 4


@dataclass(frozen=True)
class Mark:
    """A point, in the drawing's own units, and what it says of itself."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Front:
    points: tuple[Mark, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]

    @property
    def line(self) -> str:
        """As an SVG polyline wants it."""
        return " ".join(f"{one.x:.1f},{one.y:.1f}" for one in self.points)


def draw_front(points: Sequence[FrontPoint]) -> Front | None:
    """Latency to the right, decibels upwards; None for fewer than two plans, of which there is nothing to see."""
    if len(points) < 2:
        return None
    ordered = sorted(points, key=lambda one: one.latency_ratio)
    xs, ys = [one.latency_ratio for one in ordered], [one.picture_psnr_db for one in ordered]

    def x(value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * _share(value, xs), 1)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * _share(value, ys), 1)

    marks = tuple(
        Mark(
            x(one.latency_ratio),
            y(one.picture_psnr_db),
            f"{one.latency_ratio:.3f} of fp32, {one.picture_psnr_db:.1f} dB, {one.bytes:,} bytes",
        )
        for one in ordered
    )
    x_ticks = tuple(Tick(x(value), f"{value:.2f}") for value in _spread(xs))
    y_ticks = tuple(Tick(y(value) + 4, f"{value:.0f} dB") for value in _spread(ys))
    return Front(marks, x_ticks, y_ticks)


def _share(value: float, among: Sequence[float]) -> float:
    low, high = min(among), max(among)
    return 0.5 if high == low else (value - low) / (high - low)


def _spread(among: Sequence[float]) -> list[float]:
    low, high = min(among), max(among)
    return sorted({low + (high - low) * index / TICKS for index in range(TICKS + 1)})
