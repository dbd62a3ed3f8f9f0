"""Verification in a child process: a runtime that crashes on an artifact takes only itself down.

The parent stores the reference as files; the child, which imports torch only where a runtime needs it, loads the
artifacts, holds them against the reference, measures them and writes what it found. A child that dies becomes a
RUN_FAIL for every component of its backend.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from edgegen.bundle.manifest import ComponentFixture, ComponentIO, Fixture, Gates, Manifest, PlanBound, SamplerTable
from edgegen.child import child_main, leave, run_child
from edgegen.errors import EdgegenError
from edgegen.graph.tiles import Tiling
from edgegen.heap import keep_freed_memory
from edgegen.lower.backend import Delegation, HeldTo, get_backend
from edgegen.lower.chain import SUFFIX
from edgegen.lower.requirements import missing_modules
from edgegen.lower.stand_in import Evaluated, Sums, executed_by
from edgegen.profile.host import AlreadyTimed, ProfileReport, profile
from edgegen.students.config import LatentConfig
from edgegen.verify.fixtures import restore
from edgegen.verify.gates import check
from edgegen.verify.outcome import ComponentParity, Outcome, ParityReport, Unavailable
from edgegen.verify.parity import compiled_run, load_executables, verify
from edgegen.verify.second_opinion import with_second_opinions
from edgegen.verify.trajectory import Picture, Reference, Trajectory

PREDICTED = "float16_arithmetic_db"
"""Key of an artifact's details."""
SECONDS = 2.0
"""For measuring one component; what was executed for longer than that while it was verified is not called again."""


class StoredReference(BaseModel):
    """Where a reference lies as files, and what it takes to read it back; `root` is a bundle or a folder like one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: Path
    components: dict[str, ComponentIO]
    fixtures: tuple[Fixture, ...]
    component_fixtures: tuple[ComponentFixture, ...] = ()
    sampler: SamplerTable | None = None
    latent: LatentConfig | None = None
    planned: dict[str, tuple[dict[str, str], ...]] = {}
    bounds: dict[str, PlanBound] = {}
    conditions: dict[str, float] = {}

    @classmethod
    def of(cls, manifest: Manifest, root: Path) -> StoredReference:
        """What `manifest` says of the files below `root`."""
        return cls(
            root=root,
            components=manifest.components,
            fixtures=manifest.fixtures,
            component_fixtures=manifest.component_fixtures,
            sampler=manifest.sampler,
            latent=manifest.latent,
            planned=manifest.planned,
            bounds={} if manifest.plan is None else manifest.plan.bounds,
            conditions=manifest.conditions,
        )

    def restored(self) -> Reference:
        """The reference itself. EdgegenError names a file that is not the array it should be."""
        return restore(
            self.root,
            self.components,
            self.fixtures,
            self.component_fixtures,
            self.sampler,
            self.latent,
            self.planned,
            self.bounds,
            self.conditions,
        )


class VerifyJob(BaseModel):
    """One backend's artifacts, to be held against one stored reference."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str
    precision: HeldTo
    artifacts: dict[str, Path]
    delegations: dict[str, Delegation]
    predicted_db: dict[str, float] = {}
    """Component -> what float16 arithmetic, emulated on the graph that was lowered, leaves of its signal."""
    accumulate: Sums = "fp32"
    """"fp16": an evaluator's numbers with float16 sums are measured beside the ones that the gates are about."""
    reference: StoredReference
    gates: Gates
    tilings: dict[str, Tiling] = {}
    """Components whose artifact computes one tile."""
    pictures: Path
    """Folder for the pictures that the compiled loop draws: `<index of the trajectory>.png`."""
    measure: bool = True


def predicted_db(details: Mapping[str, str]) -> float | None:
    """What was predicted for an artifact when it was lowered, from its `details`; None where nothing was."""
    try:
        value = float(details.get(PREDICTED, "nan"))
    except ValueError:  # a manifest may come from anywhere
        return None
    return value if math.isfinite(value) else None


class Verified(BaseModel):
    """What the child found; `profile` is None where nothing could be measured."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    parity: ParityReport
    profile: ProfileReport | None = None


def verify_in_child(job: VerifyJob, log: Path) -> Verified:
    """Execute, compare and measure one backend's artifacts; a crash of the runtime becomes a failed report."""
    try:
        return run_child("edgegen.verify.worker", job, Verified, log, f"verification of backend `{job.backend}`")
    except EdgegenError as error:
        return _all_failed(job, Outcome.RUN_FAIL, error.message)


def not_executable(job: VerifyJob) -> str | None:
    """Why the artifacts of `job` cannot run on this host, or None when they can."""
    backend = get_backend(job.backend)
    reason = backend.not_executed_here()
    if reason is None and (missing := missing_modules(backend, "run")):
        reason = f"{', '.join(missing)} not installed here (`pip install 'edgegen[{backend.extra}]'`)"
    return reason


def unexecuted(job: VerifyJob, reason: str) -> Verified:
    """The report of artifacts that this host cannot run: no gate failed, and none passed."""
    return _all_failed(job, Outcome.NOT_EXECUTED, reason)


def _all_failed(job: VerifyJob, outcome: Outcome, reason: str) -> Verified:
    parts = tuple(
        ComponentParity(component=name, outcome=outcome, reason=reason, delegation=job.delegations.get(name))
        if name in job.artifacts
        else ComponentParity(component=name, outcome=Outcome.LOWER_FAIL, reason="no artifact was made")
        for name in job.reference.components
    )
    failed = check(job.gates, job.precision, parts)
    report = ParityReport(
        backend=job.backend,
        precision=job.precision,
        executed_by=executed_by(get_backend(job.backend)) if outcome is not Outcome.NOT_EXECUTED else None,
        status="failed" if failed else "not_executed",
        components=parts,
        gates=job.gates,
        failed=failed,
    )
    return Verified(parity=report)


def work(job: VerifyJob) -> Verified:
    """The child's whole task."""
    from PIL import Image

    keep_freed_memory()
    stored = job.reference
    reference = stored.restored()
    backend = get_backend(job.backend)
    executables = load_executables(backend, job.artifacts, reference.signatures, job.tilings)
    job.pictures.mkdir(parents=True, exist_ok=True)
    drawn: list[Trajectory] = []
    seconds: list[float] = []

    def keep(one: Trajectory, picture: Picture) -> None:
        drawn.append(one)
        index = next(i for i, known in enumerate(reference.trajectories) if known is one)
        Image.fromarray(picture).save(job.pictures / f"{index:02d}.png")

    counted = len(reference.trajectories[0].steps) if reference.trajectories else 0
    parity = verify(
        reference,
        executables,
        job.precision,
        job.gates,
        backend=job.backend,
        executed_by=executed_by(backend),
        delegations=job.delegations,
        # Who else rounds to float16 where is not known well enough to be held to a prediction.
        predicted_db=job.predicted_db if isinstance(backend, Evaluated) else {},
        on_picture=keep,
        on_run=lambda one, taken: seconds.append(taken) if len(one.steps) == counted else None,
    )
    running = {name: one for name, one in executables.items() if not isinstance(one, Unavailable)}
    whole = {name: path for name, path in job.artifacts.items() if name not in job.tilings and path.suffix != SUFFIX}
    parity = with_second_opinions(parity, backend, whole, running, reference, job.accumulate)
    measured = None
    if job.measure and len(running) == len(job.artifacts) and len(drawn) == len(reference.trajectories):
        first = reference.trajectories[0] if reference.trajectories else None
        measured = profile(
            backend,
            job.artifacts,
            reference.signatures,
            reference.one_picture(),
            seconds_per_component=SECONDS,
            tilings=job.tilings,
            picture=None if first is None else lambda loaded: compiled_run(reference, first, loaded),
            picture_steps=None if first is None else len(first.steps),
            already=AlreadyTimed(running, tuple(seconds)),
        )
    for one in running.values():
        one.close()
    return Verified(parity=parity, profile=measured)


if __name__ == "__main__":
    leave(child_main(sys.argv[1], VerifyJob, work))
