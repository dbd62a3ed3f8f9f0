"""Chains of reshapes and permutes as one value: composed, inverted, written out again, they move the same elements."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgegen.graph.rearrange import identity, permuted, reshaped


def run(steps, x):
    for kind, value in steps:
        x = x.reshape(value) if kind == "reshape" else x.permute(value)
    return x


def composed(shape, steps):
    """The chain as one value, or None where a reshape has no common factors with what it reads."""
    whole, now = identity(shape), tuple(shape)
    for kind, value in steps:
        one = reshaped(now, value) if kind == "reshape" else permuted(now, value)
        whole = None if one is None else whole.then(one)
        if whole is None:
            return None
        now = whole.target_shape
    return whole


@st.composite
def chains(draw):
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    steps, now = [], list(shape)
    for _ in range(draw(st.integers(1, 5))):
        if draw(st.booleans()):
            dims = draw(st.permutations(range(len(now))))
            steps.append(("permute", tuple(dims)))
            now = [now[i] for i in dims]
        else:
            primes = [p for size in now for p in {1: [], 2: [2], 3: [3], 4: [2, 2], 6: [2, 3]}.get(size, [size])]
            groups = [[]]
            for prime in primes:
                if draw(st.booleans()):
                    groups.append([])
                groups[-1].append(prime)
            now = [int(torch.tensor(group).prod()) for group in groups]
            steps.append(("reshape", tuple(now)))
    return tuple(shape), steps


@settings(max_examples=150, deadline=None, derandomize=True)
@given(chains(), st.booleans())
def test_a_chain_is_what_it_does(chain, images):
    shape, steps = chain
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    expected = run(steps, x)
    whole = composed(shape, steps)
    if whole is None:
        return
    short = whole.steps(images)
    assert torch.equal(run(short, x), expected) and run(short, x).shape == expected.shape
    assert len(short) <= 3
    assert whole.is_identity == (x.shape == expected.shape and torch.equal(x, expected))
    assert torch.equal(run(whole.inverse().steps(images), expected), x)
    assert whole.then(whole.inverse()).is_identity
    assert composed(shape, short) == whole


def test_tokens_of_an_image_are_a_permute_and_a_reshape_either_way_round():
    flat = reshaped((2, 8, 4, 4), (2, 8, 16))
    tokens = flat.then(permuted((2, 8, 16), (0, 2, 1)))
    assert tokens.steps() == (("reshape", (2, 8, 16)), ("permute", (0, 2, 1)))
    assert tokens.steps(images=True) == (("permute", (0, 2, 3, 1)), ("reshape", (2, 16, 8)))
    assert tokens.inverse().steps(images=True) == (("reshape", (2, 4, 4, 8)), ("permute", (0, 3, 1, 2)))


def test_a_permute_of_axes_of_size_one_is_a_reshape():
    assert permuted((1, 5, 1, 3), (2, 1, 3, 0)).steps() == (("reshape", (1, 5, 3, 1)),)


def test_pixel_shuffle_leaves_a_batch_of_one_out_of_the_permute():
    parts = reshaped((1, 8, 3, 5), (1, 2, 2, 2, 3, 5)).then(permuted((1, 2, 2, 2, 3, 5), (0, 1, 4, 2, 5, 3)))
    whole = parts.then(reshaped((1, 2, 3, 2, 5, 2), (1, 2, 6, 10)))
    assert whole.steps()[1] == ("permute", (0, 3, 1, 4, 2))


def test_shapes_without_common_factors_have_no_rearrangement():
    assert reshaped((2, 3), (3, 2)) is None
    assert reshaped((2, 3), (3, 3)) is None


def test_axes_follow_their_elements():
    tokens = reshaped((2, 8, 4, 4), (2, 8, 16)).then(permuted((2, 8, 16), (0, 2, 1)))
    assert tokens.source_axis(2) == 1
    assert tokens.source_axis(1) is None
    assert tokens.source_axes([1]) == [2, 3]
    assert tokens.resized((2, 16, 5)).source_shape == (2, 5, 4, 4)
    assert tokens.resized((1, 1, 8)).source_shape == (1, 8, 1, 1)
    assert tokens.resized((2, 9, 8)) is None
    heads = reshaped((2, 8, 5), (2, 2, 4, 5))
    assert heads.resized((2, 1, 1, 5)).source_shape == (2, 1, 5)
    assert heads.resized((2, 1, 4, 5)) is None  # four of eight do not broadcast


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_shapes_without_factors(shape):
    assert identity(shape).is_identity
    assert identity(shape).inverse().target_shape == shape
