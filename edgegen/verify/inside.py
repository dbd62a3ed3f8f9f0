"""Looking inside the artifacts of a finished bundle: `edgegen verify --blame` and `--dump`. Imports torch."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.export import ExportedProgram

from edgegen.bundle.manifest import Artifact
from edgegen.bundle.open import Bundle
from edgegen.errors import UsageError
from edgegen.graph.capture import capture
from edgegen.lower.backend import get_backend
from edgegen.precision.file import load_plan
from edgegen.precision.plan import ComponentPlan
from edgegen.precision.repair.tensors import Tensors, by_component, load
from edgegen.students.student import Student
from edgegen.verify.blame import blame
from edgegen.verify.bundle import stored_reference
from edgegen.verify.outcome import ComponentParity, Outcome, ParityReport
from edgegen.verify.rebuild import rebuilt, rebuilt_as_planned


def prepare_dump(folder: Path) -> None:
    """UsageError when `folder` is not a new or empty one: values of two runs must not mix."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"`{folder}` is not an empty folder", hint="name a folder that does not exist yet")


def load_model(path: Path, bundle: Bundle) -> Student:
    """The student at `path`, of several sizes the one that `bundle` has; UsageError when `bundle` was built from
    another."""
    from edgegen.prune.elastic import at_level
    from edgegen.students.load import load

    student, level = load(path), bundle.manifest.level
    if level is not None and level.name in student.config.levels:
        student = at_level(student, level.name)
    if student.fingerprint != bundle.manifest.student_sha256:
        raise UsageError(
            f"`{path}` is not the student that `{bundle.root}` was built from",
            hint=f"see what it was with `edgegen inspect {shlex.quote(str(bundle.root))}`",
        )
    return student


def look_inside(
    bundle: Bundle,
    reports: Sequence[ParityReport],
    student: Student | None,
    dump: Path | None,
    told: Callable[[str], None] = lambda text: None,
) -> list[ParityReport]:
    """The reports with `blame` said of every component that was executed, whether it failed or not.

    `student` makes the graphs that values are compared with, those of the bundle's plan where it has one; without it an
    artifact is held against itself. Values go
    to `dump`/<backend>/<component>. `told` hears which component is looked at.
    """
    reference = stored_reference(bundle).restored()
    graphs = None if student is None else _Lowered(bundle, student)

    def ask(report: ParityReport, part: ComponentParity) -> ComponentParity:
        if part.outcome not in (Outcome.SUCCESS, Outcome.UNDELEGATED, Outcome.MISMATCH):
            return part
        if part.component in bundle.manifest.tilings or bundle.artifacts(report.backend)[part.component].parts > 1:
            return part.model_copy(update={"blame": "not looked into: it is in parts or tiles"})
        told(f"{report.backend} {part.component}")
        artifact = bundle.artifacts(report.backend)[part.component]
        worst = min(part.outputs, key=lambda one: one.sqnr_db, default=None)
        said = blame(
            get_backend(report.backend),
            part.component,
            bundle.loadable(artifact).resolve(),
            None if graphs is None else graphs.of(artifact),
            [spec.name for spec in reference.signatures[part.component].inputs],
            reference.expected(part.component),
            report.gates.sqnr_db[report.precision],
            worst_at=None if worst is None else worst.worst_at,
            dump=None if dump is None else dump / report.backend / part.component,
            planned=artifact.component in bundle.manifest.planned,
        )
        return part.model_copy(update={"blame": said})

    return [
        report.model_copy(update={"components": tuple(ask(report, part) for part in report.components)})
        for report in reports
    ]


class _Lowered:
    """The graphs that the artifacts of a bundle were lowered from; each component is traced once."""

    def __init__(self, bundle: Bundle, student: Student) -> None:
        self._student = student
        self._captured: dict[str, ExportedProgram] = {}
        self._record = bundle.manifest.plan
        self._plans: dict[str, ComponentPlan] = {}
        self._repaired: dict[str, Tensors] = {}
        if self._record is not None:
            plan = load_plan(bundle.path(self._record.path))
            self._plans = {name: part for name, part in plan.components.items() if part.compressed}
            if self._record.tensors is not None and plan.tensors_sha256 is not None:
                self._repaired = by_component(load(bundle.path(self._record.tensors), plan.tensors_sha256))

    def of(self, artifact: Artifact) -> ExportedProgram:
        """In float32, or as the plan computes it between its float32 values."""
        name = artifact.component
        if name not in self._captured:
            self._captured[name] = capture(self._student.components[name])
        if self._record is None or name not in self._plans:
            return rebuilt(self._captured[name], artifact.passes)
        return rebuilt_as_planned(
            self._captured[name],
            artifact.passes,
            self._record.canonical.get(name, ()),
            self._plans[name],
            self._repaired.get(name, {}),
        )
