"""Holding what was lowered against the reference, a child process a backend."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from edgegen.build.clock import Clock
from edgegen.build.graphs import Graphs
from edgegen.build.lowering import LoweredComponent, rewritten
from edgegen.build.progress import Progress
from edgegen.build.recipe import Recipe
from edgegen.build.remembered import remembered_verification
from edgegen.bundle.manifest import Manifest
from edgegen.cache import Cache
from edgegen.lower.backend import get_backend
from edgegen.verify.outcome import ComponentParity, Outcome, ParityReport
from edgegen.verify.trajectory import Reference
from edgegen.verify.worker import (
    StoredReference,
    Verified,
    VerifyJob,
    not_executable,
    predicted_db,
    unexecuted,
    verify_in_child,
)


def verify_all(
    progress: Progress,
    graphs: Graphs,
    cache: Cache,
    clock: Clock,
    recipe: Recipe,
    manifest: Manifest,
    lowered: Sequence[LoweredComponent],
    truth: Reference,
    work: Path,
) -> dict[str, Verified]:
    """Every backend's artifacts, executed where this host can; a backend with a component missing is not drawn with."""
    stored = StoredReference.of(manifest, work)
    progress.stage(f"{recipe.target}: verify", len(recipe.backends))
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
            tilings=manifest.tilings,
            pictures=work / "pictures" / backend.name,
        )
        reason = not_executable(job)
        if reason is not None:
            verified[backend.name] = unexecuted(job, reason)
            progress.note(f"{backend.name}: not executed here: {reason}")
        else:
            log = work / "logs" / f"{backend.name}-verify.log"
            with clock.span(f"{backend.name}: verify"):
                found, before = remembered_verification(job, mine, cache, log, verify_in_child)
            if before:
                progress.note(f"{backend.name}: executed and measured before: the same artifacts, reference and host")
            blamed = _with_blame(found.parity, mine, graphs, truth, manifest.tilings)
            verified[backend.name] = Verified(parity=blamed, profile=found.profile)
        progress.advance()
    return verified


def _with_blame(
    report: ParityReport,
    lowered: dict[str, LoweredComponent],
    graphs: Graphs,
    truth: Reference,
    tiled: Collection[str],
) -> ParityReport:
    """Ask each component that disagrees where it does; torch is at hand here, in the child it is not."""
    from edgegen.verify.blame import blame
    from edgegen.verify.rebuild import rebuilt

    def ask(part: ComponentParity) -> ComponentParity:
        if part.outcome is not Outcome.MISMATCH:
            return part
        one = lowered[part.component]
        if one.job.parts > 1 or part.component in tiled:
            return part.model_copy(update={"blame": "not looked into: it is in parts or tiles"})
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
