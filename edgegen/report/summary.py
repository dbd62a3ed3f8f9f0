"""The few numbers of a build that fit a terminal: one line a backend. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgegen.bundle.manifest import Manifest, stored_bytes
from edgegen.report.html import human_size
from edgegen.verify.gates import decibels
from edgegen.verify.outcome import ParityReport


def summarise(manifest: Manifest, report: ParityReport) -> dict[str, object]:
    """One backend's worst numbers as plain JSON values; None where nothing was measured, text for infinities."""
    artifacts = [one for one in manifest.artifacts if one.backend == report.backend]
    known = [one.delegation for one in artifacts if one.delegation.known]
    worst = report.worst_sensitivity
    return {
        "precision": report.precision,
        "executed_by": report.executed_by,
        "status": report.status,
        "sqnr_db": _number(report.worst_sqnr_db),
        "picture_psnr_db": _number(report.worst_psnr_db),
        "sensitivity_ratio": None if worst is None else worst.ratio,
        "delegated_ops": sum(d.delegated_ops or 0 for d in known) if known else None,
        "total_ops": sum(d.total_ops or 0 for d in known) if known else None,
        "pieces": sum(d.pieces or 0 for d in known) if known else None,
        "bytes": stored_bytes(artifacts),
        "also_measured": {
            part.component: {one.what: _number(one.sqnr_db) for one in part.also}
            for part in report.components
            if part.also
        },
        "reason": next((part.reason for part in report.components if part.reason), None),
    }


def summary_table(manifest: Manifest, reports: Sequence[ParityReport]) -> str:
    """A line a backend: what ran, how close it came, how much the delegate takes, how large it is."""
    head = ("backend", "", "status", "SQNR", "picture", "sensitivity", "delegated", "size")
    rows = [head]
    reasons = []
    for report in reports:
        said = summarise(manifest, report)
        ratio = said["sensitivity_ratio"]
        delegated = "not known here" if said["pieces"] is None else _delegated(said)
        rows.append(
            (
                report.backend,
                report.precision,
                report.status.replace("_", " "),
                decibels(report.worst_sqnr_db),
                decibels(report.worst_psnr_db),
                f"{ratio:.4f}" if isinstance(ratio, float) else "not measured",
                delegated,
                human_size(int(str(said["bytes"]))),
            )
        )
        if report.executed_by is not None:
            reasons.append(f"{report.backend} was executed by {report.executed_by}; no latency was measured")
        for part in report.components:
            reasons += [
                f"{report.backend} {part.component}: {one.what}"
                + (f": {decibels(one.sqnr_db)}" if one.sqnr_db is not None else "")
                for one in part.also
            ]
        if report.status == "not_executed" and said["reason"]:
            reasons.append(f"{report.backend} was not executed: {said['reason']}")
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{manifest.name} for {manifest.target}", *lines, *reasons])


def _delegated(said: dict[str, object]) -> str:
    return (
        f"{said['delegated_ops']}/{said['total_ops']} ops, {said['pieces']} piece{'' if said['pieces'] == 1 else 's'}"
    )


def _number(value: float | None) -> float | str | None:
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
