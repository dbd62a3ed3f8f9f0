"""The search of widths, blocks and precisions against every choice there is."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgegen.prune.search import Ladder, NoFitError, Part, Problem, Removal, Work, search, total, walk


def random_problem(seed):
    """Two or three spaces, ops between them in every way (a space to itself, none on a side, two that are read), blocks
    and runs of them that overlap."""
    rng = np.random.default_rng(seed)
    levels = {f"s{i}": int(rng.integers(1, 4)) for i in range(rng.integers(1, 4))}
    ladders = tuple(
        Ladder(
            name,
            count,
            {"loss": (0.0, *sorted(rng.uniform(0, 2, count - 1)))},
            {"bytes": tuple(sorted(rng.uniform(0, 1, count), reverse=True))},
        )
        for name, count in levels.items()
    )
    works = []
    for index in range(rng.integers(1, 5)):
        options = ("fp32", "w8a8", "w8")[: rng.integers(1, 4)]
        ends = [None, *levels]
        parts = []
        for _ in range(rng.integers(1, 3)):
            rows, columns = (ends[rng.integers(len(ends))] for _ in range(2))
            shape = (len(options), levels.get(rows, 1), levels.get(columns, 1))
            parts.append(Part(rows, columns, {name: rng.uniform(0, 3, shape) for name in ("time", "bytes")}))
        losses = {"loss": (0.0, *rng.uniform(0, 1, len(options) - 1))}
        works.append(Work(f"op{index}", options, tuple(parts), losses))
    names = [work.name for work in works]
    removals = tuple(
        Removal(f"cut{i}", frozenset(names[i : i + rng.integers(1, 3)]), {"loss": float(rng.uniform(0, 2))})
        for i in range(rng.integers(0, len(names) + 1))
    )
    return Problem(ladders, tuple(works), removals, {"time": 0.3})


def every(problem):
    """Levels, options and removals of every choice."""
    for number in range(len(problem.removals) + 1):
        for removed in itertools.combinations(problem.removals, number):
            gone = [name for one in removed for name in one.works]
            if len(set(gone)) < len(gone):
                continue
            options = [(None,) if work.name in gone else work.options for work in problem.works]
            for levels in itertools.product(*(range(one.levels) for one in problem.ladders)):
                for chosen in itertools.product(*options):
                    yield (
                        {one.name: level for one, level in zip(problem.ladders, levels, strict=True)},
                        {one.name: option for one, option in zip(problem.works, chosen, strict=True)},
                        tuple(one.name for one in removed),
                    )


def with_caps(problem, share):
    full = total(problem, {one.name: 0 for one in problem.ladders}, {w.name: w.options[0] for w in problem.works}, ())
    return Problem(
        problem.ladders,
        problem.works,
        problem.removals,
        problem.fixed,
        {name: share * full[name] for name in ("time", "bytes")},
        {"loss": 1.0},
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 1.1))
def test_no_choice_is_better(seed, share):
    problem = with_caps(random_problem(seed), share)
    sums = [total(problem, *choice) for choice in every(problem)]
    kept = [one for one in sums if all(one[name] <= cap for name, cap in problem.caps.items())]
    if not kept:
        with pytest.raises(NoFitError) as caught:
            search(problem)
        for name, best in caught.value.best.items():
            (other,) = set(problem.caps) - {name}
            within = [one[name] for one in sums if one[other] <= problem.caps[other]]
            assert best == pytest.approx(min(within), rel=1e-4) if within else best is None
        return
    found = search(problem)
    assert found.totals == total(problem, found.levels, found.options, found.removed)
    assert all(found.totals[name] <= cap * (1 + 1e-6) for name, cap in problem.caps.items())
    assert found.totals["loss"] <= min(one["loss"] for one in kept) + 1e-4


def test_the_excesses_of_the_nearest_are_least():
    table = np.array([[[4.0], [2.0]]])
    part = Part("s", None, {"time": table, "bytes": table})
    ladder = Ladder("s", 2, {"loss": (0.0, 1.0)})
    problem = Problem((ladder,), (Work("op", ("fp32",), (part,)),), caps={"time": 1.0, "bytes": 3.0})
    with pytest.raises(NoFitError) as caught:
        search(problem)
    assert caught.value.best == {"time": pytest.approx(2.0), "bytes": None}
    assert caught.value.nearest.levels == {"s": 1}


@pytest.mark.parametrize("seed", range(12))
def test_levels_that_are_not_allowed_and_works_that_have_to_go(seed):
    """Against every choice there is."""
    problem = random_problem(seed)
    rng = np.random.default_rng(seed)
    allowed = {one.name: frozenset(range(int(rng.integers(one.levels)), one.levels)) for one in problem.ladders}
    gone = problem.removals[0].works if problem.removals else frozenset()
    problem = replace(problem, minimise={"loss": 1.0}, allowed=allowed, gone=gone)
    kept = [
        total(problem, levels, options, removed)["loss"]
        for levels, options, removed in every(problem)
        if all(levels[name] in those for name, those in allowed.items()) and all(options[name] is None for name in gone)
    ]
    found = search(problem)
    assert all(found.levels[name] in those for name, those in allowed.items())
    assert all(found.options[name] is None for name in gone)
    assert found.totals["loss"] == pytest.approx(min(kept), abs=1e-4)


def test_of_two_removals_that_share_work_one_is_chosen():
    works = tuple(Work(f"op{i}", ("fp32",), (Part(None, None, {"time": np.ones((1, 1, 1))}),)) for i in range(3))
    pair = Removal("pair", frozenset({"op0", "op1"}), {"loss": 1.0})
    other = Removal("other", frozenset({"op1", "op2"}), {"loss": 0.1})
    last = Removal("last", frozenset({"op2"}), {"loss": 0.2})
    found = search(Problem((), works, (pair, other, last), caps={"time": 0.5}, minimise={"loss": 1.0}))
    assert set(found.removed) == {"pair", "last"}
    assert found.options == {"op0": None, "op1": None, "op2": None}


def test_a_walk_goes_from_the_cheapest_to_the_most_faithful():
    problem = random_problem(5)
    problem = Problem(problem.ladders, problem.works, problem.removals, problem.fixed, {}, {"loss": 1.0})
    found = walk(problem, "time", 5)
    times = [one.totals["time"] for one in found]
    losses = [one.totals["loss"] for one in found]
    assert len(found) > 1
    assert times == sorted(times)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(0.0, abs=1e-9)
    assert times[0] == pytest.approx(min(total(problem, *one)["time"] for one in every(problem)))
