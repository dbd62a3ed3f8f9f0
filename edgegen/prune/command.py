"""What `edgegen prune` does: a smaller student within a budget or by a ratio, and what it costs and loses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.export import ExportedProgram

from edgegen.cache import Cache
from edgegen.errors import UsageError
from edgegen.graph.capture import capture
from edgegen.graph.count import GraphCount, count
from edgegen.precision.options import Progress
from edgegen.prune.apply import pruned
from edgegen.prune.check import check
from edgegen.prune.elastic import require_one_size
from edgegen.prune.estimate import before_and_after
from edgegen.prune.find import Found, find
from edgegen.prune.find import spaces as find_spaces
from edgegen.prune.importance import Floats, Probe, confirmed, importance, magnitude
from edgegen.prune.lighter import lighter
from edgegen.prune.options import PruneOptions, components_of, shares_of
from edgegen.prune.ratio import by_ratio, ratio_for
from edgegen.prune.recipe import Recipe, follow
from edgegen.prune.refusal import refused
from edgegen.prune.space import Spaces, to_pruning
from edgegen.prune.target_speed import target_speed
from edgegen.prune.trial import Trial
from edgegen.students.pruning import Pruning
from edgegen.students.student import Student
from edgegen.targets import Target

MEASURED = 16
"""Single units whose removal is measured, beside what was estimated."""


@dataclass(frozen=True)
class Part:
    """One component before and after."""

    name: str
    before: GraphCount
    after: GraphCount
    units: tuple[int, int]
    """Of all spaces that may be cut: how many there were, how many are left."""
    removed: tuple[str, ...] = ()
    separated: Mapping[str, int] = field(default_factory=dict)
    """Convolution -> filters for each channel."""


@dataclass(frozen=True)
class Made:
    """`frozen`: component -> reason -> the spaces that may not be cut for it. `psnr`: dB of the pictures against the
    student that was pruned; None for one that draws nothing. `correlation`: Spearman's, of the estimates with so many
    units measured alone. `latency`: backend -> milliseconds before and after, `estimated` from kernels timed on this
    machine or the target's throughput; a share of 1 where neither says milliseconds."""

    student: Student
    prunings: Mapping[str, Pruning]
    parts: tuple[Part, ...]
    frozen: Mapping[str, Mapping[str, tuple[str, ...]]]
    latency: Mapping[str, tuple[float, float]]
    latency_source: str
    psnr: float | None
    correlation: tuple[float, int] | None = None

    def summary(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "components": {
                one.name: {
                    "parameters": [one.before.parameters, one.after.parameters],
                    "macs": [one.before.macs, one.after.macs],
                    "units": list(one.units),
                    "removed": list(one.removed),
                    "separated": dict(one.separated),
                }
                for one in self.parts
            },
            "latency_ms_estimated": {name: list(pair) for name, pair in self.latency.items()},
            "latency_source": self.latency_source,
            "picture_psnr_db": self.psnr,
            "rank_correlation": None if self.correlation is None else self.correlation[0],
            "units_measured": 0 if self.correlation is None else self.correlation[1],
            "frozen": {name: {why: list(those) for why, those in one.items()} for name, one in self.frozen.items()},
        }


def prune(
    student: Student, target: Target, backends: Sequence[str], options: PruneOptions, cache: Cache, progress: Progress
) -> Made:
    """A smaller `student`. UsageError for what cannot be asked of it, GateError for a budget below what the smallest
    legal network needs."""
    require_one_size(student, "pruning")
    names = components_of(student, options)
    if options.recipe is not None:
        return _followed(student, target, backends, options, options.recipe, cache, progress)
    if options.separable:
        return _separated(student, target, backends, options, cache, progress)
    if options.ratio is None and not options.max_macs and options.max_latency is None:
        raise UsageError(
            "nothing says how small it should be",
            hint="`--max-macs 60%`, `--max-latency 0.6x`, `--ratio 0.4` or `--separable decoder=40%`",
        )
    if options.ratio is not None and (options.max_macs or options.max_latency is not None):
        raise UsageError("`--ratio` says how much goes, and so does a budget", hint="give one of them")
    if options.uniform and options.max_latency is not None:
        raise UsageError("`--uniform` knows MACs and ratios, not latency", hint="`--max-macs 60%` or `--ratio 0.4`")
    programs, known = captured(student, names, progress)
    for name in names:
        if not known[name].spaces.spaces:
            why = next((one.frozen for one in known[name].spaces.frozen), "it has no channels, heads or feed-forwards")
            raise UsageError(f"nothing of component `{name}` may be cut: {why}")
    found = {name: one.spaces for name, one in known.items()}
    multiple = max((target.backend(name).width_multiple for name in backends), default=1)
    probe = Probe.of(student, options.samples, options.steps)
    ranks: dict[str, dict[str, Sequence[float]]]
    correlation = None
    if options.uniform:
        ranks = {name: _lists(magnitude(student.components[name], found[name])) for name in names}
    else:
        progress.stage("importance of units", probe.count)
        scores = importance(probe, found, progress.advance)
        ranks = {name: _lists(scores[name].units) for name in names}
        if options.measure and probe.steps:
            few = replace(probe, prompts=probe.prompts[:2])
            progress.stage("units measured alone", MEASURED)
            said, number = confirmed(few, found, scores, MEASURED, progress.advance)
            correlation = None if said is None else (said, number)
    latency: dict[str, tuple[float, float]] = {}
    source = "the target's throughput"
    if options.ratio is not None:
        prunings = {
            name: to_pruning(found[name], by_ratio(found[name], ranks[name], options.ratio, multiple)) for name in names
        }
    elif options.uniform:
        progress.stage("ratio for the budget", len(options.max_macs))
        prunings = {}
        for name, share in shares_of(options, names).items():
            most = share * count(programs[name]).macs
            prunings[name] = ratio_for(student, name, found[name], ranks[name], most, multiple)
            progress.advance()
    else:
        prunings, latency, source = _searched(student, target, backends, options, names, ranks, cache, progress)
    made = _held(student, known, prunings, progress)
    parts = tuple(_part(made, name, programs[name], found[name], prunings.get(name, Pruning())) for name in names)
    if not latency:
        latency = _by_throughput(student, target, backends, parts, probe.steps)
    psnr = _psnr(student, made, options, progress) if probe.steps else None
    return Made(made, prunings, parts, _frozen(found), latency, source, psnr, correlation)


def captured(
    student: Student, names: Sequence[str], progress: Progress
) -> tuple[dict[str, ExportedProgram], dict[str, Found]]:
    """Component -> its graph, and what may be cut out of it."""
    progress.stage("capture, find what may be cut", len(names))
    programs, known = {}, {}
    for name in names:
        programs[name] = capture(student.components[name])
        known[name] = find(programs[name])
        progress.advance()
    return programs, known


def _held(student: Student, known: Mapping[str, Found], prunings: Mapping[str, Pruning], progress: Progress) -> Student:
    """What `prunings` leave, each op held against what was found of it."""
    progress.stage("hold what is left against what it was", len(prunings))
    for name, pruning in prunings.items():
        check(student.components[name], known[name], pruning)
        progress.advance()
    return pruned(student, prunings)


def _psnr(student: Student, made: Student, options: PruneOptions, progress: Progress) -> float:
    """Of the pictures of `made` against those of `student`, dB."""
    progress.stage("draw with what is left", 1)
    loss = Trial.of(student, options.steps, options.samples, unseen=True).loss(made)
    progress.advance()
    return round(-10 * math.log10(max(loss, 1e-15)), 2)


def _followed(
    student: Student,
    target: Target,
    backends: Sequence[str],
    options: PruneOptions,
    recipe: Recipe,
    cache: Cache,
    progress: Progress,
) -> Made:
    """What `edgegen tune` chose."""
    recipe.require_for(target.name, backends)
    follow(recipe, student)
    names = tuple(recipe.prunings)
    programs, known = captured(student, names, progress)
    made = _held(student, known, recipe.prunings, progress)
    parts = tuple(_part(made, name, programs[name], known[name].spaces, recipe.prunings[name]) for name in names)
    trial = Trial.of(student, options.steps, options.samples)
    latency, source = before_and_after(student, made, trial.steps, target, backends, cache, progress)
    return Made(made, recipe.prunings, parts, {}, latency, source, _psnr(student, made, options, progress))


def _separated(
    student: Student, target: Target, backends: Sequence[str], options: PruneOptions, cache: Cache, progress: Progress
) -> Made:
    """Convolutions first, then what else is asked for, of what they leave; shares are of `student` as it came."""
    first = lighter(student, target, backends, options, cache, progress)
    rest = replace(
        options,
        separable={},
        max_macs=first.shares(shares_of(options, tuple(first.whole))),
        slower={} if options.latency_ms else first.slower,
    )
    made = Made(first.student, {}, (), {}, first.latency, first.latency_source, None)
    if rest.max_macs or rest.ratio is not None or rest.max_latency is not None:
        made = prune(first.student, target, backends, rest, cache, progress)
        latency = {name: (one * first.slower.get(name, 1.0), after) for name, (one, after) in made.latency.items()}
        source = made.latency_source
        if rest.uniform or rest.ratio is not None:
            # A throughput knows MACs alone, and separable ones take longer.
            steps = Trial.of(student, options.steps, options.samples).steps
            latency, source = before_and_after(student, made.student, steps, target, backends, cache, progress)
        made = replace(made, latency=latency, latency_source=source)
    known = {part.name: part for part in made.parts}
    known |= {
        name: Part(name, first.whole[name], first.left[name], (0, 0)) for name in first.records if name not in known
    }
    configs = made.student.config.components
    parts = tuple(
        replace(part, before=first.whole[name], separated=(configs[name].pruning or Pruning()).separated)
        for name, part in known.items()
    )
    return replace(made, parts=parts, psnr=_psnr(student, made.student, options, progress))


def _searched(
    student: Student,
    target: Target,
    backends: Sequence[str],
    options: PruneOptions,
    names: Sequence[str],
    ranks: Mapping[str, Mapping[str, Sequence[float]]],
    cache: Cache,
    progress: Progress,
) -> tuple[dict[str, Pruning], dict[str, tuple[float, float]], str]:
    """What loses least within the budget, the latencies before and after, and what those are from."""
    from edgegen.prune.assemble import Options, assemble
    from edgegen.prune.search import NoFitError, search

    if student.config.sampler is None:
        raise UsageError(
            f"student `{student.config.name}` draws no pictures that a budget could be weighed against",
            hint="`--ratio 0.4`, or `--uniform --max-macs 60%`",
        )
    assembled = assemble(
        student,
        target,
        backends,
        Options(tuple(names), depth=options.depth, steps=options.steps, jobs=options.jobs),
        find_spaces,
        lambda part, _: ranks[part.name],
        cache,
        progress,
    )
    whole = assembled.whole.totals
    caps = {f"macs {name}": share * whole[f"macs {name}"] for name, share in shares_of(options, names).items()}
    factors, source = scaled(target, backends, options, cache, progress)
    if options.max_latency is not None:
        for name in backends:
            cost = f"latency {name}"
            of = whole[cost] * options.slower.get(name, 1.0)
            caps[cost] = options.max_latency * (1 / factors[name] if options.latency_ms else of)
    progress.stage("search", 1)
    try:
        choice = search(replace(assembled.problem, caps=caps, minimise={"picture": 1.0}))
    except NoFitError as error:
        asked_of = {f"latency {name}": whole[f"latency {name}"] * ratio for name, ratio in options.slower.items()}
        raise refused(error, caps, {**whole, **asked_of}) from error
    progress.advance()
    latency = {
        name: (whole[f"latency {name}"] * factors[name], choice.totals[f"latency {name}"] * factors[name])
        for name in backends
        if f"latency {name}" in whole
    }
    return assembled.prunings(choice), latency, source


def scaled(
    target: Target, backends: Sequence[str], options: PruneOptions, cache: Cache, progress: Progress
) -> tuple[dict[str, float], str]:
    """Backend -> milliseconds of the target for each of this machine, and where that is from; 1 for a target whose
    speed nobody has measured, which is no answer where milliseconds were asked for: UsageError."""
    factors, said = {}, []
    for name in backends:
        speed = target_speed(target.backend(name), cache, progress)
        if speed is None and options.latency_ms:
            raise UsageError(
                f"nobody has measured how fast target `{target.name}` runs fp32 with `{name}`",
                hint="ask for a share instead: `--max-latency 0.6x`",
            )
        factors[name] = 1.0 if speed is None else speed.factor
        said.append("kernels timed on this machine, not scaled" if speed is None else speed.said())
    return factors, "; ".join(dict.fromkeys(said))


def _by_throughput(
    student: Student, target: Target, backends: Sequence[str], parts: Sequence[Part], steps: int
) -> dict[str, tuple[float, float]]:
    """Milliseconds of a picture (or of a call) of the components that were pruned."""
    made = {}
    for name in backends:
        speed = target.backend(name).speed
        if speed is not None:
            calls = {one.name: max(1, steps) if one.name == "denoiser" else 1 for one in parts}
            before = sum(one.before.macs * calls[one.name] for one in parts) / speed.macs_per_second
            after = sum(one.after.macs * calls[one.name] for one in parts) / speed.macs_per_second
            made[name] = (before * 1e3, after * 1e3)
    return made


def _part(made: Student, name: str, program: ExportedProgram, found: Spaces, pruning: Pruning) -> Part:
    units = sum(space.count for space in found.spaces)
    left = 0
    for space in found.spaces:
        cut = space.cuts[0]
        kept = pruning.positions(cut.parameter, cut.dim)
        gone = cut.parameter.startswith(tuple(f"{path}." for path in pruning.removed))
        held = cut.owners if kept is None else cut.owners[list(kept)]
        left += 0 if gone else len({owner for owner in held.tolist() if owner >= 0})
    return Part(name, count(program), count(capture(made.components[name])), (units, left), tuple(pruning.removed))


def _frozen(found: Mapping[str, Spaces]) -> dict[str, dict[str, tuple[str, ...]]]:
    made: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, one in found.items():
        for space in one.frozen:
            assert space.frozen is not None
            reasons = made.setdefault(name, {})
            reasons[space.frozen] = (*reasons.get(space.frozen, ()), space.name)
    return made


def _lists(scores: Mapping[str, Floats]) -> dict[str, Sequence[float]]:
    return {name: one.tolist() for name, one in scores.items()}
