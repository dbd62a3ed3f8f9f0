"""`build`: lower, verify, profile and bundle one student for one target after another, sharing what they share."""

from __future__ import annotations

import dataclasses
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from edgegen.build.clock import Clock
from edgegen.build.contents import Rewrites, contents_of, rewrites_of
from edgegen.build.graphs import Graphs
from edgegen.build.joining import join_components
from edgegen.build.lowering import LoweredComponent, LowerFailure, LowerJob, lower_all, was_lowered, weight_bytes
from edgegen.build.memory import Memory, decide, foreseen_parts
from edgegen.build.planned import realise, with_plan
from edgegen.build.progress import Progress
from edgegen.build.recipe import BackendRecipe, Recipe
from edgegen.build.record import executed, manifest_of
from edgegen.build.remembered import remembered_reference
from edgegen.build.room import Conversion, require_room
from edgegen.build.verification import verify_all
from edgegen.bundle.manifest import (
    Manifest,
)
from edgegen.bundle.write import reserve, write_bundle
from edgegen.cache import Cache
from edgegen.errors import EdgegenError, GateError
from edgegen.graph.tiles import Tiling, cut_tiles
from edgegen.heap import keep_freed_memory
from edgegen.report.summary import summarise
from edgegen.rewrite.pipeline import Pipeline, pipeline_of
from edgegen.students.archive import available_memory
from edgegen.students.student import Student
from edgegen.verify import gates
from edgegen.verify.outcome import Outcome, ParityReport
from edgegen.verify.trajectory import Reference, Sample, Signature


@dataclass(frozen=True)
class Built:
    """One target's outcome: `path` is the bundle, or `<output>.failed` when a stage or a gate failed."""

    recipe: Recipe
    path: Path
    manifest: Manifest
    reports: tuple[ParityReport, ...]
    failures: tuple[LowerFailure, ...]
    rewrites: Rewrites

    @property
    def passed(self) -> bool:
        """Whether nothing failed; artifacts that this host cannot execute are told apart in `reports`."""
        return not self.failures and not any(report.failed for report in self.reports)

    def summary(self, *, time_passes: bool = False) -> dict[str, object]:
        """For `--json`: where it is, and each backend's worst numbers."""
        return {
            "target": self.recipe.target,
            "path": str(self.path),
            **({} if self.recipe.level is None else {"level": self.recipe.level.model_dump(mode="json")}),
            "backends": {report.backend: summarise(self.manifest, report) for report in self.reports},
            **({"rewrites": self.rewrites} if time_passes else {}),
        }


@dataclass
class _Shared:
    """What every target of one build command uses: the reference is drawn once."""

    student: Student
    cache: Cache
    progress: Progress
    dump_ir: Path | None = None
    shrink: Path | None = None
    clock: Clock = field(default_factory=Clock)
    graphs: Graphs = field(default_factory=Graphs)
    references: dict[tuple[int | None, str], Reference] = field(default_factory=dict)

    def signatures(self, recipe: Recipe) -> dict[str, Signature]:
        """What each component takes and gives once the canonical passes ran: the same for every backend."""
        return {
            name: self.graphs.canonical(part, pipeline_of(recipe.canonical[name])).signature
            for name, part in self.student.components.items()
        }

    def reference(self, recipe: Recipe) -> Reference:
        key = (recipe.steps, repr(recipe.canonical))
        if key not in self.references:
            self.progress.stage("capture, reference in torch", 2)
            with self.clock.span("capture"):
                signatures = self.signatures(recipe)
            self.progress.advance()
            counts = step_counts(self.student, recipe.steps)
            with self.clock.span("reference in torch"):
                self.references[key] = remembered_reference(self.student, counts, signatures, self.cache)
            self.progress.advance()
        return self.references[key]


def step_counts(student: Student, steps: int | None) -> tuple[int, ...] | None:
    """Every step count of the student, the one that was asked for first; None for a student without a sampler."""
    sampler = student.config.sampler
    if sampler is None or steps is None:
        return None
    return (steps, *(count for count in sorted(sampler.times) if count != steps))


def build_all(
    student: Student,
    recipes: Sequence[Recipe],
    cache: Cache,
    progress: Progress,
    *,
    dump_ir: Path | None = None,
    shrink: Path | None = None,
) -> list[Built]:
    """Build one bundle a recipe. A recipe that fails does not stop the others; see `raise_for_failures`."""
    keep_freed_memory()
    shared = _Shared(student, cache, progress, dump_ir, shrink)
    return [build(shared, recipe) for recipe in recipes]


def raise_for_failures(built: Sequence[Built]) -> None:
    """EdgegenError for what could not be lowered, else GateError with the table of gates that were not met."""
    failures = [(result, failure) for result in built for failure in result.failures]
    if failures:
        refused = all(isinstance(failure.error, GateError) for _, failure in failures)
        what = "would be cut into too many pieces" if refused else "could not be lowered"
        lines = [f"{len(failures)} of the components {what}"]
        lines += [f"  {result.recipe.target}, {f.job.backend}: {f.error.message}" for result, f in failures]
        where = " and ".join(sorted({str(result.path) for result, _ in failures}))
        kind = GateError if refused else EdgegenError
        raise kind("\n".join(lines), hint=f"what was made, with logs, is in {where}")
    try:
        gates.require([report for result in built for report in result.reports])
    except GateError as error:
        failed = " and ".join(f"`{result.path}`" for result in built if not result.passed)
        raise GateError(error.message, hint=f"look at the pictures and tables in report.html of {failed}") from error


def _moved(failures: Sequence[LowerFailure], logs: Path, failed: Path) -> tuple[LowerFailure, ...]:
    """`failures` that name their logs where a reader finds them: the folder they were written to does not stay."""
    stays = str(failed / "reports" / "logs")
    for failure in failures:
        failure.error.message = failure.error.message.replace(str(logs), stays)
        failure.error.hint = failure.error.hint and failure.error.hint.replace(str(logs), stays)
    return tuple(dataclasses.replace(one, log=failed / "reports" / "logs" / one.log.name) for one in failures)


def build(shared: _Shared, recipe: Recipe) -> Built:
    """Build one bundle; it appears at the recipe's output only when every stage and gate was met."""
    student, progress = shared.student, shared.progress
    with reserve(recipe.output) as writer, tempfile.TemporaryDirectory(prefix="edgegen-build-") as folder:
        work = Path(folder)
        canonical = {name: pipeline_of(recipe.canonical[name]) for name in recipe.components}
        _require_room(shared, recipe, canonical)
        truth = shared.reference(recipe)
        realised = realise(recipe)
        if realised is not None:
            progress.stage(f"{recipe.target}: what the plan computes", 1)
            truth = with_plan(truth, realised, student, recipe, shared.graphs)
            progress.advance()
        with shared.clock.span("memory"):
            memory = decide(student, recipe, shared.graphs, canonical, truth)
        _tell(progress, memory)
        jobs = [
            LowerJob(
                memory.components[name],
                backend.name,
                recipe.precision(backend, name),
                backend.lowering_options,
                canonical[name],
                pipeline_of(backend.passes),
                recipe.max_pieces,
                _tiles_of(truth.one_picture()[name], memory.tilings.get(name)),
                None if realised is None else realised.plan.components.get(name),
                {} if realised is None else realised.repaired.get(name, {}),
                memory.parts(backend.name, name),
            )
            for backend in recipe.backends
            for name in recipe.components
        ]
        if shared.dump_ir is not None:
            _dump(shared.graphs, jobs, shared.dump_ir / recipe.target)
        progress.stage(f"{recipe.target}: lower", len(jobs))
        logs = work / "logs"
        with shared.clock.span("lower"):
            results = lower_all(jobs, shared.graphs, shared.cache, logs, lambda job: progress.advance(), shared.clock)
        for backend in recipe.backends:
            if backend.functions:
                progress.stage(f"{recipe.target}: join ({backend.name})", 1)
                results = join_components(backend, results, shared.cache, logs)
                progress.advance()
        lowered = [result for result in results if isinstance(result, LoweredComponent)]
        failures = tuple(result for result in results if isinstance(result, LowerFailure))
        with shared.clock.span("manifest"):
            manifest = manifest_of(student, recipe, lowered, truth, work, realised, memory)
        with shared.clock.span("verify"):
            verified = verify_all(
                progress, shared.graphs, shared.cache, shared.clock, recipe, manifest, lowered, truth, work
            )
        manifest = manifest.model_copy(update={"artifacts": tuple(executed(a, verified) for a in manifest.artifacts)})
        built = Built(
            recipe, recipe.output, manifest, tuple(v.parity for v in verified.values()), failures, rewrites_of(lowered)
        )
        if shared.shrink is not None and not built.passed:
            _shrink(shared, built, jobs, truth, shared.shrink / recipe.target)
        progress.stage(f"{recipe.target}: bundle", 1)
        contents = contents_of(
            built.manifest, built.rewrites, student, verified, lowered, truth, work, realised, shared.clock
        )
        if built.passed:
            with shared.clock.span("bundle"):
                writer.write(contents)
        else:
            failed = recipe.output.with_name(f"{recipe.output.name}.failed")
            built = dataclasses.replace(built, path=failed, failures=_moved(built.failures, logs, failed))
            write_bundle(failed, contents)
        progress.advance()
        return built


def _require_room(shared: _Shared, recipe: Recipe, canonical: dict[str, Pipeline]) -> None:
    """EdgegenError before anything takes long where this machine cannot convert what is asked for."""
    parts = foreseen_parts(shared.student, recipe, shared.graphs, canonical)

    def wanted(backend: BackendRecipe, name: str, count: int) -> LowerJob:
        part, shape = shared.student.components[name], pipeline_of(backend.passes)
        precision, options = recipe.precision(backend, name), backend.lowering_options
        return LowerJob(part, backend.name, precision, options, canonical[name], shape, parts=count)

    conversions = {
        backend.name: tuple(
            Conversion(backend.name, name, weight_bytes(shared.student.components[name]), count)
            for name, count in parts[backend.name].items()
            if recipe.plan is not None or not was_lowered(wanted(backend, name, count), shared.cache)
        )
        for backend in recipe.backends
    }
    require_room(conversions, available_memory())


def _tell(progress: Progress, memory: Memory) -> None:
    """What is not loaded as one piece, and why, once for backends that agree."""
    said: dict[tuple[str, ...], list[str]] = {}
    for backend, plan in memory.plans.items():
        if plan.load == "sequential" or any(one.parts > 1 for one in plan.components.values()) or memory.tilings:
            said.setdefault(plan.why, []).append(backend)
    for why, backends in said.items():
        progress.note(f"memory ({', '.join(backends)}): " + "; ".join(why))


def _tiles_of(samples: Sequence[Sample], tiling: Tiling | None) -> tuple[Sample, ...]:
    """Calls of a whole decoder as those of its tile; what it gives is not known there, and not asked for."""
    if tiling is None:
        return tuple(samples)
    return tuple(
        Sample(f"{sample.label}, tile {index}", {name: tile}, {})
        for sample in samples
        for name, value in sample.inputs.items()
        for index, (_, _, tile) in enumerate(cut_tiles(np.asarray(value, dtype=np.float32), tiling), start=1)
    )


def _shrink(shared: _Shared, built: Built, jobs: Sequence[LowerJob], truth: Reference, folder: Path) -> None:
    """For each component that a backend cannot lower or gets wrong, the smallest graph that shows it."""
    from edgegen.build.trial import Trial, shrink_parity

    wrong = {(f.job.backend, f.job.component.name) for f in built.failures if not isinstance(f.error, GateError)}
    bad = (Outcome.MISMATCH, Outcome.LOAD_FAIL, Outcome.RUN_FAIL)
    wrong |= {(r.backend, part.component) for r in built.reports for part in r.components if part.outcome in bad}
    for job in jobs:
        if (job.backend, job.component.name) not in wrong:
            continue
        name = f"`{job.component.name}` with {job.backend}"
        gate = built.recipe.gates.sqnr_db[job.precision]
        shared.progress.stage(f"{built.recipe.target}: shrink {job.component.name} ({job.backend})", 0)
        try:
            program = shared.graphs.shaped(job.component, job.canonical, job.shape).program
            given = {k: torch.from_numpy(np.array(v)) for k, v in truth.samples[job.component.name][0].inputs.items()}
            trial = Trial(job.backend, job.precision, job.options)
            script = shrink_parity(trial, program, given, gate, folder / job.backend / job.component.name)
            shared.progress.note(f"{name}: the smallest graph that shows it: `sh {shlex.quote(str(script))}`")
        except EdgegenError as error:
            shared.progress.note(f"{name}: could not be made smaller: {error.message}")


def _dump(graphs: Graphs, jobs: Sequence[LowerJob], folder: Path) -> None:
    """Every graph after every pass, whether or not its artifact is in the cache."""
    from edgegen.rewrite.observe import Dump

    for job in jobs:
        graphs.shaped(job.component, job.canonical, job.shape, (Dump(folder / job.backend / job.component.name),))
