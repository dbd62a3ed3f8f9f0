"""Several sizes of one student at once, each cut out of the one before it: what `edgegen prune --levels` does.

Losses and costs are measured once, on the whole student. The largest level is what `prune` would choose for its budget
alone; every following one is the same search over what the one before keeps: of a space the levels whose units are
among those that are left, and blocks that are gone stay gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from edgegen.cache import Cache
from edgegen.errors import GateError, UsageError
from edgegen.graph.capture import capture
from edgegen.graph.count import GraphCount, count
from edgegen.precision.options import Progress
from edgegen.prune.apply import pruned
from edgegen.prune.assemble import Assembled, Options, assemble
from edgegen.prune.check import check
from edgegen.prune.command import captured, scaled
from edgegen.prune.elastic import at_level, heal_levels, require_one_size, with_levels
from edgegen.prune.find import spaces as find_spaces
from edgegen.prune.heal import HealOptions
from edgegen.prune.heal import Progress as HealProgress
from edgegen.prune.importance import Probe, importance
from edgegen.prune.judging import Judge, prompts_to_heal
from edgegen.prune.lighter import lighter
from edgegen.prune.options import PruneOptions, components_of
from edgegen.prune.refusal import refused
from edgegen.prune.search import Choice, NoFitError, Problem, search
from edgegen.prune.space import Spaces
from edgegen.prune.training import Judged
from edgegen.students.config import LEVEL_NAME
from edgegen.students.pruning import Pruning
from edgegen.students.student import Component, Student
from edgegen.targets import Target


@dataclass(frozen=True)
class Asked:
    """One level: `shares` of the MACs that may be left, by component, "" for each that is not named."""

    name: str
    shares: Mapping[str, float]


@dataclass(frozen=True)
class Level:
    """One size. `latency`: backend -> milliseconds of a picture, `estimated`, as `Made` of `edgegen.prune.command` has
    them. `before` healing and `after` it, as prompts are drawn that nothing was learned from."""

    name: str
    counts: Mapping[str, GraphCount]
    removed: Mapping[str, tuple[str, ...]]
    latency: Mapping[str, float]
    before: Judged
    after: Judged | None = None


@dataclass(frozen=True)
class Nested:
    """`student` holds all levels; `whole` is what they were cut out of, with the same figures."""

    student: Student
    levels: tuple[Level, ...]
    whole: Mapping[str, GraphCount]
    whole_latency: Mapping[str, float]
    latency_source: str
    whole_alignment: float | None
    cut: tuple[str, ...]
    healed_steps: int | None = None

    def summary(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "levels": {
                one.name: {
                    "components": {
                        name: {
                            "parameters": [self.whole[name].parameters, found.parameters],
                            "macs": [self.whole[name].macs, found.macs],
                            "removed": list(one.removed.get(name, ())),
                        }
                        for name, found in one.counts.items()
                    },
                    "parameters": sum(found.parameters for found in one.counts.values()),
                    "latency_ms_estimated": dict(one.latency),
                    "before": one.before.model_dump(),
                    "after": None if one.after is None else one.after.model_dump(),
                }
                for one in self.levels
            },
            "latency_ms_estimated": dict(self.whole_latency),
            "latency_source": self.latency_source,
            "alignment_unpruned": self.whole_alignment,
            "healed_steps": self.healed_steps,
        }


def nested_levels(
    student: Student,
    target: Target,
    backends: Sequence[str],
    asked: Sequence[Asked],
    options: PruneOptions,
    cache: Cache,
    progress: Progress,
) -> Nested:
    """`student` with nested levels in its config, not healed. UsageError for what cannot be asked, GateError for a
    level below what the smallest legal network that is nested needs."""
    require_one_size(student, "`--levels`")
    names = components_of(student, replace(options, max_macs={name: 1.0 for one in asked for name in one.shares}))
    wanted = falling(asked, names)
    if student.config.sampler is None:
        raise UsageError(
            f"student `{student.config.name}` draws no pictures that levels could be weighed against",
            hint="`--ratio 0.4` makes one smaller size",
        )
    base, slower = student, dict.fromkeys(backends, 1.0)
    if options.separable:
        first = lighter(student, target, backends, options, cache, progress)
        base, slower = first.student, {**slower, **first.slower}
        wanted = tuple(replace(one, shares=first.shares(one.shares)) for one in wanted)
    _, known = captured(base, names, progress)
    probe = Probe.of(base, options.samples, options.steps)

    def ranks(part: Component, spaces: Spaces) -> dict[str, Sequence[float]]:
        progress.stage(f"importance of units of {part.name}", probe.count)
        found = importance(probe, {part.name: spaces}, progress.advance)[part.name]
        return {name: units.tolist() for name, units in found.units.items()}

    assembled = assemble(
        base,
        target,
        backends,
        Options(names, depth=options.depth, steps=options.steps, jobs=options.jobs),
        find_spaces,
        ranks,
        cache,
        progress,
    )
    choices = choose(assembled, wanted, progress)
    prunings = {name: assembled.prunings(choice) for name, choice in choices.items()}
    _require_different(prunings)
    progress.stage("hold what is left against what it was", len(prunings))
    for cuts in prunings.values():
        for name, pruning in cuts.items():
            check(base.components[name], known[name], pruning)
        progress.advance()
    factors, source = scaled(target, backends, options, cache, progress)

    def latency(totals: Mapping[str, float]) -> dict[str, float]:
        return {name: totals[f"latency {name}"] * factors[name] for name in backends if f"latency {name}" in totals}

    judge = Judge(student, prompts_to_heal(student))
    progress.stage("draw with every level", len(prunings))
    levels = []
    for name, cuts in prunings.items():
        small = pruned(base, cuts)
        counts = {part: count(capture(one)) for part, one in small.components.items()}
        removed = {part: tuple(cut.removed) for part, cut in cuts.items()}
        levels.append(Level(name, counts, removed, latency(choices[name].totals), judge(small)))
        progress.advance()
    return Nested(
        with_levels(base, prunings),
        tuple(levels),
        {part: count(capture(one)) for part, one in student.components.items()},
        {name: one * slower[name] for name, one in latency(assembled.whole.totals).items()},
        source,
        judge.of_teacher,
        names,
    )


def heal_nested(student: Student, made: Nested, options: HealOptions, cache: Cache, progress: HealProgress) -> Nested:
    """`made` of `student` with all levels trained together, each judged again; kept in `cache`, where a run that was
    killed goes on."""
    stored = heal_levels(student, made.student, options, cache, progress)
    judge = Judge(student, prompts_to_heal(student))
    progress.stage("draw with every healed level", len(made.levels))
    levels = []
    for one in made.levels:
        levels.append(replace(one, after=judge(at_level(stored, one.name))))
        progress.advance()
    return replace(made, student=stored, levels=tuple(levels), healed_steps=options.steps)


def choose(assembled: Assembled, asked: Sequence[Asked], progress: Progress) -> dict[str, Choice]:
    """Level -> what loses least within its MACs, of what the level before keeps; the first may have everything.

    GateError where nothing keeps to one.
    """
    whole = assembled.whole.totals
    problem = replace(assembled.problem, minimise={"picture": 1.0})
    made: dict[str, Choice] = {}
    progress.stage("search of every level", len(asked))
    for one in asked:
        caps = {f"macs {name}": share * whole[f"macs {name}"] for name, share in one.shares.items()}
        try:
            choice = search(replace(problem, caps=caps))
        except NoFitError as error:
            said = refused(error, caps, whole)
            raise GateError(f"level `{one.name}`: {said.message}", hint=said.hint) from error
        made[one.name] = choice
        problem = within(assembled, problem, choice)
        progress.advance()
    return made


def within(assembled: Assembled, problem: Problem, choice: Choice) -> Problem:
    """`problem` over what `choice` keeps: groups of a norm may make a small level hold what a larger one has not, so
    units themselves are compared."""
    allowed = {}
    for component, spaces in assembled.kept.items():
        for space, levels in spaces.items():
            held = set(levels[choice.levels[f"{component}/{space}"]])
            allowed[f"{component}/{space}"] = frozenset(i for i, units in enumerate(levels) if held.issuperset(units))
    gone = frozenset(work for work, option in choice.options.items() if option is None)
    return replace(problem, allowed=allowed, gone=gone)


def falling(asked: Sequence[Asked], names: Sequence[str]) -> tuple[Asked, ...]:
    """`asked` with a share of every component of `names`: what a level does not name stays as in the level before.

    UsageError for names that are none or come twice, and for levels that do not fall.
    """
    made: list[Asked] = []
    before = dict.fromkeys(names, 1.0)
    for one in asked:
        if not LEVEL_NAME.fullmatch(one.name):
            raise UsageError(
                f"`{one.name[:80]}` is no name of a level", hint="use lower-case letters, digits, `.`, `_` and `-`"
            )
        if one.name in [other.name for other in made]:
            raise UsageError(f"two levels are named `{one.name}`", hint="give each a name: `--level-names large,small`")
        rest = one.shares.get("")
        shares = {name: one.shares.get(name, before[name] if rest is None else rest) for name in names}
        if made and (any(shares[n] > before[n] for n in names) or shares == before):
            larger = made[-1].name
            raise UsageError(
                f"levels do not fall: `{one.name}` has as many MACs as `{larger}` before it, or more",
                hint="name the largest first: `--levels 75%,50%,30%`",
            )
        made.append(Asked(one.name, shares))
        before = shares
    return tuple(made)


def _require_different(prunings: Mapping[str, Mapping[str, Pruning]]) -> None:
    for (larger, cuts), (smaller, others) in pairwise(prunings.items()):
        if cuts == others:
            raise UsageError(
                f"levels `{larger}` and `{smaller}` come to the same network: its spaces have few sizes",
                hint="leave more between them, as `--levels 75%,50%,30%`",
            )
