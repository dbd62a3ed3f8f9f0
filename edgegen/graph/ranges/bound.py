"""Interval arithmetic on tensors: a lower and an upper bound that broadcast against the value they bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_HELD = 1 << 16
"""Bounds with more elements than this are kept as one interval for the whole tensor."""
# Float64 that stands for infinity inside products, so that 0 * inf is 0; anything near it is infinite again afterwards.
_BIG, _INFINITE = 1e150, 1e120


@dataclass(frozen=True)
class Bound:
    """`low <= value <= high` for every element; float64, both broadcast against the value's shape."""

    low: Tensor
    high: Tensor

    @staticmethod
    def of(low: float, high: float | None = None) -> Bound:
        """One interval, or one number, for the whole tensor."""
        top = low if high is None else high
        return Bound(torch.tensor(low, dtype=torch.float64), torch.tensor(top, dtype=torch.float64))

    @staticmethod
    def exactly(value: Tensor) -> Bound:
        """The bound of a known tensor."""
        wide = value.detach().to(torch.float64)
        return Bound(wide, wide) if value.numel() <= LARGEST_HELD else Bound(wide.min(), wide.max())

    def whole(self) -> Bound:
        """One interval for the whole tensor."""
        return Bound(self.low.min(), self.high.max())

    def interval(self) -> tuple[float, float]:
        """The whole interval as numbers."""
        return float(self.low.min()), float(self.high.max())

    def full(self, shape: Sequence[int]) -> Bound | None:
        """One bound an element, or None where that would be too much."""
        if math.prod(shape) > LARGEST_HELD:
            return None
        return Bound(self.low.expand(tuple(shape)), self.high.expand(tuple(shape)))

    def tidy(self) -> Bound:
        """NaN and stand-ins become infinities; low and high have one shape, and not too many elements."""
        low, high = self.low.double(), self.high.double()
        low = low.masked_fill(torch.isnan(low) | (low < -_INFINITE), -math.inf).clamp(max=_INFINITE)
        high = high.masked_fill(torch.isnan(high) | (high > _INFINITE), math.inf).clamp(min=-_INFINITE)
        low, high = low + torch.zeros_like(high), high + torch.zeros_like(low)
        made = Bound(low, high)
        return made if made.low.numel() <= LARGEST_HELD else made.whole()

    def map(self, function: Callable[[Tensor], Tensor]) -> Bound:
        """`function` rises with its argument."""
        return Bound(function(self.low), function(self.high))

    def finite(self) -> Bound:
        """Infinities as numbers that products can be made of."""
        return Bound(self.low.clamp(-_BIG, _BIG), self.high.clamp(-_BIG, _BIG))


UNKNOWN = Bound.of(-math.inf, math.inf)


def add(a: Bound, b: Bound) -> Bound:
    """Sum."""
    return Bound(a.low + b.low, a.high + b.high)


def negative(a: Bound) -> Bound:
    """-a."""
    return Bound(-a.high, -a.low)


def multiply(a: Bound, b: Bound) -> Bound:
    """Product of two values that know nothing of each other."""
    x, y = a.finite(), b.finite()
    a_low, a_high, b_low, b_high = x.low * y.low, x.low * y.high, x.high * y.low, x.high * y.high
    low = torch.minimum(torch.minimum(a_low, a_high), torch.minimum(b_low, b_high))
    high = torch.maximum(torch.maximum(a_low, a_high), torch.maximum(b_low, b_high))
    return Bound(low, high)


def reciprocal(a: Bound) -> Bound:
    """1 / a; everything where a can be 0."""
    crosses = (a.low <= 0) & (a.high >= 0)
    from_above, from_below = (a.low == 0) & (a.high > 0), (a.high == 0) & (a.low < 0)
    low = (1 / a.high).masked_fill(crosses, -math.inf)
    high = (1 / a.low).masked_fill(crosses, math.inf)
    return Bound(torch.where(from_above, 1 / a.high, low), torch.where(from_below, 1 / a.low, high))


def valley(a: Bound, function: Callable[[Tensor], Tensor], bottom: float, least: float) -> Bound:
    """A function that falls to `least` at `bottom` and rises from there."""
    x, y = function(a.low), function(a.high)
    inside = (a.low <= bottom) & (a.high >= bottom)
    return Bound(torch.minimum(x, y).masked_fill(inside, least), torch.maximum(x, y))


def union(a: Bound, b: Bound) -> Bound:
    """Either of the two."""
    return Bound(torch.minimum(a.low, b.low), torch.maximum(a.high, b.high))


def weighted(a: Bound, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Bound:
    """A sum of products with known weights: positive weights take one end, negative ones the other."""
    held, up, down = a.finite(), weight.clamp(min=0), weight.clamp(max=0)
    return Bound(
        product(held.low, up) + product(held.high, down),
        product(held.high, up) + product(held.low, down),
    )
