"""The bound on prompts that nobody measured, against prompts that somebody did."""

import math

import numpy as np
import pytest

from edgegen.precision.margin import CONFIDENCE, bounds

LEAST = 1e-5


@pytest.mark.parametrize(("number", "spread"), [(4, 0.7), (8, 0.7), (32, 0.45), (32, 0.7), (32, 0.85)])
def test_unseen_samples_stay_within_as_often_as_it_says(number, spread):
    source = np.random.default_rng(0)
    within, count = 0, 3000
    for _ in range(count):
        values = np.exp(source.normal(-4.0, spread, number + 4))
        (most,) = bounds([values[:number].tolist()], [4], LEAST, 0.7)
        within += values[number:].max() <= most
    assert CONFIDENCE - 0.02 <= within / count <= 0.995


def test_the_worst_of_few_is_no_such_bound():
    """What was done before: the worst of six is passed by one of four others in about two of five draws."""
    source = np.random.default_rng(1)
    drawn = source.normal(0.0, 0.7, (3000, 10))
    assert 0.3 < np.mean(drawn[:, 6:].max(1) > drawn[:, :6].max(1)) < 0.5


def test_more_samples_bound_closer_and_never_below_what_was_seen():
    values = np.exp(np.random.default_rng(2).normal(-4.0, 0.7, 64)).tolist()
    few, many = (bounds([values[:n]], [4], LEAST, 0.7)[0] / math.exp(np.log(values[:n]).mean()) for n in (4, 64))
    assert few > many
    outlier = [*values, 1.0]
    assert bounds([outlier], [1], LEAST, 0.7) == (1.0,)


def test_groups_share_their_spread_and_keep_their_means():
    source = np.random.default_rng(3)
    low, high = (np.exp(source.normal(mean, 0.4, 8)).tolist() for mean in (-9.0, -7.0))
    first, second = bounds([low, high], [4, 1], 1e-12, 0.4)
    assert max(low) <= first < second
    assert bounds([low, high], [0, 1], 1e-12, 0.4)[0] == max(low)


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [0.0, LEAST]])
def test_rounding_alone_has_no_margin(values):
    assert bounds([values], [4], LEAST, 0.7) == (max(values),)
