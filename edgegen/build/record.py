"""What a build says of itself: the manifest of its bundle."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import edgegen
from edgegen.build.lowering import LoweredComponent, tool_versions
from edgegen.build.memory import Memory
from edgegen.build.planned import Realised
from edgegen.build.recipe import Recipe
from edgegen.bundle.manifest import Artifact, ComponentIO, Manifest, NoiseSpec, SamplerTable
from edgegen.lower.backend import get_backend
from edgegen.students.student import Student
from edgegen.verify.fixtures import store, store_planned
from edgegen.verify.trajectory import Reference
from edgegen.verify.worker import Verified


def manifest_of(
    student: Student,
    recipe: Recipe,
    lowered: Sequence[LoweredComponent],
    truth: Reference,
    work: Path,
    realised: Realised | None,
    memory: Memory,
) -> Manifest:
    """The manifest of a build before anything of it was executed; the reference's fixtures are written to `work`."""
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
        conditions=config.conditions,
        frames_per_second=config.frames_per_second,
        notes=config.notes,
        example_prompts=config.example_prompts,
        level=recipe.level,
        memory=memory.plans,
        tilings=memory.tilings,
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
        parts=one.job.parts,
        precision=one.job.precision,
        compressed={} if realised is None else realised.compressed(one.job.component.name),
        bytes=sum(path.stat().st_size for path in files),
        delegation=one.lowered.delegation,
        details=one.lowered.details,
        notes=one.lowered.notes,
        passes=tuple(record.spec for record in one.records),
        executed=False,
    )


def executed(artifact: Artifact, verified: Mapping[str, Verified]) -> Artifact:
    """`artifact` with what verification found: whether it ran here, who ran it, or why it did not."""
    parts = verified[artifact.backend].parity.components
    part = next(part for part in parts if part.component == artifact.component)
    ran = part.sqnr_db is not None
    by = verified[artifact.backend].parity.executed_by if ran else None
    why = None if ran else part.reason
    return artifact.model_copy(update={"executed": ran, "executed_by": by, "not_executed_because": why})
