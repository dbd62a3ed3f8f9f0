"""Sizes of spaces, and the units that stay."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgegen.errors import UsageError
from edgegen.prune.levels import keep, ladder, sizes
from edgegen.prune.space import Cut, Space


def space(count, groups=1, frozen=None, repeats=1):
    owners = np.repeat(np.arange(count, dtype=np.int32), repeats)
    cut = Cut("conv.weight", 0, owners)
    return Space("s", "channels", count, (cut,), (), (cut,), groups, frozen)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_every_level_is_legal_and_keeps_what_matters_most(groups, each, seed):
    scores = np.random.default_rng(seed).uniform(size=groups * each)
    one = space(groups * each, groups)
    for count in one.counts:
        kept = keep(one, scores, count)
        one.check(kept)
        assert len(kept) == count
    best = int(np.argmax(scores))
    assert keep(one, scores, 1) == (best,)


def test_of_ways_to_split_a_count_over_groups_the_best_is_taken():
    # Two groups of two: two units are one of each group, or a whole group.
    assert keep(space(4, 2), [9.0, 8.0, 1.0, 2.0], 2) == (0, 1)
    assert keep(space(4, 2), [9.0, 1.0, 0.0, 8.0], 2) == (0, 3)


def test_widths_are_multiples_where_a_legal_one_is():
    assert sizes(space(64), 16, (1.0, 0.8, 0.5, 0.3)) == (64, 48, 32, 16)
    assert sizes(space(6), 16, (1.0, 0.5)) == (6, 3)
    assert sizes(space(4, repeats=24), 16, (1.0, 0.5)) == (4, 2)  # heads of 24
    assert sizes(space(6, frozen="an input"), 1, (1.0, 0.5)) == (6,)


def test_levels_fall_and_are_nested_in_a_space_without_groups():
    levels = ladder(space(16), list(range(16)))
    assert len(levels[0]) == 16
    for larger, smaller in itertools.pairwise(levels):
        assert set(smaller) < set(larger)


def test_a_count_that_a_norm_forbids_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="cannot be left with 7") as caught:
        keep(space(8, 4), [1.0] * 8, 7)
    assert caught.value.hint == "it can have 6"
