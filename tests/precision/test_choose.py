"""The choice of precisions against every choice there is."""

import itertools
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgegen.precision.choose import InfeasibleError, Item, Option, Problem, choose, pareto


def problem(rows, **fields):
    """`rows`: one op each, of (time, bytes, loss) an option."""
    items = tuple(
        Item("net", f"op{i}", tuple(Option("w8", {"time": t, "bytes": b}, {"loss": e}) for t, b, e in row))
        for i, row in enumerate(rows)
    )
    return Problem(items, **fields)


def total(options, name):
    return sum({**one.costs, **one.losses}[name] for one in options)


number = st.floats(0.01, 10)
op = st.lists(st.tuples(number, number, number), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(op, min_size=1, max_size=5), st.floats(0.2, 1.2), st.floats(0.2, 1.2))
def test_no_choice_is_better(rows, share, room):
    caps = {"loss": share * sum(max(e for _, _, e in row) for row in rows)}
    caps["bytes"] = room * sum(max(b for _, b, _ in row) for row in rows)
    one = problem(rows, caps=caps, minimise={"time": 1.0})
    every = itertools.product(*(item.options for item in one.items))
    kept = [options for options in every if all(total(options, name) <= cap for name, cap in caps.items())]
    if not kept:
        with pytest.raises(InfeasibleError):
            choose(one)
        return
    found = choose(one)
    assert all(found.totals[name] <= cap * (1 + 1e-6) for name, cap in caps.items())
    assert found.totals["time"] <= min(total(options, "time") for options in kept) * (1 + 1e-5)


def test_a_tie_falls_to_the_smaller_and_the_more_faithful():
    tied = [[(1.0, 4.0, 0.0), (1.0, 1.0, 0.0)], [(1.0, 1.0, 0.5), (1.0, 1.0, 0.1)]]
    found = choose(problem(tied, minimise={"time": 1.0}))
    assert found.totals == {"time": 2.0, "bytes": 2.0, "loss": 0.1}


def test_caps_that_cannot_be_kept_name_the_best_of_each_and_the_nearest_plan():
    rows = [[(1.0, 4.0, 0.0), (0.2, 1.0, 3.0)], [(1.0, 4.0, 0.0), (0.4, 1.0, 1.0)]]
    with pytest.raises(InfeasibleError) as caught:
        choose(problem(rows, caps={"time": 1.0, "loss": 1.5}, minimise={"loss": 1.0}))
    assert caught.value.best == {"time": pytest.approx(1.4), "loss": pytest.approx(4.0)}
    assert caught.value.nearest.totals["time"] == pytest.approx(1.4)  # 40 % over; the other way is 167 % over
    with pytest.raises(InfeasibleError) as caught:
        choose(problem(rows, caps={"time": 0.1, "bytes": 0.5}, minimise={"loss": 1.0}))
    assert caught.value.best == {"time": None, "bytes": None}


def test_what_is_fixed_counts_against_a_cap():
    rows = [[(1.0, 4.0, 0.0), (0.2, 1.0, 3.0)]]
    found = choose(problem(rows, fixed={"time": 0.5}, caps={"time": 1.0}, minimise={"loss": 1.0}))
    assert found.totals["time"] == pytest.approx(0.7)


def test_small_losses_are_not_lost_in_the_tolerance():
    rows = [[(1.0, 1.0, 0.0), (0.5, 1.0, 3e-9)]] * 4
    found = choose(problem(rows, caps={"loss": 7e-9}, minimise={"time": 1.0}))
    assert found.totals["loss"] == pytest.approx(6e-9)


def test_the_front_goes_from_the_fastest_to_the_most_faithful():
    rows = [[(1.0, 4.0, 0.0), (0.2, 1.0, loss)] for loss in (1.0, 2.0, 4.0, 8.0)]
    front = pareto(problem(rows, minimise={"loss": 1.0}), "time", 9)
    assert front[0].totals["time"] == pytest.approx(0.8) and front[-1].totals["loss"] == 0.0
    assert [one.totals["time"] for one in front] == sorted(one.totals["time"] for one in front)
    assert [one.totals["loss"] for one in front] == sorted((one.totals["loss"] for one in front), reverse=True)
    assert len(front) == 5


def test_what_the_solver_prints_is_not_on_standard_output():
    script = """
import ctypes
from edgegen.precision.choose import muted
library = ctypes.CDLL(None)
library.printf(b"before ")
with muted():
    library.printf(b"noise ")
library.printf(b"after")
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout == "before after"
