"""What `edgegen build` does between its arguments and its result."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgegen.build.pipeline import Built, build_all, raise_for_failures
from edgegen.build.progress import Progress
from edgegen.build.recipe import BuildOptions, Recipe, resolve
from edgegen.cache import Cache
from edgegen.lower.backend import Precision
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
    dump_ir: Path | None = None
    """Folder for every graph after every pass: `<target>/<backend>/<component>/`."""
    shrink: Path | None = None
    """Folder for the smallest graph of each component that a backend gets wrong: `<target>/<backend>/<component>/`."""
    source: Source = field(default_factory=Source)
    """What to do to the model when it is opened."""


@dataclass(frozen=True)
class Prepared:
    """A loaded student and one resolved recipe a target: all that can be refused was refused."""

    student: Student
    recipes: tuple[Recipe, ...]
    dump_ir: Path | None = None
    shrink: Path | None = None


def prepare(request: BuildRequest) -> Prepared:
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
    recipes = [
        resolve(student, target, options, _output(request, student, target.name, len(targets))) for target in targets
    ]
    return Prepared(student, tuple(recipes), request.dump_ir, request.shrink)


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
    built = build_all(
        prepared.student, prepared.recipes, cache, progress, dump_ir=prepared.dump_ir, shrink=prepared.shrink
    )
    raise_for_failures(built)
    return built


def _smoke(prepared: Prepared, cache: Cache, progress: Progress) -> None:
    """All stages on the two-layer copy, in a folder that is thrown away; only its failures are of interest."""
    small = smoke_copy(prepared.student)
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
