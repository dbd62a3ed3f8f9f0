"""One precision for each op, exactly: a multiple-choice knapsack as a mixed-integer linear program (HiGHS).

Every op takes one of its options; what an option costs and spoils adds up. Losses are expected squared errors, which
add up as long as the errors of two ops know nothing of each other: what comes of a plan is measured afterwards.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array, hstack, vstack

from edgegen.errors import EdgegenError
from edgegen.precision.plan import OpPrecision

Row = NDArray[np.float64]
TIE = 1e-6
"""What the other costs count beside the one that is minimised, so that a tie falls to the cheaper."""


@dataclass(frozen=True)
class Option:
    """One way to compute one op. `costs` and `losses` are by name, each adding up over a plan."""

    precision: OpPrecision
    costs: dict[str, float]
    losses: dict[str, float]
    form: str = "affine"
    group: int = 0


@dataclass(frozen=True)
class Item:
    """An op and its options, the first of which is its float."""

    component: str
    key: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Problem:
    """`fixed`: what every plan costs, whatever it chooses. `caps`: name of a cost or loss -> the most that a plan may
    have of it. `minimise`: weights of costs and losses in what is made small."""

    items: tuple[Item, ...]
    fixed: dict[str, float] = field(default_factory=dict)
    caps: dict[str, float] = field(default_factory=dict)
    minimise: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """`options`: one for each item, in their order; `totals`: every cost and loss of that plan, `fixed` included."""

    options: tuple[Option, ...]
    totals: dict[str, float]


class InfeasibleError(Exception):
    """No plan keeps to all caps. `best`: of each cap, the least that a plan can have while the others are kept, None
    where they cannot be (latencies with several backends are one cap); `nearest`: the plan whose excesses, each as a
    share of its cap, are least in sum."""

    def __init__(self, best: dict[str, float | None], nearest: Choice) -> None:
        super().__init__(f"no plan keeps to {', '.join(best)}")
        self.best = best
        self.nearest = nearest


def choose(problem: Problem) -> Choice:
    """The best plan; InfeasibleError when there is none, EdgegenError when the solver gives up."""
    chosen = _solve(problem)
    if chosen is None:
        raise _infeasible(problem)
    return chosen


def pareto(problem: Problem, along: str, points: int) -> list[Choice]:
    """The best plans for `points` caps on `along`, evenly between its least and that of the best plan without a cap;
    each once, the cheapest first. Other caps hold; InfeasibleError when they cannot."""
    least = choose(replace(problem, minimise={along: 1.0})).totals[along]
    free = {name: cap for name, cap in problem.caps.items() if name != along}
    most = choose(replace(problem, caps=free)).totals[along]
    found: list[Choice] = []
    for cap in np.linspace(least, max(least, most), points):
        # A solver's cap has a tolerance: without it the first point could be out of reach.
        chosen = _solve(replace(problem, caps={**free, along: float(cap) * (1 + 1e-9)}))
        if chosen is not None and chosen.totals not in [one.totals for one in found]:
            found.append(chosen)
    return found


def _names(problem: Problem) -> list[str]:
    first = problem.items[0].options[0] if problem.items else Option("fp32", {}, {})
    return list(dict.fromkeys((*problem.fixed, *first.costs, *first.losses)))


def _row(problem: Problem, name: str) -> Row:
    values = [{**option.costs, **option.losses}.get(name, 0.0) for item in problem.items for option in item.options]
    return np.array(values, dtype=np.float64)


def _solve(problem: Problem) -> Choice | None:
    """None when there is no plan within the caps."""
    if not problem.items:
        within = all(problem.fixed.get(name, 0.0) <= cap for name, cap in problem.caps.items())
        return Choice((), dict(problem.fixed)) if within else None
    objective = _objective(problem)
    with muted():
        result = milp(
            objective,
            integrality=np.ones(len(objective), dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(_options_of(problem.items), 1, 1), *_caps(problem)],
            options={"time_limit": 60.0, "mip_rel_gap": 1e-7},
        )
    return _choice(problem, result)


def _objective(problem: Problem) -> Row:
    """Each term as a share of the greatest that it can be, so that weights and the tie-break mean what they say."""
    made: Row = np.zeros(sum(len(item.options) for item in problem.items))
    for name in _names(problem):
        row = _row(problem, name)
        weight = problem.minimise.get(name, 0.0)
        if weight:
            made += weight * row
    scale = max(float(np.abs(made).max()), 1e-300)
    made = made / scale
    for name in _names(problem):
        row = _row(problem, name)
        if name not in problem.minimise and row.any():
            made += TIE / len(problem.items) * row / float(np.abs(row).max())
    return made


def _options_of(items: Sequence[Item]) -> csr_array[np.float64, tuple[int, int]]:
    """A row an item, with a one for each of its options: of each row exactly one is chosen."""
    sizes = [len(item.options) for item in items]
    rows = np.repeat(np.arange(len(items)), sizes)
    columns = np.arange(sum(sizes))
    return csr_array((np.ones(len(columns)), (rows, columns)))


def _caps(problem: Problem) -> list[LinearConstraint]:
    """Each scaled by its cap: HiGHS's tolerance is absolute, and squared errors are small numbers."""
    made = []
    for name, cap in problem.caps.items():
        room = cap - problem.fixed.get(name, 0.0)
        scale = max(abs(room), 1e-12)
        made.append(LinearConstraint(_row(problem, name)[None] / scale, -np.inf, room / scale))
    return made


def _choice(problem: Problem, result: OptimizeResult) -> Choice | None:
    if result.x is None:
        if result.status == 2:  # infeasible
            return None
        raise EdgegenError(f"the choice of precisions was not solved: {result.message}")
    options, start = [], 0
    for item in problem.items:
        taken = result.x[start : start + len(item.options)]
        options.append(item.options[int(np.argmax(taken))])
        start += len(item.options)
    totals = {name: problem.fixed.get(name, 0.0) for name in _names(problem)}
    for option in options:
        for name, value in {**option.costs, **option.losses}.items():
            totals[name] += value
    return Choice(tuple(options), totals)


def _infeasible(problem: Problem) -> InfeasibleError:
    best: dict[str, float | None] = {}
    for name in problem.caps:
        own, others = cap_of(name, problem.caps)
        alone = _solve(replace(problem, caps=others, minimise={one: 1 / max(cap, 1e-30) for one, cap in own.items()}))
        best[name] = None if alone is None else alone.totals[name]
    return InfeasibleError(best, _nearest(problem))


def cap_of(name: str, caps: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """The caps that one option asks for together with `name`, and the others: one latency is asked of all backends."""
    own = {one: cap for one, cap in caps.items() if one == name or one.split(" ")[0] == name.split(" ")[0] == "latency"}
    return own, {one: cap for one, cap in caps.items() if one not in own}


def _nearest(problem: Problem) -> Choice:
    """With an excess of each cap as one more variable, all of them minimised."""
    count = sum(len(item.options) for item in problem.items)
    over = len(problem.caps)
    each = _options_of(problem.items)
    rows, rooms = [], []
    for index, constraint in enumerate(_caps(problem)):
        excess = np.zeros((1, over))
        excess[0, index] = -1.0
        rows.append(np.hstack([np.asarray(constraint.A), excess]))
        rooms.append(constraint.ub)
    with muted():
        result = milp(
            np.concatenate([TIE * _objective(problem), np.ones(over)]),
            integrality=np.concatenate([np.ones(count, dtype=np.int64), np.zeros(over, dtype=np.int64)]),
            bounds=Bounds(0, np.concatenate([np.ones(count), np.full(over, np.inf)])),
            constraints=[
                LinearConstraint(hstack([each, csr_array((len(problem.items), over))]), 1, 1),
                LinearConstraint(vstack([csr_array(row) for row in rows]), -np.inf, np.array(rooms).ravel()),
            ],
            options={"time_limit": 60.0},
        )
    found = _choice(problem, result)
    assert found is not None, "excesses are unbounded"
    return found


@contextmanager
def muted() -> Iterator[None]:
    """HiGHS prints notes to itself on standard output, past Python: that one is for data."""
    library = ctypes.CDLL(None)  # what C has buffered would come out later, where it is no longer muted
    sys.stdout.flush()
    library.fflush(None)
    kept = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        yield
    finally:
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(null)
