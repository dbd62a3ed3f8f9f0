"""From real numbers to codes and back: the one arithmetic that every backend's numbers are held against.

Rounding is half to even, as in torch and in the runtimes. Every scale has 11 significant bits: a code of eight bits
times it is then exact in float32, so what is decoded is encoded to the same codes and the same scale again, by us and
by any tool that takes the greatest magnitude over 127; and float16 holds it too, as long as it is no subnormal there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from edgegen.errors import EdgegenError, UsageError
from edgegen.precision.palette import palettes
from edgegen.precision.plan import BITS, OpPlan, Range

ACTIVATION_MIN, ACTIVATION_MAX = -128, 127
WEIGHT_MAX = {8: 127, 4: 7}
"""Bits -> greatest code of an affine weight; the least is its negative."""
SCALE_BITS = 11
SMALLEST_SCALE = 2.0**-100
_CLIPS = tuple(1.0 - step / 40 for step in range(17))
"""Shares of the greatest magnitude that four bits are tried for."""
_CHUNK = 1 << 18
"""Elements."""


class QParams(NamedTuple):
    """real = scale * (code - zero_point), codes -128..127."""

    scale: float
    zero_point: int


def activation_qparams(range: Range) -> QParams:
    """Scale and zero point of int8 codes -128..127 that cover `range` widened to hold zero, which is a code exactly.

    Ends may move outwards by half a code, as zero needs it. EdgegenError when the range is not finite.
    """
    low, high = min(range.low, 0.0), max(range.high, 0.0)
    if not math.isfinite(high - low):
        raise EdgegenError(f"range {range.low} .. {range.high} is not finite")
    return _qparams(low, high)


@lru_cache(maxsize=4096)
def _qparams(low: float, high: float) -> QParams:
    if high - low < SMALLEST_SCALE * 255:
        return QParams(1.0, 0)
    scale = _short(torch.tensor((high - low) / 255.0, dtype=torch.float64), up=True).item()
    zero_point = round(ACTIVATION_MIN - low / scale)
    return QParams(scale, max(ACTIVATION_MIN, min(ACTIVATION_MAX, zero_point)))


def grid(qparams: QParams) -> Range:
    """Least and greatest value that int8 codes of `qparams` stand for: what to tell a tool that asks for ranges."""
    scale, zero = qparams
    return Range(low=scale * (ACTIVATION_MIN - zero), high=scale * (ACTIVATION_MAX - zero))


@dataclass(frozen=True)
class Encoded:
    """A compressed weight. `axis` is that of the output channels, N long; C is the axis beside it (0 or 1).

    Affine: `codes` int8, `scales` [N], or [N, C / group]. Palette: `codes` uint8, places in `tables`
    [N / group or 1, 2^bits], each sorted.
    """

    codes: Tensor
    axis: int
    bits: int
    group: int
    scales: Tensor | None = None
    tables: Tensor | None = None

    def decode(self) -> Tensor:
        """float32 of the weight's shape."""
        channels = self.codes.movedim(self.axis, 0)
        if self.tables is not None:
            rows = channels.reshape(len(self.tables), -1).long()
            values = torch.gather(self.tables, 1, rows).view(channels.shape)
        else:
            assert self.scales is not None
            by_group = channels.reshape(*self.scales.shape, -1).float()
            values = (by_group * self.scales[..., None]).view(channels.shape)
        return values.movedim(0, self.axis).contiguous()

    @property
    def stored_bytes(self) -> int:
        """Codes packed, with scales or tables of two bytes each."""
        held = self.scales if self.tables is None else self.tables
        assert held is not None
        return -(-self.codes.numel() * self.bits // 8) + 2 * held.numel()


def encode_weight(
    weight: Tensor, op: OpPlan, axis: int = 0, *, name: str = "weight", importance: Tensor | None = None
) -> Encoded:
    """Codes of `weight`, whose output channels are along `axis` (0; 1 of a transposed convolution), as `op` says.

    `importance` has the weight's shape, or broadcasts to it: how much the square of each element's error counts, for
    palettes. EdgegenError with `name` for NaN or infinity; UsageError for a group that does not divide the channels,
    or an op that is not compressed. Encoding what was decoded gives the same codes and scales or tables.
    """
    bits = BITS[op.precision]
    if bits > 8:
        raise UsageError(f"`{name}` is {op.precision}: there is nothing to encode")
    if not torch.isfinite(weight).all():
        raise EdgegenError(f"weight `{name}` holds NaN or infinity", hint="check the checkpoint")
    channels = weight.detach().movedim(axis, 0)
    if op.form == "palette":
        rows = len(channels) // _divided(op.group, len(channels), name, "output") if op.group else 1
        shared = None
        if importance is not None:
            shared = importance.expand_as(weight).movedim(axis, 0).reshape(rows, -1)
        tables, codes = palettes(channels.reshape(rows, -1), 2**bits, shared)
        codes = codes.view(channels.shape).movedim(0, axis).contiguous()
        return Encoded(codes, axis, bits, op.group, tables=tables)
    shape: tuple[int, ...] = (len(channels), 1)
    if op.group:
        shape = (len(channels), channels.shape[1] // _divided(op.group, channels.shape[1], name, "input"))
    by_group = channels.reshape(*shape, -1).float()
    codes, scales = _affine(by_group, bits)
    codes = codes.view(channels.shape).movedim(0, axis).contiguous()
    return Encoded(codes, axis, bits, op.group, scales=scales if op.group else scales[:, 0])


def _divided(group: int, channels: int, name: str, which: str) -> int:
    if channels % group:
        raise UsageError(
            f"`{name}` has {channels} {which} channels, which groups of {group} do not divide",
            hint=f"take a group that divides {channels}, or 0",
        )
    return group


def _affine(by_group: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes [N, G, M] int8 and scales [N, G] of [N, G, M], some rows at a time: temporaries stay in the cache."""
    top = WEIGHT_MAX[bits]
    step = max(1, _CHUNK * len(by_group) // max(1, by_group.numel()))
    parts = torch.split(by_group, step)
    scales = torch.cat([_scales(part, top) if bits == 8 else _clipped_scales(part, top) for part in parts])
    dead = torch.cat([_peaks(part) for part in parts]) < SMALLEST_SCALE * top
    if dead.any() and not dead.all():
        # Any scale would do for zeros; some runtimes want those of one weight to be of one size.
        scales[dead] = scales[~dead].max()
    codes = torch.empty(by_group.shape, dtype=torch.int8)
    for part, scale, place in zip(parts, torch.split(scales, step), torch.split(codes, step), strict=True):
        place.copy_(_rounded(part, scale, top))
    return codes, scales


def _peaks(by_group: Tensor) -> Tensor:
    low, high = by_group.aminmax(dim=-1)
    return torch.maximum(-low, high)


def _scales(by_group: Tensor, top: int, clip: float = 1.0) -> Tensor:
    """[N, G] of [N, G, M]: the greatest magnitude (times `clip`) over `top`; 1 for zeros."""
    scales = _short(_peaks(by_group).double() * clip / top).float()
    return torch.where(scales < SMALLEST_SCALE, 1.0, scales)


def _clipped_scales(by_group: Tensor, top: int) -> Tensor:
    """As `_scales`, each clipped where that makes the squared error less; what is on a grid has none, and stays."""
    best = _scales(by_group, top)
    least = _squared_error(by_group, best, top)
    for clip in _CLIPS[1:]:
        scales = _scales(by_group, top, clip)
        error = _squared_error(by_group, scales, top)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def _squared_error(by_group: Tensor, scales: Tensor, top: int) -> Tensor:
    return _rounded(by_group, scales, top).mul_(scales[..., None]).sub_(by_group).square_().sum(-1)


def _rounded(by_group: Tensor, scales: Tensor, top: int) -> Tensor:
    return (by_group / scales[..., None]).round_().clamp_(-top, top)


def _short(values: Tensor, up: bool = False) -> Tensor:
    """float64 `values` at SCALE_BITS significant bits, the nearest or the next greater."""
    mantissa, exponent = torch.frexp(values)
    whole = mantissa * 2**SCALE_BITS
    return torch.ldexp(whole.ceil() if up else whole.round(), exponent - SCALE_BITS)
