"""The noise stream against Random123's published vectors, against scipy, and against itself in JavaScript."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy import special, stats

from edgegen.bundle.noise import _log, normal, normal_quantile, philox4x32, words
from edgegen.errors import UsageError

# philox4x32 10 of Random123's tests/kat_vectors: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, expected):
    four = philox4x32(tuple(np.array([word], dtype=np.uint32) for word in counter), key)
    assert tuple(int(word[0]) for word in four) == expected


def test_words_are_laid_out_as_the_recipe_says():
    seed, stream = 0x0123456789ABCDEF, 3
    drawn = words(seed, stream, 10)
    for i in (0, 1, 3, 4, 9):
        counter = tuple(np.array([word], dtype=np.uint32) for word in (i // 4, 0, stream, 0))
        assert int(philox4x32(counter, (0x89ABCDEF, 0x01234567))[i % 4][0]) == int(drawn[i])


def test_golden_values():
    assert normal(0, 0, (4,)).tobytes().hex() == GOLDEN_SEED_0
    assert normal(2**64 - 1, 7, (1, 4)).tobytes().hex() == GOLDEN_SEED_MAX


def test_shape_order_and_prefix():
    flat = normal(5, 1, (60,))
    assert flat.dtype == np.float32
    assert np.array_equal(normal(5, 1, (3, 4, 5)).reshape(-1), flat)
    assert np.array_equal(normal(5, 1, (7,)), flat[:7])
    assert normal(5, 1, (0, 3)).shape == (0, 3)


def test_moments_and_distribution():
    x = normal(42, 0, (1_000_000,)).astype(np.float64)
    n = len(x)
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert stats.kstest(x[:200_000], "norm").pvalue > 0.01
    assert np.isfinite(x).all()


def test_quantile_matches_scipy_everywhere_a_word_can_land():
    edges = np.array([0, 1, 2, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], dtype=np.float64)
    break_points = np.concatenate([np.round(c * 2**32) + np.arange(-3, 4) for c in (0.075, 0.5, 0.925)])
    spread = np.floor(np.linspace(0, 2**32 - 1, 200_001))
    tail = np.floor(2.0 ** np.linspace(0, 32, 20_001) - 1)
    word = np.clip(np.concatenate([edges, break_points, spread, tail]), 0, 2**32 - 1)
    p = (word + 0.5) * 2.0**-32
    x, truth = normal_quantile(p), special.ndtri(p)
    assert np.max(np.abs(x - truth) / np.maximum(np.abs(truth), 1e-9)) < 1e-14
    assert np.array_equal(normal_quantile(1 - p), -x)
    assert 6.33 < np.abs(x).max() < 6.35


def test_log_is_within_two_units_in_the_last_place():
    t = 2.0 ** np.linspace(-33, np.log2(0.075), 100_001)
    assert np.max(np.abs(_log(t) / np.log(t) - 1)) < 2 * np.finfo(np.float64).eps


def test_streams_and_seeds_are_unrelated():
    n = 200_000
    base = normal(1, 0, (n,))
    for other in (normal(1, 1, (n,)), normal(2, 0, (n,)), normal(1 + 2**32, 0, (n,))):
        assert not np.array_equal(base, other)
        assert abs(np.corrcoef(base, other)[0, 1]) < 4 / math.sqrt(n)
    assert abs(np.corrcoef(base[:-1], base[1:])[0, 1]) < 4 / math.sqrt(n)


@pytest.mark.parametrize(("seed", "stream"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**32)])
def test_seed_and_stream_outside_their_bits_are_refused(seed, stream):
    with pytest.raises(UsageError, match="does not fit"):
        normal(seed, stream, (4,))


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize(("seed", "stream"), [(7, 0), (0xFEDCBA9876543210, 3)])
def test_javascript_draws_the_same_bits(seed, stream):
    count = 100_003
    script = Path(__file__).with_name("noise_check.js")
    command = ["node", str(script), str(seed), str(stream), str(count)]
    drawn = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    assert drawn == normal(seed, stream, (count,)).astype("<f4").tobytes()


GOLDEN_SEED_0 = "50fa82be4fbb963fb753213febfd883e"
GOLDEN_SEED_MAX = "70cc853f4e73d13f494f4cbf4962373f"
