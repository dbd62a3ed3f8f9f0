"""One student's widths, blocks and precisions as one problem: what each loses, measured, and what each costs.

What a level of a space loses, and what passing a block by loses, is measured on pictures without healing; what a
precision of an op loses comes from the precision plan's own stages. Costs are those of `edgegen.prune.cost`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache as memoize
from functools import partial
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed
from torch.export import ExportedProgram

import edgegen
from edgegen.cache import Cache
from edgegen.errors import UsageError
from edgegen.graph.capture import capture
from edgegen.lower.backend import get_backend
from edgegen.precision.memo import kept as remembered
from edgegen.precision.options import Progress
from edgegen.prune.apply import pruned, require_modules
from edgegen.prune.bench import times
from edgegen.prune.check import not_following
from edgegen.prune.cost import Kept, Op, Priced, Surface, ladders, ops, points, surface, width, work
from edgegen.prune.depth import Block, Effect, blocks, effects, measured, runs
from edgegen.prune.kernels import Kernel
from edgegen.prune.levels import SHARES, ladder
from edgegen.prune.search import Choice, Ladder, Problem, Removal
from edgegen.prune.space import Spaces, to_pruning
from edgegen.prune.trial import Trial
from edgegen.students.pruning import Pruning, Way
from edgegen.students.student import Component, Student
from edgegen.targets import Target

TOGETHER = 16
"""Measurements that are kept at once: what a kill loses."""
PRUNED = ("denoiser", "decoder")
"""Components that are cut unless something else is asked for: what a picture costs is there."""
Scores = Callable[[Component, Spaces], Mapping[str, Sequence[float]]]
"""Of every unit of every space of a component, how much it matters."""
Losses = Mapping[tuple[str, str], Priced]
"""(component, module path) -> the precisions that an op may have."""


@dataclass(frozen=True)
class Options:
    """`shares`: of a space that its levels keep. `depth`: whether blocks may be passed by. `samples`: pictures that
    losses are measured on, of `steps` steps (None: the student's default); with 2 or 4 of `shapes`, what is chosen is
    right for those and wrong for others. `jobs`: processes."""

    components: tuple[str, ...] = PRUNED
    shares: tuple[float, ...] = SHARES
    depth: bool = True
    samples: int = 12
    steps: int | None = None
    jobs: int = 1


@dataclass(frozen=True)
class Assembled:
    """The problem, and what its names stand for. `estimates`: of each block, to first order, beside which `measured`
    has what passing it by alone does."""

    student: Student
    trial: Trial
    problem: Problem
    spaces: Mapping[str, Spaces]
    kept: Mapping[str, Kept]
    removals: Mapping[str, tuple[Block, ...]]
    estimates: Mapping[str, Effect] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)
    surfaces: Mapping[str, Mapping[Kernel, Surface]] = field(default_factory=dict)

    @property
    def whole(self) -> Choice:
        """Nothing taken out, all in float."""
        from edgegen.prune.search import total

        levels = {one.name: 0 for one in self.problem.ladders}
        options = {one.name: one.options[0] for one in self.problem.works}
        return Choice(levels, options, (), total(self.problem, levels, options, ()))

    def prunings(self, choice: Choice) -> dict[str, Pruning]:
        """What is taken out of each component; components that stay whole are left out."""
        removed: dict[str, dict[str, Way]] = {name: {} for name in self.spaces}
        for one in choice.removed:
            for block in self.removals[one]:
                removed[block.component][block.path] = block.way
        made = {}
        for name, spaces in self.spaces.items():
            selection = {space: units[choice.levels[f"{name}/{space}"]] for space, units in self.kept[name].items()}
            pruning = to_pruning(spaces, selection, removed[name])
            if pruning.cuts or pruning.removed:
                made[name] = pruning
        return made

    def pruned(self, choice: Choice) -> Student:
        return pruned(self.student, self.prunings(choice))

    def precisions(self, choice: Choice) -> dict[str, dict[str, str]]:
        """Component -> module path of an op -> its precision, of those that are no floats and are still there."""
        made: dict[str, dict[str, str]] = {}
        for name, option in choice.options.items():
            component, _, path = name.partition("/")
            if option is not None and option not in ("fp32", "fp16"):
                made.setdefault(component, {})[path] = option
        return made


def assemble(
    student: Student,
    target: Target,
    backends: Sequence[str],
    options: Options,
    find: Callable[[ExportedProgram], Spaces],
    scores: Scores,
    cache: Cache,
    progress: Progress,
    priced: Losses | None = None,
) -> Assembled:
    """`find` gives the spaces of a captured graph. UsageError for a component that is not there or has no modules, and
    for a student that draws nothing."""
    for name in options.components:
        if name not in student.components:
            known = ", ".join(f"`{one}`" for one in student.components)
            raise UsageError(f"student `{student.config.name}` has no component `{name}`", hint=f"it has {known}")
        require_modules(name, student.config.components[name].architecture)
    trial = Trial.of(student, options.steps, options.samples)
    progress.stage("capture, find spaces and blocks", len(student.components))
    programs, spaces = {}, {}
    for name, part in student.components.items():
        programs[name] = capture(part)
        if name in options.components:
            spaces[name] = find(programs[name])
        progress.advance()
    multiple = max((target.backend(name).width_multiple for name in backends), default=1)
    kept: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {}
    for name, found in spaces.items():
        matter = scores(student.components[name], found)
        made = {one.name: ladder(one, matter[one.name], multiple, options.shares) for one in found.spaces}
        kept[name] = {space: levels for space, levels in made.items() if len(levels) > 1}
    losses = _level_losses(trial, spaces, kept, options, cache, progress)
    removable: list[Block] = []
    if options.depth:
        for name in options.components:
            removable += blocks(student.components[name], programs[name])
    estimates, alone, removals = _removals(trial, removable, cache, progress)
    of = {name: ops(program, spaces.get(name, Spaces(()))) for name, program in programs.items()}
    surfaces = {
        name: timed(name, [op for each in of.values() for op in each], multiple, cache, progress) for name in backends
    }
    problem = _problem(trial, programs, of, spaces, kept, losses, removals, surfaces, backends, priced or {})
    return Assembled(student, trial, problem, spaces, kept, removals_of(removals), estimates, alone, surfaces)


Removals = Mapping[tuple[Block, ...], float]


def removals_of(removals: Removals) -> dict[str, tuple[Block, ...]]:
    return {removal_name(one): one for one in removals}


def removal_name(run: Sequence[Block]) -> str:
    """`denoiser/blocks.3`, or `denoiser/blocks.3 ... blocks.5` of a run."""
    return run[0].name if len(run) == 1 else f"{run[0].name} ... {run[-1].path}"


def timed(backend: str, found: Sequence[Op], multiple: int, cache: Cache, progress: Progress) -> dict[Kernel, Surface]:
    """The surface of every kernel of `found` on this machine's runtime of `backend`, or of a stand-in."""
    widest: dict[Kernel, tuple[float, float]] = {}
    for op in found:
        if op.kernel is not None and not op.folded:
            r, w = widest.get(op.kernel, (0.0, 0.0))
            widest[op.kernel] = (max(r, width(op.read)), max(w, width(op.written)))
    wanted = {kernel: points(kernel, round(r), round(w), multiple) for kernel, (r, w) in widest.items()}
    known = times(timed_with(backend), [one for each in wanted.values() for one in each], cache, progress)
    return {kernel: surface({one: known[one] for one in each}) for kernel, each in wanted.items()}


STAND_IN = "tflite"
"""Runtime that kernels are timed with where the backend's own does not run on this machine."""


def timed_with(backend: str) -> str:
    """Whose runtime on this machine says how long `backend` takes, relatively."""
    from edgegen.lower.stand_in import executed_by

    one = get_backend(backend)
    return backend if one.not_executed_here() is None and executed_by(one) is None else STAND_IN


@memoize
def pruner_fingerprint() -> str:
    """sha256 over the sources that decide what pruning finds."""
    digest = hashlib.sha256()
    for path in sorted((Path(edgegen.__file__).parent / "prune").glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _settings(trial: Trial) -> dict[str, Any]:
    return {
        "student": trial.student.fingerprint,
        "pruner": pruner_fingerprint(),
        "given": trial.given.tolist() if trial.given.numel() < 1e5 else list(trial.given.shape),
        "seeds": list(trial.seeds),
        "steps": trial.steps,
    }


def _level_losses(
    trial: Trial,
    spaces: Mapping[str, Spaces],
    kept: Mapping[str, Kept],
    options: Options,
    cache: Cache,
    progress: Progress,
) -> dict[str, dict[str, list[float]]]:
    """Component -> space -> what each level of it alone loses, the first 0. Never less than a level that keeps more:
    a picture that comes out better by luck is no reason to cut."""
    wanted = [
        (name, space, index)
        for name, found in kept.items()
        for space, levels in found.items()
        for index in range(1, len(levels))
    ]
    cuts = [to_pruning(spaces[name], {space: kept[name][space][index]}) for name, space, index in wanted]
    progress.stage("measure the levels of every space", len(wanted))

    def measure(part: slice) -> list[float]:
        _ = trial.pictures, trial.conditioning  # once, before they go to other processes
        jobs = [delayed(level_loss)(trial, where[0], cut) for where, cut in zip(wanted[part], cuts[part], strict=True)]
        made: list[float] = Parallel(n_jobs=options.jobs)(jobs)
        return made

    values: list[float] = []
    for start in range(0, len(wanted), TOGETHER):
        part = slice(start, start + TOGETHER)
        named = [[name, cut.model_dump(mode="json")] for (name, *_), cut in zip(wanted[part], cuts[part], strict=True)]
        values += remembered(cache, "prune-levels", {**_settings(trial), "cuts": named}, partial(measure, part))
        for _ in named:
            progress.advance()
    losses = {name: {space: [0.0] * len(levels) for space, levels in found.items()} for name, found in kept.items()}
    for (name, space, index), value in zip(wanted, values, strict=True):
        losses[name][space][index] = max(value, losses[name][space][index - 1])
    return losses


def level_loss(trial: Trial, component: str, pruning: Pruning) -> float:
    """Of one cut of one component, measured: a job for another process."""
    try:
        return trial.loss(pruned(trial.student, {component: pruning}))
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise not_following(component, f"it no longer runs: {error}") from error


def _removals(
    trial: Trial, found: Sequence[Block], cache: Cache, progress: Progress
) -> tuple[dict[str, Effect], dict[str, float], dict[tuple[Block, ...], float]]:
    """First-order estimates of blocks, what each does alone, and all removals with what they do, runs too."""
    if not found:
        return {}, {}, {}
    named = {block.name: block for block in found}
    settings = {**_settings(trial), "blocks": sorted(named)}
    progress.stage("what blocks do, to first order", 1)
    said = remembered(
        cache, "prune-effects", settings, lambda: [[name, vars(one)] for name, one in effects(trial, found).items()]
    )
    known = {name: Effect(**one) for name, one in said}
    progress.advance()
    whole = [(block,) for block in found] + runs(found, known)
    progress.stage("measure the blocks that may be passed by", len(whole))
    rows: list[tuple[tuple[str, ...], float]] = []
    for start in range(0, len(whole), TOGETHER):
        part = whole[start : start + TOGETHER]
        names = [tuple(block.name for block in one) for one in part]
        losses = remembered(cache, "prune-blocks", {**settings, "removed": names}, partial(_passed_by, trial, part))
        rows += zip(names, losses, strict=True)
        for _ in part:
            progress.advance()
    removals = {tuple(named[name] for name in names): loss for names, loss in rows}
    alone = {run[0].name: loss for run, loss in removals.items() if len(run) == 1}
    return known, alone, removals


def _passed_by(trial: Trial, removals: Sequence[Sequence[Block]]) -> list[float]:
    """What each of them does to the picture."""
    return [measured(trial, one) for one in removals]


def _problem(
    trial: Trial,
    programs: Mapping[str, ExportedProgram],
    of: Mapping[str, Sequence[Op]],
    spaces: Mapping[str, Spaces],
    kept: Mapping[str, Kept],
    losses: Mapping[str, Mapping[str, Sequence[float]]],
    removals: Removals,
    surfaces: Mapping[str, Mapping[Kernel, Surface]],
    backends: Sequence[str],
    priced: Losses,
) -> Problem:
    works = []
    rungs: list[Ladder] = []
    fixed = 0.0
    for name, program in programs.items():
        calls = trial.steps if name == "denoiser" else 1
        for op in of[name]:
            options = priced.get((name, op.path), Priced.plain(backends))
            works.append(work(name, op, kept.get(name, {}), surfaces, options, calls))
        own: tuple[Ladder, ...] = ()
        if name in spaces:
            own = ladders(name, spaces[name], kept[name], losses[name])
        rungs += own
        held = sum(value.numel() * 4 for value in program.state_dict.values() if value.is_floating_point())
        fixed += max(0.0, held - 4 * sum(op.weight for op in of[name]) - sum(one.costs["bytes"][0] for one in own))
    names = {work.name for work in works}
    gone = []
    for run, loss in removals.items():
        within = frozenset(name for name in names for block in run if _in(name, block))
        gone.append(Removal(removal_name(run), within, {"picture": loss}))
    return Problem(tuple(rungs), tuple(works), tuple(gone), {"bytes": fixed})


def _in(work: str, block: Block) -> bool:
    """The second call of a module is `path#2`."""
    return f"{work.split('#')[0]}.".startswith(f"{block.name}.")
