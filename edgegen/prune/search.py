"""Widths, blocks and precisions of a student at once, exactly: one mixed-integer linear program (HiGHS).

Every space has a level (how many of its units stay), every block stays or is passed by, every op has one of its
options (its precision, or another form of it); one budget holds for all three together. What an op costs depends on
the level of what it reads, the level of what it writes and its option at once: a product of three choices, which is
linear in the shares of a transport from one to the other. Such shares are 0 or 1 where the choices are, so nothing is
approximated. Losses are expected squared errors and add up, as those of precisions do; what comes of a choice is
measured afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array

from edgegen.errors import EdgegenError
from edgegen.precision.choose import TIE, cap_of, muted

Table = NDArray[np.float64]
"""[option, level of the rows' ladder, level of the columns']; an axis of a ladder that is None has one entry."""
SECONDS = 60.0
GAP = 1e-5
"""Of the objective: how near to the best a choice is, at worst."""


@dataclass(frozen=True)
class Ladder:
    """The levels of a space, the first of which keeps all of it. `losses`: name -> of each level; `costs` likewise, of
    what depends on this space and on nothing else."""

    name: str
    levels: int
    losses: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    costs: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A share of a piece of work that depends on two ladders at most; `costs`: name -> table."""

    rows: str | None
    columns: str | None
    costs: Mapping[str, Table]


@dataclass(frozen=True)
class Work:
    """An op, its options (the first is the float one), what each option loses, and what it costs at every width."""

    name: str
    options: tuple[str, ...]
    parts: tuple[Part, ...]
    losses: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Removal:
    """Blocks that are passed by together, one or a run of them: `works` are gone then. Of removals that share work one
    at most is chosen."""

    name: str
    works: frozenset[str]
    losses: Mapping[str, float]


@dataclass(frozen=True)
class Problem:
    """`fixed`: what every choice costs. `caps`: name of a cost or loss -> the most that a choice may have of it.
    `minimise`: weights of costs and losses in what is made small. `allowed`: ladder -> the levels that it may have, any
    where it is not named. `gone`: works that a removal has to take away."""

    ladders: tuple[Ladder, ...]
    works: tuple[Work, ...]
    removals: tuple[Removal, ...] = ()
    fixed: Mapping[str, float] = field(default_factory=dict)
    caps: Mapping[str, float] = field(default_factory=dict)
    minimise: Mapping[str, float] = field(default_factory=dict)
    allowed: Mapping[str, frozenset[int]] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Choice:
    """`levels`: ladder -> level; `options`: work -> option, None of what is gone with its block; `removed`: names of
    removals; `totals`: every cost and loss, `fixed` included."""

    levels: Mapping[str, int]
    options: Mapping[str, str | None]
    removed: tuple[str, ...]
    totals: Mapping[str, float]


class NoFitError(Exception):
    """Nothing keeps to all caps. `best`: of each cap, the least that can be had while the others are kept, None where
    they cannot be (latencies with several backends are one cap); `nearest`: the choice whose excesses, each as a share
    of its cap, are least in sum."""

    def __init__(self, best: Mapping[str, float | None], nearest: Choice) -> None:
        super().__init__(f"nothing keeps to {', '.join(best)}")
        self.best = best
        self.nearest = nearest


def search(problem: Problem) -> Choice:
    """The best choice; NoFitError where none keeps to the caps, EdgegenError where the solver gives up."""
    chosen = _solve(problem)
    if chosen is not None:
        return chosen
    best: dict[str, float | None] = {}
    for name in problem.caps:
        own, others = cap_of(name, problem.caps)
        alone = _solve(replace(problem, caps=others, minimise={one: 1 / max(cap, 1e-30) for one, cap in own.items()}))
        best[name] = None if alone is None else alone.totals[name]
    raise NoFitError(best, _nearest(problem))


def walk(problem: Problem, along: str, points: int, advance: Callable[[], None] = lambda: None) -> list[Choice]:
    """The best choices for `points` caps on `along`, evenly between its least and that of the best choice without a
    cap on it; each once, the cheapest first. Other caps hold; NoFitError where they cannot. `advance` is called after
    each of `points` + 2 searches."""
    least = search(replace(problem, minimise={along: 1.0})).totals[along]
    advance()
    free = {name: cap for name, cap in problem.caps.items() if name != along}
    most = search(replace(problem, caps=free)).totals[along]
    advance()
    highest = max(least, min(most, problem.caps.get(along, most)))
    found: list[Choice] = []
    for cap in np.linspace(least, highest, points):
        # A solver's cap has a tolerance: without it the first point could be out of reach.
        chosen = _solve(replace(problem, caps={**free, along: float(cap) * (1 + 1e-6)}))
        if chosen is not None and chosen.totals not in [one.totals for one in found]:
            found.append(chosen)
        advance()
    return found


def total(
    problem: Problem, levels: Mapping[str, int], options: Mapping[str, str | None], removed: Sequence[str]
) -> dict[str, float]:
    """Every cost and loss of one choice, added up from the tables: what the program's own sums are held against."""
    sums = dict.fromkeys(_names(problem), 0.0) | dict(problem.fixed)
    for ladder in problem.ladders:
        for name, values in (*ladder.losses.items(), *ladder.costs.items()):
            sums[name] += values[levels[ladder.name]]
    for removal in problem.removals:
        if removal.name in removed:
            for name, value in removal.losses.items():
                sums[name] += value
    for work in problem.works:
        chosen = options[work.name]
        if chosen is None:
            continue
        place = work.options.index(chosen)
        for name, losses in work.losses.items():
            sums[name] += losses[place]
        for part in work.parts:
            row, column = (0 if one is None else levels[one] for one in (part.rows, part.columns))
            for name, table in part.costs.items():
                sums[name] += float(table[place, row, column])
    return sums


def _names(problem: Problem) -> list[str]:
    """Of all costs and losses."""
    found = list(problem.fixed)
    for ladder in problem.ladders:
        found += [*ladder.losses, *ladder.costs]
    for work in problem.works:
        found += [*work.losses, *(name for part in work.parts for name in part.costs)]
    for removal in problem.removals:
        found += list(removal.losses)
    return list(dict.fromkeys([*found, *problem.caps, *problem.minimise]))


class _Program:
    """The variables, their coefficients in every cost and loss, and what holds between them.

    Binary: a level of a ladder, an option of a work, a removal. Between 0 and 1: the shares of a part's transport, one
    for each option, row and column; an option's shares sum to that option, a level's to no more than that level.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.binary: list[bool] = []
        self.terms: dict[str, list[tuple[int, float]]] = {name: [] for name in _names(problem)}
        self._entries: list[tuple[int, int, float]] = []
        self._low: list[float] = []
        self._high: list[float] = []
        self.level = {ladder.name: self._many(ladder.levels) for ladder in problem.ladders}
        self.option = {work.name: self._many(len(work.options)) for work in problem.works}
        self.removal = {one.name: self._many(1)[0] for one in problem.removals}
        for ladder in problem.ladders:
            self._row([(one, 1.0) for one in self.level[ladder.name]], 1.0, 1.0)
            for name, values in (*ladder.losses.items(), *ladder.costs.items()):
                self.terms[name] += list(zip(self.level[ladder.name], values, strict=True))
        for removal in problem.removals:
            for name, value in removal.losses.items():
                self.terms[name].append((self.removal[removal.name], value))
        for work in problem.works:
            gone = [(self.removal[one.name], 1.0) for one in problem.removals if work.name in one.works]
            self._row([*((one, 1.0) for one in self.option[work.name]), *gone], 1.0, 1.0)
            for name, values in work.losses.items():
                self.terms[name] += list(zip(self.option[work.name], values, strict=True))
            for part in work.parts:
                self._transport(self.option[work.name], part)

    def holds(self, more: int = 0) -> LinearConstraint:
        """With so many variables at the end that none of this concerns."""
        rows, columns, values = zip(*self._entries, strict=True)
        shape = (len(self._low), len(self.binary) + more)
        return LinearConstraint(coo_array((values, (rows, columns)), shape=shape).tocsr(), self._low, self._high)

    def highest(self) -> NDArray[np.float64]:
        """Of every variable: 0 of levels that are not allowed and of options of works that have to go, else 1."""
        made = np.ones(len(self.binary))
        for name, allowed in self.problem.allowed.items():
            made[[one for level, one in enumerate(self.level[name]) if level not in allowed]] = 0.0
        for name in self.problem.gone:
            made[self.option[name]] = 0.0
        return made

    def row(self, name: str) -> NDArray[np.float64]:
        """Of every variable, what it adds to a cost or loss."""
        made = np.zeros(len(self.binary))
        for variable, value in self.terms[name]:
            made[variable] += value
        return made

    def _many(self, count: int, binary: bool = True) -> list[int]:
        start = len(self.binary)
        self.binary += [binary] * count
        return list(range(start, start + count))

    def _row(self, entries: Sequence[tuple[int, float]], low: float, high: float) -> None:
        self._entries += [(len(self._low), variable, value) for variable, value in entries]
        self._low.append(low)
        self._high.append(high)

    def _transport(self, options: Sequence[int], part: Part) -> None:
        rows = self.level[part.rows] if part.rows is not None else None
        columns = self.level[part.columns] if part.columns is not None else None
        costs = dict(part.costs)
        if rows is not None and part.rows == part.columns:
            costs = {name: np.diagonal(table, axis1=1, axis2=2)[:, :, None] for name, table in costs.items()}
            columns = None
        elif rows is None:
            rows, columns = columns, None
            costs = {name: table.transpose(0, 2, 1) for name, table in costs.items()}
        if rows is None:
            for name, table in costs.items():
                self.terms[name] += list(zip(options, table[:, 0, 0].tolist(), strict=True))
            return
        width = 1 if columns is None else len(columns)
        shares = np.array(self._many(len(options) * len(rows) * width, binary=False))
        shares = shares.reshape(len(options), len(rows), width)
        for place, option in enumerate(options):
            self._row([*((int(one), 1.0) for one in shares[place].ravel()), (option, -1.0)], 0.0, 0.0)
        for place, level in enumerate(rows):
            self._row([*((int(one), 1.0) for one in shares[:, place].ravel()), (level, -1.0)], -np.inf, 0.0)
        for place, level in enumerate(columns or ()):
            self._row([*((int(one), 1.0) for one in shares[:, :, place].ravel()), (level, -1.0)], -np.inf, 0.0)
        for name, table in costs.items():
            self.terms[name] += list(zip(shares.ravel().tolist(), table.ravel().tolist(), strict=True))


def _solve(problem: Problem) -> Choice | None:
    """None when nothing keeps to the caps."""
    program = _Program(problem)
    if not program.binary:
        within = all(problem.fixed.get(name, 0.0) <= cap for name, cap in problem.caps.items())
        return Choice({}, {}, (), total(problem, {}, {}, ())) if within else None
    result = _milp(_objective(program), program, [program.holds(), *_caps(program)])
    return _choice(program, result)


def _milp(
    objective: NDArray[np.float64], program: _Program, constraints: Sequence[LinearConstraint], excesses: int = 0
) -> OptimizeResult:
    whole = np.concatenate([np.array(program.binary, dtype=np.int64), np.zeros(excesses, dtype=np.int64)])
    high = np.concatenate([program.highest(), np.full(excesses, np.inf)])
    with muted():
        return milp(
            objective,
            integrality=whole,
            bounds=Bounds(0, high),
            constraints=list(constraints),
            options={"time_limit": SECONDS, "mip_rel_gap": GAP},
        )


def _objective(program: _Program) -> NDArray[np.float64]:
    """What is minimised, scaled to 1, and every other cost a little, so that a tie falls to the cheaper."""
    wanted = program.problem.minimise
    made = np.zeros(len(program.binary))
    for name, weight in wanted.items():
        made += weight * program.row(name)
    made /= max(float(np.abs(made).max(initial=0.0)), 1e-300)
    for name in program.terms:
        row = program.row(name)
        if name not in wanted and row.any():
            made += TIE / len(program.binary) * row / float(np.abs(row).max())
    return made


def _caps(program: _Program) -> list[LinearConstraint]:
    """Each scaled by its cap: HiGHS's tolerance is absolute, and squared errors are small numbers."""
    made = []
    for name, cap in program.problem.caps.items():
        room = cap - program.problem.fixed.get(name, 0.0)
        scale = max(abs(room), 1e-12)
        made.append(LinearConstraint(program.row(name)[None] / scale, -np.inf, room / scale))
    return made


def _choice(program: _Program, result: OptimizeResult) -> Choice | None:
    if result.x is None:
        if result.status == 2:  # infeasible
            return None
        raise EdgegenError(f"the search of widths was not solved: {result.message}")
    x, problem = result.x, program.problem
    levels = {name: int(np.argmax(x[variables])) for name, variables in program.level.items()}
    removed = tuple(name for name, variable in program.removal.items() if x[variable] > 0.5)
    gone = {work for one in problem.removals if one.name in removed for work in one.works}
    options = {
        work.name: None if work.name in gone else work.options[int(np.argmax(x[program.option[work.name]]))]
        for work in problem.works
    }
    return Choice(levels, options, removed, total(problem, levels, options, removed))


def _nearest(problem: Problem) -> Choice:
    """With an excess of each cap as one more variable, all of them minimised."""
    program = _Program(problem)
    count, over = len(program.binary), len(problem.caps)
    if not count:
        return Choice({}, {}, (), total(problem, {}, {}, ()))
    constraints = [program.holds(over)]
    for index, constraint in enumerate(_caps(program)):
        excess = np.zeros((1, over))
        excess[0, index] = -1.0
        constraints.append(LinearConstraint(np.hstack([np.asarray(constraint.A), excess]), -np.inf, constraint.ub))
    objective = np.concatenate([TIE * _objective(program), np.ones(over)])
    found = _choice(program, _milp(objective, program, constraints, over))
    assert found is not None, "excesses are unbounded"
    return found
