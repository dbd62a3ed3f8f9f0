"""What `edgegen build` does between its arguments and its result."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgegen.build.graphs import Graphs
from edgegen.build.levels import LatencyBudget, SizeOptions, sized
from edgegen.build.pipeline import Built, build_all, raise_for_failures
from edgegen.build.progress import Progress
from edgegen.build.recipe import BuildOptions, Recipe
from edgegen.cache import Cache
from edgegen.lower.backend import Precision
from edgegen.prune.elastic import without_levels
from edgegen.students.shrink import smoke_copy
from edgegen.students.source import Source
from edgegen.students.student import Student
from edgegen.targets import load_target


@dataclass(frozen=True)
class BuildRequest:
    """The command line, parsed and not yet checked."""

    model: Path
    targets: tuple[str, ...]
    output: Path | None = None
    backends: tuple[str, ...] | None = None
    precision: Precision | None = None
    steps: int | None = None
    require_full_delegation: bool = False
    passes: str | None = None
    max_pieces: int | None = None
    plan: Path | None = None
    one_package: bool | None = None
    max_memory: int | None = None
    level: str | None = None
    """Of a checkpoint that holds several sizes; None leaves it to each target."""
    max_latency: LatencyBudget | None = None
    dump_ir: Path | None = None
    """Folder for every graph after every pass: `<target>/<backend>/<component>/`."""
    shrink: Path | None = None
    """Folder for the smallest graph of each component that a backend gets wrong: `<target>/<backend>/<component>/`."""
    source: Source = field(default_factory=Source)
    """What to do to the model when it is opened."""


@dataclass(frozen=True)
class Prepared:
    """A loaded student and one resolved recipe a target: all that can be refused was refused. `sizes`: of each recipe,
    what it builds, which is the student itself unless that holds several sizes."""

    student: Student
    recipes: tuple[Recipe, ...]
    sizes: tuple[Student, ...]
    dump_ir: Path | None = None
    shrink: Path | None = None


def prepare(request: BuildRequest, progress: Progress) -> Prepared:
    """Targets are looked up before the model is opened, so that a typing error costs nothing."""
    targets = [load_target(name) for name in request.targets]
    student = request.source.open(request.model)
    options = BuildOptions(
        request.backends,
        request.precision,
        request.steps,
        request.require_full_delegation,
        request.passes,
        request.max_pieces,
        request.plan,
        request.max_memory,
        request.one_package,
    )
    sizes, graphs, cache = SizeOptions(request.level, request.max_latency), Graphs(), Cache(None)
    chosen = []
    for target in targets:
        output = _output(request, student, target.name, len(targets))
        chosen.append(sized(student, target, options, sizes, output, graphs, cache, progress))
    students, recipes = zip(*chosen, strict=True)
    return Prepared(student, recipes, students, request.dump_ir, request.shrink)


def _output(request: BuildRequest, student: Student, target: str, targets: int) -> Path:
    """`-o DIR` is the bundle for one target and the parent of `DIR/<target>` for several."""
    if request.output is None:
        return Path(f"{student.config.name}-{target}")
    return request.output if targets == 1 else request.output / target


def run(prepared: Prepared, progress: Progress, *, smoke: bool = False) -> list[Built]:
    """Build every recipe; EdgegenError or GateError when something failed, after everything else was done."""
    cache = Cache(None)
    if smoke:
        _smoke(prepared, cache, progress)
    built: dict[int, Built] = {}
    for places in _alike(prepared.sizes):
        recipes = [prepared.recipes[place] for place in places]
        student = prepared.sizes[places[0]]
        made = build_all(student, recipes, cache, progress, dump_ir=prepared.dump_ir, shrink=prepared.shrink)
        built |= dict(zip(places, made, strict=True))
    ordered = [built[place] for place in sorted(built)]
    raise_for_failures(ordered)
    return ordered


def _alike(students: Sequence[Student]) -> list[list[int]]:
    """Places of the same student: they share a reference."""
    found: dict[str, list[int]] = {}
    for place, student in enumerate(students):
        found.setdefault(student.fingerprint, []).append(place)
    return list(found.values())


def _smoke(prepared: Prepared, cache: Cache, progress: Progress) -> None:
    """All stages on the two-layer copy, in a folder that is thrown away; only its failures are of interest."""
    small = smoke_copy(without_levels(prepared.student))
    folder = Path(tempfile.mkdtemp(prefix="edgegen-smoke-"))
    try:
        recipes: Sequence[Recipe] = [
            recipe.model_copy(
                update={
                    "output": folder / recipe.target,
                    "student": small.config.name,
                    "student_sha256": small.fingerprint,
                }
            )
            for recipe in map(_in_float, prepared.recipes)
        ]
        progress.note("smoke: a two-layer copy with random weights goes first")
        if any(recipe.plan is not None for recipe in prepared.recipes):
            progress.note("smoke: without the plan, whose ops the copy does not have")
        raise_for_failures(build_all(small, recipes, cache, progress))
        progress.note("smoke: passed")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _in_float(recipe: Recipe) -> Recipe:
    """`recipe` without its plan, in the float arithmetic that the plan has between what it compresses."""
    if recipe.plan is None:
        return recipe
    floats = [part.float_precision for part in recipe.plan.components.values()] or ["fp32"]
    backends = tuple(one.model_copy(update={"precision": floats[0]}) for one in recipe.backends)
    return recipe.model_copy(update={"plan": None, "repaired": None, "backends": backends})
