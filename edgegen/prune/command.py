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
from edgegen.prune.apply import pruned, require_modules
from edgegen.prune.check import check
from edgegen.prune.elastic import require_one_size
from edgegen.prune.find import find
from edgegen.prune.find import spaces as find_spaces
from edgegen.prune.importance import Floats, Probe, confirmed, importance, magnitude
from edgegen.prune.ratio import by_ratio, ratio_for
from edgegen.prune.refusal import refused
from edgegen.prune.separable import separate
from edgegen.prune.space import Spaces, to_pruning
from edgegen.prune.target_speed import target_speed
from edgegen.prune.trial import Trial
from edgegen.students.pruning import Pruning
from edgegen.students.student import Student
from edgegen.targets import Target

MEASURED = 16
"""Single units whose removal is measured, beside what was estimated."""


@dataclass(frozen=True)
class PruneOptions:
    """`components`: () for the denoiser and the decoder, or the one that there is. `max_macs`: component (or "" for
    each) -> share of what it has. `max_latency` of the whole picture: a share, or milliseconds with `latency_ms`.
    `ratio`: share of every space that goes. `separable`: component -> the share of its MACs that it is left with by
    making convolutions separable, before anything is cut. `uniform`: one ratio for all spaces, units ranked by their
    weights alone. `samples`: pictures that importance is measured on, of `steps` steps."""

    components: tuple[str, ...] = ()
    max_macs: Mapping[str, float] = field(default_factory=dict)
    max_latency: float | None = None
    latency_ms: bool = False
    ratio: float | None = None
    separable: Mapping[str, float] = field(default_factory=dict)
    uniform: bool = False
    depth: bool = True
    samples: int = 8
    steps: int | None = None
    jobs: int = 1
    measure: bool = True


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
    progress.stage("capture, find what may be cut", len(names))
    programs, known = {}, {}
    for name in names:
        programs[name] = capture(student.components[name])
        known[name] = find(programs[name])
        if not known[name].spaces.spaces:
            why = next((one.frozen for one in known[name].spaces.frozen), "it has no channels, heads or feed-forwards")
            raise UsageError(f"nothing of component `{name}` may be cut: {why}")
        progress.advance()
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
        for name, share in _shares(options, names).items():
            most = share * count(programs[name]).macs
            prunings[name] = ratio_for(student, name, found[name], ranks[name], most, multiple)
            progress.advance()
    else:
        prunings, latency, source = _searched(student, target, backends, options, names, ranks, cache, progress)
    progress.stage("hold what is left against what it was", len(prunings))
    for name, pruning in prunings.items():
        check(student.components[name], known[name], pruning)
        progress.advance()
    made = pruned(student, prunings)
    parts = tuple(_part(made, name, programs[name], found[name], prunings.get(name, Pruning())) for name in names)
    if not latency:
        latency = _by_throughput(student, target, backends, parts, probe.steps)
    psnr = None
    if probe.steps:
        progress.stage("draw with what is left", 1)
        loss = Trial.of(student, options.steps, options.samples, unseen=True).loss(made)
        psnr = round(-10 * math.log10(max(loss, 1e-15)), 2)
        progress.advance()
    return Made(made, prunings, parts, _frozen(found), latency, source, psnr, correlation)


def _separated(
    student: Student, target: Target, backends: Sequence[str], options: PruneOptions, cache: Cache, progress: Progress
) -> Made:
    """Convolutions first, then what else is asked for, of what they leave; shares are of `student` as it came."""
    if options.max_latency is not None:
        raise UsageError(
            "`--separable` and `--max-latency` are not weighed against each other",
            hint="give `--max-macs` beside `--separable`, or prune what comes out once more: `--max-latency 0.6x`",
        )
    whole = {name: count(capture(student.components[name])) for name in components_of(student, options)}
    trial = Trial.of(student, options.steps, options.samples)
    records = separate(student, options.separable, trial, progress.stage, progress.advance)
    lighter = pruned(student, records)
    left = {name: count(capture(part)) for name, part in lighter.components.items() if name in whole}
    rest = replace(options, separable={})
    if options.max_macs:
        shares = _shares(options, tuple(whole))
        rest = replace(
            rest,
            max_macs={name: min(1.0, share * whole[name].macs / left[name].macs) for name, share in shares.items()},
        )
    if rest.max_macs or rest.ratio is not None:
        made = prune(lighter, target, backends, rest, cache, progress)
    else:
        made = Made(lighter, {}, (), {}, {}, "", None)
    progress.stage("draw with what is left", 1)
    loss = Trial.of(student, options.steps, options.samples, unseen=True).loss(made.student)
    progress.advance()
    known = {part.name: part for part in made.parts}
    known |= {name: Part(name, whole[name], left[name], (0, 0)) for name in records if name not in known}
    configs = made.student.config.components
    parts = tuple(
        replace(part, before=whole[name], separated=(configs[name].pruning or Pruning()).separated)
        for name, part in known.items()
    )
    return replace(made, parts=parts, latency={}, psnr=round(-10 * math.log10(max(loss, 1e-15)), 2))


def components_of(student: Student, options: PruneOptions) -> tuple[str, ...]:
    """What is pruned; UsageError for what is not there, is a finished graph, or has a budget and is not pruned."""
    drawn = student.config.sampler is not None
    names = options.components or (("denoiser", "decoder") if drawn else tuple(student.components))
    for name in (*names, *options.separable, *(one for one in options.max_macs if one)):
        if name not in student.components:
            known = ", ".join(f"`{one}`" for one in student.components)
            raise UsageError(f"student `{student.config.name}` has no component `{name}`", hint=f"it has {known}")
        require_modules(name, student.config.components[name].architecture)
    stray = [one for one in options.max_macs if one and one not in names]
    if stray:
        raise UsageError(f"`--max-macs` names `{stray[0]}`, which is not pruned", hint=f"`--component {stray[0]}`")
    return names


def _shares(options: PruneOptions, names: Sequence[str]) -> dict[str, float]:
    """Component -> the share of its MACs that may be left."""
    given = options.max_macs
    return {name: given.get(name, given.get("", 1.0)) for name in names if name in given or "" in given}


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
    caps = {f"macs {name}": share * whole[f"macs {name}"] for name, share in _shares(options, names).items()}
    factors, source = scaled(target, backends, options, cache, progress)
    if options.max_latency is not None:
        for name in backends:
            cost = f"latency {name}"
            caps[cost] = options.max_latency * (1 / factors[name] if options.latency_ms else whole[cost])
    progress.stage("search", 1)
    try:
        choice = search(replace(assembled.problem, caps=caps, minimise={"picture": 1.0}))
    except NoFitError as error:
        raise refused(error, caps, whole) from error
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
