"""`build`: lower, verify, profile and bundle one student for one target after another, sharing what they share."""

from __future__ import annotations

import dataclasses
import platform
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

import edgegen
from edgegen.build.graphs import Graphs
from edgegen.build.joining import join_components
from edgegen.build.lowering import LoweredComponent, LowerFailure, LowerJob, lower_all, rewritten, tool_versions
from edgegen.build.planned import Realised, realise, with_plan
from edgegen.build.recipe import Recipe
from edgegen.bundle.manifest import (
    Artifact,
    ComponentIO,
    Manifest,
    NoiseSpec,
    SamplerTable,
)
from edgegen.bundle.write import BundleContents, reserve, write_bundle
from edgegen.cache import Cache
from edgegen.errors import EdgegenError, GateError
from edgegen.lower.backend import get_backend
from edgegen.report.html import PictureRow, render
from edgegen.report.summary import summarise
from edgegen.rewrite.pipeline import Pipeline
from edgegen.rewrite.registry import parse
from edgegen.students.student import Student
from edgegen.verify import gates
from edgegen.verify.fixtures import store, store_planned
from edgegen.verify.outcome import ComponentParity, Outcome, ParityReport
from edgegen.verify.reference import reference
from edgegen.verify.trajectory import Picture, Reference, Signature
from edgegen.verify.worker import (
    StoredReference,
    Verified,
    VerifyJob,
    not_executable,
    predicted_db,
    unexecuted,
    verify_in_child,
)


class Progress(Protocol):
    """Where a build says what it is doing; `edgegen.cli.console` has the one that people see."""

    def stage(self, name: str, total: int) -> None: ...

    def advance(self) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Built:
    """One target's outcome: `path` is the bundle, or `<output>.failed` when a stage or a gate failed."""

    recipe: Recipe
    path: Path
    manifest: Manifest
    reports: tuple[ParityReport, ...]
    failures: tuple[LowerFailure, ...]
    rewrites: dict[str, dict[str, dict[str, Any]]]
    """Backend -> component -> `passes`, what each did, and `hazards` of float16, as JSON."""

    @property
    def passed(self) -> bool:
        """Whether nothing failed; artifacts that this host cannot execute are told apart in `reports`."""
        return not self.failures and not any(report.failed for report in self.reports)

    def summary(self, *, time_passes: bool = False) -> dict[str, object]:
        """For `--json`: where it is, and each backend's worst numbers."""
        return {
            "target": self.recipe.target,
            "path": str(self.path),
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
    graphs: Graphs = field(default_factory=Graphs)
    references: dict[tuple[int | None, str], Reference] = field(default_factory=dict)

    def signatures(self, recipe: Recipe) -> dict[str, Signature]:
        """What each component takes and gives once the canonical passes ran: the same for every backend."""
        return {
            name: self.graphs.canonical(part, _pipeline(recipe.canonical[name])).signature
            for name, part in self.student.components.items()
        }

    def reference(self, recipe: Recipe) -> Reference:
        key = (recipe.steps, repr(recipe.canonical))
        if key not in self.references:
            self.progress.stage("capture, reference in torch", 2)
            signatures = self.signatures(recipe)
            self.progress.advance()
            counts = step_counts(self.student, recipe.steps)
            self.references[key] = reference(self.student, step_counts=counts, signatures=signatures)
            self.progress.advance()
        return self.references[key]


def _pipeline(specs: Sequence[str]) -> Pipeline:
    return Pipeline(parse(", ".join(specs)))


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


def build(shared: _Shared, recipe: Recipe) -> Built:
    """Build one bundle; it appears at the recipe's output only when every stage and gate was met."""
    student, progress = shared.student, shared.progress
    with reserve(recipe.output) as writer, tempfile.TemporaryDirectory(prefix="edgegen-build-") as folder:
        work = Path(folder)
        truth = shared.reference(recipe)
        realised = realise(recipe)
        if realised is not None:
            progress.stage(f"{recipe.target}: what the plan computes", 1)
            truth = with_plan(truth, realised, student, recipe, shared.graphs)
            progress.advance()
        jobs = [
            LowerJob(
                student.components[name],
                backend.name,
                recipe.precision(backend, name),
                backend.lowering_options,
                _pipeline(recipe.canonical[name]),
                _pipeline(backend.passes),
                recipe.max_pieces,
                truth.one_picture()[name],
                None if realised is None else realised.plan.components.get(name),
                {} if realised is None else realised.repaired.get(name, {}),
            )
            for backend in recipe.backends
            for name in recipe.components
        ]
        if shared.dump_ir is not None:
            _dump(shared.graphs, jobs, shared.dump_ir / recipe.target)
        progress.stage(f"{recipe.target}: lower", len(jobs))
        logs = work / "logs"
        results = lower_all(jobs, student, shared.graphs, shared.cache, logs, lambda job: progress.advance())
        for backend in recipe.backends:
            if backend.functions:
                progress.stage(f"{recipe.target}: join ({backend.name})", 1)
                results = join_components(backend, results, shared.cache, logs)
                progress.advance()
        lowered = [result for result in results if isinstance(result, LoweredComponent)]
        failures = tuple(result for result in results if isinstance(result, LowerFailure))
        manifest = _manifest(student, recipe, lowered, truth, work, realised)
        verified = _verify(shared, recipe, manifest, lowered, truth, work)
        manifest = manifest.model_copy(update={"artifacts": tuple(_executed(a, verified) for a in manifest.artifacts)})
        built = Built(
            recipe, recipe.output, manifest, tuple(v.parity for v in verified.values()), failures, _rewrites(lowered)
        )
        if shared.shrink is not None and not built.passed:
            _shrink(shared, built, jobs, truth, shared.shrink / recipe.target)
        progress.stage(f"{recipe.target}: bundle", 1)
        contents = _contents(built, student, verified, lowered, truth, work, realised)
        if built.passed:
            writer.write(contents)
        else:
            failed = recipe.output.with_name(f"{recipe.output.name}.failed")
            built = dataclasses.replace(built, path=failed)
            write_bundle(failed, contents)
        progress.advance()
        return built


def _manifest(
    student: Student,
    recipe: Recipe,
    lowered: Sequence[LoweredComponent],
    truth: Reference,
    work: Path,
    realised: Realised | None,
) -> Manifest:
    config = student.config
    versions = {"edgegen": edgegen.__version__, "python": platform.python_version(), "numpy": np.__version__}
    for backend in recipe.backends:
        versions |= tool_versions(get_backend(backend.name))
    fixtures, component_fixtures = store(truth, work)
    table = None
    if config.sampler is not None:
        assert recipe.steps is not None
        table = SamplerTable(
            config=config.sampler,
            default_steps=recipe.steps,
            tables={count: config.sampler.table(count) for count in sorted(config.sampler.times)},
            timesteps=config.sampler.timesteps(),
        )
        if realised is not None:
            table = realised.sampler(table)
    return Manifest(
        name=config.name,
        task=config.task,
        student_sha256=student.fingerprint,
        target=recipe.target,
        target_sha256=recipe.target_sha256,
        options=recipe.options(),
        tool_versions=dict(sorted(versions.items())),
        components={name: ComponentIO(inputs=io.inputs, outputs=io.outputs) for name, io in truth.signatures.items()},
        artifacts=tuple(_artifact(one, realised) for one in lowered),
        backends=tuple(backend.name for backend in recipe.backends),
        declined=recipe.declined,
        sampler=table,
        latent=config.latent,
        noise=NoiseSpec() if config.sampler is not None else None,
        tokenizer="tokenizer/tokenizer.json" if student.tokenizer_json is not None else None,
        example_prompts=config.example_prompts,
        fixtures=fixtures,
        component_fixtures=component_fixtures,
        plan=None if realised is None else realised.record(truth),
        planned=store_planned(truth, work),
        gates=recipe.gates,
        files={},
    )


def _artifact(one: LoweredComponent, realised: Realised | None) -> Artifact:
    files = [one.path] if one.path.is_file() else [path for path in one.path.rglob("*") if path.is_file()]
    return Artifact(
        backend=one.job.backend,
        component=one.job.component.name,
        path=f"components/{one.job.backend}/{one.path.relative_to(one.folder).as_posix()}",
        function=one.function,
        precision=one.job.precision,
        compressed={} if realised is None else realised.compressed(one.job.component.name),
        bytes=sum(path.stat().st_size for path in files),
        delegation=one.lowered.delegation,
        details=one.lowered.details,
        notes=one.lowered.notes,
        passes=tuple(record.spec for record in one.records),
        executed=False,
    )


def _verify(
    shared: _Shared,
    recipe: Recipe,
    manifest: Manifest,
    lowered: Sequence[LoweredComponent],
    truth: Reference,
    work: Path,
) -> dict[str, Verified]:
    """Every backend's artifacts, executed where this host can; a backend with a component missing is not drawn with."""
    stored = StoredReference.of(manifest, work)
    shared.progress.stage(f"{recipe.target}: verify", len(recipe.backends))
    verified = {}
    for backend in recipe.backends:
        mine = {one.job.component.name: one for one in lowered if one.job.backend == backend.name}
        job = VerifyJob(
            backend=backend.name,
            precision=backend.precision,
            artifacts={name: one.loadable for name, one in mine.items()},
            delegations={name: one.lowered.delegation for name, one in mine.items()},
            predicted_db={
                name: db for name, one in mine.items() if (db := predicted_db(one.lowered.details)) is not None
            },
            reference=stored,
            gates=recipe.gates,
            pictures=work / "pictures" / backend.name,
        )
        reason = not_executable(job)
        if reason is not None:
            verified[backend.name] = unexecuted(job, reason)
            shared.progress.note(f"{backend.name}: not executed here: {reason}")
        else:
            found = verify_in_child(job, work / "logs" / f"{backend.name}-verify.log")
            blamed = _with_blame(found.parity, mine, shared.graphs, truth)
            verified[backend.name] = Verified(parity=blamed, profile=found.profile)
        shared.progress.advance()
    return verified


def _with_blame(
    report: ParityReport, lowered: dict[str, LoweredComponent], graphs: Graphs, truth: Reference
) -> ParityReport:
    """Ask each component that disagrees where it does; torch is at hand here, in the child it is not."""
    from edgegen.verify.blame import blame
    from edgegen.verify.rebuild import rebuilt

    def ask(part: ComponentParity) -> ComponentParity:
        if part.outcome is not Outcome.MISMATCH:
            return part
        one = lowered[part.component]
        said = blame(
            get_backend(report.backend),
            part.component,
            one.loadable,
            rewritten(one.job, graphs).program
            if one.job.planned
            else rebuilt(graphs.captured(one.job.component), [record.spec for record in one.records]),
            [spec.name for spec in truth.signatures[part.component].inputs],
            truth.expected(part.component),
            report.gates.sqnr_db[report.precision],
            worst_at=min(part.outputs, key=lambda found: found.sqnr_db).worst_at if part.outputs else None,
        )
        return part.model_copy(update={"blame": said})

    return report.model_copy(update={"components": tuple(ask(part) for part in report.components)})


def _executed(artifact: Artifact, verified: Mapping[str, Verified]) -> Artifact:
    parts = verified[artifact.backend].parity.components
    part = next(part for part in parts if part.component == artifact.component)
    ran = part.sqnr_db is not None
    by = verified[artifact.backend].parity.executed_by if ran else None
    why = None if ran else part.reason
    return artifact.model_copy(update={"executed": ran, "executed_by": by, "not_executed_because": why})


def _pictures(truth: Reference, backends: Sequence[str], work: Path) -> list[PictureRow]:
    """Reference and compiled pictures side by side, prompt by prompt."""

    def load(path: Path) -> Picture:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))

    rows: list[PictureRow] = []
    for index, one in enumerate(truth.trajectories):
        drawn = {name: work / "pictures" / name / f"{index:02d}.png" for name in backends}
        compiled = {name: load(path) for name, path in drawn.items() if path.exists()}
        label = f"{one.prompt} ({len(one.steps)} {'step' if len(one.steps) == 1 else 'steps'}, seed {one.seed})"
        rows.append((label, one.picture, compiled))
    return rows


def _contents(
    built: Built,
    student: Student,
    verified: Mapping[str, Verified],
    lowered: Sequence[LoweredComponent],
    truth: Reference,
    work: Path,
    realised: Realised | None,
) -> BundleContents:
    """Everything of the bundle, with the reports that say how it came about."""
    files: dict[str, Path | bytes | str] = {"fixtures": work / "fixtures"}
    if realised is not None:
        files |= realised.files(work)
    if student.tokenizer_json is not None:
        files["tokenizer/tokenizer.json"] = student.tokenizer_json
    logs = {f"logs/{path.name}": path for path in sorted((work / "logs").glob("*.log"))}
    logs |= {f"logs/{one.job.backend}-{one.job.component.name}.log": one.log for one in lowered}
    logs |= {f"logs/{one.job.backend}-join.log": one.joined.log for one in lowered if one.joined is not None}
    profiles = {name: found.profile for name, found in verified.items() if found.profile is not None}
    parity = {name: found.parity for name, found in verified.items()}
    rows = _pictures(truth, list(verified), work)
    page = render(built.manifest, parity, profiles, rows, sorted(logs), built.rewrites)
    return BundleContents(
        manifest=built.manifest,
        artifacts=list(dict.fromkeys((one.job.backend, one.folder) for one in lowered)),
        files=files,
        reports={**logs, "parity.json": parity, "profile.json": profiles, "rewrites.json": built.rewrites},
        report_html=page,
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


def _rewrites(lowered: Sequence[LoweredComponent]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for one in lowered:
        found.setdefault(one.job.backend, {})[one.job.component.name] = {
            "passes": [record.model_dump(mode="json") for record in one.records],
            "hazards": [hazard.model_dump(mode="json") for hazard in one.hazards],
            "forecast": one.forecast.model_dump(mode="json"),
        }
    return found
