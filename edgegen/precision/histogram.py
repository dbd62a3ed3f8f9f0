"""What values a tensor takes, call after call, and the range that int8 codes are best spent on.

A histogram has as many bins whatever comes: its width is a power of two that doubles, two bins becoming one, when a
value lies outside. So nothing has to be known before the first value is seen, and no tensor is kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgegen.precision.plan import Range

BINS = 4096
_SHARES = torch.cat([torch.linspace(1.0, 0.5, 26), torch.logspace(-1.05, -6, 34, base=2.0)]).double()
"""Of the least and the greatest value: what is tried as an end of the range."""


class Histogram:
    """Counts of the values seen, over -width .. width, with their exact least and greatest."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self._exponent = -126
        self._counts = torch.zeros(BINS, dtype=torch.float64)

    def see(self, values: Tensor) -> bool:
        """Count `values`; False, and nothing counted, when one of them is NaN or infinite."""
        if values.numel() == 0:
            return True
        low, high = (float(end) for end in values.detach().float().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            return False
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(math.frexp(max(-low, high))[1])
        width = 2.0**self._exponent
        counts = torch.histc(values.detach().float(), BINS, -width, width).double()
        # Zero is a code, so it costs nothing whatever the range: after a relu it is most of the values.
        counts[BINS // 2] -= values.numel() - int(values.count_nonzero())
        self._counts += counts.clamp_(min=0.0)
        return True

    def add(self, other: Histogram) -> None:
        """See what `other` has seen."""
        if other.low > other.high:
            return
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self._widen(other._exponent)
        self._counts += _merged(other._counts, self._exponent - other._exponent)

    def range(self, observer: str = "mse") -> Range:
        """`minmax`: all that was seen. `mse`: where rounding and saturation together have the least squared error."""
        if self.low > self.high:
            raise ValueError("nothing was seen")
        if observer == "minmax" or self.low == self.high:
            return Range(low=self.low, high=self.high)
        error = _Error(self._counts, 2.0**self._exponent, self.low, self.high)
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        for _ in (0, 1):  # one end after the other, since they share the scale
            if low < 0.0:
                tried = _SHARES * min(self.low, 0.0)
                low = float(tried[int(error(tried, torch.full_like(tried, high)).argmin())])
            if high > 0.0:
                tried = _SHARES * max(self.high, 0.0)
                high = float(tried[int(error(torch.full_like(tried, low), tried).argmin())])
        return Range(low=low, high=high)

    def _widen(self, exponent: int) -> None:
        if exponent > self._exponent:
            self._counts = _merged(self._counts, exponent - self._exponent)
            self._exponent = exponent


def _merged(counts: Tensor, doublings: int) -> Tensor:
    """The same counts in as many bins, over a width that was doubled so many times."""
    for _ in range(min(doublings, BINS.bit_length())):
        if not counts.any():
            break
        half = counts.view(-1, 2).sum(1)
        counts = torch.zeros_like(counts)
        counts[BINS // 4 : 3 * BINS // 4] = half
    return counts


class _Error:
    """The squared error that a range makes of counted values: of rounding within it, of saturation beyond it."""

    def __init__(self, counts: Tensor, width: float, low: float, high: float) -> None:
        self._centres = ((torch.arange(BINS).double() + 0.5) * (2 * width / BINS) - width).clamp(low, high)
        moments = torch.stack([counts, counts * self._centres, counts * self._centres.square()])
        self._below = torch.cat([torch.zeros(3, 1, dtype=torch.float64), moments.cumsum(1)], 1)

    def __call__(self, lows: Tensor, highs: Tensor) -> Tensor:
        """One sum of squares for each pair of ends."""
        under = self._below[:, self._place(lows)]
        until = self._below[:, torch.searchsorted(self._centres, highs, right=True)]
        over = self._below[:, -1:] - until
        saturated = _about(under, lows) + _about(over, highs)
        # What lies within half a code of zero becomes zero: of values that are mostly small, that is most.
        step = (highs - lows) / 255.0
        left = torch.maximum(self._place(-step / 2), self._place(lows))
        right = torch.minimum(self._place(step / 2), self._place(highs))
        central = self._below[:, right] - self._below[:, left]
        rounded = (until[0] - under[0] - central[0]) * step.square() / 12.0
        return saturated + rounded + _about(central, torch.zeros_like(step))

    def _place(self, values: Tensor) -> Tensor:
        return torch.searchsorted(self._centres, values)


def _about(moments: Tensor, end: Tensor) -> Tensor:
    """The sum of squared distances from `end`, of count, sum and sum of squares."""
    return (moments[2] - 2 * end * moments[1] + end.square() * moments[0]).clamp(min=0.0)
