"""The noise stream: the same float32 normals, bit for bit, in Python, Kotlin, Swift and JavaScript.

The recipe, which is what the manifest calls `philox4x32-10/as241`. Every float64 operation below is a single IEEE 754
operation, rounded to nearest even, in the order written; **no fused multiply-add, no reassociation, no math library**
(only `+ - * /` and `sqrt`, which IEEE 754 rounds correctly everywhere).

1. Word `i` of stream `s` for `seed`: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as
   1, 2, 3; SC 2011) with key `(seed & 0xffffffff, seed >> 32)` and counter `(b & 0xffffffff, b >> 32, s, 0)` where
   `b = i // 4`; word `i % 4` of the four that come out. All integers are unsigned.
2. `p = (word + 0.5) * 2**-32`: exact, and inside (0, 1).
3. `q = p - 0.5` (exact). If `|q| <= 0.425`: `r = 0.180625 - q * q`, `x = q * A(r) / B(r)`: first the product, then the
   quotient.
4. Otherwise `t = p` if `q < 0`, else `t = 1 - p` (exact); `r = sqrt(-log(t)) - 1.6`; `x = C(r) / D(r)`, negated if `q
   < 0`.
5. `log(t)`: write `t = m * 2**e` with `0.5 <= m < 1` (frexp); if `m < SQRT_HALF`, double `m` and take one from `e`
   (exact). `s = (m - 1) / (m + 1)`, `z = s * s`, `log(t) = e * LN2 + (2 * s) * L(z)` with `L(z) = 1 + z/3 + z**2/5 +
   ... + z**11/23`. Its coefficients are the float64 quotients `1 / (2 * k + 1)`.
6. The value is `x` rounded to float32.

A, B, C, D are the polynomials of algorithm AS 241, PPND16 (Wichura, The Percentage Points of the Normal Distribution,
Applied Statistics 37, 1988); L and they are evaluated by Horner's rule from the highest degree: `y = y * r + c`, one
product, one sum. Words have 32 bits, so `t >= 2**-33`, `sqrt(-log(t)) < 4.79`, and AS 241's far tail (beyond 5) is
never entered: the largest magnitude is 6.34.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgegen.errors import UsageError

Words = NDArray[np.uint32]
Doubles = NDArray[np.float64]

SEED_LIMIT = 2**64
STREAM_LIMIT = 2**32

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

# Lowest degree first.
_A = (
    3.3871328727963666080e0,
    1.3314166789178437745e2,
    1.9715909503065514427e3,
    1.3731693765509461125e4,
    4.5921953931549871457e4,
    6.7265770927008700853e4,
    3.3430575583588128105e4,
    2.5090809287301226727e3,
)
_B = (
    1.0,
    4.2313330701600911252e1,
    6.8718700749205790830e2,
    5.3941960214247511077e3,
    2.1213794301586595867e4,
    3.9307895800092710610e4,
    2.8729085735721942674e4,
    5.2264952788528545610e3,
)
_C = (
    1.42343711074968357734e0,
    4.63033784615654529590e0,
    5.76949722146069140550e0,
    3.64784832476320460504e0,
    1.27045825245236838258e0,
    2.41780725177450611770e-1,
    2.27238449892691845833e-2,
    7.74545014278341407640e-4,
)
_D = (
    1.0,
    2.05319162663775882187e0,
    1.67638483018380384940e0,
    6.89767334985100004550e-1,
    1.48103976427480074590e-1,
    1.51986665636164571966e-2,
    5.47593808499534494600e-4,
    1.05075007164441684324e-9,
)
_ATANH = tuple(1.0 / (2 * k + 1) for k in range(12))
SQRT_HALF = 0.7071067811865476
LN2 = 0.6931471805599453


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[int, int], rounds: int = 10) -> tuple[Words, ...]:
    """Philox4x32: four uint32 words for each counter (four arrays of one shape) under one 2 x 32 bit key."""
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(rounds):
        high_low_0 = c0 * _MULTIPLIERS[0]
        high_low_1 = c2 * _MULTIPLIERS[1]
        c0 = (high_low_1 >> _SHIFT) ^ c1 ^ np.uint64(k0)
        c2 = (high_low_0 >> _SHIFT) ^ c3 ^ np.uint64(k1)
        c1 = high_low_1 & _LOW
        c3 = high_low_0 & _LOW
        k0 = (k0 + _WEYL[0]) & 0xFFFFFFFF
        k1 = (k1 + _WEYL[1]) & 0xFFFFFFFF
    return tuple(word.astype(np.uint32) for word in (c0, c1, c2, c3))


def words(seed: int, stream: int, count: int) -> Words:
    """The first `count` uint32 words of a stream; UsageError for a seed outside 64 or a stream outside 32 bits."""
    if not 0 <= seed < SEED_LIMIT:
        raise UsageError(f"seed {seed} does not fit 64 bits", hint=f"choose a seed from 0 to {SEED_LIMIT - 1}")
    if not 0 <= stream < STREAM_LIMIT:
        raise UsageError(f"noise stream {stream} does not fit 32 bits")
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    low, high = (blocks & _LOW).astype(np.uint32), (blocks >> _SHIFT).astype(np.uint32)
    counter = (low, high, np.full_like(low, stream), np.zeros_like(low))
    four = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return np.stack(four, axis=-1).reshape(-1)[:count]


def normal(seed: int, stream: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Standard normals of `shape`, float32, in C order; stream 0 is the initial latent, k the noise after step k."""
    count = math.prod(shape)
    p = (words(seed, stream, count).astype(np.float64) + 0.5) * 2.0**-32
    return normal_quantile(p).astype(np.float32).reshape(tuple(shape))


def normal_quantile(p: Doubles) -> Doubles:
    """Inverse of the standard normal distribution for `2**-33 <= p <= 1 - 2**-33` (steps 3 to 5 of the recipe)."""
    q = p - 0.5
    x = np.empty_like(p)
    central = np.abs(q) <= 0.425
    near = q[central]
    r = 0.180625 - near * near
    x[central] = near * _horner(_A, r) / _horner(_B, r)
    tails = ~central
    left = q[tails] < 0
    r = np.sqrt(-_log(np.where(left, p[tails], 1.0 - p[tails]))) - 1.6
    far = _horner(_C, r) / _horner(_D, r)
    x[tails] = np.where(left, -far, far)
    return x


def _log(t: Doubles) -> Doubles:
    """Natural logarithm by step 5 of the recipe: the platform's own differs in the last bit from machine to machine."""
    m, e = np.frexp(t)
    small = m < SQRT_HALF
    m = np.where(small, m * 2.0, m)
    exponent = np.where(small, e - 1, e).astype(np.float64)
    s = (m - 1.0) / (m + 1.0)
    result: Doubles = exponent * LN2 + (2.0 * s) * _horner(_ATANH, s * s)
    return result


def _horner(coefficients: tuple[float, ...], r: Doubles) -> Doubles:
    """The polynomial at `r`, from the highest degree; numpy rounds the product and the sum separately."""
    y = np.full_like(r, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        y = y * r + coefficient
    return y
