"""What goes into a bundle beside its artifacts: fixtures, tokenizer, plan, logs and the reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgegen.build.clock import Clock
from edgegen.build.lowering import LoweredComponent
from edgegen.build.planned import Realised
from edgegen.bundle.manifest import Manifest
from edgegen.bundle.write import BundleContents
from edgegen.cache import recorded_files
from edgegen.report.html import PictureRow, render
from edgegen.students.student import Student
from edgegen.verify.trajectory import Picture, Reference
from edgegen.verify.worker import Verified

Rewrites = dict[str, dict[str, dict[str, Any]]]
"""Backend -> component -> `passes`, what each did, and `hazards` of float16, as JSON."""


def contents_of(
    manifest: Manifest,
    rewrites: Rewrites,
    student: Student,
    verified: Mapping[str, Verified],
    lowered: Sequence[LoweredComponent],
    truth: Reference,
    work: Path,
    realised: Realised | None,
    clock: Clock,
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
    page = render(manifest, parity, profiles, rows, sorted(logs), rewrites)
    return BundleContents(
        manifest=manifest,
        artifacts=list(dict.fromkeys((one.job.backend, one.folder) for one in lowered)),
        files=files,
        reports={
            **logs,
            "parity.json": parity,
            "profile.json": profiles,
            "rewrites.json": rewrites,
            "times.json": [span.model_dump() for span in clock.spans()],
        },
        report_html=page,
        linkable={path: sha for one in lowered for path, sha in recorded_files(one.entry).items()},
    )


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


def rewrites_of(lowered: Sequence[LoweredComponent]) -> Rewrites:
    """What each pass did, and what float16 would have broken, for the reports."""
    found: Rewrites = {}
    for one in lowered:
        found.setdefault(one.job.backend, {})[one.job.component.name] = {
            "passes": [record.model_dump(mode="json") for record in one.records],
            "hazards": [hazard.model_dump(mode="json") for hazard in one.hazards],
            "forecast": one.forecast.model_dump(mode="json"),
        }
    return found
