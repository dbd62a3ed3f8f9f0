import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgegen.verify.metrics import psnr_db, sensitivity, sqnr_db

RNG = np.random.default_rng(0)
A = RNG.standard_normal((1, 4, 8, 8)).astype(np.float32)
B = A + 0.3 * RNG.standard_normal(A.shape).astype(np.float32)


@pytest.mark.parametrize("db", [20.0, 40.0, 60.0])
def test_sqnr_is_what_was_put_in(db):
    noise = RNG.standard_normal(A.shape)
    noise *= np.sqrt(np.square(A.astype(np.float64)).sum() / np.square(noise).sum()) * 10 ** (-db / 20)
    assert sqnr_db(A, A.astype(np.float64) + noise) == pytest.approx(db, abs=1e-6)


def test_psnr_of_a_known_error():
    assert psnr_db(np.zeros((1, 3, 4, 4)), np.full((1, 3, 4, 4), 0.02)) == pytest.approx(40.0, abs=1e-6)


def test_equal_is_infinite_and_never_nan():
    assert sqnr_db(A, A) == math.inf
    assert psnr_db(A, A.copy()) == math.inf
    assert sqnr_db(np.zeros(3), np.zeros(3)) == math.inf
    assert sqnr_db(np.zeros(3), np.ones(3)) == -math.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("metric", [sqnr_db, psnr_db])
def test_what_is_not_finite_is_worst(metric, bad):
    broken = A.copy()
    broken[0, 0, 0, 0] = bad
    assert metric(A, broken) == -math.inf
    with pytest.raises(ValueError, match="reference is not finite"):
        metric(broken, A)


def test_shapes_must_be_equal_even_where_numpy_would_broadcast():
    with pytest.raises(ValueError, match="shapes differ"):
        sqnr_db(A, A[:, :1])


def test_sensitivity_of_the_reference_against_itself():
    found = sensitivity(A, B, A, B)
    assert found.ratio == pytest.approx(1.0, abs=1e-12)
    assert found.cosine == pytest.approx(1.0, abs=1e-12)
    assert not found.degenerate


def test_swapped_prompts_keep_the_ratio_and_turn_the_direction():
    found = sensitivity(A, B, B, A)
    assert found.ratio == pytest.approx(1.0, abs=1e-6)
    assert found.cosine == pytest.approx(-1.0, abs=1e-6)


def test_ignoring_the_prompt_is_ratio_zero():
    found = sensitivity(A, B, A, A)
    assert (found.ratio, found.cosine, found.compiled_std) == (0.0, 0.0, 0.0)


def test_a_reference_that_ignores_the_prompt_is_reported_and_not_divided_by():
    found = sensitivity(A, A, A, B)
    assert found.degenerate
    assert found.ratio is None and found.cosine is None
    assert found.compiled_std > 0.1


def test_nan_has_no_ratio():
    found = sensitivity(A, B, A, B * np.float32(np.nan))
    assert found.ratio is None
    assert math.isnan(found.compiled_std)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.1, 10.0), st.floats(-5.0, 5.0))
def test_sensitivity_scales_with_the_difference_and_ignores_what_both_share(scale, shift):
    found = sensitivity(A, B, scale * A + shift, scale * B + shift)
    assert found.ratio == pytest.approx(scale, rel=1e-5)
    assert found.cosine == pytest.approx(1.0, abs=1e-6)
