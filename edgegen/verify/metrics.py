"""Numbers that say how far apart two tensors are. None of them ever rates NaN or infinity as close."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgegen.lower.backend import Array

DEGENERATE_BELOW = 1e-6
"""A reference whose output moves by less than this share of its own std does not listen to the prompt in fp32."""


def _doubles(reference: Array, measured: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if reference.shape != measured.shape:
        raise ValueError(f"shapes differ: reference {reference.shape}, measured {measured.shape}")
    wide = np.asarray(reference, dtype=np.float64)
    if not np.isfinite(wide).all():
        raise ValueError("the reference is not finite")
    return wide, np.asarray(measured, dtype=np.float64)


def _ratio_db(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return -math.inf if signal == 0.0 else 10.0 * math.log10(signal / noise)


def sqnr_db(reference: Array, measured: Array) -> float:
    """Signal to quantization noise ratio in dB: 10 log10(sum r^2 / sum (r - m)^2).

    +inf when equal; -inf when anything measured is NaN or infinite, or the reference is zero and the measured is not.
    ValueError when shapes differ or the reference itself is not finite.
    """
    wide, other = _doubles(reference, measured)
    if not np.isfinite(other).all():
        return -math.inf
    return _ratio_db(float(np.square(wide).sum()), float(np.square(wide - other).sum()))


def psnr_db(reference: Array, measured: Array, peak: float = 2.0) -> float:
    """Peak signal to noise ratio in dB of unclipped images in -1..1 (peak to peak 2): 10 log10(peak^2 / mean e^2)."""
    wide, other = _doubles(reference, measured)
    if not np.isfinite(other).all():
        return -math.inf
    return _ratio_db(peak * peak, float(np.square(wide - other).mean()))


def picture_psnr_db(reference: Array, measured: Array) -> float:
    """`psnr_db` of a picture [1, 3, H, W]; of a video [1, 3, T, H, W] that of its worst frame."""
    if reference.ndim != 5 or reference.shape != measured.shape:
        return psnr_db(reference, measured)
    return min(psnr_db(reference[:, :, t], measured[:, :, t]) for t in range(reference.shape[2]))


@dataclass(frozen=True)
class Sensitivity:
    """How much an output moves with the prompt: compiled against reference."""

    reference_std: float
    compiled_std: float
    output_std: float
    ratio: float | None
    cosine: float | None
    degenerate: bool


def sensitivity(reference_a: Array, reference_b: Array, compiled_a: Array, compiled_b: Array) -> Sensitivity:
    """std(A - B) of the compiled over that of the reference, and the cosine between both differences.

    Differences are taken about their mean, as std does. A reference that does not move is `degenerate`: no ratio. A
    compiled output that is not finite has no ratio either, and its std is NaN.
    """
    wide_a, other_a = _doubles(reference_a, compiled_a)
    wide_b, other_b = _doubles(reference_b, compiled_b)
    expected = wide_a - wide_b
    expected = expected - expected.mean()
    reference_std, output_std = float(expected.std()), float(wide_a.std())
    degenerate = reference_std <= DEGENERATE_BELOW * output_std
    if not (np.isfinite(other_a).all() and np.isfinite(other_b).all()):
        return Sensitivity(reference_std, math.nan, output_std, None, None, degenerate)
    found = other_a - other_b
    found = found - found.mean()
    compiled_std = float(found.std())
    if degenerate:
        return Sensitivity(reference_std, compiled_std, output_std, None, None, True)
    product = float((expected * found).mean())
    cosine = 0.0 if compiled_std == 0.0 else product / (reference_std * compiled_std)
    return Sensitivity(reference_std, compiled_std, output_std, compiled_std / reference_std, cosine, False)
