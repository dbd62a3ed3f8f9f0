"""The search for the plan that is taken: chosen by estimates, then held against measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from edgegen.precision.budget import SCALES, Budget, Measured
from edgegen.precision.choose import Choice, InfeasibleError, Problem, choose

ROUNDS = 8
"""How often a plan is measured and its budget moved before the best so far is taken; twice as often until there
is one."""
CLOSE_DB = 0.5
"""A plan that is measured this little above its floor is taken."""
CLOSE_SHARE = 0.85
"""As is one that changes how prompts are heard by this much of what it may."""
LEANER, LEANEST = 3, 0.8
"""So many plans are tried that cost less than the one that was found, down to this share of it."""
STALLED = 4
"""Moves of the caps in a row that change no op."""


class MissedError(Exception):
    """No plan that was measured keeps to the budget; `nearest` misses it by least."""

    def __init__(self, nearest: Measured, budget: Budget) -> None:
        super().__init__(f"nothing tried keeps to the budget: {nearest.said()}")
        self.nearest = nearest
        self.budget = budget


@dataclass
class _Cap:
    """The search for the greatest estimated loss at which what is measured keeps to the budget."""

    at: float
    holds: float = 0.0
    fails: float = math.inf
    failures: int = 0

    def held(self, factor: float) -> None:
        """A plan within the cap was measured to lose `factor` times less than it may."""
        self.holds = max(self.holds, self.at)
        self.at = self._middle() if self.fails < math.inf else self.holds * factor

    def failed(self, loss: float, factor: float) -> None:
        """A plan of this estimated loss was measured to lose more than it may: `factor` times as much could do. Where
        that was said before and was not so, less."""
        factor **= 1.0 + self.failures / 2.0
        self.failures += 1
        self.fails = min(self.fails, loss)
        self.at = self._middle() if 0.0 < self.holds < self.fails else self.fails * factor

    def _middle(self) -> float:
        return math.sqrt(self.holds * self.fails)

    def settled(self, close: float) -> bool:
        return self.fails <= self.holds * close


def settle(
    asked: Problem, budget: Budget, measure: Callable[[Choice], Measured], done: Callable[[], None] = lambda: None
) -> tuple[Choice, Measured]:
    """The best choice that was measured to keep to `budget`, other prompts than the measured ones included.

    Estimates decide what is tried; where a measurement says that they were too hopeful the caps on losses are drawn
    in, and let out where there is room; in the end what loses least within the costs is tried too. InfeasibleError when
    not even the estimates allow a plan; MissedError when nothing that was tried keeps to the budget.
    """
    costs = {name: cap for name, cap in asked.caps.items() if name not in SCALES}
    search = {name: _Cap(cap) for name, cap in asked.caps.items() if name in SCALES}
    known: dict[tuple[str, ...], Measured] = {}
    good: tuple[Choice, Measured] | None = None
    nearest: Measured | None = None
    before: tuple[str, ...] | None = None
    stalled = 0
    while stalled < STALLED:
        try:
            choice = choose(replace(asked, caps={**costs, **{name: one.at for name, one in search.items()}}))
        except InfeasibleError:
            if not known:
                raise
            break
        name = tuple(one.precision for one in choice.options)
        stalled = stalled + 1 if name == before else 0
        before = name
        if name not in known:
            if len(known) >= (2 * ROUNDS if good is None else ROUNDS):
                break
            known[name] = measure(choice)
            done()
        found = known[name]
        missed = found.misses(budget)
        if missed:
            nearest = found if nearest is None or found.short(budget) < nearest.short(budget) else nearest
            if not search:
                break
            _draw_in(search, missed, choice, found, budget)
            continue
        if good is None or _worth(asked, choice) < _worth(asked, good[0]):
            good = (choice, found)
        loosest = choose(replace(asked, caps=costs)).options == choice.options
        if loosest or budget.psnr is None or not _let_out(search, found, budget):
            break
    if good is None and search and costs:
        last = most_faithful(asked, costs)
        found = measure(last)
        done()
        if found.keeps(budget):
            return last, found
        nearest = found if nearest is None or found.short(budget) < nearest.short(budget) else nearest
    if good is not None:
        between = "conditioning" in search and search["conditioning"].failures and not set(asked.minimise) & set(SCALES)
        return _leaner(asked, costs, good, budget, measure, done) if between else good
    assert nearest is not None
    raise MissedError(nearest, budget)


def _leaner(
    asked: Problem,
    costs: Mapping[str, float],
    good: tuple[Choice, Measured],
    budget: Budget,
    measure: Callable[[Choice], Measured],
    done: Callable[[], None],
) -> tuple[Choice, Measured]:
    """A plan that costs less than `good` and keeps to `budget` too, if one is found.

    Caps on two losses lead to the corners where both are met exactly; what is measured of prompts is the noise of all
    ops, and then a plan between them may be cheaper: of all that cost a share of `good`, the one that loses least.
    """
    start = good[0].totals
    holds, fails = 1.0, LEANEST
    for _ in range(LEANER):
        share = (holds + fails) / 2
        caps = {**costs, **{name: min(share * start[name], costs.get(name, math.inf)) for name in asked.minimise}}
        try:
            choice = most_faithful(asked, caps)
        except InfeasibleError:
            fails = share
            continue
        found = measure(choice)
        done()
        if found.keeps(budget):
            holds = share
            good = min(good, (choice, found), key=lambda one: _worth(asked, one[0]))
        else:
            fails = share
    return good


def most_faithful(asked: Problem, costs: Mapping[str, float]) -> Choice:
    """What loses least by the estimates within caps on `costs`. InfeasibleError where there is no such plan."""
    return choose(replace(asked, caps=dict(costs), minimise={name: 1.0 / scale for name, scale in SCALES.items()}))


def _worth(asked: Problem, choice: Choice) -> float:
    return sum(weight * choice.totals[name] for name, weight in asked.minimise.items())


def _draw_in(
    search: Mapping[str, _Cap], missed: Sequence[str], choice: Choice, found: Measured, budget: Budget
) -> None:
    for name in missed:
        loss = "conditioning" if name == "conditioning" else "picture"
        if loss not in search:
            continue
        if name == "conditioning":
            assert budget.conditioning is not None
            factor = 0.9 * (budget.conditioning / max(found.sure_conditioning, 1e-12)) ** 2
        else:  # where it is alignment that is missed, nobody can say by how much
            short = -3.0 if name == "alignment" or budget.psnr is None else found.sure_psnr - budget.psnr
            factor = 10.0 ** ((short - 0.3) / 10.0)
        if name == "conditioning" and search[loss].failures and "picture" in search:
            # What is left is no single op's: noise of all, which turns what a prompt changes, and spoils pictures.
            search["picture"].failed(choice.totals["picture"], min(factor, 0.97))
        search[loss].failed(choice.totals[loss], min(factor, 0.97))


def _let_out(search: Mapping[str, _Cap], found: Measured, budget: Budget) -> bool:
    """Whether any cap has room left, which it was given."""
    assert budget.psnr is not None
    let = False
    room = found.sure_psnr - budget.psnr
    if "picture" in search and room > CLOSE_DB and not search["picture"].settled(1.01):
        search["picture"].held(10.0 ** (max(room, 1.0) / 10.0))
        let = True
    share = 0.0 if budget.conditioning is None else found.sure_conditioning / max(budget.conditioning, 1e-12)
    if "conditioning" in search and share < CLOSE_SHARE and not search["conditioning"].settled(CLOSE_SHARE**-2):
        search["conditioning"].held(min(0.9 / max(share, 0.1) ** 2, 30.0))
        let = True
    return let
