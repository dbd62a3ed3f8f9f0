"""Which size of a checkpoint that holds several a target gets: the largest whose estimates keep to its budgets.

Two budgets: the latency of a picture (`--max-latency`) and the memory that an app may use (the target file's, or
`--max-memory`). A student of one size goes through the same check where a latency is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgegen.build.graphs import Graphs
from edgegen.build.memory import TILED, foreseen
from edgegen.build.progress import Progress
from edgegen.build.recipe import BuildOptions, Recipe, resolve
from edgegen.build.residency import TooLarge
from edgegen.bundle.level import LevelChoice, LevelFigures
from edgegen.cache import Cache
from edgegen.errors import GateError, UsageError
from edgegen.graph.count import count
from edgegen.precision.file import load_plan
from edgegen.precision.plan import PrecisionPlan
from edgegen.prune.elastic import at_level
from edgegen.prune.estimate import Network, picture_latency
from edgegen.rewrite.pipeline import pipeline_of
from edgegen.students.student import Student
from edgegen.targets import Target


@dataclass(frozen=True)
class LatencyBudget:
    """Of a picture: milliseconds, or a share of what the largest size takes."""

    amount: float
    milliseconds: bool

    @property
    def text(self) -> str:
        """As it was typed."""
        return f"{self.amount:g}ms" if self.milliseconds else f"{self.amount:g}x"


@dataclass(frozen=True)
class SizeOptions:
    """`level`: what the user chose; None leaves it to the target."""

    level: str | None = None
    budget: LatencyBudget | None = None


@dataclass
class _Candidate:
    """`name` None: the student has one size."""

    name: str | None
    student: Student
    recipe: Recipe
    figures: LevelFigures
    tiled: bool = False
    """It fits if its decoder can be drawn in tiles, which only pictures tell."""

    def pass_over(self, why: str) -> None:
        self.figures = self.figures.model_copy(update={"passed_over": (*self.figures.passed_over, why)})

    @property
    def fits(self) -> bool:
        return not self.figures.passed_over


def sized(
    student: Student,
    target: Target,
    options: BuildOptions,
    sizes: SizeOptions,
    output: Path,
    graphs: Graphs,
    cache: Cache,
    progress: Progress,
) -> tuple[Student, Recipe]:
    """The size of `student` that `target` gets, and its recipe, whose `level` says why.

    UsageError for a level that is not there and for milliseconds of a target whose speed nobody measured; GateError,
    with the figures of every size, where none keeps to the budgets.
    """
    if not student.config.levels and sizes.level is None and sizes.budget is None:
        return student, resolve(student, target, options, output)
    names, why = _considered(student, options, sizes)
    if sizes.budget is not None and not student.config.levels and not sizes.budget.milliseconds:
        raise UsageError(
            f"student `{student.config.name}` has one size: `--max-latency {sizes.budget.text}` is a share of its own",
            hint=f"`--max-latency 120ms`, or cut it first: `edgegen prune MODEL --target {target.name} --max-latency "
            f"{sizes.budget.text} -o small.pt`",
        )
    students = [student if name is None else at_level(student, name) for name in names]
    recipes = [resolve(small, target, options, output) for small in students]
    if sizes.budget is not None and sizes.budget.milliseconds:
        _require_speed(student, target, recipes[0])
    progress.stage(f"{target.name}: figures of {_sizes(len(names))}", len(names))
    candidates: list[_Candidate] = []
    for name, small, recipe in zip(names, students, recipes, strict=True):
        candidates.append(_Candidate(name, small, recipe, _figures(name, small, recipe, graphs)))
        _weigh_memory(candidates[-1], graphs, judged=len(names) > 1)
        progress.advance()
    source = None
    if sizes.budget is not None:
        reference = None
        if student.config.levels:
            largest = next(iter(student.config.levels))
            reference = candidates[0] if candidates[0].name == largest else None
            if reference is None:
                whole = at_level(student, largest)
                without = resolve(whole, target, replace(options, plan=None), output)
                reference = _Candidate(largest, whole, without, _figures(largest, whole, without, graphs))
        source = _weigh_latency(candidates, reference, target, sizes.budget, graphs, cache, progress)
    chosen = next((one for one in candidates if one.fits and not one.tiled), None)
    chosen = chosen or next((one for one in candidates if one.fits), None)
    if chosen is None:
        raise _none_fits(student, target, candidates, sizes.budget, source)
    for one in candidates[: candidates.index(chosen)]:
        if one.fits:
            one.pass_over("memory: its decoder would have to be drawn in tiles, and a smaller level fits whole")
    choice = LevelChoice(
        name=chosen.name,
        why=why,
        budget=None if sizes.budget is None else f"`--max-latency {sizes.budget.text}`",
        latency_source=source,
        levels=tuple(one.figures for one in candidates),
    )
    for line in said(target.name, choice):
        progress.note(line)
    return chosen.student, chosen.recipe.model_copy(update={"level": choice})


def said(target: str, choice: LevelChoice) -> list[str]:
    """In words: what was chosen, and why each larger one was not."""
    lines = [] if choice.name is None else [f"{target}: level `{choice.name}`, {choice.why}"]
    for one in choice.levels:
        if one.name == choice.name:
            break
        lines += [f"{target}: level `{one.name}` passed over: {why}" for why in one.passed_over]
    return lines


def _considered(student: Student, options: BuildOptions, sizes: SizeOptions) -> tuple[Sequence[str | None], str]:
    """The levels to look at, the largest first, and who chose them; (None,) for a student of one size."""
    if sizes.level is not None:
        at_level(student, sizes.level)  # refuses what is not there
        return (sizes.level,), f"by `--level {sizes.level}`"
    if not student.config.levels:
        return (None,), "the only size"
    if options.plan is not None:
        plan = load_plan(options.plan)
        for name in student.config.levels:
            if at_level(student, name).fingerprint == plan.student_sha256:
                return (name,), f"the one that `{options.plan}` was made for"
        raise UsageError(
            f"`{options.plan}` was made for `{plan.student}` ({plan.student_sha256[:12]}), which is no level of this "
            "checkpoint",
            hint=f"make one: `edgegen plan MODEL --level {next(iter(student.config.levels))} --target {plan.target}`",
        )
    return tuple(student.config.levels), "the largest that fits"


def _calls(recipe: Recipe, component: str) -> int:
    return recipe.steps or 1 if component == "denoiser" else 1


def _figures(name: str | None, student: Student, recipe: Recipe, graphs: Graphs) -> LevelFigures:
    counts = {part: count(graphs.captured(one)) for part, one in student.components.items()}
    return LevelFigures(
        name=student.config.name if name is None else name,
        parameters=sum(one.parameters for one in counts.values()),
        macs=sum(one.macs * _calls(recipe, part) for part, one in counts.items()),
    )


def _weigh_memory(one: _Candidate, graphs: Graphs, *, judged: bool) -> None:
    """Of a size that nothing competes with, whether it fits is left to the build, which knows more."""
    held, load = {}, {}
    canonical = {name: pipeline_of(specs) for name, specs in one.recipe.canonical.items()}
    for backend, plan in foreseen(one.student, one.recipe, graphs, canonical).items():
        if not isinstance(plan, TooLarge):
            held[backend], load[backend] = plan.peak_bytes, plan.load
        elif plan.component == TILED and plan.spare > 0 and one.student.config.sampler is not None:
            one.tiled = True
        elif judged:
            one.pass_over(f"memory with {backend}: {plan.message}")
    one.figures = one.figures.model_copy(update={"memory_bytes_estimated": held, "load": load})


def _weigh_latency(
    candidates: Sequence[_Candidate],
    reference: _Candidate | None,
    target: Target,
    budget: LatencyBudget,
    graphs: Graphs,
    cache: Cache,
    progress: Progress,
) -> str:
    """Adds the estimates, and the reason to those that take too long; returns what they are from. `reference`: the
    largest size, which shares are of."""
    sources = []
    for backend in candidates[0].recipe.backends:
        on = target.backend(backend.name)
        networks = {str(index): _networks(one, backend.name, graphs) for index, one in enumerate(candidates)}
        if reference is not None:
            networks["reference"] = _networks(reference, backend.name, graphs)
        found = picture_latency(networks, on, cache, progress)
        sources.append(found.source)
        whole = found.milliseconds.get("reference")
        for index, one in enumerate(candidates):
            taken = found.milliseconds[str(index)] * _planned(one.recipe.plan, backend.name)
            share = None if not whole else taken / whole
            _note_latency(one, backend.name, taken if found.on_target else None, share, budget)
    return "; ".join(dict.fromkeys(sources))


def _require_speed(student: Student, target: Target, recipe: Recipe) -> None:
    """UsageError where nothing makes milliseconds of the target of those of this machine."""
    for backend in recipe.backends:
        if target.backend(backend.name).speed is None:
            share = "ask for a share of the largest level instead: `--max-latency 0.6x`"
            cut = (
                "leave `--max-latency` out, or cut the student to a share: `edgegen prune MODEL --target "
                f"{target.name} --max-latency 0.6x -o small.pt`"
            )
            raise UsageError(
                f"nobody has measured how fast target `{target.name}` runs fp32 with `{backend.name}`",
                hint=share if student.config.levels else cut,
            )


def _note_latency(
    one: _Candidate, backend: str, milliseconds: float | None, share: float | None, budget: LatencyBudget
) -> None:
    figures = one.figures
    update: dict[str, dict[str, float]] = {}
    if milliseconds is not None:
        update["latency_ms_estimated"] = {**figures.latency_ms_estimated, backend: round(milliseconds, 4)}
    if share is not None:
        update["latency_share_estimated"] = {**figures.latency_share_estimated, backend: round(share, 4)}
    one.figures = figures.model_copy(update=update)
    if budget.milliseconds and milliseconds is not None and milliseconds > budget.amount:
        one.pass_over(f"latency with {backend}: {milliseconds:.3g} ms (estimated), {budget.amount:g} ms are allowed")
    if not budget.milliseconds and share is not None and share > budget.amount:
        one.pass_over(
            f"latency with {backend}: {share:.3f} of the largest level's (estimated), {budget.amount:g} are allowed"
        )


def _networks(one: _Candidate, backend: str, graphs: Graphs) -> dict[str, Network]:
    """A plan's precisions come as the ratio to fp32 that it estimated, so its networks are taken in fp32."""
    recipe = one.recipe
    chosen = next(each for each in recipe.backends if each.name == backend)
    return {
        name: Network(
            graphs.captured(part),
            _calls(recipe, name),
            "fp32" if recipe.plan is not None else recipe.precision(chosen, name),
        )
        for name, part in one.student.components.items()
    }


def _planned(plan: PrecisionPlan | None, backend: str) -> float:
    return 1.0 if plan is None else plan.predicted.get(f"latency_ratio_estimated.{backend}", 1.0)


def _none_fits(
    student: Student,
    target: Target,
    candidates: Sequence[_Candidate],
    budget: LatencyBudget | None,
    source: str | None,
) -> GateError:
    cut = "" if budget is None else f" --max-latency {budget.text}"
    again = f"`edgegen prune MODEL --target {target.name}{cut or ' --max-macs 60%'} -o small.pt`"
    if candidates[0].name is None:
        lines = [f"student `{student.config.name}` does not keep to what was asked for `{target.name}`"]
        lines += [f"  {why}" for why in candidates[0].figures.passed_over]
        hint = f"allow more, or cut it: {again}"
    else:
        one_level = f"level `{candidates[0].name}` of `{student.config.name}` does not fit `{target.name}`"
        lines = [one_level if len(candidates) == 1 else f"no level of `{student.config.name}` fits `{target.name}`"]
        for one in candidates:
            lines += [f"  {one.name}: {why}" for why in one.figures.passed_over]
        nearest = candidates[-1]
        if len(candidates) > 1:
            lines.append(f"  the nearest is `{nearest.name}`{_amounts(nearest.figures)}")
        hint = (
            "allow more, or make smaller levels of the student that these were cut out of: `edgegen prune MODEL "
            f"--target {target.name} --levels 50%,25% -o elastic.pt`"
        )
    if source is not None:
        lines.append(f"  latency is estimated from {source}")
    return GateError("\n".join(lines), hint=hint)


def _amounts(figures: LevelFigures) -> str:
    texts = [f"{value:.3g} ms with {name}" for name, value in figures.latency_ms_estimated.items()]
    if not texts:
        texts = [f"{value:.3f} of the largest with {name}" for name, value in figures.latency_share_estimated.items()]
    texts += [f"{value / 2**20:.1f} MiB with {name}" for name, value in figures.memory_bytes_estimated.items()]
    return f": {', '.join(texts)} (estimated)" if texts else ""


def _sizes(number: int) -> str:
    return "1 size" if number == 1 else f"{number} sizes"
