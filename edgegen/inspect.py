"""What is in a model, a bundle or a Core ML package, as data: parameters, MACs, ops, bytes, schedule, and what a target
would refuse."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from edgegen.errors import EdgegenError
from edgegen.graph.tensor_spec import TensorSpec
from edgegen.lower.backend import BACKENDS, Delegation, get_backend
from edgegen.lower.package_facts import PackageFacts, is_package, package_facts
from edgegen.lower.requirements import missing_modules
from edgegen.students.sampler import SamplerStep

if TYPE_CHECKING:
    from edgegen.graph.count import GraphCount
    from edgegen.students.source import Source
    from edgegen.students.student import Student
    from edgegen.targets import Target


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ComponentFacts(_Model):
    """One network as captured; `uncounted` are products of matrices that `macs` leaves out."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: int | None = None
    parameter_bytes: int | None = None
    macs: int | None = None
    ops: dict[str, int] | None = None
    macs_by_op: dict[str, int] | None = None
    uncounted: dict[str, int] = {}


class ArtifactFacts(_Model):
    """One artifact of a bundle."""

    backend: str
    component: str
    precision: str
    path: str
    function: str | None = None
    """Which function of the package at `path`, whose `bytes` are those of all its functions."""
    bytes: int
    delegation: Delegation
    executed: bool
    executed_by: str | None = None
    """Who executed it when it was built, in place of its runtime."""
    package: PackageFacts | None = None
    """What is in it, and what is known of it on the Neural Engine: Core ML packages, where coremltools is installed."""


class Refusal(_Model):
    """An op of a component that the target's delegate leaves out; `when` says if only in that case."""

    component: str
    op: str
    count: int
    when: str | None
    reason: str
    reference: str


class BackendFacts(_Model):
    """What one backend would refuse here: `missing` modules, the target's own refusal, and ops left out."""

    backend: str
    missing: tuple[str, ...]
    install: str | None
    denied: str | None = None
    precisions: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()


class Inspection(_Model):
    kind: Literal["model", "bundle"]
    name: str
    task: str
    sha256: str
    built_for: str | None = None
    """The target of a bundle; `target` is the one that was asked about."""
    target: str | None
    components: dict[str, ComponentFacts]
    notes: tuple[str, ...] = ()
    """What a reader must know of the checkpoint itself."""
    levels: tuple[str, ...] = ()
    """Sizes that the checkpoint holds; what is counted is the first, the largest."""
    conditions: dict[str, float] = {}
    """Scalars of the denoiser, with their defaults."""
    default_steps: int | None = None
    sampler: dict[int, tuple[SamplerStep, ...]] = {}
    artifacts: tuple[ArtifactFacts, ...] = ()
    backends: tuple[BackendFacts, ...] = ()
    declined: dict[str, str] = {}
    unavailable: tuple[str, ...] = ()
    """What cannot be had of a student without prompts, in words."""

    @property
    def counted(self) -> bool:
        """Whether there were graphs to count: a bundle has none."""
        return all(part.parameters is not None for part in self.components.values())


def inspect_path(path: Path, target_name: str | None = None, source: Source | None = None) -> Inspection | PackageFacts:
    """Inspect the bundle, model or `.mlpackage` at `path`; raises what opening and loading raise, UsageError for
    the target. `source` is for a model: what to do to it when it is opened."""
    from edgegen.bundle.open import MANIFEST
    from edgegen.errors import UsageError
    from edgegen.students.source import Source

    source = source or Source()
    if not path.exists():
        raise UsageError(
            f"`{path}` does not exist", hint="name a checkpoint, a diffusers folder, a bundle or a `.mlpackage`"
        )
    target = None
    if target_name is not None:
        from edgegen.targets import load_target

        target = load_target(target_name)
    finished = (path / MANIFEST).is_file()
    if (finished or is_package(path)) and source != Source():
        raise UsageError(f"`{path}` is compiled: nothing is merged or made there any more", hint="inspect the model")
    if finished:
        return inspect_bundle(path, target)
    if is_package(path):
        return package_facts(path)
    return inspect_student(source.open(path), target)


def inspect_student(student: Student, target: Target | None = None) -> Inspection:
    """Capture and count every component of `student`."""
    from edgegen.graph.capture import capture
    from edgegen.graph.count import count
    from edgegen.students.source import unavailable

    counts: dict[str, GraphCount] = {}
    core: dict[str, Mapping[str, int]] = {}
    for name, part in student.components.items():
        program = capture(part)
        counts[name] = count(program)
        if target is not None:
            # Targets name ops as runtimes see them, after decomposition to core ATen; the captured graph is above that.
            try:
                lowered = count(program.run_decompositions())
            except Exception as error:  # torch raises anything here
                raise EdgegenError(f"component `{name}` cannot be decomposed to core ATen: {error}") from error
            core[name] = {**lowered.ops, **counts[name].ops}
    sampler = student.config.sampler
    return Inspection(
        kind="model",
        name=student.config.name,
        task=student.config.task,
        sha256=student.fingerprint,
        target=target.name if target is not None else None,
        components={
            name: ComponentFacts(inputs=part.inputs, outputs=part.outputs, **counts[name].model_dump())
            for name, part in student.components.items()
        },
        notes=student.config.notes,
        levels=tuple(student.config.levels),
        conditions=student.config.conditions,
        default_steps=sampler.default_steps if sampler is not None else None,
        sampler={steps: sampler.table(steps) for steps in sorted(sampler.times)} if sampler is not None else {},
        backends=tuple(backend_facts(name, target, core) for name in BACKENDS),
        unavailable=unavailable(student),
    )


def inspect_bundle(path: Path, target: Target | None = None) -> Inspection:
    """What the manifest says, its files checked; Core ML packages are read as well. Nothing is captured, so parameters
    and MACs are not counted. Imports no torch unless there is a Core ML package."""
    from edgegen.bundle.open import open_bundle

    bundle = open_bundle(path)
    manifest = bundle.manifest
    readable = not missing_modules(get_backend("coreml"), "lower")
    sampler = manifest.sampler
    return Inspection(
        kind="bundle",
        name=manifest.name,
        task=manifest.task,
        sha256=manifest.student_sha256,
        built_for=manifest.target,
        target=target.name if target is not None else None,
        components={
            name: ComponentFacts(inputs=io.inputs, outputs=io.outputs) for name, io in manifest.components.items()
        },
        notes=manifest.notes,
        conditions=manifest.conditions,
        default_steps=sampler.default_steps if sampler is not None else None,
        sampler=dict(sorted(sampler.tables.items())) if sampler is not None else {},
        artifacts=tuple(
            ArtifactFacts(
                backend=one.backend,
                component=one.component,
                precision=one.precision,
                path=one.path,
                function=one.function,
                bytes=one.bytes,
                delegation=one.delegation,
                executed=one.executed,
                executed_by=one.executed_by,
                package=package_facts(bundle.path(one.path)) if readable and one.backend == "coreml" else None,
            )
            for one in manifest.artifacts
        ),
        backends=tuple(backend_facts(name, target, {}) for name in BACKENDS) if target is not None else (),
        declined=manifest.declined,
    )


def backend_facts(name: str, target: Target | None, ops: Mapping[str, Mapping[str, int]]) -> BackendFacts:
    """What backend `name` lacks on this machine, and what it would refuse of `ops` (component -> op -> count)."""
    backend = get_backend(name)
    missing = missing_modules(backend, "lower")
    install = f"pip install 'edgegen[{backend.extra}]'" if missing else None
    if target is None:
        return BackendFacts(backend=name, missing=missing, install=install, precisions=backend.precisions)
    if name not in target.backends:
        why = target.denied_backends.get(name, "its target file does not list it")
        return BackendFacts(backend=name, missing=missing, install=install, denied=why)
    spec = target.backend(name)
    refusals = []
    for denial in spec.denied_ops:
        for component, histogram in ops.items():
            if denial.op == "*":
                found = sum(histogram.values())
            else:
                # A denial may name an overload; ops are counted without.
                found = histogram.get(".".join(denial.op.split(".")[:2]), 0)
            if found:
                refusals.append(
                    Refusal(
                        component=component,
                        op=denial.op,
                        count=found,
                        when=denial.when,
                        reason=denial.reason,
                        reference=denial.reference,
                    )
                )
    precisions = tuple(p for p in spec.precisions if p in backend.precisions)
    return BackendFacts(backend=name, missing=missing, install=install, precisions=precisions, refusals=tuple(refusals))
