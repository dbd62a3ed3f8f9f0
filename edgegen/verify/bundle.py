"""Verify a finished bundle on this machine, from the reference that it carries. Imports no torch."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from edgegen.bundle.open import Bundle, open_bundle
from edgegen.errors import GateError, UsageError
from edgegen.lower.stand_in import Sums
from edgegen.verify import gates
from edgegen.verify.outcome import ParityReport
from edgegen.verify.worker import (
    StoredReference,
    VerifyJob,
    not_executable,
    predicted_db,
    unexecuted,
    verify_in_child,
)


def verify_bundle(
    path: Path,
    backend: str | None = None,
    *,
    require_full_delegation: bool = False,
    accumulate: Sums = "fp32",
) -> tuple[Bundle, list[ParityReport]]:
    """Check every hash, then execute each backend's artifacts in a child process.

    `accumulate` "fp16" also measures how artifacts do whose evaluator is asked to keep sums in float16. UsageError when
    `backend` is not in the bundle; the errors of `open_bundle`. What an artifact does wrong is in its report; see
    `raise_unless_met`.
    """
    bundle = open_bundle(path)
    names = bundle.backends()
    if backend is not None:
        if backend not in names:
            have = " or ".join(f"`--backend {name}`" for name in names)
            raise UsageError(f"bundle `{path}` has no `{backend}`", hint=f"use {have}" if have else None)
        names = (backend,)
    reports = []
    with tempfile.TemporaryDirectory(prefix="edgegen-verify-") as folder:
        for name in names:
            job = _job(bundle, name, Path(folder), require_full_delegation, accumulate)
            reason = not_executable(job)
            found = unexecuted(job, reason) if reason else verify_in_child(job, Path(folder) / f"{name}.log")
            reports.append(found.parity)
    return bundle, reports


def raise_unless_met(path: Path, reports: Sequence[ParityReport]) -> None:
    """GateError with the table when a gate was not met, or when nothing of the bundle could be executed here."""
    gates.require(reports)
    if not any(report.passed for report in reports):
        raise GateError(
            f"nothing of `{path}` was executed on this machine, so nothing is proven",
            hint="verify it on a machine that runs one of its backends, or build it with `--backend all`",
        )


def stored_reference(bundle: Bundle) -> StoredReference:
    """The reference that a bundle carries."""
    return StoredReference.of(bundle.manifest, bundle.root.resolve())


def _job(bundle: Bundle, backend: str, folder: Path, require_full_delegation: bool, accumulate: Sums) -> VerifyJob:
    manifest = bundle.manifest
    artifacts = bundle.artifacts(backend)
    thresholds = manifest.gates
    if require_full_delegation:
        thresholds = thresholds.model_copy(update={"require_full_delegation": True})
    return VerifyJob(
        backend=backend,
        precision=next(iter(artifacts.values())).precision if manifest.plan is None else "plan",
        artifacts={name: bundle.loadable(artifacts[name]).resolve() for name in manifest.components},
        delegations={name: one.delegation for name, one in artifacts.items()},
        predicted_db={name: db for name, one in artifacts.items() if (db := predicted_db(one.details)) is not None},
        accumulate=accumulate,
        tilings=manifest.tilings,
        reference=stored_reference(bundle),
        gates=thresholds,
        pictures=folder / backend,
        measure=False,
    )
